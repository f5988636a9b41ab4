"""AlpacaEval's files: a JSON list of `{instruction, output, generator, dataset}`."""

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_BYTES = 256 << 20
"""A larger file is refused: the reference outputs of 805 instructions are less than 2 MB."""


@dataclass(frozen=True)
class Reference:
    """An instruction with the output that a model is compared with."""

    instruction: str
    output: str
    generator: str
    dataset: str


def read(path: str | Path, setting: str = "evaluator.reference") -> tuple[Reference, ...]:
    """Read the reference outputs from a `.json` or `.json.gz` file.

    Raises:
        ValueError: not such a file, no instructions, or an instruction twice.
        OSError: the file cannot be read.
    """
    place = Path(path).expanduser()
    if not place.is_file():
        raise FileNotFoundError(f"{setting}={path}: no such file")
    try:
        with gzip.open(place) if place.suffix == ".gz" else open(place, "rb") as file:
            text = file.read(MOST_BYTES + 1)
    except (OSError, EOFError) as error:
        raise OSError(f"{setting}={path}: cannot be read ({error})") from None
    if len(text) > MOST_BYTES:
        raise ValueError(f"{setting}={path}: larger than {MOST_BYTES >> 20} MiB")
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{setting}={path}: not a JSON file") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(
            f"{setting}={path}: holds no instructions; it must be a JSON list of"
            " {instruction, output, generator, dataset}"
        )
    found = tuple(_row(row, number, f"{setting}={path}") for number, row in enumerate(rows))
    seen: dict[str, int] = {}
    for number, row in enumerate(found):
        if (first := seen.setdefault(row.instruction, number)) != number:
            raise ValueError(f"{setting}={path}: rows {first} and {number} have one instruction")
    return found


def _row(row: Any, number: int, where: str) -> Reference:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: row {number} is not a mapping")
    for key in ("instruction", "output"):
        if not isinstance(row.get(key), str):
            raise ValueError(f"{where}: row {number} has no text {key!r}")
    if not row["instruction"].strip():
        raise ValueError(f"{where}: the instruction of row {number} is empty")
    return Reference(
        row["instruction"],
        row["output"],
        str(row.get("generator", "reference")),
        str(row.get("dataset", "")),
    )
