"""The embedded pairs: small vision transformers whose weights and images ship in the package."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltalab.models import embedded
from deltalab.models.live import live_pair
from deltalab.store.latest import latest
from deltalab.weights.mapping import Checkpoint, ModelPair, check_same_layout

DIRECTORY = embedded.ZOO
OUTPUTS = 20
"""Of all embedded vision transformers."""
NEVER = -1e4
"""A logit whose exponential is zero beside any other's, in every dtype."""


@dataclass(frozen=True)
class EmbeddedVit:
    """A generalist and one of its fine-tuned descendants.

    Args:
        post: `mnist`, `mnist_early`, `fashion` or `digits` (whose generalist is one that never saw
            the held-out digits), or `subset_0` to `subset_4` and `sequence_1` to `sequence_4`
            (see `results/zoo/subsets.json`).
        task: the packaged image task that the post-trained model is for.
        device: as for `TimmPair`.
        classes: the outputs that count, as if the others were not there: those of the task that an
            expert has a head for; None: all.
        weights: a safetensors file of another training of the same architecture, which takes the
            place of `post`'s own weights; None: those that ship with the package.

    Raises:
        ValueError: no such model, or no list of outputs.
    """

    post: str
    task: str
    device: str = "cpu"
    classes: tuple[int, ...] | None = None
    weights: str | None = None
    contents: ClassVar = {"post": "packaged vit", "weights": "model"}
    reads: ClassVar = ("checkpoint",)

    def __post_init__(self) -> None:
        if self.classes is not None:
            found = tuple(self.classes)
            if not found or not all(type(each) is int and 0 <= each < OUTPUTS for each in found):
                raise ValueError(
                    f"model.classes={[*found]}: must list outputs, from 0 to {OUTPUTS - 1}"
                )
            object.__setattr__(self, "classes", found)
        if self.post not in embedded.VIT:
            raise ValueError(
                f"model.post={self.post}: must be one of {', '.join(sorted(embedded.VIT))}"
            )

    @property
    def pre(self) -> str:
        """The name of the model that `post` was trained from."""
        return embedded.VIT[self.post]

    @property
    def checkpoints(self) -> tuple[Path, Path]:
        """The files of both models' weights."""
        post = _weights(self.post) if self.weights is None else Path(self.weights).expanduser()
        return _weights(self.pre), post

    def open(self) -> ModelPair:
        """Return the pair; consecutive calls with an equal spec share it."""
        return _open(self)

    def skeleton(self) -> nn.Module:
        """Return the architecture on the meta device: names and shapes, no memory."""
        with torch.device("meta"):
            return _architecture(_recipe(self.post))


def _weights(name: str) -> Path:
    return DIRECTORY / f"{name}.safetensors"


def _recipe(post: str) -> dict[str, Any]:
    recipe: dict[str, Any] = json.loads((DIRECTORY / embedded.vit_config(post)).read_text())
    return recipe


def _architecture(recipe: dict[str, Any]) -> nn.Module:
    import timm

    module: nn.Module = timm.create_model(
        recipe["architecture"], pretrained=False, **recipe["args"]
    )
    return module


def among(module: nn.Module, classes: tuple[int, ...]) -> None:
    """Have a module give all outputs but some the logit of what cannot be."""
    left = torch.ones(OUTPUTS, dtype=torch.bool)
    left[list(classes)] = False

    def masked(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return out.masked_fill(left.to(out.device), NEVER)

    module.register_forward_hook(masked)


def alone(name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Return one of the vision transformers by itself, in float32, and what prepares its images."""
    recipe = _recipe(name)
    module = _architecture(recipe).eval()
    module.load_state_dict({n: t.float() for n, t in Checkpoint(_weights(name)).items()})
    return module, _normalising(recipe)


def _normalising(recipe: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    mean, std = float(recipe["mean"]), float(recipe["std"])
    return lambda images: (images.float() / 255 - mean) / std


@latest("model")
def _open(spec: EmbeddedVit) -> ModelPair:
    recipe = _recipe(spec.post)
    normalise, module = _normalising(recipe), _architecture(recipe)
    if spec.classes is not None:
        among(module, spec.classes)
    pre, post = map(Checkpoint, spec.checkpoints)
    if spec.weights is not None:
        check_same_layout(pre, post)
    return live_pair(
        module,
        pre,
        post,
        spec.device,
        "float32",
        normalise,
    )
