"""What a run leaves on disk: checkpoints to go on from, and the finished model, whole or not."""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltalab.data.rows import read
from deltalab.provenance import commit, device_name
from experiments.posttrain.model import Run, trained
from experiments.posttrain.recipe import Recipe

MANIFEST = "posttrain.json"
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt")


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: steps done.
        curve: one entry a step, with the held-out loss where it was measured.
        seconds: time spent in steps, over all resumptions.
    """

    step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


def partial(out: Path) -> Path:
    """Return where a run's checkpoint lies."""
    return out.with_name(out.name + ".partial")


def digest(path: str) -> str:
    """Return the SHA-256 of a data file."""
    return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()


def described(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe and the hash of its data: what must be equal for a run to go on."""
    return {**asdict(recipe), "sha256": digest(recipe.data)}


def finished(out: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Return the manifest of a finished run of this recipe, or None where there is none.

    Raises:
        ValueError: something else lies there.
    """
    if not out.exists():
        return None
    path = out / MANIFEST
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if found.get("recipe") != described(recipe):
        raise ValueError(f"--out {out}: something else is there; name another directory")
    return found


def checkpoint(
    out: Path, recipe: Recipe, named: Mapping[str, Tensor], optimiser: Any, at: Progress
) -> None:
    """Write a checkpoint, whole or not at all."""
    place = partial(out)
    place.mkdir(parents=True, exist_ok=True)
    content = {
        "recipe": described(recipe),
        "progress": asdict(at),
        "weights": {name: p.detach() for name, p in named.items()},
        "optimiser": optimiser.state_dict(),
    }
    torch.save(content, place / "state.pt.tmp")
    os.replace(place / "state.pt.tmp", place / "state.pt")


def resume(out: Path, recipe: Recipe, named: Mapping[str, Tensor], optimiser: Any) -> Progress:
    """Load the checkpoint of this recipe into model and optimiser, if there is one.

    Raises:
        ValueError: the checkpoint is of another recipe or of other data.
    """
    path = partial(out) / "state.pt"
    if not path.is_file():
        return Progress()
    content = torch.load(path, weights_only=True, map_location="cpu")
    for name, value in described(recipe).items():
        if content["recipe"].get(name) != value:
            raise ValueError(
                f"{path}: begun with {name}={content['recipe'].get(name)}, now {value}; remove"
                " it, or name another --out"
            )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(content["weights"][name])
    optimiser.load_state_dict(content["optimiser"])
    return Progress(**content["progress"])


def publish(out: Path, run: Run, found: Mapping[str, float], at: Progress) -> dict[str, Any]:
    """Write the model with tokenizer, held-out rows and manifest; it appears under `out` whole."""
    recipe, place = run.recipe, partial(out) / "model"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    trained(run).to(_stored_dtype(recipe.model)).save_pretrained(place)
    _copy_tokenizer(recipe.model, run.tokenizer, place)
    rows = [row.fields for row in read(recipe.data)[-recipe.held :]]
    lines = (json.dumps(fields, ensure_ascii=False) + "\n" for fields in rows)
    (place / "held_out.jsonl").write_text("".join(lines), encoding="utf-8")
    manifest = {
        "recipe": described(recipe),
        "examples": {"train": len(run.train), "held_out": len(run.held)},
        "parameters_trained": sum(p.numel() for p in run.masters.values()),
        "unit": "nats per token" if recipe.kind == "sft" else "nats per example",
        "held_out": dict(found),
        "curve": at.curve,
        "seconds": round(at.seconds, 1),
        "hardware": {"device": device_name(run.device), "processor": _processor()},
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "git": commit(),
    }
    (place / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    os.replace(place, out)
    shutil.rmtree(partial(out))
    return manifest


def _stored_dtype(model: str) -> torch.dtype:
    """Return the dtype in which the starting model is stored, and so the result too."""
    from transformers import AutoConfig

    dtype: torch.dtype = AutoConfig.from_pretrained(model).dtype or torch.float32
    return dtype


def _copy_tokenizer(model: str, tokenizer: Any, place: Path) -> None:
    """Copy the tokenizer's files as they are: a pair's two tokenizers must be the same."""
    if not Path(model).expanduser().is_dir():
        tokenizer.save_pretrained(place)
        return
    for pattern in TOKENIZER:
        for file in Path(model).expanduser().glob(pattern):
            shutil.copy(file, place / file.name)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")
