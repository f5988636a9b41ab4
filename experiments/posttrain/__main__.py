"""Post-train a language model on a GPU or a CPU; a killed run goes on where it was.

    python -m experiments.posttrain sft --model DIR --data train.jsonl --out DIR
    python -m experiments.posttrain sample --model DIR --data train.jsonl --out pairs.jsonl
    python -m experiments.posttrain dpo --model DIR --data pairs.jsonl --out DIR

The last `--held` rows of the data never train; the model's loss on them is the curve that the
result's `posttrain.json` holds, and they lie beside it as `held_out.jsonl`.
"""

import argparse
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from experiments.posttrain.recipe import Recipe

TYPES: dict[Any, Any] = {int: int, float: float, str: str, int | None: int}


def parser() -> argparse.ArgumentParser:
    """Return the parser: one option for every setting of the recipe."""
    top = argparse.ArgumentParser("python -m experiments.posttrain", description=__doc__)
    top.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = top.add_subparsers(dest="kind", required=True)
    for kind, words in (("sft", "train on answers"), ("dpo", "train on preferences")):
        sub = kinds.add_parser(kind, help=words)
        for f in fields(Recipe)[1:]:
            option = f"--{f.name}"
            if f.type is bool:
                sub.add_argument(option, action="store_true")
            elif f.default is MISSING:
                sub.add_argument(option, required=True)
            else:
                sub.add_argument(option, type=TYPES[f.type], default=f.default)
        sub.add_argument("--out", type=Path, required=True)
        sub.add_argument("--device", default="auto")
        sub.add_argument("--score", type=int, default=25, help="steps between held-out losses")
        sub.add_argument("--save", type=int, default=25, help="steps between checkpoints")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a user's mistake is one line and exit code 2."""
    options = vars(parser().parse_args(arguments))
    try:
        _command(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _command(options: dict[str, Any]) -> None:
    from deltalab.models.timm_vit import device_of
    from experiments.posttrain.train import train

    own = {name: options.pop(name) for name in ("out", "device", "score", "save")}
    manifest = train(
        Recipe(**options),
        own["out"].expanduser(),
        device_of(own["device"]),
        own["score"],
        own["save"],
        say=lambda line: print(line, flush=True),
    )
    held = manifest["held_out"]
    print(
        f"held-out loss {held['before']:.4f} -> {held['after']:.4f} {manifest['unit']}"
        f" (change {held['change']:+.4f} +- {held['error']:.4f})"
        + (f", accuracy {held['accuracy']:.3f}" if "accuracy" in held else "")
        + f" in {manifest['seconds'] / 60:.0f} minutes: {own['out']}"
    )


if __name__ == "__main__":
    sys.exit(main())
