"""The paper's artefacts: their checks judge as they should, and what is committed is theirs."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from deltalab.report import reading
from deltalab.settings import conf_dir
from deltalab.store.record import Outcome
from deltalab.store.terms import Term
from experiments.paper import alpha, bits, curves, intensity, log, parts, rules, table1
from experiments.paper.artefacts import ARTEFACTS
from experiments.paper.found import Check, verdict

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
ENDS = {"post": {"gsm/exact_match_strict": 0.9}, "pre": {"gsm/exact_match_strict": 0.1}}


def point(edit, score=0.9, seed=0, change=0.1, terms=(), **settings):
    found = {name: Term(name, 5, value, {"mlp": value}) for name, value in dict(terms).items()}
    metrics = {"gsm/exact_match_strict": score, "gsm/exact_match_strict_error": 0.01}
    return Outcome("m", edit, settings, experiment="fig", seed=seed, metrics=metrics,
                   key=f"{edit}{settings}",
                   reference=ENDS, change=change, error=0.01, terms=found, unit="nats per token",
                   gradient_evaluations=3)  # fmt: skip


def grid(score):
    return [
        point("dare", score(p, k), seed, p=p, k=k)
        for p in (0.1, 0.3, 0.5, 0.9)
        for k in (-1, 0, 0.8)
        for seed in (0, 1)
    ]


@pytest.mark.parametrize(
    ("score", "wanted"),
    [
        (lambda p, k: 0.9, "agrees"),
        (lambda p, k: 0.9 if p <= 0.3 else 0.0, "agrees"),  # only small p is claimed
        (lambda p, k: 0.9 if k >= 0 else 0.0, "partly"),
        (lambda p, k: 0.5, "disagrees"),
    ],
)
def test_curves_of_text_are_judged_at_small_p(score, wanted):
    found = curves.text(grid(score))
    assert found.verdict == wanted
    assert len(found.tables[0].rows) == 4


def test_curves_of_images_are_judged_everywhere():
    assert curves.images(grid(lambda p, k: 0.9)).verdict == "agrees"
    assert curves.images(grid(lambda p, k: 0.9 if p < 0.9 else 0.5)).verdict == "partly"


def test_table1_sees_the_sign_of_the_first_order_account():
    points = []
    for k in (0.5, 1.5):
        for edit, score, change in (("dare", 0.9, 0.0), ("biased_sign", 0.9, 0.01),
                                    ("biased_product", 0.0, 2.0)):  # fmt: skip
            terms = {"first_order": 1 - k, "left": 1.0, "adaptive": 1.9}
            points.append(point(edit, score, 0, change, terms, k=k))
    found = table1.table(points)
    assert found.verdict == "agrees"
    assert "first order 1 of 1" in found.notes[0]
    assert "paper's term (left, 5) 0 of 1" in found.notes[0]
    assert found.tables[0].rows[0][1:] == ["90.0", "90.0", "0.0", "76.35", "74.15", "0.00"]


def terms_of(small):
    points = []
    for p in (0.1, 0.5, 0.9):
        points.append(point("dare", terms={"left": small * p, "gauss": small * p}, p=p, k=0))
        points.append(point("drop_only", terms={"left": p, "gauss": p}, p=p))
        points.append(point("ties", terms={"left": p / 2, "gauss": p / 2}, keep=round(1 - p, 6)))
    points += [point(edit, terms={"left": 0.2, "gauss": 0.2}) for edit in ("bitdelta", "twin")]
    return points


def test_the_order_of_terms():
    assert parts.terms(terms_of(0.01)).verdict == "agrees"
    assert parts.terms(terms_of(0.5)).verdict == "partly"


def test_bits_and_statistics():
    back = [point("multibit", 0.5 if b < 4 else 0.89, bits=b) for b in range(6)]
    assert bits.blocks(back).verdict == "agrees"
    assert bits.blocks([point("multibit", 0.5, bits=b) for b in range(6)]).verdict == "disagrees"
    peak = [
        point("bitdelta", 0.9 - abs(c - 1) / 2, multiple=c, magnitudes=kind)
        for c in (0.5, 1.0, 2.0)
        for kind in ("mean", "normal", "uniform")
    ]
    assert bits.statistic(peak).verdict == "agrees"


def test_expo_falls_and_rises():
    def along(curve):
        return [
            point("expo", 0.9, 0, curve(a / 10), {"left": curve(a / 10), "gauss": curve(a / 10)},
                  alpha=a / 10)
            for a in (*range(7), 10, 20)
        ]  # fmt: skip

    assert alpha.expo_term(along(lambda a: a * (a - 0.5))).verdict == "agrees"
    assert alpha.expo_term(along(lambda a: a * (a - 1.5))).verdict == "partly"
    assert alpha.expo_term(along(lambda a: a + 0.1)).verdict == "partly"  # above 0 is in the claim


def test_the_better_direction():
    up = [point("expo", 0.9 + 0.05 * a, alpha=a) for a in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    found = alpha.gains(up)
    assert "extrapolation +5.0" in found.sentence
    assert found.tables[0].rows[0][4:] == ["-2.5 at -0.5", "+5.0 at 1"]


def test_intensity_compares_what_has_the_same():
    points = [point("noise", change=s**2, sigma=s) for s in (0.5, 1.0, 2.0)]
    points += [point("dare", change=2.0 * p / (1 - p), p=p, k=0) for p in (0.3, 0.5, 0.7)]
    points += [point("sign_flip", change=4.0 * f, fraction=f, balanced=False) for f in (0.1, 0.2)]
    row = intensity.intensity(points).tables[0].rows[0]
    assert row[3] == "2.00"  # DARE was made twice as harmful as noise of its intensity


def test_rules_are_compared_on_the_same_points():
    nodes = [("left", 5, 0.12), ("gauss", 2, 0.11), ("gauss", 3, 0.1), ("radau", 3, 0.1)]
    points = [
        replace(point("twin", change=0.1), terms={rule: Term(rule, count, value)})
        for rule, count, value in nodes
    ]
    found = rules.rules([*points, point("twin", change=0.1, terms={"adaptive": 0.1001})])
    assert "(left, 5) 20 %" in found.sentence
    assert "Gauss nodes 10 %" in found.sentence


def test_verdicts():
    assert verdict([Check("a", 19, 20), Check("b", 1, 1)]) == "agrees"
    assert verdict([Check("a", 18, 20), Check("b", 0, 1)]) == "partly"
    assert verdict([Check("a", 1, 20), Check("b", 0, 1)]) == "disagrees"


def test_every_artefact_has_an_experiment_that_says_what_it_is():
    for name in ARTEFACTS:
        head = (conf_dir() / "experiment" / f"{name}.yaml").read_text()
        for word in ("Claim: |Question: ", f"make {name} ", "SCALE=paper", "Cost: ", "Expected: "):
            assert re.search(word, head), (name, word)


@pytest.mark.parametrize("name", ARTEFACTS)
def test_every_artefact_is_committed_with_its_numbers(name):
    card = json.loads((RESULTS / "paper" / f"{name}.json").read_text())
    points = reading.lines(RESULTS / "paper" / card["lines"])
    assert card["points"] == len(points) > 5
    assert {point.experiment for point in points} == {name}
    assert all(point.change is not None and point.terms and point.data for point in points)
    for figure in card["figures"]:
        for kind in ("file", "png"):
            assert (RESULTS / "paper" / figure[kind]).stat().st_size > 1000
    assert card["verdict"] in ("agrees", "partly", "disagrees", "finding")
    assert ARTEFACTS[name].claim == card["claim"]


def test_the_log_is_what_the_cards_say():
    page = (RESULTS / "README.md").read_text()
    assert log.with_table(page, log.cards(RESULTS)) == page


def test_fig4_comes_out_as_committed(tmp_path):
    """The whole way of one artefact, in a folder of its own: sweep, records, verdict, numbers."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in (
        ["-m", "deltalab", "-m", "experiment=fig4", f"results={tmp_path}"],
        ["-m", "experiments.paper", "fig4", f"results={tmp_path}"],
    ):
        subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)
    made, kept = (json.loads((d / "paper" / "fig4.json").read_text()) for d in (tmp_path, RESULTS))
    assert made["verdict"] == kept["verdict"]
    assert [t["columns"] for t in made["tables"]] == [t["columns"] for t in kept["tables"]]
    made, kept = (numbers(d / "paper" / "fig4.jsonl") for d in (tmp_path, RESULTS))
    assert made.keys() == kept.keys()
    for at, (changes, score) in kept.items():
        assert made[at][0] == pytest.approx(changes, rel=1e-2, abs=1e-5), at
        assert made[at][1] == pytest.approx(score, abs=0.02), at  # another processor, another digit


def numbers(path):
    """Return change, term and score of every point of a summary, by what the point is."""
    return {
        (p.pair, p.label): (
            [p.change, p.terms["adaptive"].value],
            p.metrics["tiny_gsm/exact_match_strict"],
        )
        for p in reading.lines(path)
    }
