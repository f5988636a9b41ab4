"""Small multimodal models that share one language model, fused as VisionFuse does (2412.01289).

Each expert is a frozen vision encoder, a projector into the language model's embeddings, and its
own fine-tune of the language model. Fused, the tokens of all encoders stand one after the other
before the question, and the language models' deltas are merged: W = W_0 + sum_m lambda_m D_m.
Encoders and projectors stay as they are. `python -m experiments.visionfuse` makes a directory:

    world.json            encoders, questions and their answers
    projectors.safetensors
    base.safetensors, NAME.safetensors   the language models, names as in `Seer`
    lm/                   configuration and tokenizer
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltalab.data.images import packaged
from deltalab.models import zoo
from deltalab.models.live import live_pair
from deltalab.store.latest import latest
from deltalab.weights.mapping import Checkpoint, ModelPair

MADE = "python -m experiments.visionfuse makes one"


@dataclass(frozen=True)
class FusedLm:
    """A base language model and the fine-tune of it that one vision encoder was trained with.

    Args:
        dir: the directory that holds them all.
        post: the expert, by its encoder's name.
        device: as for `TimmPair`.
    """

    dir: str
    post: str
    device: str = "cpu"
    contents: ClassVar = {"dir": "tree"}
    reads: ClassVar = ("checkpoint",)
    version: ClassVar[int] = 1

    @property
    def pre(self) -> str:
        """The name of the language model that all were trained from."""
        return "base"

    @property
    def place(self) -> Path:
        """The directory.

        Raises:
            FileNotFoundError: there is none, or it lacks the expert.
        """
        found = Path(self.dir).expanduser()
        if not (found / "world.json").is_file():
            raise FileNotFoundError(f"model.dir={self.dir}: no such family of models; {MADE}")
        if not (found / f"{self.post}.safetensors").is_file():
            raise FileNotFoundError(f"model.post={self.post}: not in {self.dir}")
        return found

    def open(self) -> ModelPair:
        """Return the pair; consecutive calls with an equal spec share it."""
        return _open(self)

    def skeleton(self) -> nn.Module:
        """Return the architecture on the meta device: names and shapes, no memory."""
        look = Look(self.place)
        with torch.device("meta"):
            return Seer(_language_model(self.place), look)


@latest("model")
def _open(spec: FusedLm) -> ModelPair:
    place = spec.place
    look = Look(place)
    pre, post = (Checkpoint(place / f"{name}.safetensors") for name in (spec.pre, spec.post))
    seer = Seer(_language_model(place), look)
    return live_pair(seer, pre, post, spec.device, "float32", look)


def _language_model(place: Path) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(place / "lm", local_files_only=True)
    module: nn.Module = LlamaForCausalLM(config)
    return module


class Look:
    """What turns pictures and a question into the input of `Seer`, and knows the right answers.

    Args:
        place: a directory as above.
    """

    def __init__(self, place: Path) -> None:
        from safetensors.torch import load_file
        from transformers import PreTrainedTokenizerFast

        world: Mapping[str, Any] = json.loads((place / "world.json").read_text(encoding="utf-8"))
        self.tasks: Sequence[str] = world["tasks"]
        self.encoders: Mapping[str, Mapping[str, str]] = world["encoders"]
        self.questions: Mapping[str, Mapping[str, Any]] = world["questions"]
        self.projectors = load_file(place / "projectors.safetensors")
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(place / "lm" / "tokenizer.json"))
        self.prompts = {
            name: torch.tensor(tokenizer(question["prompt"]).input_ids)
            for name, question in self.questions.items()
        }
        words = {
            word for each in self.questions.values() for row in each["answers"] for word in row
        }
        self.words: dict[str, int] = {word: tokenizer(word).input_ids[0] for word in words}

    def labels(self, question: str, classes: Sequence[Tensor]) -> Tensor:
        """Return the token of the right answer for the classes of the parts of every picture."""
        answers = self.questions[question]["answers"]
        pairs = zip(*(each.tolist() for each in classes), strict=True)
        return torch.tensor([self.words[answers[a][b]] for a, b in pairs])

    def prepared(
        self,
        question: str,
        encoders: Sequence[str],
        split: str,
        rows: Sequence[int],
        keep: int | None,
    ) -> Tensor:
        """Return the input of `Seer` for some pictures of a split.

        Args:
            question: by name.
            encoders: whose tokens, in order.
            split: of the packaged images.
            rows: the pictures' places in it.
            keep: so many tokens of each encoder, those whose projections are longest; None: all.

        Returns:
            (pictures, 1 + tokens, 1 + width): a row with the question's number, then a token each,
            the number of its encoder before it.
        """
        parts = []
        for name in encoders:
            about = self.encoders[name]
            tokens = seen(about["vit"], about["task"], split)[list(rows)]
            if keep is not None and keep < tokens.shape[1]:
                tokens = _longest(tokens, self.projected(name, tokens), keep)
            number = torch.full((*tokens.shape[:2], 1), float([*self.encoders].index(name)))
            parts.append(torch.cat([number, tokens], 2))
        width = parts[0].shape[2] if parts else 2
        first = torch.zeros(len(rows), 1, width)
        first[:, 0, 0] = [*self.questions].index(question)
        return torch.cat([first, *parts], 1)

    def projected(self, encoder: str, tokens: Tensor) -> Tensor:
        """Return the language model's embeddings of an encoder's tokens."""
        weight, bias = (self.projectors[f"{encoder}.{part}"] for part in ("weight", "bias"))
        return functional.linear(tokens, weight.to(tokens.device), bias.to(tokens.device))


def _longest(tokens: Tensor, projected: Tensor, keep: int) -> Tensor:
    """Keep the tokens with the longest projections, in their order."""
    chosen = projected.norm(dim=2).topk(keep, dim=1).indices.sort(dim=1).values
    return tokens.gather(1, chosen[:, :, None].expand(-1, -1, tokens.shape[2]))


class Seer(nn.Module):
    """Answers a question about pictures: the language model after the encoders' projected tokens.

    Args:
        lm: the language model, whose weights alone are the module's.
        look: projectors and questions.
    """

    def __init__(self, lm: nn.Module, look: Look) -> None:
        super().__init__()
        self.lm, self.look = lm, look

    def forward(self, x: Tensor) -> Tensor:
        """Return logits over the vocabulary, (n, words), for inputs of `Look.prepared`."""
        embed: Any = self.lm.get_input_embeddings()  # type: ignore[operator]
        names = [*self.look.encoders]
        of = [names[int(number)] for number in x[0, 1:, 0].tolist()]
        parts = []
        for name in dict.fromkeys(of):
            places = [1 + i for i, other in enumerate(of) if other == name]
            parts.append(self.look.projected(name, x[:, places, 1:]))
        prompt = [*self.look.prompts.values()][int(x[0, 0, 0])].to(x.device)
        words = embed(prompt)[None].expand(len(x), -1, -1)
        logits: Tensor = self.lm(
            inputs_embeds=torch.cat([*parts, words], 1), use_cache=False
        ).logits
        return logits[:, -1]


@lru_cache(maxsize=16)
def seen(vit: str, task: str, split: str) -> Tensor:
    """Return what an embedded vision transformer makes of a task's images: (n, 5, width).

    The class token, and the means of the four quarters' patches.
    """
    module, normalise = zoo.alone(vit)
    images, _ = packaged(task, split)
    found = []
    with torch.inference_mode():
        for start in range(0, len(images), 250):
            x = normalise(images[start : start + 250])
            found.append(_pooled(module.forward_features(x)))  # type: ignore[operator]
    return torch.cat(found).clone()


def _pooled(tokens: Tensor) -> Tensor:
    """Keep the class token and average patches (4 x 4 of them) over quarters."""
    count, _, width = tokens.shape
    patches = tokens[:, 1:].reshape(count, 2, 2, 2, 2, width).mean((2, 4))
    return torch.cat([tokens[:, :1], patches.reshape(count, 4, width)], 1)
