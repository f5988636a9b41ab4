"""What the recipe leaves behind: measured figures, weights, data files and training curves."""

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from experiments.zoo.checks import PARTS, check_pair, relative_delta
from experiments.zoo.data import Images, Task, write_task
from experiments.zoo.train import ARCHITECTURE, ARGS, MEAN, STD, load_shipped, make_model, score

PRE_OF = {"mnist": "pre", "mnist_early": "pre", "fashion": "pre", "digits": "digits_pre"}
# What a model is scored on; not `pre` on the digits, all of which it was trained on.
TASKS_OF = {
    "pre": ("mnist", "fashion"),
    "mnist": ("mnist",),
    "mnist_early": ("mnist",),
    "fashion": ("fashion",),
    "digits_pre": ("digits",),
    "digits": ("digits",),
}

# Rows of (phase, step, mean batch loss, task, validation loss, validation accuracy).
Curve = list[tuple[str, int, float, str, float, float]]


def measure(
    weights: dict[str, dict[str, Tensor]], tasks: dict[str, Task], seed: int
) -> dict[str, Any]:
    """Return scores, sizes of the deltas and the effects of edits, for the rounded weights."""
    model = make_model(seed)
    full = {name: {k: w.float() for k, w in tensors.items()} for name, tensors in weights.items()}
    scores = []
    for name in weights:
        load_shipped(model, weights[name])
        for task_name in TASKS_OF[name]:
            for split in ("validation", "objective", "test"):
                images: Images = getattr(tasks[task_name], split)
                loss, accuracy = score(model, images)
                row = {"model": name, "task": task_name, "split": split}
                scores.append({**row, "images": len(images), "loss": loss, "accuracy": accuracy})
    deltas, edits = {}, {}
    for name in (name for name in weights if name in PRE_OF):
        pre, task = full[PRE_OF[name]], tasks[TASKS_OF[name][0]]
        deltas[name] = {
            part or "all": relative_delta(pre, full[name], part) for part in (None, *PARTS)
        }
        rows = check_pair(model, pre, full[name], task.validation, task.objective)
        edits[name] = [{**asdict(row), "agrees": row.agrees} for row in rows]
    parameters = sum(w.numel() for w in next(iter(weights.values())).values())
    return {"parameters": parameters, "scores": scores, "deltas": deltas, "edits": edits}


def merged(run: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Return a run's figures with those of the models in ``more`` added or replaced."""
    models = {row["model"] for row in more["scores"]}
    kept = [row for row in run["scores"] if row["model"] not in models]
    whole = {key: (run[key] or {}) | more[key] for key in ("deltas", "edits", "bytes", "seconds")}
    return {**more, **whole, "scores": kept + more["scores"]}


def write_data(out: Path, tasks: dict[str, Task]) -> None:
    """Write the data file of every task."""
    out.mkdir(parents=True, exist_ok=True)
    for name, task in tasks.items():
        write_task(task, out / f"{name}.npz")


def write_weights(out: Path, weights: dict[str, dict[str, Tensor]]) -> None:
    """Write the weights, and ``vit.json``, from which a loader builds the model."""
    from safetensors.torch import save

    for name, tensors in weights.items():
        (out / f"{name}.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    description = {"architecture": ARCHITECTURE, "args": ARGS, "mean": MEAN, "std": STD}
    (out / "vit.json").write_text(json.dumps(description, indent=2) + "\n")


def read_curve(results: Path) -> Curve:
    """Return the rows of ``curves.csv``."""
    with (results / "curves.csv").open(newline="") as file:
        _, *rows = csv.reader(file)
    return [(p, int(s), float(b), t, float(v), float(a)) for p, s, b, t, v, a in rows]


def write_curve(curve: Curve, results: Path) -> None:
    """Write the training curves as ``curves.csv`` and ``curves.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    header = ("phase", "step", "batch_loss", "task", "validation_loss", "validation_accuracy")
    with (results / "curves.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(
            (p, s, f"{b:.5f}", t, f"{v:.5f}", f"{a:.4f}") for p, s, b, t, v, a in curve
        )
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3), constrained_layout=True)
    for phase, task in dict.fromkeys((row[0], row[3]) for row in curve):
        rows = [row for row in curve if (row[0], row[3]) == (phase, task)]
        label = f"pre, {task}" if phase == "pre" else phase
        for axis, column in zip(axes, (4, 5), strict=True):
            axis.plot([row[1] for row in rows], [row[column] for row in rows], label=label)
    for axis, title in zip(axes, ("validation loss, nats", "validation accuracy"), strict=True):
        axis.set(xlabel="step", ylabel=title)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize="small")
    figure.savefig(results / "curves.png", dpi=80)
    pyplot.close(figure)
