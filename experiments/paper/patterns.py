"""The points that each artefact's experiment would leave, drawn: its pattern, or one of its nulls.

Every function returns what adds one artefact's points to an empty `World`; its arguments are the
effects, by default the paper's pattern.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from deltalab.store.record import Outcome
from deltalab.store.terms import Term
from experiments.paper import bits, safety, saturation
from experiments.paper.evidence import CHANGE
from experiments.paper.simulate import CHOICE, GSM, World

Draw = Callable[[World], None]


def plane(rates: Sequence[float], at: tuple[float, float] = (0, 0), gain: float = 0.0) -> Draw:
    """Return DARE over p and k, three draws each, with a gain at one place."""

    def draw(world: World) -> None:
        for p in rates:
            for k in (-0.5, 0.0):
                own = gain if (p, k) == at else 0.0
                world.scored("dare", {"p": p, "k": k}, {GSM: own}, draws=3)

    return draw


def ways(dare: float = 0.0, sign: float = 0.0, product: float = -0.75) -> Draw:
    """Return Table 1, with a change of the score at the first k of each way."""

    def draw(world: World) -> None:
        for first, k in ((1, 0.5), (0, 1.5)):
            world.scored("dare", {"k": k}, {GSM: first * dare}, draws=3)
            world.scored("biased_sign", {"k": k}, {GSM: first * sign})
            world.scored("biased_product", {"k": k}, {GSM: product if first else -0.75})

    return draw


def restored(
    safe: float = -0.77,
    useful: float = -0.05,
    random: float = -0.3,
    removed: float = -0.6,
    drawn: float = -0.2,
    recalibrated: float = -0.1,
) -> Draw:
    """Return edits of an unsafe model: how attack success and the task's score differ from post.

    Args:
        safe: Safe Delta's attack success.
        useful: its task.
        random: the attack success of as many random entries.
        removed: that of IRR, recalibrated or not.
        drawn: that of as many random entries.
        recalibrated: IRR's task; it is -.4 for removal alone.
    """

    def draw(world: World) -> None:
        world.scored("discard", {}, {safety.ATTACK: -0.78, safety.TASK: -0.75})
        for strength, more in ((0.1, 0.0), (0.7, 0.6)):
            own = {"strength": strength}
            gains = {safety.ATTACK: safe + more, safety.TASK: useful}
            world.scored("safe_delta", {**own, "choose": "safety"}, gains)
            gains = {safety.ATTACK: random, safety.TASK: -0.1}
            world.scored("safe_delta", {**own, "choose": "random"}, gains, draws=5)
        for recalibrate, task in ((False, -0.4), (True, recalibrated)):
            own = {"recalibrate": recalibrate, "identify": "sign"}
            world.scored("irr", own, {safety.ATTACK: removed, safety.TASK: task})
        own = {"recalibrate": True, "identify": "random"}
        world.scored("irr", own, {safety.ATTACK: drawn, safety.TASK: -0.1}, draws=5)

    return draw


TERMS = {"left": None, "gauss": None}
THREE = (0.001, 0.001, 0.001)


def terms(dare: float = 0.0005, drop: float = 1.0, ties: float = 0.1, alone: float = 0.02) -> Draw:
    """Return Fig. 3 at two rates: terms at the first, TIES growing by its share to the second."""

    def draw(world: World) -> None:
        for p, first, growth in ((0.1, True, 0.0), (0.9, False, ties)):
            now = dare if first else 0.0005
            world.lost("dare", {"p": p}, now, 0.002, THREE, TERMS)
            own = drop if first else 1.0
            world.lost("drop_only", {"p": p}, own, 0.01, THREE, TERMS)
            world.lost("ties", {"keep": round(1 - p, 6)}, 0.05 + growth, 0.01, rules=TERMS)
        world.lost("bitdelta", {}, 0.02, 0.004, rules=TERMS)
        world.lost("twin", {}, alone, 0.004, rules=TERMS)

    return draw


def along(curve: Callable[[float], float]) -> Draw:
    """Return ExPO's term along alpha, with a standard error of .01 nats."""

    def draw(world: World) -> None:
        for a in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0):
            world.lost("expo", {"alpha": a}, curve(a), 0.01 if a else 0.0, rules=TERMS)

    return draw


def magnitudes(none: float = -0.12, four: float = 0.0) -> Draw:
    """Return Fig. 4 for two scores, of which the second loses nothing with no bit."""

    def draw(world: World) -> None:
        for b, gain in ((0, none), (bits.FOUR, four)):
            world.scored("multibit", {"bits": b}, {GSM: gain, CHOICE: 0.0})

    return draw


def multiples(at: Mapping[float, float], drawn: float = 0.0) -> Draw:
    """Return BitDelta over multiples of the mean; drawn magnitudes at 1, of three draws."""

    def draw(world: World) -> None:
        for c, gain in at.items():
            for kind in bits.KINDS if c == 1.0 else ("mean",):
                own = gain + (drawn if kind == "uniform" else 0.0)
                settings = {"multiple": c, "magnitudes": kind}
                world.scored("bitdelta", settings, {GSM: own}, draws=1 if kind == "mean" else 3)

    return draw


def directions(*gains: tuple[float, float]) -> Draw:
    """Return scores along alpha, a task for each pair of gains at the best alpha of either way."""

    def draw(world: World) -> None:
        for a in (-1.0, -0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6, 1.0):
            top = 1.0 if abs(a) == 0.4 else 0.0
            own = {
                f"task{i}/acc": top * (one if a < 0 else two) for i, (one, two) in enumerate(gains)
            }
            world.scored("expo", {"alpha": a}, own)

    return draw


def intensities(noise: tuple[float, float] = (0.25, 1.0), dare: float = 1.1) -> Draw:
    """Return noise and DARE at two intensities, DARE's change a multiple of noise's at one."""

    def draw(world: World) -> None:
        three = (0.02,) * 3
        for v, change, times in ((0.25, noise[0], dare), (1.0, noise[1], 1.1)):
            world.lost("noise", {"sigma": v**0.5}, change, 0.02, three)
            world.lost("dare", {"p": v / (1 + v), "k": 0.0}, times * change, 0.02, three)
            world.lost("sign_flip", {"fraction": 0.1 * v, "balanced": False}, change, 0.02, three)

    return draw


def nodes(gauss: float = 0.001, left: float = 0.02, edits: int = 12) -> Draw:
    """Return two rules' terms of two pairs' edits, off the change by normal errors.

    They are so wide in the first pair; in the second Gauss's errors are a twentieth of the other's.
    """

    def draw(world: World) -> None:
        for model in ("m", "n"):
            for place in range(edits):
                change = 0.1 + 0.2 * world.rng.random()
                own = gauss if model == "m" else left / 20
                for rule, count, wide in (("gauss", 3, own), ("left", 5, left)):
                    term = Term(rule, count, change + wide * world.rng.standard_normal())
                    world.points.append(_point(model, place, change, {rule: term}))

    return draw


def levels(rate: float = 1.0, four: float = 0.0) -> Draw:
    """Return three pairs by magnitude bits; the arguments are those of the first.

    Args:
        rate: by how much log2 of the error falls per bit, in expectation.
        four: what four bits lose, a share of the gap; eight lose nothing.
    """

    def draw(world: World) -> None:
        for model in ("m", "n", "o"):
            fall, lost = (rate, four) if model == "m" else (1.0, 0.0)
            error = 0.6
            for count in range(9):
                mean = lost if count == saturation.FOUR else 0.0
                seen = mean + world.rng.standard_normal(256) / 20
                key = f"{len(world.points)}"
                world.documents[key] = {CHANGE: seen}
                world.points.append(
                    Outcome(
                        model,
                        "multibit",
                        {"bits": count, "blocks": "equal_width"},
                        key=key,
                        change=float(seen.mean()),
                        gap=1.0,
                        relative_shift=error,
                    )
                )
                error *= 2.0 ** -(fall + 0.1 * world.rng.standard_normal())

    return draw


def tasks(loss: float = 0.95, term: float = 0.95, settings: int = 60) -> Draw:
    """Return three models of one task, whose lost scores correlate in rank with loss and term.

    Ranks of two normal numbers of correlation 2 sin(pi r / 6) correlate by r; the arguments are
    those of the first model.
    """

    def draw(world: World) -> None:
        for model in ("m", "n", "o"):
            wanted = (loss, term) if model == "m" else (0.95, 0.95)
            for place in range(settings):
                lost = world.rng.standard_normal()
                change, told = (
                    r * lost + math.sqrt(1 - r * r) * world.rng.standard_normal()
                    for r in (2 * math.sin(math.pi * rank / 6) for rank in wanted)
                )
                world.points.append(
                    Outcome(
                        model,
                        "dare",
                        {"p": place},
                        key=f"{len(world.points)}",
                        metrics={GSM: 0.5 - 0.05 * lost},
                        reference={"post": {GSM: 0.6}},
                        change=change,
                        terms={"adaptive": Term("adaptive", None, told)},
                    )
                )

    return draw


def accounts(first: float = 0.2, second: float = 0.02, term: float = 0.001) -> Draw:
    """Return accounts of 20 edits of two pairs, off the change by normal errors.

    They are so wide in the first pair; in the second each is a tenth of the one before.
    """

    def draw(world: World) -> None:
        for model in ("m", "n"):
            own = (first, second, term) if model == "m" else (0.2, 0.02, 0.002)
            widths = dict(zip(("first_order", "second_order", "adaptive"), own, strict=True))
            for place in range(20):
                change = 0.1 + 0.2 * world.rng.random()
                off = {r: w * world.rng.standard_normal() for r, w in widths.items()}
                terms = {r: Term(r, None, change + apart) for r, apart in off.items()}
                world.points.append(_point(model, place, change, terms))

    return draw


def _point(model: str, place: int, change: float, terms: Mapping[str, Term]) -> Outcome:
    settings = {"place": place}
    return Outcome(model, "dare", settings, seed=0, change=change, error=0.01, terms=terms)
