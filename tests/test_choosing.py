"""deltalab-choose: goals, candidates, the prediction, the search, and one run from end to end."""

import subprocess
import sys

import pytest
import torch

from deltalab.choosing import command, search
from deltalab.choosing.candidates import candidates, label
from deltalab.choosing.goals import Goal, goal
from deltalab.choosing.prediction import Curves, Expected, measured
from deltalab.choosing.search import Measured

SAID = {"bits_per_weight": {"payload": 1.0, "metadata": 0.0}}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "no goal: name one of"),
        ({"bits": "2", "loss": "1%"}, "bits=2 and loss=1%: name one of"),
        ({"loss": "0.01"}, "loss=0.01: must be a share"),
        ({"size": "5 apples"}, "size=5 apples: must be a size"),
        ({"bits": "0"}, "bits=0: must be a number of bits"),
    ],
)
def test_goals_that_are_none(given, told):
    with pytest.raises(ValueError, match=told):
        goal(given)


def test_all_candidates_are_edits_with_a_code_that_build():
    from deltalab.edits import Edit
    from deltalab.run.building import edit_of

    settings, choices = command.composed(["model=mnist_vit", "evaluator=none"])
    for each in candidates():
        edit, _ = edit_of(command.pointed(settings, choices, each)[0] | {"values": "exact"})
        assert type(edit).encode is not Edit.encode, label(each)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nosuch: {p: [1]}", "nosuch: no such edit"),
        ("dare: {p: 1}", "dare: must give lists"),
        ("- dare", "must be a mapping"),
        ("dare: {p: [", "is no YAML"),
    ],
)
def test_lists_of_candidates_that_are_none(tmp_path, text, told):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ValueError, match=told):
        candidates(str(tmp_path / "own.yaml"))


def test_shrink_and_scatter_of_edits_with_a_closed_form():
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(200, 200, generator=generator)
    pre = torch.zeros_like(delta)
    half = measured({"w": (pre, delta, 0.5 * delta)}, SAID)
    assert half["shrink"] == pytest.approx(0.5)
    assert half["scatter"] == pytest.approx(0.0, abs=1e-9)
    kept = (torch.rand(delta.shape, generator=generator) < 0.2).float()
    dare = measured({"w": (pre, delta, delta * kept / 0.2)}, SAID)
    assert dare["shrink"] == pytest.approx(0.0, abs=0.05)  # unbiased
    assert dare["scatter"] == pytest.approx(4.0, rel=0.05)  # p / (1 - p)
    sign = measured({"w": (pre, delta, delta.abs().mean() * delta.sign())}, SAID)
    assert sign["shrink"] == pytest.approx(1 - 2 / torch.pi, abs=0.01)  # of Gaussian deltas
    with pytest.raises(ValueError, match="has no code"):
        measured({"w": (pre, delta, delta)}, {})


def test_curves_are_what_was_measured_and_straight_beyond():
    curves = Curves((0.1, 0.2, 0.4, 0.7, 1.0), (1.0, 16.0), 1.0, 1, 0)
    assert curves.change(0.3, 0.0) == pytest.approx(0.3)
    assert curves.change(2.0, 0.0) == pytest.approx(2.0)
    assert curves.change(-0.1, 0.0) == pytest.approx(-0.1)
    assert curves.change(0.0, 31.0) == pytest.approx(31.0)


EXPECTED = [Expected(2.0**-bits, bits, 10.0 * bits) for bits in (1.0, 2.0, 4.0, 8.0)]


def found(bits, tuned):
    return Measured(tuned, tuned, 0.0, bits, 10 * bits)


def test_a_bound_on_size_takes_what_is_expected_to_lose_least_within_it():
    assert search.following(Goal("bits", 4.0, ""), EXPECTED, {}, 1.0) == 2
    assert search.following(Goal("size", 25.0, ""), EXPECTED, {}, 1.0) == 1
    assert search.following(Goal("bits", 0.5, ""), EXPECTED, {}, 1.0) is None
    ones = {0: found(1.0, 0.1), 1: found(2.0, 0.2), 3: found(8.0, 0.0)}
    assert search.chosen(Goal("bits", 4.0, ""), ones, 1.0) == 0


def test_a_bound_on_loss_looks_for_the_smallest_that_keeps_it():
    wanted, seen = Goal("loss", 0.1, ""), {}
    for _ in range(4):
        place = search.following(wanted, EXPECTED, seen, 1.0)
        if place is None:
            break
        seen[place] = found(EXPECTED[place].bits, EXPECTED[place].change)
    assert search.chosen(wanted, seen, 1.0) == 2  # 1/16 of the gap, half the bits of the next
    nothing = {0: found(1.0, 0.5)}
    assert search.chosen(wanted, nothing, 1.0) is None


@pytest.mark.slow
def test_from_a_pair_to_the_file(tmp_path, capsys):
    (tmp_path / "own.yaml").write_text("bitdelta: {axis: [tensor]}\ndare: {p: [0.5, 0.9]}\n")
    settings = ["model=mnist_vit", "evaluator=none", "objective.limit=64",
                f"results={tmp_path}", f"candidates={tmp_path / 'own.yaml'}"]  # fmt: skip
    told = command.choose([*settings, "bits=2.5", "n=2"])
    text = capsys.readouterr().out
    assert told["best"] in ("bitdelta axis=tensor", "dare p=0.9")
    assert len(list((tmp_path / "records").glob("*.json"))) == 2
    times = {f: f.stat().st_mtime_ns for f in (tmp_path / "records").glob("*.json")}
    assert command.choose([*settings, "bits=2.5", "n=2"])["best"] == told["best"]
    assert capsys.readouterr().out == text
    assert times == {f: f.stat().st_mtime_ns for f in (tmp_path / "records").glob("*.json")}
    (tmp_path / "out").mkdir()
    words = told["command"].split()
    subprocess.run(
        [sys.executable, "-m", "deltalab.delta", *words[1:]], check=True, cwd=tmp_path / "out"
    )
    size = next((tmp_path / "out").glob("*.safetensors")).stat().st_size
    assert size == pytest.approx(
        told["measured"][told["best"]].size, rel=0.15
    )  # of so small a model the names weigh
    with pytest.raises(ValueError, match=r"bits=0.1: no candidate is so small; the smallest"):
        command.choose([*settings, "bits=0.1"])


def test_mistakes_in_one_line():
    with pytest.raises(ValueError, match="edit=dare: edits are what is chosen"):
        command.choose(["model=mnist_vit", "edit=dare", "bits=2"])
    with pytest.raises(ValueError, match="n=0: must be"):
        command.choose(["model=mnist_vit", "n=0", "bits=2"])
    with pytest.raises(ValueError, match="a family; deltalab-choose is for a pair"):
        command.choose(["model=subset_family", "bits=2"])
