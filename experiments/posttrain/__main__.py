"""Post-train a language model on a GPU or a CPU; a killed run goes on where it was.

    python -m experiments.posttrain sft --model DIR --data train.jsonl --out DIR
    python -m experiments.posttrain sample --model DIR --data train.jsonl --out pairs.jsonl
    python -m experiments.posttrain dpo --model DIR --data pairs.jsonl --out DIR

The last `--held` rows of the data never train; the model's loss on them is the curve that the
result's `posttrain.json` holds, and they lie beside it as `held_out.jsonl`.
"""

import argparse
import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from experiments.posttrain.recipe import Recipe
from experiments.posttrain.sample import Sampling, sample

TYPES: dict[Any, Any] = {int: int, float: float, str: str, int | None: int}


def parser() -> argparse.ArgumentParser:
    """Return the parser: one option for every setting of a command."""
    top = argparse.ArgumentParser("python -m experiments.posttrain", description=__doc__)
    top.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = top.add_subparsers(dest="kind", required=True)
    for kind, words in (("sft", "train on answers"), ("dpo", "train on preferences")):
        sub = kinds.add_parser(kind, help=words)
        _options(sub, Recipe)
        sub.add_argument("--score", type=int, default=25, help="steps between held-out losses")
        sub.add_argument("--save", type=int, default=25, help="steps between checkpoints")
    _options(kinds.add_parser("sample", help="make preferences of the model's answers"), Sampling)
    return top


def _options(sub: argparse.ArgumentParser, settings: type[Recipe] | type[Sampling]) -> None:
    """Add an option for every field, explained as the docstring does."""
    lines = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", settings.__doc__ or "", re.MULTILINE)
    words = {name: " ".join(text.split()).replace("%", "%%") for name, text in lines}
    for f in fields(settings):
        if f.name == "kind":
            continue
        if f.type is bool:
            sub.add_argument(f"--{f.name}", action="store_true", help=words[f.name])
        elif f.default is MISSING:
            sub.add_argument(f"--{f.name}", required=True, help=words[f.name])
        else:
            kind, default = TYPES[f.type], f"{words[f.name]} (default: {f.default})"
            sub.add_argument(f"--{f.name}", type=kind, default=f.default, help=default)
    sub.add_argument("--out", type=Path, required=True, help="what to make")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


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
    from deltalab.models.live import device_of
    from experiments.posttrain.train import train

    out, device = options.pop("out").expanduser(), device_of(options.pop("device"))
    if options["kind"] == "sample":
        del options["kind"]
        print(f"{sample(Sampling(**options), out, device, _say)} pairs: {out}")
        return
    score, save = options.pop("score"), options.pop("save")
    manifest = train(Recipe(**options), out, device, score, save, _say)
    held = manifest["held_out"]
    print(
        f"held-out loss {held['before']:.4f} -> {held['after']:.4f} {manifest['unit']}"
        f" (change {held['change']:+.4f} +- {held['error']:.4f})"
        + (f", accuracy {held['accuracy']:.3f}" if "accuracy" in held else "")
        + f" in {manifest['seconds'] / 60:.0f} minutes: {out}"
    )


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
