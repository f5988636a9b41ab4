"""What is claimed of codes, written before the points that judge were run.

A claim compares two ways to spend about the same bits, pair by pair: one loses at most so many
times what the other does. Bits are those of the file, numbers, scales, places and description. A
pair is informative where the two are not both beyond `MOST` of what discarding the delta loses, and
not both below `LEAST` of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BUDGETS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""True bits a weight, of the tensors that are edited."""
WITHIN = 1.05
"""A code is of a budget up to this factor: what descriptions may add to a file."""
MOST, LEAST = 0.7, 0.01
PAIRS = 3
"""On how many informative pairs a claim must be shown."""


@dataclass(frozen=True)
class Way:
    """Some points of a pair: those of an edit with these settings.

    Attributes:
        edit: its name.
        settings: that the points must have.
        budget: of the bits; None: any. Of several settings the one of most bits within it.
        spread: by which budget bits are spread over the tensors.
        chosen: of several settings the one that loses least on half A.
    """

    edit: str
    settings: Mapping[str, Any]
    budget: float | None = None
    spread: str | None = None
    chosen: bool = False


@dataclass(frozen=True)
class Claim:
    """One loses at most `times` what another does, on at least `PAIRS` pairs.

    Attributes:
        words: what is claimed.
        one: that loses less.
        other: that loses more.
        times: the factor.
        all: on every informative pair instead.
        none_worse: and is shown to lose more on none.
        fewer: the first must take no more bits than the second; a pair where it does is left out.
        without: pairs that are told and not counted.
    """

    words: str
    one: Way
    other: Way
    times: float = 1.0
    all: bool = False
    none_worse: bool = False
    fewer: bool = False
    without: tuple[str, ...] = ()


BITDELTA = Way("bitdelta", {"axis": "tensor"})
COME = Way("delta_come", {}, 1.0)
QRELO = Way("dqrelo", {"order": "sign_svd"}, 2.0)
IMPART = Way("impart", {"importance": True, "rescale": True}, 1.0)
SEEN = ("mnist_vit",)
"""Budgets were compared on half B of this pair while they were made."""

CLAIMS = {
    "come": Claim(
        "Delta-CoMe at one bit loses at most half of what BitDelta does", COME, BITDELTA, 0.5
    ),
    "rank": Claim(
        "Delta-CoMe at one bit loses at most half of what low rank does",
        COME, Way("twin", {}, 1.0), 0.5, all=True,
    ),
    "qrelo": Claim(
        "D-QRELO at two bits loses at most half of what BitDelta does at one", QRELO, BITDELTA, 0.5
    ),
    "order": Claim(
        "signs before the low rank lose less than after it, at two bits",
        QRELO, Way("dqrelo", {"order": "svd_sign"}, 2.0),
    ),
    "ultra": Claim(
        "UltraDelta at fewer bits loses at most .7 of what DARE does at one bit",
        Way("ultradelta", {}, 1.0), Way("dare", {}, 1.0), 0.7, fewer=True,
    ),
    "importance": Claim(
        "ImPart at one bit loses at most a fifth of what it does with the same rate everywhere",
        IMPART, Way("impart", {"importance": False}), 0.2,
    ),
    "rescale": Claim(
        "ImPart at one bit loses less than without the rescale",
        IMPART, Way("impart", {"rescale": False}, 1.0),
    ),
    "cosines": Claim(
        "Delta-DCT loses at most .95 of what it does without the transform",
        Way("delta_dct", {"side": 16, "transform": "dct"}),
        Way("delta_dct", {"side": 16, "transform": "identity"}), 0.95,
    ),
    "axis": Claim(
        "BitDelta with the best axis of every tensor loses less than with one scale a tensor",
        Way("bitdelta", {"axis": "best"}), BITDELTA,
    ),
    "mix_half": Claim(
        "DeltaMix at half a bit loses at most 1.05 times what Delta-CoMe does",
        Way("delta_mix", {}, 0.5), Way("delta_come", {}, 0.5), 1.05,
    ),
    "mix_one": Claim(
        "DeltaMix at one bit loses at most 1.05 times what Delta-CoMe does",
        Way("delta_mix", {}, 1.0), COME, 1.05,
    ),
    "shift": Claim(
        "DBMS with the amount that half A chooses loses at most .8 of what it does without the"
        " base",
        Way("shifted", {}, chosen=True), Way("shifted", {"amount": 0}), 0.8,
    ),
    "spread_come": Claim(
        "Delta-CoMe at one bit loses less by knapsack than the same for all tensors",
        Way("delta_come", {}, 1.0, "Knapsack"), Way("delta_come", {}, 1.0, "Uniform"),
        none_worse=True, without=SEEN,
    ),
    "spread_qrelo": Claim(
        "D-QRELO at two bits loses less by knapsack than the same for all tensors",
        Way("dqrelo", {}, 2.0, "Knapsack"), Way("dqrelo", {}, 2.0, "Uniform"),
        none_worse=True, without=SEEN,
    ),
}  # fmt: skip
"""All claims by name."""
