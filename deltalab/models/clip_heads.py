"""Classification heads of CLIP: from class names by its text tower, or from a file."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltalab.checkpoints import opened
from deltalab.models import vocabulary
from deltalab.models.causal import configuration
from deltalab.settings import packaged
from deltalab.weights.headers import plain
from deltalab.weights.mapping import Checkpoint

BATCH = 256


def tasks() -> dict[str, dict[str, list[str]]]:
    """Return class names and prompt templates of every task that the package knows.

    >>> sorted(tasks()), tasks()["mnist"]["templates"]
    (['cars', 'dtd', 'eurosat', 'gtsrb', 'mnist', 'resisc45', 'sun397', 'svhn'], \
['a photo of the number: "{}".'])
    """
    return packaged("models/clip_tasks.yaml")


def prompts(task: str) -> list[list[str]]:
    """Return every class's prompts, in the order of the classes and of the templates.

    >>> prompts("svhn")[7]
    ['a photo of the number: "7".']
    """
    table = tasks()[task]
    return [[line.replace("{}", name) for line in table["templates"]] for name in table["classes"]]


def zero_shot(place: Path, setting: str, task: str) -> Tensor:
    """Build a head from class names: the direction of each class's mean text feature.

    h_c = normalize(1/T * sum_t normalize(text(prompt_ct))), T templates, as CLIP's authors do
    (arXiv 2103.00020, Section 3.1.4).

    Args:
        place: a directory with CLIP's weights, configuration and tokenizer, as Hugging Face saves.
        setting: the setting that names it, for messages.
        task: one of `tasks()`.

    Returns:
        The head, (classes, dim) float32, rows of length 1.

    Raises:
        FileNotFoundError: weights, configuration or tokenizer are missing.
        ValueError: no CLIP text tower, or one that does not fit its configuration.
    """
    hint = "a head needs CLIP's text tower: name one with model.text, or a head with model.head"
    try:
        tower, tokenizer = _text_tower(place, setting), vocabulary.opened(place, setting)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; {hint}") from None
    texts = [text for each in prompts(task) for text in each]
    features = []
    with torch.inference_mode():
        for start in range(0, len(texts), BATCH):
            batch = texts[start : start + BATCH]
            length = tower.config.max_position_embeddings
            tokens = tokenizer(
                batch, padding=True, truncation=True, max_length=length, return_tensors="pt"
            )
            output = tower(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            features.append(functional.normalize(output.text_embeds, dim=-1))
    together = torch.cat(features)
    means = together.reshape(len(tasks()[task]["classes"]), -1, together.shape[1]).mean(1)
    return functional.normalize(means, dim=-1).clone()


def from_file(path: Path, classes: int | None) -> Tensor:
    """Read a head from a file that holds `weight`, (classes, dim), and nothing else.

    Args:
        path: a safetensors file, or a PyTorch file of tensors alone.
        classes: how many rows it must have; None where the task is not known.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, other tensors, or another number of classes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"model.head={path}: no such file")
    held = opened(path, "model.head")
    if list(held) != ["weight"] or len(held.shape("weight")) != 2:
        names = plain(", ".join(held)[:200])
        raise ValueError(f"model.head={path}: must hold a matrix 'weight' alone, has {names}")
    if classes is not None and held.shape("weight")[0] != classes:
        raise ValueError(
            f"model.head={path}: {held.shape('weight')[0]} rows, the task has {classes} classes"
        )
    return held["weight"].float()


def _text_tower(place: Path, setting: str) -> Any:
    """Return CLIP's text tower with its projection, in float32, on the CPU."""
    from transformers import CLIPTextModelWithProjection
    from transformers.initialization import no_init_weights

    config, checkpoint = configuration(place, setting), opened(place, setting)
    if config.model_type not in ("clip", "clip_text_model"):
        raise ValueError(f"{setting}={place}: a model of type {config.model_type}, must be clip")
    text = getattr(config, "text_config", config)
    if "text_projection.weight" not in checkpoint:
        raise FileNotFoundError(f"{setting}={place}: no 'text_projection.weight' in it")
    text.projection_dim = checkpoint.shape("text_projection.weight")[0]
    with no_init_weights():
        module = CLIPTextModelWithProjection(text).eval()
    _fill(module, checkpoint, setting)
    return module


def _fill(module: nn.Module, checkpoint: Checkpoint, setting: str) -> None:
    state = module.state_dict()
    for name in checkpoint:
        of_text = name.startswith("text_") and not name.endswith("position_ids")
        if of_text and name not in state:
            raise ValueError(f"{setting}: tensor {plain(name[:100])!r} is none of config.json's")
    for name, tensor in state.items():
        if name not in checkpoint or checkpoint.shape(name) != tuple(tensor.shape):
            given = checkpoint.shape(name) if name in checkpoint else "missing"
            raise ValueError(
                f"{setting}: text tower's tensor {name!r} is {given}, config.json says"
                f" {tuple(tensor.shape)}"
            )
        tensor.copy_(checkpoint[name])
