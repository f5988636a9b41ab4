"""Cards: what is to be told of an artefact of the paper, of a study or of an experiment."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERDICTS = ("agrees", "undecided", "partly", "disagrees", "finding")
Warn = Callable[[str], None]


@dataclass(frozen=True)
class Figure:
    """A picture beside its card, and what it shows."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Grid:
    """A table as it stands in a card: cells are numbers or text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[float | str, ...], ...]


@dataclass(frozen=True)
class Card:
    """One artefact of the paper, a study, or (without `kind`) an experiment of which no card tells.

    Attributes:
        facts: what else is known, by its title, such as `seeds` and `hardware`.
        commands: title -> shell command.
        lines: the file of its points, JSON lines, if there is one.
        experiments: whose points it tells of.
        page: the report that lists every point.
    """

    name: str
    title: str
    kind: str = ""
    claim: str = ""
    verdict: str = ""
    sentence: str = ""
    notes: tuple[str, ...] = ()
    commands: tuple[tuple[str, str], ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    minutes: float | None = None
    hardware: str = ""
    date: str = ""
    figures: tuple[Figure, ...] = ()
    tables: tuple[Grid, ...] = ()
    lines: Path | None = None
    experiments: tuple[str, ...] = ()
    page: str = ""

    @property
    def label(self) -> str:
        """The name as the paper writes it.

        >>> Card("fig12", "").label, Card("table1", "").label, Card("my_sweep", "").label
        ('Fig. 12', 'Table 1', 'my_sweep')
        """
        found = re.fullmatch(r"(fig|table)(\d+)", self.name)
        if not found:
            return self.name.capitalize() if self.kind in ("answer", "study") else self.name
        return f"{'Fig.' if found[1] == 'fig' else 'Table'} {found[2]}"

    @property
    def order(self) -> tuple[Any, ...]:
        """Where the card stands: the answer, tables, figures by number, studies, experiments.

        >>> names = ("fig10", "rules", "fig2", "table1")
        >>> sorted(names, key=lambda name: Card(name, "", "").order)
        ['table1', 'fig2', 'fig10', 'rules']
        """
        kinds = {"answer": 0, "artefact": 1, "study": 2}
        found = re.fullmatch(r"(table|fig)(\d+)", self.name)
        place = (("table", "fig").index(found[1]), int(found[2])) if found else (2, 0)
        return kinds.get(self.kind, 3), *place, self.name


MOST_BYTES = 400_000
"""Beyond this the smaller of a figure's two files is shown, be it pixels."""


def lighter(paths: Sequence[Path]) -> Path | None:
    """Choose among a figure's files the first one, unless it is heavy and another is lighter."""
    sizes = [path.stat().st_size for path in paths]
    return paths[0 if sizes[0] <= MOST_BYTES else sizes.index(min(sizes))] if paths else None
