"""Tables of runs of the recipe: ``python -m experiments.zoo.tables RUN.json [RUN.json ...]``."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Run = dict[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table.

    >>> print(table(["a", "b"], [[1, 2]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [header, ["---"] * len(header), *rows]
    text = ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
    text[1] = "|" + "---|" * len(header)
    return "\n".join(text)


def scores_table(runs: Sequence[Run]) -> str:
    """Return loss and accuracy per model and split, one pair of columns per run.

    A model that a later run did not train has a dash there.
    """
    header = ["model", "task", "split", "images"]
    for i in range(len(runs)):
        header += [f"loss{_run(i, runs)}", f"accuracy{_run(i, runs)}"]
    rows = []
    for entry in runs[0]["scores"]:
        row = [entry[key] for key in ("model", "task", "split", "images")]
        for run in runs:
            same = _entry(run, entry)
            row += [f"{same['loss']:.4f}", f"{same['accuracy']:.2%}"] if same else ["-", "-"]
        rows.append(row)
    return table(header, rows)


def _entry(run: Run, like: dict[str, Any]) -> dict[str, Any] | None:
    keys = ("model", "task", "split")
    found = (e for e in run["scores"] if all(e[key] == like[key] for key in keys))
    return next(found, None)


def _run(i: int, runs: Sequence[Run]) -> str:
    return f", run {i + 1}" if len(runs) > 1 else ""


def deltas_table(run: Run) -> str:
    """Return |delta| / |W| by part of the model."""
    parts = list(next(iter(run["deltas"].values())))
    rows = [[name, *(f"{d[part]:.3f}" for part in parts)] for name, d in run["deltas"].items()]
    return table(["pair", *parts], rows)


def edits_table(run: Run) -> str:
    """Return what the standard edits do to every pair, and whether the Gauss term agrees."""

    def change(effect: dict[str, float]) -> str:
        return f"{effect['loss']:+.4f} ± {effect['loss_error']:.4f}"

    rows = []
    for pair, entries in run["edits"].items():
        for e in entries:
            gap = abs(e["term"] - e["change"])
            share = f"{gap / abs(e['change']):.2%}" if e["change"] else "-"
            rows.append(
                (
                    pair,
                    e["edit"],
                    change(e["validation"]),
                    f"{100 * e['validation']['accuracy']:+.2f}",
                    change(e["objective"]),
                    f"{e['change']:+.5f}",
                    f"{e['term']:+.5f}",
                    f"{gap:.1e} ({share})",
                    "yes" if e["agrees"] else "**no**",
                )
            )
    header = ["pair", "edit", "validation loss", "validation points", "objective loss"]
    header += ["objective loss, seed 0", "Gauss term, seed 0", "gap", "agrees"]
    return table(header, rows)


def render(runs: Sequence[Run]) -> str:
    """Return the whole document; the first run is the one whose weights are shipped."""
    first = runs[0]
    settings = ", ".join(f"{key} {value}" for key, value in first["settings"].items())
    times = [run["seconds"] or {} for run in runs]
    families = dict.fromkeys(family for each in times for family in each)
    seconds = ", ".join(
        f"{family} and its descendants "
        + " and ".join(f"{each[family]} s" for each in times if family in each)
        for family in families
    )
    text = [
        "# The embedded ViT pairs",
        f"`python -m experiments.zoo.vit`, {settings}; {first['parameters']:,} parameters. "
        f"Training: {seconds}. All figures are of the weights as shipped, rounded "
        "to float16 and evaluated in float32; losses in nats per image over the 20-way head.",
        "## Scores",
        scores_table(runs),
    ]
    if len(runs) > 1:
        worst = max(
            abs(a["accuracy"] - b["accuracy"])
            for other in runs[1:]
            for a in first["scores"]
            if a["split"] == "test" and (b := _entry(other, a))
        )
        text.append(f"Largest difference in test accuracy between runs: {100 * worst:.2f} points.")
    text += [
        "## |delta| / |W|",
        deltas_table(first),
        "## Edits of the tensors with two or more dimensions",
        "Changes of the mean loss with the paired standard error, and of the accuracy in points; "
        "dropping edits averaged over 5 seeds. The term is three Gauss-Legendre nodes of "
        "<grad L(post + t E), E>; it agrees if within 2 % of the change or 1e-4. Nothing here "
        "touches the test split.",
        edits_table(first),
        "## Files",
        table(["file", "bytes"], first["bytes"].items()),
    ]
    return "\n\n".join(text) + "\n"


def main(argv: Sequence[str]) -> int:
    """Print the document for the runs named on the command line."""
    print(render([json.loads(Path(name).read_text()) for name in argv]), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
