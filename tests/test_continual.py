"""Streams of tasks: heads against scikit-learn, masks and cosines against their closed forms."""

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from sklearn.linear_model import Ridge as Oracle
from sklearn.neighbors import NearestCentroid
from test_families import ran, settings_of
from torch import nn

from deltalab.apply.extras import Extras
from deltalab.apply.merging import Expert, Family
from deltalab.data import splits
from deltalab.edits.chain import Chain
from deltalab.edits.dare import Dare
from deltalab.edits.drop_only import DropOnly
from deltalab.evaluators import continual
from deltalab.evaluators.continual import Continual, Stream, Task, follow, projection
from deltalab.linear.heads import NearestMean, Ridge
from deltalab.merges.sum import Sum
from deltalab.run.experts import drawing
from deltalab.run.overlap import overlap
from deltalab.store import latest

CLASSES = (3, 7, 11, 12)


@pytest.fixture(autouse=True)
def closed():
    yield
    latest.forget()


def images(count: int = 120, width: int = 9, seed: int = 0):
    """Features of four classes that overlap, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([CLASSES[i % 4] for i in range(count)])
    centres = torch.randn(13, width, generator=generator).double()
    return centres[labels] + torch.randn(count, width, generator=generator), labels


def tasks_of(x, y):
    """Two tasks of two classes each."""
    for pair in (CLASSES[:2], CLASSES[2:]):
        rows = torch.isin(y, torch.tensor(pair))
        yield x[rows], y[rows]


def test_means_are_those_of_scikit_learn() -> None:
    x, y = images()
    head = NearestMean()
    for part in tasks_of(x, y):
        head.add(*part)
    oracle = NearestCentroid().fit(x.numpy(), y.numpy())
    means = torch.stack([*head.means.values()])
    assert torch.allclose(means, torch.from_numpy(oracle.centroids_))
    # By cosine: the nearest of the means brought to length 1.
    oracle.centroids_ = torch.nn.functional.normalize(means).numpy()
    assert head.classify(x).tolist() == oracle.predict(x.numpy()).tolist()
    assert head.classify(5 * x).tolist() == head.classify(x).tolist(), "a cosine has no length"


@pytest.mark.parametrize("projections", [0, 40])
def test_a_ridge_is_that_of_scikit_learn_on_all_images_at_once(projections: int) -> None:
    x, y = images()
    head = Ridge(partial(projection, projections, 1) if projections else None)
    for part in tasks_of(x, y):
        head.add(*part)
    labels, weights = head.solved()
    assert labels == list(CLASSES)
    assert head.strength in [10.0**n for n in range(-8, 9)]
    lifted = head.lifted(x)
    hot = (y[:, None] == torch.tensor(labels)).double()
    gram, products = lifted.T @ lifted, lifted.T @ hot
    assert torch.allclose(head.fitted.gram + head.held.gram, gram, rtol=1e-6)
    both = head.fitted.columns(labels) + head.held.columns(labels)
    assert torch.allclose(both, products, rtol=1e-6)
    oracle = Oracle(alpha=head.strength, fit_intercept=False).fit(lifted.numpy(), hot.numpy())
    assert torch.allclose(weights, torch.from_numpy(oracle.coef_).T, atol=1e-6)
    if projections:
        assert (lifted >= 0).all()
        assert 0.4 < (lifted == 0).double().mean() < 0.6


def test_the_strength_has_the_least_error_on_what_was_held_out() -> None:
    x, y = images()
    head = Ridge()
    head.add(x, y)
    out = torch.arange(len(y)) % 5 == 4
    labels, errors = list(CLASSES), {}
    hot = (y[:, None] == torch.tensor(labels)).double()
    for strength in (10.0**n for n in range(-8, 9)):
        oracle = Oracle(alpha=strength, fit_intercept=False)
        oracle.fit(x[~out].numpy(), hot[~out].numpy())
        wrong = torch.from_numpy(oracle.predict(x[out].numpy())) - hot[out]
        errors[strength] = float(wrong.square().sum())
    head.solved()
    assert head.strength == min(errors, key=errors.__getitem__)


@pytest.mark.parametrize("made", [NearestMean, Ridge, lambda: Ridge(partial(projection, 40, 0))])
def test_on_a_frozen_backbone_the_order_of_tasks_is_nothing(made) -> None:
    x, y = images()
    parts = [*tasks_of(x, y)]
    one, other = made(), made()
    for part in parts:
        one.add(*part)
    for part in reversed(parts):
        other.add(*part)
    assert one.classify(x).tolist() == other.classify(x).tolist()
    if isinstance(one, Ridge):
        assert torch.allclose(one.solved()[1], other.solved()[1], atol=1e-6)


def test_too_few_images_to_choose_a_strength_by() -> None:
    with pytest.raises(ValueError, match="takes 5 training images of a task"):
        Ridge().add(torch.ones(4, 2).double(), torch.tensor([0, 0, 1, 1]))


class Turned(nn.Module):
    """A backbone that tells a picture by its first `keeps` numbers."""

    def __init__(self, keeps: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.keeps = keeps

    def features(self, x):
        return x[:, : self.keeps]


def test_stale_prototypes_are_those_of_the_backbone_after_their_task() -> None:
    """Refreshed ones follow the backbone; of one backbone throughout both are the same."""
    x, y = images(width=6)
    tasks = [Task([part], [part]) for part in tasks_of(x.float(), y)]

    def gone(prototypes: str, *backbones: Turned) -> Stream:
        how = Continual(None, None, "t", prototypes=prototypes)
        return follow(tasks, map(nullcontext, backbones), how)

    still = Turned(6), Turned(6)
    assert torch.equal(gone("stale", *still).right[1, 0], gone("refreshed", *still).right[1, 0])

    class Mirrored(Turned):
        def features(self, x):
            return -x

    moved = Turned(6), Mirrored(6)
    assert gone("refreshed", *moved).accuracy(1, 0) > 0.7
    assert gone("stale", *moved).accuracy(1, 0) < 0.3, "its means point the other way"
    assert gone("stale", *moved).accuracy(0, 0) == gone("refreshed", *moved).accuracy(0, 0)


def test_what_is_told_of_a_stream() -> None:
    a = {(0, 0): 0.9, (1, 0): 1.0, (1, 1): 0.8, (2, 0): 0.5, (2, 1): 0.7, (2, 2): 0.6}
    right = {at: torch.tensor([1.0] * round(10 * v) + [0.0] * round(10 - 10 * v)).double()
             for at, v in a.items()}  # fmt: skip
    found = Stream(right, 3)
    told = found.metrics()
    assert told["accuracy"] == pytest.approx(0.6)
    assert told["incremental_accuracy"] == pytest.approx((0.9 + 0.9 + 0.6) / 3)
    assert told["forgetting"] == pytest.approx(((1.0 - 0.5) + (0.8 - 0.7)) / 2)
    assert told["backward_transfer"] == pytest.approx(((0.5 - 0.9) + (0.7 - 0.8)) / 2)
    assert found.documents()["accuracy"].mean() == pytest.approx(told["accuracy"])
    assert found.matrix(["a", "b", "c"])["b"] == {"a": 1.0, "b": 0.8}
    assert set(Stream({(0, 0): right[0, 0]}, 1).metrics()) == {"accuracy", "incremental_accuracy"}


def family(edit, count: int = 5, entries: int = 40_000, seed: int = 0, shared: float = 0.3):
    """Experts of one tensor whose deltas have something in common and exact zeros."""
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(entries, generator=generator)
    base, names, experts = {"w": torch.zeros(entries)}, [f"e{t}" for t in range(count)], {}
    for name in names:
        own = torch.randn(entries, generator=generator)
        delta = (shared * common + own) * (torch.rand(entries, generator=generator) < 0.9)
        mine, salt = drawing(edit, "", name, names)
        extras = Extras(mine.needs, seed, salt=salt)
        experts[name] = Expert(base, {"w": delta}, mine, "all", extras)
    return Family(experts, Sum(1.0, None))


def test_masks_have_the_collisions_and_cosines_of_their_closed_forms() -> None:
    """Over 60 seeds the means, within three standard errors, and the spreads, within a third."""
    for edit in (DropOnly(0.8), Dare(0.6, 0.0)):
        draws = [overlap(family(edit, seed=s, entries=4000)) for s in range(60)]
        first = draws[0]
        keep = 1 - edit.p
        raw = overlap(family(DropOnly(0.0), entries=4000))["cosine"]["e0 e1"]
        assert first["expected"]["cosine"]["e0 e1"] == pytest.approx(keep * raw)
        for at in (("collisions",), ("cosine", "e0 e1"), ("cosine", "e2 e4")):
            values = torch.tensor([_at(d, at) for d in draws]).double()
            wanted, error = _at(first["expected"], at), _at(first["expected_error"], at)
            assert abs(values.mean() - wanted) < 3 * error / math.sqrt(60), at
            assert float(values.std()) == pytest.approx(error, rel=1 / 3), at
    alone = overlap(family(DropOnly(0.8), shared=0.0))
    assert alone["expected"]["collisions"] < 1 - 0.8**5 - 5 * 0.2 * 0.8**4, "zeros have no writer"


def _at(found, path):
    for name in path:
        found = found[name]
    return found


@pytest.mark.parametrize("p", [0.8, 0.95])
def test_disjoint_masks_have_no_entry_in_common(p: float) -> None:
    found = overlap(family(DropOnly(p, "disjoint")))
    assert set(found["cosine"].values()) == {0.0}
    assert found["collisions"] == 0.0
    assert found["expected"] == {"cosine": dict.fromkeys(found["cosine"], 0.0), "collisions": 0.0}
    kept = family(DropOnly(p, "disjoint")).merged()["w"]
    share = float((kept != 0).double().mean())
    assert share == pytest.approx(0.9 * 5 * (1 - p), abs=0.02)


def test_of_one_task_disjoint_masks_are_those_of_drop_only() -> None:
    one, other = (family(DropOnly(0.8, m), count=1).merged()["w"] for m in (None, "disjoint"))
    assert torch.equal(one, other)
    with pytest.raises(ValueError, match="disjoint masks cannot be a step of a chain"):
        Chain(steps=[{"drop_only": {"p": 0.9, "masks": "disjoint"}}]).among(0, 2)


def test_nothing_is_expected_of_an_edit_that_draws_no_entries() -> None:
    assert "expected" not in overlap(family(Dare(0.5, 0.5)))


STREAM = ("model=subset_family", "evaluator=continual", "objective.limit=24", "riemann=off",
          "~model.experts.c2", "~model.experts.c3", "~model.experts.c4")  # fmt: skip


def test_a_stream_of_the_embedded_family(tmp_path) -> None:
    record = ran(tmp_path, *STREAM, "merge=sum", "merge.weights={c0: 1, c1: 0.5}")
    a = record["stream"]["accuracy"]
    assert [*a] == ["c0", "c1"]
    assert [len(row) for row in a.values()] == [1, 2]
    # After the first task the backbone is the first expert, and its task is the only one.
    assert a["c0"]["c0"] == record["experts"]["c0"]["reference"]["post"]["fashion/accuracy"]
    assert record["metrics"]["stream/accuracy"] == pytest.approx(sum(a["c1"].values()) / 2)
    own = ran(tmp_path, *STREAM, "merge=sum", "evaluator.backbone=own")["stream"]["accuracy"]
    assert own["c0"] == a["c0"]
    assert own["c1"] != a["c1"]


def test_the_heads_see_half_a_of_the_training_images_and_no_test_image(monkeypatch) -> None:
    made = settings_of(*STREAM, "merge=sum")["model"]["experts"]["c0"]["evaluator"]
    assert (made["train"]["split"], made["test"]["split"]) == ("objective", "test")
    assert made["train"]["classes"] == made["test"]["classes"] == [10, 11]
    batches = [(torch.arange(n, n + 5).float()[:, None], torch.arange(5)) for n in (0, 5, 10)]
    kept = [int(v) for x, _ in continual._half(batches, "A") for v in x]
    assert kept == splits.places(15, "A")


BAD = {
    "one alone": (("+model.experts.c0.evaluator=null", "merge=sum"),
                  "model.experts.c0.evaluator: must be continual, as that of c1 is"),
    "several ways": (("+model.experts.c1.evaluator={continual: {head: ridge}}", "merge=sum"),
                     "classified in one way"),
    "a model each": (("merge=emr",), "merge=emr: gives a model for each expert"),
    "two at once": (("merge=slerp",), "is of two experts, .* has 1"),
    "head": (("merge=sum", "evaluator.head=svm"), "evaluator.head=svm: must be one of ncm, ridge"),
    "masks": (("merge=sum", "edit=drop_only", "edit.p=0.3", "edit.masks=disjoint"),
              "2 experts with disjoint masks keep 0.5 each"),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "text"), BAD.values(), ids=BAD)
def test_what_is_no_stream_is_told_before_anything_is_opened(overrides, text: str) -> None:
    from deltalab import keys
    from deltalab.run import building

    choices = keys.Choices("subset_family", "keep", "classification")
    with pytest.raises(ValueError, match=text):
        building.prepare(settings_of(*STREAM, *overrides), choices)
