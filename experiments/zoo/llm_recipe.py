"""The stages of the embedded language models: what each is trained from, on what, for how long."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from experiments.zoo.llm_data import draw_split
from experiments.zoo.llm_forms import base_text
from experiments.zoo.llm_prefer import Preference, margins, reward, sampled, train_dpo
from experiments.zoo.llm_problems import draw_problem
from experiments.zoo.llm_score import answer_loss, encoded_problem, exact_match, told_match
from experiments.zoo.llm_tokens import make_tokenizer
from experiments.zoo.llm_train import ARCHITECTURE, SMALL, Phase, Sequence_, make_model, train
from experiments.zoo.train import as_shipped, load_shipped

# Rows of (phase, step, mean batch loss, validation loss, validation score).
Curve = list[tuple[str, int, float, float, float]]
PHASES = {
    "base": Phase(steps=2500, rate=2e-3, warmup=200, horizon=5000, cool=500, decay=0.05, fast=True),
    "sft": Phase(steps=150, rate=4e-4, batch=32, warmup=20),
    "far": Phase(steps=800, rate=4e-3, batch=16, warmup=50),
    "dpo": Phase(steps=80, rate=2.5e-4, batch=16, warmup=10, horizon=100),
    "small_base": Phase(
        steps=2500, rate=3e-3, warmup=200, horizon=4000, cool=500, decay=0.05, fast=True
    ),
    "small_sft": Phase(steps=150, rate=6e-4, batch=32, warmup=20),
}
FROM = {"sft": "base", "far": "base", "dpo": "sft", "small_sft": "small_base"}
CURVE_EVERY = {"base": 500, "sft": 50, "far": 200, "dpo": 20, "small_base": 500, "small_sft": 50}
CURVE_PROBLEMS = 100
SAMPLED = {"train": 1600, "validation": 500, "preferences": 600}  # problems, for preferences


def is_small(name: str) -> bool:
    """Return whether a model is of the small size.

    >>> is_small("small_sft"), is_small("sft")
    (True, False)
    """
    return name.startswith("small_")


class Recipe:
    """The stages of one run: a seed, a directory of finished stages, the tokenizer."""

    def __init__(self, work: Path, seed: int):
        self.work, self.seed = work, seed
        self.tokenizer = make_tokenizer()
        self.validation = draw_split("validation", CURVE_PROBLEMS, seed)

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return a model's weights as shipped, in float16; train it where that is still to do."""
        from safetensors.torch import load_file, save_file

        path = self.work / f"{name}.safetensors"
        if not path.exists():
            start = time.perf_counter()
            model, curve = self.train(name)
            seconds = time.perf_counter() - start
            self.keep(f"{name}.curve", {"rows": curve, "seconds": seconds})
            save_file(as_shipped(model), path, metadata={"format": "pt"})
        return load_file(path)

    def model(self, name: str) -> nn.Module:
        """Return a model, in float32 as evaluated."""
        weights = self.weights(name)
        model = self.fresh(name)
        load_shipped(model, weights)
        return model

    def fresh(self, name: str) -> nn.Module:
        """Return a model of a name's size, randomly initialised."""
        architecture = SMALL if is_small(name) else ARCHITECTURE
        return make_model(self.tokenizer, self.seed_of(name), architecture)

    def seed_of(self, name: str) -> int:
        """Return the seed of a model's training; the small ones have the next one."""
        return self.seed + is_small(name)

    def kept(self, name: str) -> Any:
        """Return a finished stage's figures, or None."""
        path = self.work / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def keep(self, name: str, figures: Any) -> Any:
        """Write a stage's figures."""
        self.work.mkdir(parents=True, exist_ok=True)
        (self.work / f"{name}.json").write_text(json.dumps(figures) + "\n")
        return figures

    def train(self, name: str) -> tuple[nn.Module, Curve]:
        """Train one model; return it with its curve."""
        told = name not in FROM
        phase, seed = PHASES[name], f"{self.seed_of(name)}:{'base' if told else 'sft'}"
        start = self.fresh(name) if told else self.model(FROM[name])
        record = Recorder(name, start, self)
        if name == "dpo":
            train_dpo(start, self.tokenizer, self.pairs("train"), phase, f"{self.seed}:dpo", record)
        else:
            checkpoint = self.work / f"{name}.ck"
            draw = self.draw_text if told else self.draw_answer
            train(start, draw, phase, seed, record, checkpoint)
        return start, record.rows

    def draw_text(self, rng: random.Random) -> Sequence_:
        """Draw a document of base training."""
        return [*self.tokenizer(base_text(rng)).input_ids, self.tokenizer.eos_token_id], 0

    def draw_answer(self, rng: random.Random) -> Sequence_:
        """Draw a question with its answer."""
        return encoded_problem(self.tokenizer, draw_problem(rng, "train"))

    def pairs(self, split: str) -> list[Preference]:
        """Return preferences of a split, sampled from ``sft`` where that is still to do."""
        rows = self.kept(f"pairs.{split}")
        if rows is None:
            problems = draw_split(split, SAMPLED[split], self.seed)
            found = sampled(self.model("sft"), self.tokenizer, problems, self.seed)
            rows = self.keep(f"pairs.{split}", [vars(pair) for pair in found])
        return [Preference(**row) for row in rows]


class Recorder:
    """Collects the curve of one phase: (phase, step, batch loss, validation loss, score)."""

    def __init__(self, phase: str, model: nn.Module, recipe: Recipe):
        self.phase, self.model, self.recipe = phase, model, recipe
        self.rows: Curve = []
        self.recent: list[float] = []
        self.score = self.preferences() if phase == "dpo" else self.problems()

    def problems(self) -> Callable[[], tuple[float, float]]:
        """Return a function that gives answer loss and exact match on validation problems."""
        problems, tokenizer = self.recipe.validation, self.recipe.tokenizer
        tale = self.phase not in FROM  # base is followed in its own form

        def score() -> tuple[float, float]:
            if tale:
                right = told_match(self.model, tokenizer, problems)
            else:
                right, _ = exact_match(self.model, tokenizer, problems)
            return answer_loss(self.model, tokenizer, problems, tale), sum(right) / len(right)

        return score

    def preferences(self) -> Callable[[], tuple[float, float]]:
        """Return a function that gives DPO loss and reward accuracy on validation pairs."""
        tokenizer = self.recipe.tokenizer
        pairs = self.recipe.pairs("validation")
        reference = margins(self.model, tokenizer, pairs)
        return lambda: reward(margins(self.model, tokenizer, pairs) - reference)

    def __call__(self, step: int, loss: float) -> None:
        """Note the loss; every so many steps score the model."""
        self.recent.append(loss)
        if step % CURVE_EVERY[self.phase]:
            return
        mean = sum(self.recent) / len(self.recent)
        self.recent.clear()
        held, score = self.score()
        self.rows.append((self.phase, step, mean, held, score))
        line = f"{self.phase} step {step}: batch loss {mean:.4f}, validation loss {held:.4f}"
        print(f"{line}, score {score:.3f}", flush=True)
