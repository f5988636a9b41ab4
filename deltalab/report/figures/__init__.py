"""The figures of an experiment, each in a file of its own: PNG for the eye, SVG for print.

Nothing here uses pyplot, so that drawing neither needs nor changes any global state, and the same
points give the same bytes.
"""

from collections.abc import Sequence
from pathlib import Path

from deltalab.drawing import STYLE, save
from deltalab.report.figures import accuracy, agreement, parts
from deltalab.store.record import Outcome

FIGURES = {"accuracy": accuracy, "term": agreement, "parts": parts}


def draw(points: Sequence[Outcome], directory: Path, stem: str) -> list[tuple[Path, str]]:
    """Write all figures that the points allow; return the path of each PNG with its caption."""
    import matplotlib

    done = []
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        for name, module in FIGURES.items():
            figure = module.figure(points)
            if figure is not None:
                path = directory / f"{stem}_{name}.png"
                save(figure, path, dpi=200)
                done.append((path, module.CAPTION))
    return done
