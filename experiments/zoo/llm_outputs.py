"""What the recipe of the language models leaves behind: package files, figures, tables, curves."""

import csv
import json
from pathlib import Path
from typing import Any

import torch

from experiments.zoo.llm_checks import FEW, deltas, dpo_line, try_edits
from experiments.zoo.llm_data import (
    SIZES,
    draw_split,
    preference_row,
    write_lines,
    write_problems,
)
from experiments.zoo.llm_prefer import margins, reward
from experiments.zoo.llm_recipe import Recipe
from experiments.zoo.llm_score import answer_loss, exact_match
from experiments.zoo.llm_tables import render

PAIRS = {
    "tiny_llm": ("base", "sft"),
    "tiny_llm_far": ("base", "far"),
    "tiny_llm_dpo": ("sft", "dpo"),
    "tiny_llm_small": ("small_base", "small_sft"),
}
MODELS = ("base", "sft", "far", "dpo", "small_base", "small_sft")
CONFIGS = {"base": "config.json", "small_base": "small_config.json"}
SPLITS = ("validation", "test", "unseen")
SCORED = {"validation": 100, "test": 250, "unseen": 100}
DROPS = {"validation": 2, "test": 1}  # draws of the dropping edits


def publish(recipe: Recipe, out: Path) -> None:
    """Write weights, architecture, tokenizer and data files, everything that ships."""
    from safetensors.torch import save

    out.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        data = save(recipe.weights(name), metadata={"format": "pt"})
        (out / f"{name}.safetensors").write_bytes(data)
    write_tokenizer(recipe.tokenizer, out)
    for name, file in CONFIGS.items():
        config: Any = recipe.model(name).config
        config.dtype = torch.float16  # as stored
        (out / file).write_text(config.to_json_string())
    write_problems(out, recipe.seed)
    pairs = recipe.pairs("preferences")[: SIZES["preferences"]]
    write_lines(out / "preferences.jsonl", [preference_row(pair) for pair in pairs])


def write_tokenizer(tokenizer: Any, out: Path) -> None:
    """Write the tokenizer's files, under the class name that every version of the library knows."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n")


def measure(recipe: Recipe) -> dict[str, Any]:
    """Return every figure of the report; each part is kept as soon as it is there."""
    tokenizer = recipe.tokenizer
    problems = {s: draw_split(s, SCORED[s], recipe.seed) for s in SPLITS}
    scores: list[dict[str, Any]] = []
    for name in MODELS:
        key = f"scores.{name}"
        scores += recipe.kept(key) or recipe.keep(key, score_model(recipe, name, problems))
    full = {n: {k: w.float() for k, w in recipe.weights(n).items()} for n in MODELS}
    edits = {}
    for pair, (pre, post) in PAIRS.items():
        for split, draws in DROPS.items():
            name, couple = f"edits.{pair}.{split}", (full[pre], full[post])
            print(name, flush=True)
            few = FEW if post == "dpo" else ()
            edits[f"{pair} {split}"] = recipe.kept(name) or recipe.keep(
                name, try_edits(recipe.model(pre), tokenizer, couple, problems[split], draws, few)
            )
    return {
        "parameters": sum(w.numel() for w in full["base"].values()),
        "small parameters": sum(w.numel() for w in full["small_base"].values()),
        "vocabulary": len(tokenizer),
        "scores": scores,
        "deltas": {pair: deltas(full[a], full[b]) for pair, (a, b) in PAIRS.items()},
        "edits": edits,
        "preferences": preferences(recipe, full),
        "settings": {"seed": recipe.seed, "torch": torch.__version__},
    }


def score_model(recipe: Recipe, name: str, problems: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one model's exact match and answer loss on every split."""
    model, rows = recipe.model(name), []
    for split, own in problems.items():
        right, loose = exact_match(model, recipe.tokenizer, own)
        row = {"model": name, "split": split, "problems": len(right)}
        row |= {"strict": sum(right) / len(right), "flexible": sum(loose) / len(loose)}
        rows.append({**row, "loss": answer_loss(model, recipe.tokenizer, own)})
        print(rows[-1], flush=True)
    return rows


def preferences(recipe: Recipe, full: dict[str, Any]) -> dict[str, Any]:
    """Return the DPO pair's reward figures on validation and held-out preferences."""
    if (kept := recipe.kept("preferences")) is not None:
        return dict(kept)
    model = recipe.model("sft")
    figures: dict[str, Any] = {"training pairs": len(recipe.pairs("train"))}
    for split in ("validation", "preferences"):
        pairs = recipe.pairs(split)[: SIZES["preferences"]] if split == "preferences" else None
        pairs = pairs or recipe.pairs(split)
        model.load_state_dict(full["sft"])
        before = margins(model, recipe.tokenizer, pairs)
        model.load_state_dict(full["dpo"])
        loss, accuracy = reward(margins(model, recipe.tokenizer, pairs) - before)
        figures[split] = {"pairs": len(pairs), "loss": loss, "accuracy": accuracy}
        couple = (full["sft"], full["dpo"])
        figures[f"{split} line"] = dpo_line(model, recipe.tokenizer, couple, pairs)
    return dict(recipe.keep("preferences", figures))


def report(recipe: Recipe, out: Path, results: Path) -> str:
    """Measure, write ``llm.json``, ``llm.md``, ``llm_curves.csv`` and ``.png``; return the page."""
    run = measure(recipe)
    stages = {name: recipe.kept(f"{name}.curve") for name in MODELS}
    run["seconds"] = {name: round(stage["seconds"]) for name, stage in stages.items()}
    run["bytes"] = {p.name: p.stat().st_size for p in sorted(out.iterdir()) if p.is_file()}
    results.mkdir(parents=True, exist_ok=True)
    (results / "llm.json").write_text(json.dumps(run, indent=1) + "\n")
    write_curves([tuple(row) for stage in stages.values() for row in stage["rows"]], results)
    text = render(run)
    (results / "llm.md").write_text(text)
    return text


def write_curves(rows: list[Any], results: Path) -> None:
    """Write the training curves as ``llm_curves.csv`` and ``llm_curves.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with (results / "llm_curves.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("phase", "step", "batch_loss", "validation_loss", "validation_score"))
        writer.writerows((p, s, f"{b:.5f}", f"{v:.5f}", f"{a:.4f}") for p, s, b, v, a in rows)
    size = {"figsize": (3 * len(MODELS), 5), "constrained_layout": True, "squeeze": False}
    figure, axes = pyplot.subplots(2, len(MODELS), **size)
    for column, phase in enumerate(MODELS):
        part = [row for row in rows if row[0] == phase]
        steps = [row[1] for row in part]
        axes[0][column].plot(steps, [row[2] for row in part], label="batches")
        axes[0][column].plot(steps, [row[3] for row in part], label="validation answers")
        axes[1][column].plot(steps, [row[4] for row in part], color="C2")
        axes[0][column].set(title=phase, ylabel="loss, nats", yscale="log")
        score = "reward accuracy" if phase == "dpo" else "exact match"
        axes[1][column].set(xlabel="step", ylabel=score, ylim=(-0.02, 1.02))
        for row in (0, 1):
            axes[row][column].grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    figure.savefig(results / "llm_curves.png", dpi=80)
    pyplot.close(figure)
