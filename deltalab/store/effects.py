"""The class of an edit: its loss change is shown to be small, or to be large, or neither.

The paper sorts edits into competitive, improved and decreased. A change that is merely not
significant is not shown to be small: with more examples it would be. An edit is *competitive* where
its change is shown to lie within a margin, *improved* or *decreased* where it is shown to lie
beyond, and *undecided* where the examples cannot tell. The margin is a share of what post-training
gained on the same examples, the gap from the pre- to the post-trained model's loss.

Needs no torch: reports class points anew, at any margin, from the numbers in their records.
"""

import math
from typing import Literal

CLASSES = ("competitive", "decreased", "improved", "undecided")
Class = Literal["competitive", "decreased", "improved", "undecided"]
Significance = Literal["competitive", "decreased", "improved"]
MARGIN = 0.02
"""The default margin, a share of the gap; `margin` in conf/config.yaml is the same."""

MARGINS = (0.01, 0.02, 0.05)
"""At which margins reports count the classes."""


def check_margin(margin: object, setting: str = "margin") -> float:
    """Return a margin that is one.

    Raises:
        ValueError: it is no number in (0, 1).
    """
    if isinstance(margin, int | float) and not isinstance(margin, bool) and 0 < margin < 1:
        return float(margin)
    raise ValueError(f"{setting}={margin}: must be a share of the gap, in (0, 1)")


def classify(
    change: float | None,
    error: float | None,
    gap: float | None,
    gap_error: float | None,
    margin: float = MARGIN,
    factor: float = 2.0,
) -> Class | None:
    """Class a loss change by two one-sided tests against a margin around no change.

    With m = margin * gap and the interval change -+ factor * error: competitive where the interval
    lies within [-m, m], decreased where it lies above m, improved where it lies below -m.

    Args:
        change: the loss of the edited model minus that of the post-trained one.
        error: its standard error.
        gap: the loss of the pre-trained model minus that of the post-trained one, same examples.
        gap_error: its standard error.
        margin: share of the gap, in (0, 1).
        factor: standard errors to each side, `statistics.means.factor` of the error's freedom.

    Returns:
        The class, undecided where the interval crosses a margin or the gap itself is not above two
        standard errors; None where one of the numbers is not known.

    >>> classify(0.001, 0.002, 1.0, 0.1), classify(0.015, 0.005, 1.0, 0.1)
    ('competitive', 'undecided')
    >>> classify(0.05, 0.01, 1.0, 0.1), classify(-0.05, 0.01, 1.0, 0.1)
    ('decreased', 'improved')
    >>> classify(0.0, 0.0, 0.1, 0.1), classify(0.0, 0.0, None, None)
    ('undecided', None)
    """
    if change is None or error is None or gap is None or gap_error is None:
        return None
    if math.isnan(change + error + gap + gap_error):
        return None
    low, high, most = change - factor * error, change + factor * error, margin * gap
    if gap <= 2 * gap_error:
        return "undecided"
    if low > most:
        return "decreased"
    if high < -most:
        return "improved"
    return "competitive" if -most <= low and high <= most else "undecided"


def two_errors(change: float | None, error: float | None) -> Significance | None:
    """Class an edit by the former rule: whether its change exceeds two standard errors.

    Records keep it as `class_two_errors`. It says whether a change is shown, not how large it is:
    every edit but the identity is decreased or improved once there are examples enough.

    >>> two_errors(0.03, 0.01), two_errors(-0.03, 0.01), two_errors(0.02, 0.01)
    ('decreased', 'improved', 'competitive')
    >>> two_errors(0.0, None)
    """
    if change is None or error is None or math.isnan(change):
        return None
    if abs(change) <= 2 * error:
        return "competitive"
    return "improved" if change < 0 else "decreased"
