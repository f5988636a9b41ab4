"""The page about the embedded language models, from the figures of a run."""

from typing import Any

from experiments.zoo.tables import table

Run = dict[str, Any]


def scores_table(run: Run) -> str:
    """Return exact match and loss of every model on every split."""
    header = ["model", "split", "problems", "exact match (strict)", "flexible", "answer loss"]
    rows = [
        [
            s["model"],
            s["split"],
            s["problems"],
            f"{s['strict']:.1%}",
            f"{s['flexible']:.1%}",
            f"{s['loss']:.4f}",
        ]
        for s in run["scores"]
    ]
    return table(header, rows)


def deltas_table(run: Run) -> str:
    """Return |delta| / |W| by part of the model."""
    parts = list(next(iter(run["deltas"].values())))
    rows = [[pair, *(f"{d[part]:.3f}" for part in parts)] for pair, d in run["deltas"].items()]
    return table(["pair", *parts], rows)


def edits_table(run: Run, split: str) -> str:
    """Return exact match (points against post) and loss of every edit, a column per pair."""
    pairs = [name.split()[0] for name in run["edits"] if name.endswith(split)]
    columns = [{row["edit"]: row for row in run["edits"][f"{pair} {split}"]} for pair in pairs]
    rows = []
    for edit in columns[0]:
        row = [edit]
        for column in columns:
            entry = column.get(edit)
            if entry is None:
                row.append("-")
                continue
            points = 100 * (entry["exact"] - column["keep"]["exact"])
            row.append(f"{entry['exact']:.1%} ({points:+.1f}); {entry['loss']:.4f}")
        rows.append(row)
    return table(["edit", *pairs], rows)


def line_table(run: Run) -> str:
    """Return the DPO loss along the line through both models."""
    figures = run["preferences"]
    rows = [
        [
            f"{a['alpha']:+.1f}",
            f"{a['loss']:.4f}",
            f"{a['accuracy']:.1%}",
            f"{b['loss']:.4f}",
            f"{b['accuracy']:.1%}",
        ]
        for a, b in zip(figures["validation line"], figures["preferences line"], strict=True)
    ]
    header = ["alpha", "validation loss", "accuracy", "held-out loss", "accuracy "]
    return table(header, rows)


def render(run: Run) -> str:
    """Return the whole page."""
    settings = ", ".join(f"{key} {value}" for key, value in run["settings"].items())
    seconds = ", ".join(f"{name} {s} s" for name, s in run["seconds"].items())
    prefer = run["preferences"]
    held = prefer["preferences"]
    return (
        "\n\n".join(
            [
                "# The embedded language models",
                f"`python -m experiments.zoo.llm`, {settings}, the small ones seed "
                f"{run['settings']['seed'] + 1}; {run['parameters']:,} and "
                f"{run['small parameters']:,} parameters, {run['vocabulary']} tokens. "
                f"Training: {seconds}. All figures are of the weights as shipped, rounded to "
                "float16, evaluated in float32; losses in nats per answer token; exact match by "
                "greedy generation with GSM8K's strict filter `#### (\\-?[0-9\\.\\,]+)`, and its "
                "flexible one (the last number). Curves: `llm_curves.png`.",
                "## Scores",
                "`sft` and `far` are from `base`, `dpo` from `sft`, `small_sft` from `small_base`. "
                "`unseen` are problems of whole templates that no training text of any model has.",
                scores_table(run),
                "## |delta| / |W|",
                deltas_table(run),
                "## Edits on validation problems",
                "Edits of all tensors of two dimensions: exact match (points against post); loss. "
                "Dropping edits are means over 2 seeds. Choices were made on this split alone.",
                edits_table(run, "validation"),
                "## Edits on test problems",
                "Scored once, after every choice (the DPO pair twice, see the data's README); "
                "dropping edits with seed 0.",
                edits_table(run, "test"),
                "## Preferences",
                f"{prefer['training pairs']} training pairs. On {held['pairs']} held-out pairs the "
                f"implicit reward prefers the right answer in {held['accuracy']:.1%}; DPO loss "
                f"{held['loss']:.4f} (0.6931 before). Along `post + alpha (post - pre)`, matrices "
                "only (at alpha -1 the norms are still post), beta 0.1:",
                line_table(run),
                "## Files",
                table(["file", "bytes"], run["bytes"].items()),
            ]
        )
        + "\n"
    )
