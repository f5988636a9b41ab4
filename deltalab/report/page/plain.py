"""Plain cards of experiments without one: what their report has drawn, and how much there is."""

from collections.abc import Sequence
from pathlib import Path

from deltalab.report.figures import FIGURES
from deltalab.report.page.cards import Card, Figure, lighter
from deltalab.store.record import Outcome
from deltalab.store.shown import stem


def without_card(directory: Path, points: Sequence[Outcome], known: Sequence[str]) -> list[Card]:
    """Make a plain card of every experiment that has points, or a report with figures, here.

    Args:
        directory: holds the reports `NAME.md` and their figures `NAME_*.svg`.
        points: the records, once for each of their experiments.
        known: experiments that have a card.
    """
    names = {stem(point.experiment): point.experiment for point in points}
    for path in directory.glob("*.md"):
        if _figures(directory, path.stem):
            names.setdefault(path.stem, path.stem)
    found = [_card(directory, name, points) for name in names.values() if name not in known]
    return sorted(found, key=lambda card: card.order)


def _card(directory: Path, name: str, points: Sequence[Outcome]) -> Card:
    own = [point for point in points if point.experiment == name]
    page = f"{stem(name)}.md"
    failed = sum(point.failure is not None for point in own)
    facts = [
        ("points", f"{len(own)}" if own else "no records here"),
        ("failed", f"{failed}" if failed else ""),
        ("models", ", ".join(sorted({point.model for point in own}))),
    ]
    return Card(
        name=name,
        title=name,
        facts=tuple(fact for fact in facts if fact[1]),
        figures=tuple(_figures(directory, stem(name))),
        page=page if (directory / page).is_file() else "",
    )


def _figures(directory: Path, name: str) -> list[Figure]:
    found = []
    for figure, module in FIGURES.items():
        paths = [directory / f"{name}_{figure}.{ending}" for ending in ("svg", "png")]
        path = lighter([path for path in paths if path.is_file()])
        if path:
            found.append(Figure(path, module.CAPTION))
    return found
