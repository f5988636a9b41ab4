"""The one look of all figures: safe for the colour-blind and readable in print."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltalab.store.shown import name

# Okabe and Ito's palette without its yellow, which print loses; black is kept for references.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
HATCHES = ("", "//", "..", "xx", "\\\\", "--")

STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "font.size": 9,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.markersize": 5,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.05,
    "svg.hashsalt": "deltalab",
    "text.parse_math": False,  # names of records are no formulas
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


def short(text: str) -> str:
    """Return what a record calls something, of a length that a figure has room for."""
    return name(text, 80)


def looks(index: int) -> tuple[str, str]:
    """Return the colour and marker of a series.

    The lengths of the two cycles have no common divisor, so that 63 series look different.

    >>> len({looks(index) for index in range(63)})
    63
    """
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


def panels(
    rows: int, columns: int, width: float, height: float, ratios: Sequence[float] | None = None
) -> tuple[Any, Any]:
    """Make a figure of `width` x `height` inches with a grid of axes, outside pyplot's state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, height_ratios=ratios)


def save(figure: Any, path: Path, dpi: int) -> None:
    """Write a figure as PNG, and as SVG beside it: the same figure gives the same bytes.

    As text is no formula here, ticks of axes that are not linear are written as plain numbers.

    Args:
        figure: of `panels`.
        path: of the PNG.
        dpi: of the PNG.
    """
    from matplotlib.ticker import NullFormatter

    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if axis.get_scale() != "linear":
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(NullFormatter())
    # Without the program's version and the date, which would differ between machines.
    figure.savefig(path, dpi=dpi, metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
