"""`DIR/index.html`: all that a results directory tells, on one page that needs no network.

A template with escaping makes the page; `DIR/paper/*.json` and `DIR/merging/*.json` are its
cards, the records (or, where there are none, CSV files beside the cards) its points. The same
files give the same bytes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import deltalab
from deltalab.report.page.cards import VERDICTS, Card, Warn
from deltalab.report.page.chart import chart, is_symlog
from deltalab.report.page.libraries import datatables, digest, vega
from deltalab.report.page.parsing import read_cards
from deltalab.report.page.plain import without_card
from deltalab.report.page.points import MOST_POINTS, Points, gather, tabulate
from deltalab.report.page.views import shown
from deltalab.store import files
from deltalab.store.record import Outcome
from deltalab.store.shown import html

NAME = "index.html"


def write(
    directory: Path, points: Sequence[Outcome], warn: Warn, place: Path | None = None
) -> Path:
    """Write the page of a results directory.

    Args:
        directory: holds `paper/*.json`, `merging/*.json`.
        points: its records, all of them.
        warn: told in one line of what cannot be shown.
        place: holds the reports `*.md` and their figures, gets `index.html`; None: `directory`.
    """
    place = directory if place is None else place
    cards = read_cards(directory, warn)
    every = gather(points, cards, warn)
    cards += without_card(place, points, [name for card in cards for name in card.experiments])
    records = len({point.key for point in points})
    return files.write(place / NAME, render(cards, tabulate(every), records))


def render(cards: Sequence[Card], points: Points, records: int) -> str:
    """Make the page's text."""
    from jinja2 import Environment
    from markupsafe import Markup

    made = Environment(autoescape=True, trim_blocks=True, finalize=html)
    template = made.from_string(_own("page.html"))
    views = shown(cards)
    specification = chart(points)
    script = _own("start.js")
    counted = Counter(card.verdict for card in cards)
    fields = [asdict(field) for field in points.fields.values()]
    return template.render(
        cards=views,
        overview=[view for view in views if view["card"].kind],
        counts=[(verdict, counted[verdict]) for verdict in VERDICTS if counted[verdict]],
        verdicts=VERDICTS,
        reproduced=any(card.kind == "artefact" for card in cards),
        version=deltalab.__version__,
        source=_source(records, cards),
        shown_points=_shown(points),
        style=Markup(_own("style.css")),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none';"
        f" form-action 'none'; script-src blob: {digest(script)}",
        rows=_json({"fields": fields, "rows": points.rows}) if points.rows else None,
        symlog=specification is not None and is_symlog(specification),
        chart=_json(specification) if specification else None,
        vega=Markup(vega()) if specification else None,
        datatables=Markup(datatables()),
        script=Markup(script),
    )


def _own(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def _json(value: Any) -> Any:
    """Write JSON that ends no script element, whatever text it holds."""
    from jinja2.utils import htmlsafe_json_dumps

    return htmlsafe_json_dumps(value, separators=(",", ":"), allow_nan=False)


def _source(records: int, cards: Sequence[Card]) -> str:
    told = sum(bool(card.kind) for card in cards)
    counts = [(records, "record"), (told, "card")]
    return " and ".join(f"{n} {name}{'s' * (n != 1)}" for n, name in counts if n) or "reports"


def _shown(points: Points) -> str:
    count = len(points.rows)
    if count == points.total:
        return f"{count} point{'s' * (count != 1)}: one edit of one model with one seed each."
    return f"{count} of {points.total} points, evenly chosen: a page holds at most {MOST_POINTS}."
