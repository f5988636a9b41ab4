"""The settings of one run, checked: two runs with equal recipes give equal weights."""

import math
from dataclasses import dataclass

from deltalab.data.text import Preferences, Problems


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a run's result.

    Attributes:
        kind: `sft` or `dpo`.
        model: directory or hub id of the model to start from.
        data: file of problems (`sft`) or of preferences (`dpo`).
        chat: whether prompts go through the chat template.
        limit: the first so many rows train; None for all that are not held out.
        held: the last so many rows of the file are held out.
        context: most tokens of a sequence.
        epochs: passes over the training rows.
        batch: examples a step.
        micro: examples a forward pass; smaller needs less memory and changes nothing else.
        rate: highest learning rate, reached after `warmup`, then a cosine to zero.
        warmup: fraction of the steps that warm up.
        decay: AdamW's weight decay.
        clip: the gradient's largest norm.
        lora: rank of the adapters that train in place of the linear layers; 0 trains everything.
        beta: strength of the preference, `dpo` only.
        precision: `bfloat16` computes in it, updating weights kept in float32; or `float32`.
        seed: of the order of the examples and the adapters' start.
    """

    kind: str
    model: str
    data: str
    chat: bool = False
    limit: int | None = None
    held: int = 64
    context: int = 1024
    epochs: int = 1
    batch: int = 16
    micro: int = 4
    rate: float = 5e-5
    warmup: float = 0.1
    decay: float = 0.0
    clip: float = 1.0
    lora: int = 0
    beta: float = 0.1
    precision: str = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("sft", "dpo"):
            raise ValueError(f"{self.kind}: must be sft or dpo")
        if self.precision not in ("bfloat16", "float32"):
            raise ValueError(f"--precision {self.precision}: must be bfloat16 or float32")
        for name in ("held", "epochs", "batch", "micro", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: must be at least 1")
        for name in ("rate", "clip", "beta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name} {getattr(self, name)}: must be above 0")
        if not 0 <= self.warmup < 1 or self.decay < 0 or self.lora < 0:
            raise ValueError("--warmup must be in [0, 1), --decay and --lora at least 0")

    def rate_at(self, step: int, steps: int) -> float:
        """Return the learning rate of a step in `0 ... steps - 1`.

        >>> r = Recipe("sft", "m", "d", rate=1.0, warmup=0.1)
        >>> r.rate_at(4, 100), round(r.rate_at(55, 100), 6)
        (0.5, 0.5)
        """
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return self.rate * (step + 1) / warm
        done = (step - warm) / max(1, steps - warm)
        return self.rate * 0.5 * (1 + math.cos(math.pi * done))

    @property
    def source(self) -> Problems | Preferences:
        """The rows of the data file, as token batches."""
        return Problems(self.data) if self.kind == "sft" else Preferences(self.data)
