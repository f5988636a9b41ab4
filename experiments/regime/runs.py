"""Train series of deltas of one base, from tiny to larger than the weights.

A run is one learning rate, its checkpoints are pairs. Images: the generalist that never saw the
held-out digits, trained on those; text: the base of the embedded language models, trained on word
problems. Rates and steps were set by the sizes |delta|/|W| alone: no edit was looked at.

Weights are not shipped: `results/zoo/regime.json` holds recipe, sizes, losses and digests, and
`python -m experiments.regime` makes them again, in minutes, going on where it was stopped.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deltalab.models import embedded
from experiments.zoo import llm_train
from experiments.zoo import train as vit
from experiments.zoo.data import cut_digits, small_digits
from experiments.zoo.llm_data import draw_split
from experiments.zoo.llm_recipe import Recipe
from experiments.zoo.llm_score import answer_loss

SEED = 0
PROBLEMS = 100
IMAGES = {
    f"images_{rate:g}": vit.Phase(steps=steps, rate=rate, warmup=10, shift=2, turn=10, zoom=0.1)
    for rate, steps in (
        (3e-5, 300),
        (1e-4, 300),
        (3e-4, 300),
        (1e-3, 300),
        (3e-3, 300),
        (8e-3, 300),
    )
}
TEXT = {
    f"text_{rate:g}": llm_train.Phase(steps=200, rate=rate, batch=16, warmup=10)
    for rate in (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 8e-3)
}
KEPT = {"images": (30, 100, 300), "text": (20, 70, 200)}
"""The steps whose weights are kept."""


def names() -> Iterator[tuple[str, int]]:
    """Yield every pair: its run and its step."""
    for run in (*IMAGES, *TEXT):
        for step in KEPT[run.partition("_")[0]]:
            yield run, step


def place(directory: Path, run: str, step: int) -> Path:
    """Return the file of a pair's post-trained weights."""
    return directory / run / f"{step}.safetensors"


def make(directory: Path, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Train all runs that are not there; return what is told of every pair."""
    rows = []
    for run in (*IMAGES, *TEXT):
        told = directory / run / "run.json"
        if not told.is_file():
            started = time.process_time()
            done = _images(run, directory) if run in IMAGES else _text(run, directory)
            seconds = round(time.process_time() - started, 1)
            told.write_text(json.dumps({"seconds": seconds, "pairs": done}, indent=1) + "\n")
        found = json.loads(told.read_text(encoding="utf-8"))
        for row in found["pairs"]:
            say(f"{run} step {row['step']}: |delta|/|W| {row['size']:.4f}, loss {row['loss']:.4f}")
        rows += [{**row, "run": run, "seconds": found["seconds"]} for row in found["pairs"]]
    return rows


def publish(rows: list[dict[str, Any]], path: Path) -> None:
    """Write recipe, sizes, losses and digests."""
    phases = {name: asdict(phase) for name, phase in {**IMAGES, **TEXT}.items()}
    seconds = sum({row["run"]: row.pop("seconds") for row in rows}.values())
    found = {"seed": SEED, "core_seconds": round(seconds), "pairs": rows, "phases": phases}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _images(run: str, directory: Path) -> list[dict[str, Any]]:
    torch.manual_seed(SEED)
    model = vit.make_model(SEED)
    pre = load_file(embedded.ZOO / "digits_pre.safetensors")
    vit.load_shipped(model, pre)
    task, kept = cut_digits(small_digits()), _Kept(run, model, pre, directory)
    kept.score = lambda: vit.score(model, task.validation)[0]
    vit.train(model, [task.train], IMAGES[run], SEED, kept)
    return kept.rows


def _text(run: str, directory: Path) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as work:
        recipe = Recipe(Path(work), SEED)
        model = recipe.fresh("sft")
        pre = load_file(embedded.ZOO / "llm" / "base.safetensors")
        vit.load_shipped(model, pre)
        problems, kept = draw_split("validation", PROBLEMS, SEED), _Kept(run, model, pre, directory)
        kept.score = lambda: answer_loss(model, recipe.tokenizer, problems, False)
        state = Path(work) / "state"
        llm_train.train(model, recipe.draw_answer, TEXT[run], f"{SEED}:{run}", kept, state, 10**9)
    return kept.rows


class _Kept:
    """Keeps the weights of some steps as a training goes by, with their size and loss."""

    score: Callable[[], float]

    def __init__(self, run: str, model: nn.Module, pre: dict[str, Tensor], directory: Path) -> None:
        self.run, self.model, self.pre, self.directory = run, model, pre, directory
        self.rows: list[dict[str, Any]] = []

    def __call__(self, step: int, loss: float) -> None:
        if step not in KEPT[self.run.partition("_")[0]]:
            return
        weights, path = vit.as_shipped(self.model), place(self.directory, self.run, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, path, metadata={"format": "pt"})
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.rows.append(
            {"step": step, "size": size(self.pre, weights), "loss": self.score(), "sha256": digest}
        )


def size(pre: dict[str, Tensor], post: dict[str, Tensor]) -> float:
    """Return |delta|/|W| of all weights together.

    >>> size({"a": torch.tensor([3.0, 4.0])}, {"a": torch.tensor([3.0, 5.0])})
    0.2
    """
    delta = sum(float((post[n].double() - w.double()).square().sum()) for n, w in pre.items())
    whole = sum(float(w.double().square().sum()) for w in pre.values())
    return float((delta / whole) ** 0.5)
