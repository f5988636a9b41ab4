"""How hard each of AlpacaEval's instructions is to win on, from the files that it publishes."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Difficulty:
    """How hard each instruction is to win on, and the gamed baselines that the model is tied to.

    Attributes:
        of: difficulty by the instruction's position in the reference file.
        gamed: rows (tanh of the standardised length difference, difficulty, 0 or 1 for the model
            term, preference); none where the file has difficulties alone.
    """

    of: Mapping[int, float]
    gamed: Array


def read(path: str | Path, setting: str) -> Difficulty:
    """Read difficulties: AlpacaEval's `df_gamed.csv`, or any CSV with a difficulty for each index.

    Needed are the columns `index` (or an unnamed first one), the position in the reference file,
    and `instruction_difficulty`. Rows that also have `preference` and `std_delta_len` are those of
    gamed baselines, and the model is tied to them as on the leaderboard.

    Raises:
        ValueError: a column is missing or holds no number.
        OSError: the file cannot be read.
    """
    wanted = "index, instruction_difficulty"
    try:
        with open(Path(path).expanduser(), newline="", encoding="utf-8") as file:
            csv.field_size_limit(1 << 30)
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
        of: dict[int, float] = {}
        for row in rows:
            position = row["index"] if "index" in row else row[""]
            of.setdefault(int(float(position)), float(row["instruction_difficulty"]))
        gamed = [
            (
                math.tanh(float(row["std_delta_len"])),
                float(row["instruction_difficulty"]),
                float(row.get("not_gamed_baseline", "False") in ("True", "1", "1.0")),
                float(row["preference"]),
            )
            for row in rows
            if row.get("preference") and row.get("std_delta_len")
        ]
    except (KeyError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise ValueError(
            f"{setting}={path}: not a CSV with the columns {wanted} ({type(error).__name__}:"
            f" {error})"
        ) from None
    if not of or not all(math.isfinite(value) for value in of.values()):
        raise ValueError(f"{setting}={path}: holds no difficulties, or some that are not numbers")
    return Difficulty(of, np.array(gamed, np.float64).reshape(-1, 4))


def check(difficulty: Difficulty, positions: Sequence[int], setting: str) -> None:
    """Raise `ValueError` where an instruction has no difficulty."""
    if lost := [position for position in positions if position not in difficulty.of]:
        raise ValueError(
            f"{setting}: no difficulty for instruction {lost[0]} of the reference file"
            f" ({len(lost)} of {len(positions)} are without)"
        )
