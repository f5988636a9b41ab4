"""One run: load, train with checkpoints, measure on held-out rows, write the result at once."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltalab.loss.objectives import Measured, change
from experiments.posttrain import state
from experiments.posttrain.batches import order
from experiments.posttrain.model import Run
from experiments.posttrain.recipe import Recipe


def train(
    recipe: Recipe,
    out: Path,
    device: str = "cpu",
    score: int = 25,
    save: int = 25,
    say: Callable[[str], None] = print,
    stop: int | None = None,
) -> dict[str, Any]:
    """Run a recipe, or go on with it, and write the post-trained model.

    Args:
        recipe: the settings.
        out: the directory to be made; its checkpoint lies beside it, in `out.partial`.
        device: where to train.
        score: steps between two looks at the held-out rows.
        save: steps between two checkpoints.
        say: told of the progress, line by line.
        stop: end after this step, as if killed; for tests.

    Returns:
        The manifest, as it is in `out/posttrain.json`.
    """
    if (done := state.finished(out, recipe)) is not None:
        say(f"{out}: finished already")
        return done
    run = Run(recipe, device)
    plan, weights = order(len(run.train), recipe), list(run.masters.values())
    optimiser = torch.optim.AdamW(weights, lr=recipe.rate, weight_decay=recipe.decay)
    before = run.measured(run.held)
    at = state.resume(out, recipe, run.masters, optimiser)
    run.load()
    say(
        f"{len(run.train)} examples train, {len(run.held)} are held out; {len(plan)} steps,"
        f" {sum(p.numel() for p in weights):,} parameters; held-out loss {before.mean:.4f}"
        + (f"; going on after step {at.step}" if at.step else "")
    )
    for number in range(at.step, len(plan)):
        start, rate = time.perf_counter(), recipe.rate_at(number, len(plan))
        optimiser.param_groups[0]["lr"] = rate
        loss = run.gradients(plan[number])
        norm = float(nn.utils.clip_grad_norm_(weights, recipe.clip))
        optimiser.step()
        run.load()
        at.step = number + 1
        point = {"step": at.step, "loss": loss, "gradient": norm}
        if at.step % score == 0:
            point["held_out"] = run.measured(run.held).mean
        at.curve.append(point)
        at.seconds += time.perf_counter() - start
        say(_line(point, len(plan), rate, at.seconds))
        if at.step % save == 0 or at.step == stop:
            state.checkpoint(out, recipe, run.masters, optimiser, at)
        if at.step == stop:
            return {}
    return state.publish(out, run, _outcome(recipe, before, run.measured(run.held)), at)


def _outcome(recipe: Recipe, before: Measured, after: Measured) -> dict[str, float]:
    value, error = change(before, after)
    found = {"before": before.mean, "after": after.mean, "change": value, "error": error}
    if recipe.kind == "dpo":  # a preference is right where its loss is below log 2, its start
        found["accuracy"] = float((after.losses < before.losses).double().mean())
    return found


def _line(point: dict[str, float], steps: int, rate: float, seconds: float) -> str:
    done = int(point["step"])
    left = seconds / done * (steps - done) / 60
    held = f"  held-out {point['held_out']:.4f}" if "held_out" in point else ""
    return (
        f"step {done}/{steps}  loss {point['loss']:.4f}{held}  gradient {point['gradient']:.2f}"
        f"  rate {rate:.1e}  {seconds / done:.1f} s a step, {left:.0f} min left"
    )
