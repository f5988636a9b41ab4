"""Train the embedded family of language models: ``python -m experiments.zoo.llm_family``.

Three experts of one base (``small_base``, the narrower of the two, so that all three together ship
in 6 MB), each fine-tuned briefly on question and answer about one kind of word problem: running
counts, groups of equal size, and comparisons and prices. The base has met the stories of all kinds
in other forms, and none of them as question and answer. Rounded to float16, as shipped.

Written beside the weights are held-out problems of every kind: ``NAME.jsonl`` for losses and
gradients, ``NAME_test.jsonl`` for scores. No instance of them is in any training text.

Cost: a minute and a half on one thread. Expected: every expert at 90 % or more of its own kind by
exact match, where the base has 0 %.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.zoo.llm_data import problem_row, write_lines
from experiments.zoo.llm_forms import question_of
from experiments.zoo.llm_problems import KINDS, Problem, draw_problem
from experiments.zoo.llm_score import answer_loss, encoded_problem, exact_match
from experiments.zoo.llm_tokens import make_tokenizer
from experiments.zoo.llm_train import SMALL, Phase, Sequence_, make_model, train
from experiments.zoo.train import as_shipped, load_shipped

ROOT = Path(__file__).resolve().parents[2]
BASE = "small_base"
GROUPS = {
    "counts": ("have", "pair"),
    "groups": ("boxes", "days"),
    "compares": ("more", "fewer", "times", "price"),
}
"""How a story of every expert's problems begins."""
PHASE = Phase(steps=100, rate=6e-4, batch=32, warmup=20)
SIZES = {"objective": 64, "test": 100}


def kind_of(problem: Problem) -> str:
    """Return the expert whose problem it is.

    >>> kind_of(draw_problem(random.Random(0), "train")) in GROUPS
    True
    """
    first = next(kind for kind in KINDS if problem.template.startswith(kind))
    return next(name for name, kinds in GROUPS.items() if first in kinds)


def drawn(rng: random.Random, name: str, split: str) -> Problem:
    """Draw a problem of one kind and split."""
    while kind_of(problem := draw_problem(rng, split)) != name:
        pass
    return problem


def held_out(name: str, split: str, seed: int) -> list[Problem]:
    """Return the different problems of a kind in a split, the same ones for the same seed."""
    rng = random.Random(f"{seed}:{name}:{split}")
    found: dict[str, Problem] = {}
    while len(found) < SIZES[split]:
        problem = drawn(rng, name, split)
        found.setdefault(question_of(problem), problem)
    return list(found.values())


def tuned(start: dict[str, Tensor], tokenizer: Any, name: str, seed: int) -> dict[str, Tensor]:
    """Fine-tune shipped weights on one kind of problem; return them as shipped."""

    def draw(rng: random.Random) -> Sequence_:
        return encoded_problem(tokenizer, drawn(rng, name, "train"))

    model = opened(start, tokenizer)
    place = ROOT / "results" / "models" / f"{name}.ck"
    train(model, draw, PHASE, f"{seed}:{name}", lambda step, loss: None, place)
    return as_shipped(model)


def opened(weights: dict[str, Tensor], tokenizer: Any) -> nn.Module:
    """Return a model with shipped weights, in float32 as evaluated."""
    model = make_model(tokenizer, 0, SMALL)
    load_shipped(model, weights)
    return model


def measured(
    weights: dict[str, dict[str, Tensor]], tokenizer: Any, seed: int
) -> list[dict[str, Any]]:
    """Return what every model scores on the test problems of every kind."""
    rows = []
    for model_name, own in weights.items():
        model = opened(own, tokenizer)
        for name in GROUPS:
            problems = held_out(name, "test", seed)
            right, _ = exact_match(model, tokenizer, problems)
            loss = answer_loss(model, tokenizer, problems)
            score = sum(right) / len(right)
            rows.append({"model": model_name, "kind": name, "strict": score, "loss": loss})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure and write everything; return the exit code."""
    from safetensors.torch import load_file, save

    parser = argparse.ArgumentParser(
        prog="python -m experiments.zoo.llm_family", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "deltalab" / "zoo" / "llm", help="what ships")
    add("--results", type=Path, default=ROOT / "results" / "zoo", help="figures go here")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    tokenizer, start = make_tokenizer(), time.process_time()
    weights = {BASE: load_file(args.out / f"{BASE}.safetensors")}
    for name in GROUPS:
        weights[f"small_{name}"] = own = tuned(weights[BASE], tokenizer, name, args.seed)
        (args.out / f"small_{name}.safetensors").write_bytes(save(own, metadata={"format": "pt"}))
        for split, end in (("objective", ""), ("test", "_test")):
            rows = (problem_row(p) for p in held_out(name, split, args.seed))
            write_lines(args.out / f"{name}{end}.jsonl", rows)
    seconds = round(time.process_time() - start)
    found = {
        "seconds": seconds,
        "seed": args.seed,
        "torch": torch.__version__,
        "test": measured(weights, tokenizer, args.seed),
    }
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "llm_family.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
