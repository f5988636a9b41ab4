"""Half A tunes, half B judges: no example of B is read by anything that is fitted to data."""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from deltalab import run
from deltalab.apply import editing
from deltalab.data import splits
from deltalab.loss.answers import AnswerLoss, DpoLoss
from deltalab.loss.objectives import CrossEntropy, change, measure
from deltalab.report.comparison import compare
from deltalab.run import opening, point
from deltalab.store import latest
from deltalab.weights.mapping import ModelPair, loaded

CONF = Path(__file__).parents[1] / "conf"
COUNT = 30
A, B = (set(splits.places(COUNT, half)) for half in splits.HALVES)


class Seen(nn.Module):
    """A model that notes which examples it is shown: the first entry of an input is its place."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.shown = nn.Linear(6, 12), nn.Linear(12, 4), Counter()

    def forward(self, x):
        self.shown.update(x[:, 0].long().tolist())
        return self.second(torch.tanh(self.first(x[:, 1:])))


@lru_cache(1)
def pair():
    torch.manual_seed(0)
    module = Seen()
    post = {n: v.detach().clone() for n, v in module.state_dict().items()}
    pre = {n: v - 0.1 * torch.randn_like(v) for n, v in post.items()}
    return ModelPair(pre, post, module)


@dataclass(frozen=True)
class Model:
    fingerprints: tuple = ()

    def open(self):
        return pair()


@dataclass(frozen=True)
class Objective:
    batch_size: int = 8

    def open(self, pair, store=None):
        torch.manual_seed(1)
        x = torch.cat([torch.arange(COUNT)[:, None].float(), torch.randn(COUNT, 6)], 1)
        cut = [slice(i, i + self.batch_size) for i in range(0, COUNT, self.batch_size)]
        y = torch.randint(4, (COUNT,))
        return CrossEntropy(tuple((x[c], y[c]) for c in cut), most=3)


def edit_of(name, **fields):
    node = OmegaConf.load(CONF / "edit" / f"{name}.yaml")
    node = {k: v for k, v in OmegaConf.to_container(node).items() if k != "select"}
    return instantiate(node | fields, _convert_="all")


EDITS = {p.stem: edit_of(p.stem) for p in sorted((CONF / "edit").glob("*.yaml"))}
EDITS["bitdelta_distilled"] = edit_of("bitdelta_distilled", steps=9)


@pytest.fixture
def known():
    latest.forget()
    peers = {"unaligned": Model()}
    yield opening.opened(Model(), Objective(), None, "error", None, None, {}, (None, None), peers)
    latest.forget()


@pytest.mark.parametrize("name", EDITS)
def test_no_edit_is_fitted_to_what_it_is_judged_by(known, name):
    edit, module = EDITS[name], known.pair.module
    module.shown.clear()
    extras = run.provide(known, edit, 0)
    edited = dict(editing.edited(known.pair.pre, known.pair.post, edit, "all", extras))
    fitted = set(module.shown)
    judge = known.judge("B" if splits.tunes(edit.needs) else None)
    module.shown.clear()
    with loaded(module, edited, restore=known.pair.post):
        measure(module, judge.loss)
    judged = set(module.shown)
    if "grad" in edit.needs:  # the gradient of the very loss that is judged, by definition
        assert fitted == judged == A | B
    else:
        assert not fitted & judged
        assert fitted <= A
        assert judged == (B if fitted else A | B)


def test_there_are_edits_that_are_fitted():
    fitted = {name for name, edit in EDITS.items() if splits.tunes(edit.needs)}
    assert {"bitdelta_distilled", "darex"} <= fitted
    assert "dare" not in fitted
    assert not splits.tunes(edit_of("darex", q=0.5).needs)


def evaluated(name, **fields):
    edit = edit_of(name, **fields)
    one = SimpleNamespace(
        edit=edit, select="all", seed=0, salt="", drawn={"select": "all", "seed": 0}, margin=0.02,
        objective_name="x", experts={}, calibration={}, parts={},
        fitted=splits.tunes(edit.needs),
        riemann=instantiate(OmegaConf.load(CONF / "riemann" / "paper.yaml")),
        prediction=instantiate(OmegaConf.load(CONF / "prediction" / "on.yaml")),
    )  # fmt: skip
    return run.evaluate(one), edit


@pytest.mark.parametrize(("name", "half"), [("darex", "B"), ("dare", None)])
def test_a_point_is_judged_by_the_half_that_it_was_not_fitted_to(known, monkeypatch, name, half):
    monkeypatch.setattr(run, "reference", lambda point: known)
    (found, documents), edit = evaluated(name, p=0.5)
    rows, kept = splits.places(COUNT, half), documents[point.CHANGE]
    assert found["loss"]["half"] == half
    assert [i for i, v in enumerate(kept) if v == v] == rows
    extras = run.provide(known, edit, 0)
    weights = dict(editing.edited(known.pair.pre, known.pair.post, edit, "all", extras))
    whole = Objective().open(pair())
    post = measure(pair().module, whole)
    with loaded(pair().module, weights, restore=pair().post):
        after = measure(pair().module, whole)
    expected = (after.losses - post.losses)[rows].mean().item()
    assert found["loss"]["change"] == pytest.approx(expected, abs=1e-7)
    assert found["loss"]["post"] == pytest.approx(post.losses[rows].mean().item(), abs=1e-7)
    assert sum(kept[i] for i in rows) / len(rows) == pytest.approx(expected, abs=1e-6)
    # The accounts of the change are of the same half: small changes, so that they nearly agree.
    assert found["terms"]["left"]["value"] == pytest.approx(expected, abs=0.3 * abs(expected))


def test_halves_part_the_examples_and_never_depend_on_the_batches():
    for count in (2, 3, 7, 100, 1001):
        one, two = (splits.places(count, half) for half in splits.HALVES)
        assert sorted(one + two) == list(range(count))
        assert abs(len(one) - len(two)) <= 1
    for size in (1, 4, 30):
        loss = Objective(size).open(pair())
        halves = [splits.halved(loss, half) for half in splits.HALVES]
        shown = [torch.cat([x[:, 0] for x, _ in h.batches]).long().tolist() for h in halves]
        assert shown == [sorted(A), sorted(B)]
    values = [measure(pair().module, splits.halved(Objective(s).open(pair()), "A")) for s in (1, 7)]
    assert torch.allclose(values[0].losses, values[1].losses)


@pytest.mark.parametrize("period", [2, 3, 4, 6])
def test_no_period_of_a_source_falls_into_one_half(period):
    counts = Counter(i % period for i in splits.places(600, "A"))
    assert min(counts.values()) > 0.35 * 600 / period


def test_texts_and_preferences_are_halved_alike():
    def tokens(width):
        ids = torch.arange(COUNT)[:, None].repeat(1, width)
        return ids, torch.ones_like(ids), ids

    answers = splits.halved(AnswerLoss((tokens(3),)), "A")
    assert answers.batches[0][0][:, 0].tolist() == sorted(A)
    both = (tokens(3), tokens(5), torch.arange(COUNT).float())
    chosen, rejected, margin = splits.halved(DpoLoss((both,), 0.1), "B").batches[0]
    for values in (chosen[0][:, 0], rejected[2][:, 4], margin.long()):
        assert values.tolist() == sorted(B)


def test_one_example_cannot_be_halved():
    loss = CrossEntropy(((torch.zeros(1, 7), torch.zeros(1, dtype=torch.long)),), most=3)
    empty = next(h for h in splits.HALVES if splits.half_of(0) != h)
    with pytest.raises(ValueError, match=f"half {empty} of its 1 example is empty"):
        splits.halved(loss, empty)


def test_changes_of_a_half_are_those_of_its_examples(known):
    judge = known.judge("B")
    assert known.judge("B") is judge
    rows = sorted(B)
    whole = change(known.whole.post, known.whole.pre)
    assert judge.post.losses.tolist() == known.whole.post.losses[rows].tolist()
    assert change(judge.post, judge.pre) != whole


def test_edits_are_compared_on_the_examples_that_neither_was_fitted_to(known, monkeypatch):
    monkeypatch.setattr(run, "reference", lambda point: known)
    fitted, other = (evaluated(name, p=0.5)[0][1] for name in ("darex", "dare"))
    found = {each.metric: each.documents for each in compare(fitted, other)}
    assert found[point.CHANGE] == len(B)
