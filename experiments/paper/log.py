"""`results/README.md`: every artefact in a line, from its card: `python -m experiments.paper.log`.

The text around the table is written by hand.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltalab.report.tables import Column, markdown
from experiments.paper.artefacts import ARTEFACTS

START, END = "<!-- artefacts: written by `make reproduce` -->\n", "<!-- end -->"


def cards(results: Path) -> list[dict[str, Any]]:
    """Read the cards that there are, in the order of the artefacts."""
    paths = [results / each.folder / f"{name}.json" for name, each in ARTEFACTS.items()]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Write the cards as a Markdown table."""

    def column(title: str, *values: str, right: bool = False, markup: bool = False) -> Column:
        return Column(title, values, right=right, markup=markup)

    figures = [
        f"[{c['name']}]({ARTEFACTS[c['name']].folder}/{c['figures'][0]['png']})" for c in found
    ]
    return markdown([
        column("artefact", *figures, markup=True),
        column("claim", *(c["claim"] for c in found)),
        column("verdict", *(_verdict(c) for c in found), markup=True),
        column("in one sentence", *(c["sentence"] for c in found)),
        column("points", *(str(c["points"]) for c in found), right=True),
        column("core minutes", *(f"{c['minutes']:.1f}" for c in found), right=True),
        column("command", *(f"`{c['command']}`" for c in found), markup=True),
        column("hardware", *(c["hardware"] for c in found)),
        column("date", *(c["date"] for c in found)),
    ])  # fmt: skip


def _verdict(card: Mapping[str, Any]) -> str:
    """Write a verdict, with the check that decides it where it is not that all agree."""
    reason = f": {card['deciding']}" if card.get("deciding") else ""
    return f"**{card['verdict']}**{reason}"


def with_table(page: str, found: Sequence[Mapping[str, Any]]) -> str:
    """Return the page with the table between its markers."""
    before, rest = page.split(START)
    return before + START + "\n" + table(found) + "\n\n" + END + rest.split(END, 1)[1]


def main(results: Path) -> None:
    """Write the table into `README.md`, where the results directory has one."""
    path = results / "README.md"
    if path.is_file():
        path.write_text(with_table(path.read_text("utf-8"), cards(results)), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results"))
