"""Figures: plain ticks on every scale, the same bytes every time."""

import matplotlib

from deltalab.drawing import STYLE, panels, save


def test_no_tick_of_any_scale_is_a_formula(tmp_path):
    """Text is no formula in our figures; matplotlib writes the ticks of log axes as formulas."""
    for name in ("one", "two"):
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
            figure, grid = panels(1, 3, 9, 3)
            for axes, scale in zip(grid.flat, ("linear", "log", "symlog"), strict=True):
                axes.plot([0.001, 0.1, 10], [0.01, 1, 100])
                axes.set(xscale=scale, yscale=scale, title="$k_1$")
            save(figure, tmp_path / f"{name}.png", dpi=60)
    text = (tmp_path / "one.svg").read_text()
    assert "mathdefault" not in text
    assert "<!-- 0.01 -->" in text
    assert "<!-- $k_1$ -->" in text
    for ending in ("png", "svg"):
        one, two = (tmp_path / f"{name}.{ending}" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
