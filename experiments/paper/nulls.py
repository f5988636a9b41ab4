"""What every check must not take for the paper's claim, and what it must see.

Each check of an artefact declares here its null, a world in which its claim is just not true: no
dependence on the setting where a difference is claimed, a loss of exactly the margin where sameness
is. And each artefact declares the paper's pattern, with the size of the effect and of the data. A
test draws both a thousand times and has the artefact's own checks judge: they may agree on the null
in 5 %, and must on the pattern in 90 %. A check that is not declared fails that test.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltalab.store.record import Outcome
from experiments.atlas import patterns as mapped
from experiments.atlas.study import atlas
from experiments.compression import patterns as coded
from experiments.compression.study import compression
from experiments.merging import study
from experiments.merging.patterns import NULLS, merges
from experiments.paper import (
    alpha,
    bits,
    curves,
    expo,
    intensity,
    parts,
    predict,
    rules,
    safety,
    saturation,
    scores,
    table1,
)
from experiments.paper.bits import BACK
from experiments.paper.found import NEAR, Found
from experiments.paper.patterns import (
    Draw,
    accounts,
    along,
    directions,
    intensities,
    levels,
    magnitudes,
    multiples,
    nodes,
    plane,
    restored,
    tasks,
    terms,
    ways,
)
from experiments.paper.simulate import World
from experiments.regime import patterns as growing
from experiments.regime.study import regime
from experiments.sotu import patterns as streams
from experiments.sotu.study import sotu
from experiments.visionfuse import patterns as fusing
from experiments.visionfuse.study import visionfuse

Find = Callable[[Sequence[Outcome], Any], Found]


@dataclass(frozen=True)
class Declared:
    """What an artefact's checks must see, and what they must not.

    Attributes:
        effect: the paper's pattern with its size, and that of the data, in words.
        pattern: draws it.
        nulls: by the names of the checks: the null in words, and what draws it.
        count: documents of a task.
        runs: data sets that are drawn of each.
    """

    effect: str
    pattern: Draw
    nulls: Mapping[str, tuple[str, Draw]]
    count: int = 1000
    runs: int = 1000


def drawn(draw: Draw, rng: np.random.Generator, count: int) -> World:
    """Draw one data set."""
    world = World(rng, count)
    draw(world)
    return world


_TEXT, _IMAGES = (0.1, 0.3), (0.3, 0.9)
_LOSS = "one cell loses exactly two points"
_FLAT = {0.5: -0.2, 1.0: 0.0, 1.25: 0.0, 2.0: -0.3}

DECLARED: dict[Find, Declared] = {
    curves.text: Declared(
        "no loss; of 1,000 documents half a per cent lost and won by chance, three draws",
        plane(_TEXT),
        {
            "small": (_LOSS, plane(_TEXT, (0.3, 0.0), -NEAR)),
            "small_negative": (_LOSS, plane(_TEXT, (0.3, -0.5), -NEAR)),
        },
    ),
    curves.images: Declared(
        "no loss; of 1,000 images half a per cent lost and won by chance, three draws",
        plane(_IMAGES),
        {
            "half": (_LOSS, plane(_IMAGES, (0.3, -0.5), -NEAR)),
            "large": (_LOSS, plane(_IMAGES, (0.9, 0.0), -NEAR)),
            "large_negative": (_LOSS, plane(_IMAGES, (0.9, -0.5), -NEAR)),
        },
    ),
    table1.table: Declared(
        "the first two ways lose nothing, the third falls from 80 to 5 %; 1,000 documents",
        ways(),
        {
            "dare": (_LOSS, ways(dare=-NEAR)),
            "biased_sign": (_LOSS, ways(sign=-NEAR)),
            "biased_product": ("at one k exactly half of the score is left", ways(product=-0.4)),
        },
    ),
    parts.terms: Declared(
        "terms of five standard errors and more, TIES growing by ten",
        terms(),
        {
            "small": ("at one rate DARE's term is a tenth of drop-only's", terms(dare=0.1)),
            "positive": ("Twin's term is 0", terms(alone=0.0)),
            "grows": ("the term of TIES does not depend on the rate", terms(ties=0.0)),
            "above": ("at one rate the rescale makes no difference", terms(drop=0.0005)),
        },
    ),
    expo.expo_term: Declared(
        "a fall by .09 nats and a rise to .07 at .6 and beyond, of standard error .01",
        along(lambda a: 1.2 * a * (a - 0.5)),
        {
            "falls": ("the term does not depend on alpha", along(lambda a: 0.0)),
            "inside": ("it falls and stays there", along(lambda a: -0.1)),
            "rises": ("it is 0 from .6 on", along(lambda a: min(0.0, 1.2 * a * (a - 0.6)))),
            "far": ("it is 0 at the end", along(lambda a: 1.2 * a * (a - 1.0))),
        },
    ),
    bits.blocks: Declared(
        "one score of two loses 12 points with no bit and none with four; 3,000 documents",
        magnitudes(),
        {
            "back": ("four bits leave exactly one point to post", magnitudes(four=-BACK)),
            "needed": ("bits change nothing", magnitudes(none=0.0)),
        },
        count=3000,
    ),
    bits.statistic: Declared(
        "a multiple of 1.25 loses nothing, .5 loses 20 points, 2 loses 30; 2,000 documents",
        multiples(_FLAT),
        {
            "best": ("another multiple is exactly two points better",
                     multiples({**_FLAT, 1.25: NEAR})),
            "far": ("the largest multiple loses exactly two points",
                    multiples({**_FLAT, 2.0: -NEAR})),
            "par": ("uniform magnitudes lose exactly two points", multiples(_FLAT, -NEAR)),
        },
        count=2000,
    ),
    alpha.gains: Declared(
        "one task gains 8 points by interpolation, another by extrapolation; 1,000 documents",
        directions((0.08, -0.08), (-0.08, 0.08)),
        {
            "gains": ("no score of three depends on alpha", directions(*[(0.0, 0.0)] * 3)),
            "depends": ("interpolation is the better direction of both tasks",
                        directions((0.08, 0.0), (0.08, 0.0))),
        },
    ),
    intensity.intensity: Declared(
        "noise grows by .75 nats, DARE changes the loss 1.1 times as much; errors of .02",
        intensities(),
        {
            "grows": ("the change does not depend on the intensity", intensities((0.5, 0.5))),
            "alike": ("at one intensity DARE changes the loss exactly twice as much",
                      intensities(dare=2.0)),
        },
    ),
    rules.rules: Declared(
        "Gauss's errors a twentieth of the paper's rule's, 12 edits of each of two pairs",
        nodes(),
        {"gauss": ("both rules err alike in one pair", nodes(gauss=0.02))},
    ),
    predict.predict: Declared(
        "each account's errors a tenth of the cheaper one's, 20 edits of each of two pairs",
        accounts(),
        {
            "second_order": ("second order errs as first order does, in one pair",
                             accounts(second=0.2)),
            "adaptive": ("the term errs as second order does, in one pair", accounts(term=0.02)),
        },
    ),
    compression: Declared(
        "every claim by a third and more, on five pairs of 50 examples a half",
        coded.codes(),
        coded.NULLS,
        runs=60,
    ),
    atlas: Declared(
        "terms close on 99.5 % of 60 edits, predictions ranked at .97, codes that cost nothing"
        " where the loss change of 256 examples spreads by a seventh of the gap; three pairs",
        mapped.edits(),
        mapped.NULLS,
        runs=200,
    ),
    regime: Declared(
        "DARE .05 nats below BitDelta on small deltas and above it on large ones, changes that"
        " follow |E|/|W|; the sizes of the runs, 128 examples whose change spreads by .05 nats",
        growing.deltas(),
        growing.NULLS,
        runs=100,
    ),
    sotu: Declared(
        "seven points above all others on 2,000 images, a fifth of what sequential fine-tuning"
        " forgets; cosines and collisions of standard error .001",
        streams.stream(),
        streams.NULLS,
        count=2000,
        runs=200,
    ),
    visionfuse: Declared(
        "twenty points above every language model alone, thirty above every single model, on 500"
        " pictures and five seeds of training that differ by two points",
        fusing.models(),
        fusing.NULLS,
        count=500,
        runs=200,
    ),
    saturation.saturation: Declared(
        "errors that halve per bit up to a tenth, four bits that lose nothing on 256 examples whose"
        " loss change spreads by a twentieth of the gap; three pairs",
        levels(),
        {
            "rate": ("in one pair log2 of the error falls by exactly the bound",
                     levels(rate=saturation.HALVED)),
            "enough": ("in one pair four bits lose exactly the margin",
                     levels(four=saturation.MARGIN)),
            "saturated": ("in one pair eight bits gain exactly the margin over four",
                          levels(four=saturation.MARGIN)),
        },
    ),
    scores.scores: Declared(
        "a rank correlation of .95 in each of three tasks of 60 settings",
        tasks(),
        {
            "loss": ("in one task exactly that of the bound", tasks(loss=scores.LEAST)),
            "term": ("in one task exactly that of the bound", tasks(term=scores.LEAST)),
        },
    ),
    study.merging: Declared(
        "one method loses nothing, one gains four points on 3 x 1,000 documents; SVC loses .3 nats"
        " less than the sum, EMR a tenth of the mean; terms within .1 %; 49 merges, ranked at .99",
        merges(),
        NULLS,
        runs=200,
    ),
    safety.safety: Declared(
        "post 80 % attack success, aligned 2, Safe Delta 3 at 5 points of the task, random 50; IRR"
        " 20 at 40 points, 10 recalibrated, random 60; 800 prompts of each kind",
        restored(),
        {
            "safe": ("Safe Delta's is exactly five points above aligned", restored(safe=-0.73)),
            "useful": ("Safe Delta keeps exactly 80 % of the gain", restored(useful=-0.15)),
            "choice": ("random entries have three times Safe Delta's", restored(random=-0.71)),
            "removed": ("removal comes exactly half way", restored(removed=-0.39)),
            "signs": ("random entries have twice IRR's", restored(drawn=-0.4)),
            "recalibrated": ("exactly half is made good", restored(recalibrated=-0.2)),
        },
        count=800,
        runs=200,
    ),
}  # fmt: skip
