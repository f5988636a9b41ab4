"""The embedded pairs: small vision transformers whose weights and images ship in the package."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltalab.models import embedded
from deltalab.models.live import live_pair
from deltalab.store.latest import latest
from deltalab.weights.mapping import Checkpoint, ModelPair

DIRECTORY = embedded.ZOO


@dataclass(frozen=True)
class EmbeddedVit:
    """A generalist and one of its fine-tuned descendants.

    Args:
        post: `mnist`, `mnist_early`, `fashion` or `digits` (whose generalist is one that never saw
            the held-out digits).
        task: the packaged image task that the post-trained model is for.
        device: as for `TimmPair`.
    """

    post: str
    task: str
    device: str = "cpu"
    contents: ClassVar = {"post": "packaged vit"}
    reads: ClassVar = ("checkpoint",)

    def __post_init__(self) -> None:
        if self.post not in embedded.VIT:
            raise ValueError(
                f"model.post={self.post}: must be one of {', '.join(sorted(embedded.VIT))}"
            )

    @property
    def pre(self) -> str:
        """The name of the model that `post` was trained from."""
        return embedded.VIT[self.post]

    def open(self) -> ModelPair:
        """Return the pair; consecutive calls with an equal spec share it."""
        return _open(self)

    def skeleton(self) -> nn.Module:
        """Return the architecture on the meta device: names and shapes, no memory."""
        with torch.device("meta"):
            return _architecture(_recipe())


def _weights(name: str) -> Path:
    return DIRECTORY / f"{name}.safetensors"


def _recipe() -> dict[str, Any]:
    recipe: dict[str, Any] = json.loads((DIRECTORY / "vit.json").read_text())
    return recipe


def _architecture(recipe: dict[str, Any]) -> nn.Module:
    import timm

    module: nn.Module = timm.create_model(
        recipe["architecture"], pretrained=False, **recipe["args"]
    )
    return module


@latest("model")
def _open(spec: EmbeddedVit) -> ModelPair:
    recipe = _recipe()
    mean, std = float(recipe["mean"]), float(recipe["std"])

    def normalise(images: Tensor) -> Tensor:
        return (images.float() / 255 - mean) / std

    return live_pair(
        _architecture(recipe),
        Checkpoint(_weights(spec.pre)),
        Checkpoint(_weights(spec.post)),
        spec.device,
        "float32",
        normalise,
    )
