"""What is known of published models without asking the hub: to plan with, never to run."""

from dataclasses import dataclass
from typing import Any

import torch

from deltalab.settings import packaged


@dataclass(frozen=True)
class Facts:
    """One repository.

    Attributes:
        parameters: entries of all its tensors.
        dtype: the dtype in which they are stored.
        config: what of its `config.json` determines names and shapes, where it has one to plan by.
    """

    parameters: int
    dtype: str
    config: Any = None

    @property
    def bytes(self) -> int:
        """The bytes of its weights."""
        return self.parameters * int(getattr(torch, self.dtype).itemsize)


def known(source: str) -> Facts | None:
    """Return the facts of a hub id, if it is one of the presets'.

    >>> known("Qwen/Qwen2-7B").bytes / 1e9, known("org/name")
    (15.231233024, None)
    """
    found = packaged("models/hub_facts.yaml").get(source)
    return Facts(**found) if found else None


def configuration(source: str) -> Any:
    """Return transformers' configuration of a hub id, built without it; None where unknown."""
    from transformers import AutoConfig

    facts = known(source)
    if facts is None or facts.config is None:
        return None
    return AutoConfig.for_model(**facts.config)
