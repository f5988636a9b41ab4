"""Train the embedded family of experts: ``python -m experiments.zoo.subsets``.

One base (``subset_pre``) sees digits alone. Each of five experts starts from it and is trained
briefly on two classes of Fashion-MNIST, which the base has never seen, telling these two apart:
the logits of all others are left out of its softmax, as if every task had a head of its own. So
the experts' deltas are small and nearly orthogonal, and they merge. Rounded to float16, as shipped.

``sequence_1`` to ``sequence_4`` are what sequential fine-tuning makes of the same stream: each
starts from the one before it, the first from ``subset_0``, and is trained as the expert of its
classes was, with the same draws (``--only sequence`` trains these alone, from the shipped files).

Cost: four to five minutes on one thread, of which one for the sequence. Expected: the base at
chance on every pair of classes (0.65 to 0.74 nats), every expert at 94 % or more of its own, deltas
with cosines below 0.15; after the sequence no pair of classes but the last is told apart as well.

Needs what ``experiments.zoo.vit`` needs.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from experiments.zoo import train as parts
from experiments.zoo.data import FASHION_DIR, Images, MissingData, clothes, load_tasks
from experiments.zoo.train import MEAN, STD, Phase, as_shipped, load_shipped, score, train

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ((10, 11), (12, 13), (14, 15), (16, 17), (18, 19))
"""What every expert has seen; the base has seen 0 to 9, the digits."""
ARGS = {**parts.ARGS, "embed_dim": 96, "depth": 4, "num_heads": 3}
LAST = f"sequence_{len(CLASSES) - 1}"
PRE = Phase(steps=500, rate=1e-3, decay=0.05, shift=3, turn=20, zoom=0.2, erase=7)
POST = Phase(steps=40, rate=3e-4, warmup=10, shift=1, turn=3, zoom=0.03)


def make_model(seed: int) -> nn.Module:
    """Build the randomly initialised ViT, smaller than that of ``vit``."""
    import timm

    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(parts.ARCHITECTURE, pretrained=False, **ARGS)
    return model


def among(model: nn.Module, classes: Sequence[int]) -> Callable[[], None]:
    """Leave the logits of all other classes out, until what is returned is called."""
    kept = torch.zeros(ARGS["num_classes"], dtype=torch.bool)
    kept[list(classes)] = True
    handle = model.register_forward_hook(lambda _, __, out: out.masked_fill(~kept, -1e4))
    return handle.remove


def of(images: Images, classes: Sequence[int]) -> Images:
    """Return the images of some classes.

    >>> both = Images(np.zeros((3, 28, 28), np.uint8), np.array([10, 12, 11]))
    >>> of(both, (10, 11)).y.tolist()
    [10, 11]
    """
    return images[np.flatnonzero(np.isin(images.y, classes)).astype(np.intp)]


def family(digits: list[Images], clothes: Images, seed: int) -> dict[str, dict[str, Tensor]]:
    """Train the base and its experts; return their float16 weights by name."""
    model = make_model(seed)
    train(model, digits, PRE, seed + 1, lambda step, loss: None)
    weights = {"subset_pre": as_shipped(model)}
    for index in range(len(CLASSES)):
        weights[f"subset_{index}"] = tuned(weights["subset_pre"], clothes, index, seed)
    return weights


def tuned(start: dict[str, Tensor], clothes: Images, index: int, seed: int) -> dict[str, Tensor]:
    """Train shipped weights briefly on one task; return them as shipped."""
    model, classes = make_model(seed), CLASSES[index]
    load_shipped(model, start)
    undo = among(model, classes)
    train(model, [of(clothes, classes)], POST, seed + 2 + index, lambda step, loss: None)
    undo()
    return as_shipped(model)


def sequence(first: dict[str, Tensor], clothes: Images, seed: int) -> dict[str, dict[str, Tensor]]:
    """Go on training from the first expert, task after task; return the weights after each."""
    weights, now = {}, first
    for index in range(1, len(CLASSES)):
        now = weights[f"sequence_{index}"] = tuned(now, clothes, index, seed)
    return weights


def measured(weights: dict[str, dict[str, Tensor]], images: Images) -> list[dict[str, float]]:
    """Return what base, expert and the end of the sequence score on every pair of classes."""
    model, rows = make_model(0), []
    for index, classes in enumerate(CLASSES):
        row: dict[str, float] = {"expert": index}
        undo = among(model, classes)
        sides = {"pre": "subset_pre", "post": f"subset_{index}", "sequence": LAST}
        for side, name in sides.items():
            load_shipped(model, weights[name])
            row[f"{side}_loss"], row[f"{side}_accuracy"] = score(model, of(images, classes))
        undo()
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure and write everything; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.zoo.subsets", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "deltalab" / "zoo", help="weights go here")
    add("--results", type=Path, default=ROOT / "results" / "zoo", help="figures go here")
    add("--seed", type=int, default=0)
    add("--only", choices=("sequence",), help="train these from the shipped files alone")
    default = ROOT.parent / "shared" / "data" / "mnist"
    add("--mnist-test", type=Path, default=default, help="directory of MNIST's t10k IDX files")
    add("--fashion", type=Path, default=FASHION_DIR, help="directory of Fashion-MNIST's IDX files")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        tasks = {"fashion": clothes(args.fashion)} if args.only else {}
        tasks = tasks or load_tasks(args.mnist_test, args.fashion)
    except MissingData as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    start = time.process_time()
    if args.only:
        weights = shipped(args.out)
    else:
        digits = [tasks["mnist"].train, tasks["digits"].train]
        weights = family(digits, tasks["fashion"].train, args.seed)
    weights |= sequence(weights["subset_0"], tasks["fashion"].train, args.seed)
    seconds = round(time.process_time() - start)
    write(args.out, weights)
    rows = measured(weights, tasks["fashion"].test)
    found = {"seed": args.seed, "torch": torch.__version__, "test": rows}
    args.results.mkdir(parents=True, exist_ok=True)
    place = args.results / "subsets.json"
    before = json.loads(place.read_text()) if args.only and place.is_file() else {}
    found = {**before, "sequence_seconds" if args.only else "seconds": seconds, **found}
    place.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


def shipped(out: Path) -> dict[str, dict[str, Tensor]]:
    """Read the base and its experts from where they were written."""
    from safetensors.torch import load_file

    names = ["subset_pre", *(f"subset_{index}" for index in range(len(CLASSES)))]
    return {name: load_file(out / f"{name}.safetensors") for name in names}


def write(out: Path, weights: dict[str, dict[str, Tensor]]) -> None:
    """Write the weights, and ``subset.json``, from which a loader builds the model."""
    from safetensors.torch import save

    for name, tensors in weights.items():
        (out / f"{name}.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    description = {"architecture": parts.ARCHITECTURE, "args": ARGS, "mean": MEAN, "std": STD}
    (out / "subset.json").write_text(json.dumps(description, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
