"""The study of deltalab-choose: recomputed from the committed points, and on its nulls."""

import random
import statistics
from dataclasses import replace

import pytest

from experiments.choosing import compare


@pytest.fixture(scope="module")
def every():
    return compare.pairs()


@pytest.fixture(scope="module")
def wanted():
    return next(g for g in compare.goals() if g.text == compare.JUDGED)


def test_the_card_is_what_the_committed_points_give(every):
    assert compare.CARD.read_text("utf-8") == compare.card(every)


def test_predictions_of_other_candidates_are_no_better_than_chance(every, wanted):
    """The null: every candidate is expected to be what another is."""
    held = []
    for seed in range(20):

        def blind(pair, seed=seed):
            told = list(pair.expected)
            random.Random(seed).shuffle(told)
            return compare.cost(pair, wanted, compare.ours(pair, wanted, told), pair.ranking)

        held.append(compare.third(every, blind, wanted))
    assert sum(count >= 4 for count in held) <= 1


def test_random_search_is_no_third_of_itself(every, wanted):
    seeds = [compare.third(every, lambda p, s=seed: compare.cost(
        p, wanted, compare.shuffled(p, 10_000 + s)), wanted) for seed in range(10)]  # fmt: skip
    assert sum(count >= 4 for count in seeds) <= 1


def test_the_ranking_is_worth_more_than_one_of_other_candidates(every, wanted):
    """Its cost against those of blind rankings, pair by pair: below nine tenths of them."""
    better = 0
    for pair in every:
        mine, blind = compare.cost(pair, wanted, compare.ours(pair, wanted)), []
        for seed in range(20):
            told = list(pair.expected)
            random.Random(seed).shuffle(told)
            blind.append(compare.cost(pair, wanted, compare.ours(pair, wanted, told)))
        better += sum(mine < each for each in blind) >= 18
    assert better >= 4


def test_what_is_measured_costs_once_and_nothing_good_never_ends(every, wanted):
    pair = every[0]
    ones = [replace(m, tuned=1e9, change=1e9) for m in pair.measured]
    ones[7] = replace(ones[7], tuned=0.0, change=0.0)
    only = replace(pair, measured=ones)
    assert compare.good(only, wanted) == {7}
    twice = compare.cost(only, wanted, iter([3, 3, 7]))
    assert twice == pytest.approx(pair.seconds[3] + pair.seconds[7])
    assert compare.cost(only, wanted, iter([3])) == float("inf")
    assert not compare.is_third(float("inf"), float("inf"))


def test_of_one_good_candidate_half_of_all_are_drawn(every):
    """The median cost of a shuffle, where all cost the same and one is good: half of them."""
    pair = every[0]
    seconds = [1.0] * len(pair.edits)
    wanted = compare.goal({"loss": "1%"})
    ones = [replace(m, tuned=1e9, change=1e9) for m in pair.measured]
    ones[7] = replace(ones[7], tuned=0.0, change=0.0)
    only = replace(pair, measured=ones, seconds=seconds)
    found = statistics.median(compare.costs(only, wanted))
    assert found == pytest.approx((len(seconds) + 1) / 2, abs=3)
