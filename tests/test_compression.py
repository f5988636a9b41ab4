"""`experiment=compression`: which points stand for a claim, and what counts."""

from dataclasses import replace

import numpy as np
import pytest

from deltalab.data import splits
from deltalab.store.record import Outcome
from experiments.compression import checks, study
from experiments.compression.claims import BUDGETS, CLAIMS, Way
from experiments.compression.patterns import codes
from experiments.paper.evidence import CHANGE, Evidence
from experiments.paper.simulate import World


def point(edit, size, key="k", seed=0, **settings):
    told = {"payload": size - 0.125, "metadata": 0.125, "bound": 0.0, "model": 32.0}
    return Outcome("m", edit, settings, key=key, seed=seed, bits_per_weight=told)


def test_a_budget_counts_the_description_and_takes_the_most_bits_within():
    own = [point("dare", size, p=size) for size in (0.5, 1.0, 1.049, 1.051, 2.0)]
    assert [p.settings["p"] for p in checks.found(own, Way("dare", {}, 1.0), None)] == [1.049]
    assert not checks.found(own, Way("dare", {}, 0.25), None)
    assert not checks.found(own, Way("ties", {}, 1.0), None)


def test_spread_bits_are_not_taken_for_bits_that_are_not():
    plain, spread = point("dqrelo", 2.0), point("dqrelo", 2.0, budget="knapsack signal=loss")
    for way, wanted in ((None, plain), ("Knapsack", spread)):
        assert checks.found([plain, spread], Way("dqrelo", {}, 2.0, way), None) == [wanted]
    assert study.code(plain) == "dqrelo"
    assert study.code(spread) == "dqrelo, knapsack"


def test_what_is_chosen_is_chosen_on_half_a_and_judged_on_half_b():
    good, bad = np.zeros(40), np.zeros(40)
    good[splits.places(40, "B")], bad[splits.places(40, "A")] = 1.0, 1.0
    own = [point("shifted", 1.3, "good", amount=1), point("shifted", 1.3, "bad", amount=0)]
    evidence = Evidence(own, {"good": {CHANGE: good}, "bad": {CHANGE: bad}})
    assert checks.found(own, CLAIMS["shift"].one, evidence)[0].key == "good"
    assert evidence.change((1.0, own[:1]), half="B").value == 1.0
    assert evidence.change((1.0, own[:1]), half="A").value == 0.0
    with pytest.raises(ValueError, match="no documents to halve"):
        Evidence(own).change((1.0, own[:1]), half="B")


def world_of(at=None):
    world = World(np.random.default_rng(0), 0)
    codes(at)(world)
    return world


def cases_of(points, documents, name):
    return [c for c in checks.cases(points, Evidence(points, documents)) if c.name == name]


def test_pairs_that_separate_nothing_are_told_and_not_counted():
    world = world_of()
    assert not any(c.counted for c in cases_of(world.points, world.documents, "come"))
    for gap, why in ((0.01, "both above 70% of discarding"), (100, "both below 1% of discarding")):
        points = [replace(p, gap=gap) for p in world.points]
        found = cases_of(points, world.documents, "come")
        assert [c.counted for c in found] == [why] * 5
        assert checks.checks(found)[0].verdict == "undecided"


def test_a_pair_seen_before_and_more_bits_do_not_count():
    world = world_of()
    points = [replace(p, pair="mnist_vit", model="mnist_vit") if p.model == "a" else p
              for p in world.points]  # fmt: skip
    found = cases_of(points, world.documents, "spread_come")
    assert sorted(c.counted for c in found) == ["", "", "", "", "seen before"]
    more = [replace(p, bits_per_weight={"payload": 1.02, "metadata": 0.0})
            if p.edit == "ultradelta" else p for p in world.points]  # fmt: skip
    assert {c.counted for c in cases_of(more, world.documents, "ultra")} == {"more bits"}


def test_the_front_is_of_codes_that_lose_less_than_all_that_take_no_more():
    own = [point("dare", size, str(i), p=size) for i, size in enumerate((1.0, 2.0, 3.0, 2.0))]
    own[3] = replace(own[3], edit="ties")
    lost = {"0": 0.5, "1": 0.7, "2": 0.1, "3": 0.2}
    documents = {key: {CHANGE: np.full(8, value)} for key, value in lost.items()}
    best = study.front(study.codes(own, Evidence(own, documents)))
    assert [(size, group[0].edit) for size, _, group in best] == [
        (1.0, "dare"), (2.0, "ties"), (3.0, "dare")]  # fmt: skip


def test_tables_and_figure_of_drawn_points():
    world = world_of()
    found = study.compression(world.points, world.documents)
    tables, figures = found.show()
    assert len(tables) == 1 + 5 + 1
    assert len(tables[0].rows) == 5 * len(CLAIMS)
    assert len(figures[0][1].axes) == 5
    assert len(tables[1].columns) == 1 + len(BUDGETS)
