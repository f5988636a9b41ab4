"""Verdicts that can fail: what chance makes of an artefact's points is not taken for its claim."""

import math
import os
import zlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from deltalab.data import splits
from experiments.paper import (
    alpha,
    bits,
    curves,
    evidence,
    expo,
    intensity,
    parts,
    patterns,
    table1,
)
from experiments.paper.artefacts import ARTEFACTS
from experiments.paper.nulls import DECLARED, drawn
from experiments.paper.simulate import GSM, World

FINDS = {f"{find.__module__.rpartition('.')[2]}.{find.__name__}": find for find in DECLARED}
NULLS = [(name, check) for name, find in FINDS.items() for check in DECLARED[find].nulls]


def counted(declared):
    """Return how many data sets are drawn: as declared, or 1,000 of each by `make nulls`."""
    return max(declared.runs, int(os.environ.get("DELTALAB_NULLS", "0")))


def by_chance(runs):
    """Return the most of so many data sets on which a check of level 5 % may agree by chance."""
    return 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)


def verdicts(find, draw, name, only=None):
    """Count the verdicts of every check over the declared number of data sets."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    found, declared = Counter(), DECLARED[find]
    for _ in range(counted(declared)):
        world = drawn(draw, rng, declared.count)
        for check in find(world.points, world.documents).checks:
            if only in (None, check.name):
                found[check.name, check.verdict] += 1
    return found


def test_every_check_of_every_artefact_declares_its_null():
    assert {artefact.find for artefact in ARTEFACTS.values()} == set(DECLARED)
    for find, declared in DECLARED.items():
        world = drawn(declared.pattern, np.random.default_rng(0), declared.count)
        checks = find(world.points, world.documents).checks
        assert [c.name for c in checks] == list(declared.nulls), find
        assert all(words for words, _ in declared.nulls.values())


@pytest.mark.parametrize(("name", "check"), NULLS)
def test_no_check_agrees_by_chance(name, check):
    declared = DECLARED[FINDS[name]]
    _, null = declared.nulls[check]
    found = verdicts(FINDS[name], null, f"{name} {check}", only=check)
    runs = counted(declared)
    assert found[check, "agrees"] / runs <= by_chance(runs)
    assert found.total() == runs


@pytest.mark.parametrize("name", FINDS)
def test_every_check_sees_the_papers_pattern(name):
    declared = DECLARED[FINDS[name]]
    found, runs = verdicts(FINDS[name], declared.pattern, name), counted(declared)
    for check in declared.nulls:
        assert found[check, "agrees"] / runs >= 0.9, check
        assert found[check, "disagrees"] / runs <= by_chance(runs), check


@pytest.mark.parametrize("kept", [True, False], ids=["documents", "scores alone"])
def test_a_maximum_over_many_alphas_and_tasks_is_no_gain(kept):
    """Figs. 7 and 13 agreed in 98 % of such data: eight tasks of 100 documents, twenty alphas."""
    rng, agreed, runs = np.random.default_rng(0), Counter(), 100
    for _ in range(runs):
        world = World(rng, 100, churn=0.03)
        for a in range(-10, 11):
            gains = {f"task{i}/acc": 0.0 for i in range(8)}
            world.scored("expo", {"alpha": a / 10}, gains)
        checks = alpha.gains(world.points, world.documents if kept else None).checks
        agreed.update(c.name for c in checks if c.verdict == "agrees")
    assert agreed["gains"] / runs <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)
    assert not agreed["depends"]


def with_errors(world):
    """Return the points as committed ones will be: paired errors of each draw, no documents."""
    for p in world.points:
        kept = world.documents[p.key]
        apart = kept[GSM] - kept[f"{GSM}@post"]
        error = apart.std(ddof=1) / math.sqrt(len(apart))
        numbers = {f"{GSM}_change": apart.mean(), f"{GSM}_change_error": error}
        yield replace(p, metrics={**p.metrics, **numbers})


@pytest.mark.parametrize(("basis", "count"), [("errors", 1000), ("scores", 3000)])
def test_without_documents_chance_is_no_proof_either(basis, count):
    """Errors of each draw, or scores alone: wider errors, and so never more agreement."""
    rng, agreed, runs = np.random.default_rng(0), Counter(), 200
    for _ in range(runs):
        world = drawn(patterns.plane((0.3,), (0.3, 0.0), -0.02), rng, count)
        points = world.points if basis == "scores" else list(with_errors(world))
        found = curves.text(points)
        agreed.update(c.name for c in found.checks if c.verdict == "agrees")
        assert evidence.BASES[basis] in found.notes
    assert agreed["small"] / runs <= 0.05
    assert agreed["small_negative"] / runs >= 0.9


def test_a_gain_is_no_loss():
    world = drawn(patterns.plane((0.3,), (0.3, 0.0), 0.1), np.random.default_rng(0), 1000)
    assert [c.verdict for c in curves.text(world.points, world.documents).checks] == ["agrees"] * 2


def test_a_hundred_documents_cannot_show_a_loss_below_two_points():
    """Not one document differs, and yet one of 100 in 50 would be missed in 13 % of all draws."""
    for count, wanted in ((100, "undecided"), (300, "agrees")):
        world = World(np.random.default_rng(0), count, churn=0.0)
        patterns.plane((0.3,))(world)
        checks = curves.text(world.points, world.documents).checks
        assert [c.verdict for c in checks] == [wanted] * 2


@pytest.mark.parametrize(
    ("find", "draw", "name", "wanted"),
    [
        (curves.text, patterns.plane((0.3,), (0.3, 0.0), -0.2), "small", "disagrees"),
        (table1.table, patterns.ways(product=-0.1), "biased_product", "disagrees"),
        (parts.terms, patterns.terms(alone=-0.1), "positive", "disagrees"),
        (expo.expo_term, patterns.along(lambda a: -a), "rises", "disagrees"),
        (bits.blocks, patterns.magnitudes(four=-0.12), "back", "disagrees"),
        (bits.statistic, patterns.multiples({0.5: 0.2, 1.0: 0.0, 2.0: 0.0}), "best", "disagrees"),
        (intensity.intensity, patterns.intensities(dare=8.0), "alike", "disagrees"),
    ],
)  # fmt: skip
def test_disagreement_is_within_reach(find, draw, name, wanted):
    world = drawn(draw, np.random.default_rng(0), 1000)
    found = find(world.points, world.documents)
    assert {c.name: c.verdict for c in found.checks}[name] == wanted
    assert found.verdict == "disagrees", "a claim is worth what its worst part is"


def test_the_best_setting_is_judged_by_documents_that_it_was_not_chosen_by():
    """A score that is high on half A by chance, at one alpha, gains nothing."""
    world = World(np.random.default_rng(0), 400, churn=0.0)
    for a in (-0.2, 0.0, 0.2):
        world.scored("expo", {"alpha": a}, {"task/acc": 0.0})
    lucky = next(p for p in world.points if p.settings["alpha"] == 0.2)
    scores = world.documents[lucky.key]["task/acc"]
    scores[splits.places(400, "A")] = 1.0
    assert alpha.gains(world.points, world.documents).checks[0].held == 0
    scores[:] = 1.0
    assert alpha.gains(world.points, world.documents).checks[0].verdict == "agrees"
