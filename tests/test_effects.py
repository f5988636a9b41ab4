"""Classes and errors: what they say by chance, and what they see."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from deltalab.loss.objectives import Measured, change, influences
from deltalab.report import command, draws
from deltalab.report.comparison import compare
from deltalab.report.outcomes import at_margin
from deltalab.statistics import means
from deltalab.store import effects
from deltalab.store.reading import parse
from deltalab.store.record import Outcome

RUNS = 1000
MOST = 0.03 + 2 * math.sqrt(0.03 * 0.97 / RUNS)  # 2.3 % is meant; few draws may make it 3 %


@pytest.mark.parametrize("freedom", [1, 1.5, 2, 7, 40, 500])
def test_tails_are_those_of_students_t(freedom):
    for distance in (-3.0, -0.2, 0.1, 2.0, 12.0):
        wanted = stats.t.sf(distance, freedom)
        assert means.tail(distance, freedom) == pytest.approx(wanted, rel=1e-9)
    assert stats.t.sf(means.factor(freedom), freedom) == pytest.approx(stats.norm.sf(2), rel=1e-6)


def table(rng, draws, examples, of_draw, of_example, of_rest, middle=0.0):
    """A two-way table: effects of the draw, of the example, and of both."""
    y = middle + of_draw * rng.standard_normal((draws, 1))
    y = y + of_example * rng.standard_normal((1, examples))
    return y + of_rest * rng.standard_normal((draws, examples))


@pytest.mark.parametrize("parts", [(0, 1, 0.1), (0.3, 0.3, 1), (1, 0.1, 0.1), (0, 0, 1)])
@pytest.mark.parametrize("number", [3, 8])
def test_the_two_way_error_covers_the_truth(parts, number):
    """A change of no more than the margin is called decreased in 3 % of all cases at most."""
    rng = np.random.default_rng(0)
    beyond = inside = 0
    for _ in range(RUNS):
        found = means.two_way(table(rng, number, 60, *parts, middle=0.1))
        wide = means.factor(found.freedom)
        kind = effects.classify(found.value, found.error, 5.0, 0.1, 0.02, wide)
        beyond += kind == "decreased"
        inside += kind == "competitive"
    assert beyond / RUNS <= MOST
    assert inside / RUNS <= MOST


def test_one_draw_says_less_than_it_claims():
    """What the former rule did: the error of one draw's examples, however much draws differ."""
    rng, wrong = np.random.default_rng(1), 0
    for _ in range(RUNS):
        y = table(rng, 1, 60, 0.5, 0.5, 0.1)[0]
        wrong += effects.two_errors(y.mean(), y.std(ddof=1) / math.sqrt(len(y))) != "competitive"
    assert wrong / RUNS > 0.5


@pytest.mark.parametrize(("parts", "number"), [((0.01, 1, 0.1), 3), ((0.05, 0.3, 0.5), 8)])
def test_classes_are_found_where_they_are(parts, number):
    rng = np.random.default_rng(2)
    for middle, kind in ((0.0, "competitive"), (2.0, "decreased"), (-2.0, "improved")):
        right = 0
        for _ in range(300):
            found = means.two_way(table(rng, number, 200, *parts, middle=middle))
            wide = means.factor(found.freedom)
            right += effects.classify(found.value, found.error, 50.0, 1.0, 0.02, wide) == kind
        assert right / 300 >= 0.9, kind


def test_the_bound_is_one():
    """Without the examples the error is no smaller than with them, in the mean of many tables."""
    rng = np.random.default_rng(3)
    for parts in ((0, 1, 0.1), (0.3, 0.3, 1), (1, 0.1, 0.1)):
        squares = []
        for _ in range(300):
            y = table(rng, 4, 50, *parts)
            errors = y.std(1, ddof=1) / math.sqrt(y.shape[1])
            bound = means.over_draws(list(y.mean(1)), list(errors))
            squares.append((bound.error**2, means.two_way(y).error ** 2))
        bound, exact = np.mean(squares, axis=0)
        assert exact < bound * 1.02


def test_influences_have_the_changes_mean_and_error():
    torch.manual_seed(0)
    weights = torch.randint(1, 9, (30,)).double()
    post = Measured(torch.rand(30).double(), weights)
    edited = Measured(torch.rand(30).double(), weights)
    value, error = change(post, edited)
    v = influences(post, edited)
    assert v.mean().item() == pytest.approx(value)
    assert v.std().item() / math.sqrt(30) == pytest.approx(error)
    found = means.two_way(v.numpy())
    assert (found.value, found.error) == pytest.approx((value, error))


def test_examples_without_a_value_are_left_out():
    y = [[1.0, math.nan, 3.0, 5.0], [1.0, 2.0, 3.0, math.nan]]
    assert means.two_way(y).value == 2.0
    with pytest.raises(ValueError, match="no example"):
        means.two_way([[math.nan]])


def test_more_examples_decide_and_never_make_a_small_change_large():
    """DARE on the small language model: 3e-4 nats of a gap of 2.3 was `decreased`."""
    assert effects.two_errors(3.3e-4, 0.9e-4) == "decreased"
    assert effects.classify(3.3e-4, 0.9e-4, 2.3, 0.1) == "competitive"
    assert effects.classify(0.04, 0.03, 2.3, 0.1) == "undecided"
    assert effects.classify(0.04, 0.003, 2.3, 0.1) == "competitive"
    assert effects.classify(0.0, 0.0, 0.1, 0.06) == "undecided", "nothing was learned"
    assert effects.classify(1.0, math.inf, 2.3, 0.1) == "undecided"


@pytest.mark.parametrize("margin", [0, 1, -0.1, "x", None, True, math.nan])
def test_margins_are_shares(margin):
    with pytest.raises(ValueError, match="margin=.*share of the gap"):
        effects.check_margin(margin)


def record(**more):
    loss = {"change": 0.03, "error": 0.001, "gap": 1.0, "gap_error": 0.1}
    return {
        "schema": 1,
        "status": "ok",
        "model": "m",
        "edit": {"name": "dare"},
        "loss": loss,
    } | more


def test_a_class_follows_from_the_records_numbers():
    point = parse(record(margin=0.02, **{"class": "decreased"}))
    assert point.classed == "decreased"
    assert parse(record(margin=0.05)).classed == "competitive"
    assert [p.classed for p in at_margin([point], 0.01)] == ["decreased"]
    assert [p.classed for p in at_margin([point], 0.05)] == ["competitive"]
    old = record(**{"class": "improved"})
    del old["loss"]["gap"], old["loss"]["gap_error"]
    assert parse(old).classed is None, "the former rule's class is not this one's"


def test_edits_are_classed_over_their_draws(tmp_path, capsys):
    """Two draws that differ by more than their errors: each is decided, the edit is not."""
    rng = np.random.default_rng(4)
    for seed, middle in enumerate((0.1, -0.1, 0.0)):
        values = middle + 0.05 * rng.standard_normal(80)
        one = record(key=f"k{seed}", seed=seed, experiment="x", margin=0.02)
        one["edit"] |= {"p": 0.5}
        one["loss"] |= {"change": values.mean(), "error": values.std(ddof=1) / 80**0.5}
        for folder, content in (("records", one), ("documents", {"objective/change": [*values]})):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"k{seed}.json").write_text(json.dumps(content))
    command.report(str(tmp_path))
    page = (tmp_path / "x.md").read_text()
    row = next(line for line in page.split("## Classes over")[1].splitlines() if "dare" in line)
    assert "| 3 |" in row
    assert "| undecided | 1 competitive, 1 decreased, 1 improved | undecided | undecided |" in row
    assert "upper bound" not in page
    (tmp_path / "documents" / "k1.json").unlink()
    command.report(str(tmp_path), margin="0.9")
    page = (tmp_path / "x.md").read_text()
    assert " \\* |" in page or " * |" in page
    assert "upper bound" in page
    assert "| competitive | 3 competitive |" in page
    with pytest.raises(ValueError, match="margin=2"):
        command.report(str(tmp_path), margin="2")
    capsys.readouterr()


def test_draws_join_by_all_but_the_seed():
    a = {"error": 0.1, "gap": 1.0, "gap_error": 0.1, "change": 0.0}
    points = [Outcome("m", "dare", {"p": p}, seed=s, **a) for p in (0.1, 0.2) for s in (0, 1)]
    found = draws.drawn([*points, Outcome("m", "ties", seed=0, **a)])
    assert [[p.settings["p"] for p in each.points] for each in found] == [[0.1, 0.1], [0.2, 0.2]]


def test_posts_own_scores_are_no_metric_to_compare():
    found = compare({"a/acc": [1.0], "a/acc@post": [0.0]}, {"a/acc": [0.0], "a/acc@post": [0.0]})
    assert [each.metric for each in found] == ["a/acc"]
