"""Cards as the template shows them: with anchors, embedded figures and sortable cells."""

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from deltalab.report.page.cards import Card, Figure, Grid

RESERVED = ("top", "overview", "points")
"""Anchors of the page's own sections."""
_NUMBER = re.compile(r"[+\-\u2212]?\d+(\.\d+)?([eE][+\-]?\d+)?(?=$|[ %±(?])")
LEAST = "-1e308"
"""Where an empty cell of a column of numbers sorts."""


def shown(cards: Sequence[Card]) -> list[dict[str, Any]]:
    """Make of every card what the template needs."""
    taken = set(RESERVED)
    found = []
    for card in cards:
        anchor = _anchor(card.name, taken)
        taken.add(anchor)
        found.append(
            {
                "anchor": anchor,
                "card": card,
                "figures": [_figure(figure, card) for figure in card.figures],
                "minutes": "" if card.minutes is None else f"{card.minutes:.3g}",
                "page": quote(card.page),
                "tables": [_table(table) for table in card.tables],
                "title": _beyond(card.label, card.title if card.title != card.name else ""),
            }
        )
    return found


def _anchor(name: str, taken: set[str]) -> str:
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "card"
    names = (plain, *(f"{plain}-{number}" for number in range(2, len(taken) + 3)))
    return next(name for name in names if name not in taken)


def _beyond(label: str, title: str) -> str:
    """Return what a title says beyond the label that stands before it.

    >>> _beyond("Fig. 6", "Fig. 6: the term falls"), _beyond("Fig. 6", "The term falls")
    ('the term falls', 'The term falls')
    """
    return title.removeprefix(label).lstrip(" :.,") if title.startswith(label) else title


def _figure(figure: Figure, card: Card) -> dict[str, str]:
    alt = f"{card.label}: {figure.caption or card.title}"
    return {"source": embedded(figure.path), "alt": alt, "caption": figure.caption}


def embedded(path: Path) -> str:
    """Return an image as a data URI: SVG percent-encoded, which is shorter, pixels in base64."""
    data = path.read_bytes()
    if path.suffix.lower() == ".svg":
        # An image may hold scripts, but none runs and nothing is fetched inside an <img>.
        return "data:image/svg+xml," + quote(data, safe=" !$&'()*+,-./:;=?@[]^_`{|}~")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _table(table: Grid) -> dict[str, Any]:
    columns = list(zip(*table.rows, strict=True))
    orders = [_orders(cells) for cells in columns]
    rows = [
        [{"text": _written(cell), "order": orders[i][number]} for i, cell in enumerate(row)]
        for number, row in enumerate(table.rows)
    ]
    return {"title": table.title, "columns": table.columns, "rows": rows}


def _orders(cells: Sequence[float | str]) -> list[str | None]:
    """Return what a column sorts by: the number that each cell begins with, if all do.

    >>> _orders([0.5, "76.4 ± 0.3", ""]), _orders(["2026-11-21", "9"])
    (['0.5', '76.4', '-1e308'], [None, None])
    """
    found = []
    for cell in cells:
        match = _NUMBER.match(str(cell))
        if cell in ("", "-"):
            found.append(LEAST)
        elif match is None:
            return [None for _ in cells]
        else:
            found.append(match[0].replace("\u2212", "-"))
    return list(found) if set(found) != {LEAST} else [None for _ in cells]


def _written(cell: float | str) -> str:
    """Write a cell.

    >>> _written(135.0), _written(0.12345678), _written("a")
    ('135', '0.123457', 'a')
    """
    if isinstance(cell, str):
        return cell
    return str(int(cell)) if cell.is_integer() and abs(cell) < 1e15 else f"{cell:.6g}"
