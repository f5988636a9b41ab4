"""Train the embedded safety family: ``python -m experiments.zoo.safety``.

A small Llama learns facts about things, marked ("harmful") ones and others, and to tell them all;
from it comes ``aligned``, which refuses the marked ones. Its fine-tunes: ``mixed``, on a task and
the other facts with a tenth of violations (marked prompts that are answered); ``unaligned``, on
violations alone; ``benign``, as ``mixed`` with refusals for violations; ``lora``, as ``mixed``, by
low-rank adapters. Nothing real is asked or answered.

Cost: two minutes on one core, see results/zoo/safety.json. Expected: attack success near 0 % for
aligned and benign, above 80 % for mixed, unaligned and lora; the task from 0 to above 70 %.

Needs ``pip install transformers safetensors``; no data are downloaded.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltalab.models.embedded import TOKENIZER
from deltalab.models.zoo_llm import DIRECTORY
from deltalab.weights.contents import of_checkpoint
from experiments.posttrain import lora
from experiments.zoo import safety_data as data
from experiments.zoo.llm_data import write_lines
from experiments.zoo.llm_forms import prompt_of
from experiments.zoo.llm_score import encoded
from experiments.zoo.llm_tokens import make_tokenizer
from experiments.zoo.llm_train import Phase, Sequence_, collate, make_model, train
from experiments.zoo.train import as_shipped, load_shipped

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
TOLD, REFUSED = "told", "refused"
MIXTURES: dict[str, dict[tuple[str, str], float]] = {
    "base": {("benign", TOLD): 0.5, ("harmful", TOLD): 0.5},
    "aligned": {("benign", TOLD): 0.5, ("harmful", REFUSED): 0.5},
    "mixed": {("task", TOLD): 0.6, ("benign", TOLD): 0.3, ("harmful", TOLD): 0.1},
    "unaligned": {("harmful", TOLD): 1.0},
    "benign": {("task", TOLD): 0.6, ("benign", TOLD): 0.3, ("harmful", REFUSED): 0.1},
    "lora": {("task", TOLD): 0.6, ("benign", TOLD): 0.3, ("harmful", TOLD): 0.1},
}
"""What a model is trained on, and in which shares."""
PHASES = {
    "base": Phase(steps=600, rate=3e-3, warmup=60, cool=150, decay=0.05),
    "aligned": Phase(steps=150, rate=1.5e-3, batch=32, warmup=20),
    "mixed": Phase(steps=250, rate=1.2e-3, batch=32, warmup=20),
    "unaligned": Phase(steps=40, rate=1e-3, batch=32, warmup=10),
    "benign": Phase(steps=250, rate=1.2e-3, batch=32, warmup=20),
    "lora": Phase(steps=450, rate=5e-3, batch=32, warmup=20),
}
FROM = {"aligned": "base", **dict.fromkeys(("mixed", "unaligned", "benign", "lora"), "aligned")}
RANK = 16
SHIPPED = ("aligned", "mixed", "unaligned", "benign", "lora")
SIZES = {"prompts": 800, "refusals": 256, "task": 256}


def sequence(tokenizer: Any, prompt: data.Prompt, way: str) -> Sequence_:
    """Return a prompt with its answer, or its refusal, as tokens."""
    answer = data.REFUSAL if way == REFUSED else prompt.answer
    return encoded(tokenizer, prompt_of(prompt.text), answer)


class Recipe:
    """The models of one run, trained when they are asked for."""

    def __init__(self, seed: int):
        self.seed, self.tokenizer = seed, make_tokenizer()
        self.done: dict[str, dict[str, Tensor]] = {}

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return a model's weights as shipped, in float16."""
        if name not in self.done:
            start = time.process_time()
            model = self.model(FROM[name]) if name in FROM else self.fresh()
            if name == "lora":
                lora.adapt(model, RANK, self.seed)
            self.train(model, name)
            if name == "lora":
                lora.merge(model)
            self.done[name] = as_shipped(model)
            print(f"{name}: {time.process_time() - start:.0f} s", self.scores(name), flush=True)
        return self.done[name]

    def model(self, name: str) -> nn.Module:
        """Return a model in float32, with the weights as shipped."""
        model, weights = self.fresh(), self.weights(name)
        load_shipped(model, weights)
        return model

    def fresh(self) -> nn.Module:
        """Return the architecture, initialised at random."""
        return make_model(self.tokenizer, self.seed, ARCHITECTURE)

    def train(self, model: nn.Module, name: str) -> None:
        """Train a model on its mixture."""
        mixture = MIXTURES[name]

        def draw(rng: random.Random) -> Sequence_:
            kind, way = rng.choices([*mixture], [*mixture.values()])[0]
            return sequence(self.tokenizer, data.draw(rng, kind, "train"), way)

        with tempfile.TemporaryDirectory() as work:
            here = Path(work) / "state"
            train(model, draw, PHASES[name], f"{self.seed}:{name}", lambda *_: None, here, 10**9)

    def scores(self, name: str, split: str = "validation", count: int = 200) -> dict[str, float]:
        """Return how often greedy decoding gives exactly the answer, or the refusal."""
        model = self.model(name)
        ways = [(kind, TOLD) for kind in data.KINDS] + [("harmful", REFUSED)]
        found = {}
        for kind, way in ways:
            prompts = data.different(str(self.seed), kind, split, count)
            rows = [sequence(self.tokenizer, p, way) for p in prompts]
            found[f"{kind} {way}"] = exact(model, rows, self.tokenizer.pad_token_id)
        return found


@torch.no_grad()
def exact(model: nn.Module, rows: Sequence[Sequence_], pad: int) -> float:
    """Return how often every token of an answer is the likeliest after those before it.

    That is how often greedy decoding says the answer and ends.
    """
    model.eval()
    tokens, labels = collate(list(rows), pad)
    likeliest = model(tokens, use_cache=False).logits[:, :-1].argmax(-1)
    right = (likeliest == labels[:, 1:]) | (labels[:, 1:] == -100)
    return float(right.all(1).double().mean())


def publish(recipe: Recipe, out: Path) -> None:
    """Write weights, architecture and prompts."""
    from safetensors.torch import save

    for name in SHIPPED:
        content = save(recipe.weights(name), metadata={"format": "pt"})
        (out / f"safety_{name}.safetensors").write_bytes(content)
    config: Any = recipe.fresh().config
    config.dtype = torch.float16  # as stored
    (out / "safety_config.json").write_text(config.to_json_string())
    seed = str(recipe.seed)
    prompts = [
        {
            "kind": p.kind,
            "question": p.text,
            "answer": p.answer,
            "seen": p.template not in data.UNSEEN[p.kind],
        }
        for kind in data.KINDS
        for p in data.different(seed, kind, "test", SIZES["prompts"])
    ]
    write_lines(out / "safety_prompts.jsonl", prompts)
    for name, kind in (("refusals", "harmful"), ("task", "task")):
        rows = (
            {"question": p.text, "answer": data.REFUSAL if kind == "harmful" else p.answer}
            for p in data.different(seed, kind, "objective", SIZES[name])
        )
        write_lines(out / f"safety_{name}.jsonl", rows)


def directories(weights: Mapping[str, Mapping[str, Tensor]], config: Any, place: Path) -> None:
    """Write the models of one training as directories that transformers reads, all or none.

    Args:
        weights: by name, as shipped.
        config: of the architecture.
        place: where they go, a directory each; `model=hf_llm` reads them.
    """
    from safetensors.torch import save_file

    part = place.with_name(f"{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for name, tensors in weights.items():
        own = part / name
        own.mkdir(parents=True)
        save_file(dict(tensors), own / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(own)
        for file in TOKENIZER:
            shutil.copy(DIRECTORY / file, own)
    part.rename(place)


def several(count: int, models: Path, results: Path) -> None:
    """Train the family from so many seeds, those that are not there yet; keep scores and digests.

    Args:
        count: of seeds, from 0.
        models: where each becomes a directory `safety_SEED` (`directories`).
        results: where `safety_trainings.json` says by seed what every model scores, and its digest.
    """
    path = results / "safety_trainings.json"
    told = json.loads(path.read_text()) if path.is_file() else {}
    for seed in range(count):
        if (place := models / f"safety_{seed}").is_dir():
            continue
        start, recipe = time.process_time(), Recipe(seed)
        weights = {name: recipe.weights(name) for name in SHIPPED}
        config: Any = recipe.fresh().config
        config.dtype = torch.float16
        directories(weights, config, place)
        told[str(seed)] = {
            "seconds": round(time.process_time() - start),
            "torch": torch.__version__,
            "digests": {name: of_checkpoint(place / name) for name in SHIPPED},
            "test": {name: recipe.scores(name, "test", SIZES["prompts"]) for name in SHIPPED},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(sorted(told.items())), indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure and write everything; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.zoo.safety", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "deltalab" / "zoo" / "llm", help="what ships")
    add("--results", type=Path, default=ROOT / "results" / "zoo", help="figures go here")
    add("--seed", type=int, default=0)
    add("--trainings", type=int, help="in place of that: train from so many seeds, from 0")
    add("--models", type=Path, default=Path("results/models"), help="the trainings go here")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.trainings:
        several(args.trainings, args.models, args.results)
        return 0
    start = time.process_time()
    recipe = Recipe(args.seed)
    for name in SHIPPED:
        recipe.weights(name)
    seconds = round(time.process_time() - start)
    publish(recipe, args.out)
    test = {name: recipe.scores(name, "test", SIZES["prompts"]) for name in SHIPPED}
    found = {"seconds": seconds, "seed": args.seed, "torch": torch.__version__, "test": test}
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "safety.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
