"""Pictures of two parts with a question about them, for models of `deltalab.visionfuse`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from deltalab.data import splits
from deltalab.data.images import Batches, packaged


@dataclass(frozen=True)
class Scenes:
    """Two packaged images side by side, the i-th of one task beside the i-th of the other.

    Of the objective split half B is taken: the models were trained on half A.

    Args:
        question: the question's name, as in the models' `world.json`.
        encoders: whose tokens stand before it, in order.
        split: `test` or `objective`.
        keep: so many tokens of each encoder, by the length of their projections; None: all.
        limit: the first so many pictures; all when None.

    Raises:
        ValueError: a setting is out of range; on opening, of a model that has no such question or
            encoder.
    """

    question: str
    encoders: tuple[str, ...]
    split: str
    keep: int | None = None
    limit: int | None = None
    reads: ClassVar = ("images",)
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoders", tuple(self.encoders))
        if self.split not in ("test", "objective"):
            raise ValueError(f"data.split={self.split}: must be one of test, objective")
        for field in ("keep", "limit"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise ValueError(f"data.{field}={value}: must be at least 1, or null for all")

    def open(self, transform: Any, batch_size: int) -> Batches:
        """Return the batches: x as `Look.prepared` says, y the token of the right answer."""
        if not hasattr(transform, "prepared"):
            raise ValueError("data=scenes: is for models of visionfuse alone")
        _among("question", [self.question], transform.questions)
        _among("encoders", self.encoders, transform.encoders)
        sides = [packaged(task, self.split)[1] for task in transform.tasks]
        count = min(map(len, sides))
        rows = splits.places(count, "B" if self.split == "objective" else None)[: self.limit]
        classes = [side[rows] - side.min() for side in sides]
        x = transform.prepared(self.question, self.encoders, self.split, rows, self.keep)
        y = transform.labels(self.question, classes)
        return Batches(len(y), lambda i: (x[i], int(y[i])), batch_size)


def _among(field: str, given: Sequence[str], known: Any) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"data.{field}={name}: must be one of {', '.join(known)}")
