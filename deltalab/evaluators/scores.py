"""What every evaluator returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scores:
    """What an evaluator found.

    Attributes:
        metrics: name -> value; accuracies as fractions, losses in nats.
        losses: per-example losses by task, for paired comparisons between two edits.
        documents: per-document scores by `<task>/<metric>`, in the order of the documents.
    """

    metrics: Mapping[str, float]
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    documents: Mapping[str, Tensor] = field(default_factory=dict)
