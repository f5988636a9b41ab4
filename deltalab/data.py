"""Image sources: frozen specs whose `open` yields fixed batches, the same at every pass.

Every source takes the model's own transform and gives `(x, y)` batches: x float32 of shape
(n, channels, height, width), y int64 of shape (n,), indices into the model's outputs.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]
Transform = Callable[..., Tensor]


class Images(Protocol):
    """What objectives and evaluators ask of a source of labelled images."""

    def open(self, transform: Transform | None, batch_size: int) -> "Batches":
        """Return the batches, in a fixed order."""
        ...


class Batches:
    """Batches that can be walked through any number of times; images are decoded as needed."""

    def __init__(self, length: int, load: Callable[[int], tuple[Any, int]], batch_size: int):
        if length == 0:
            raise ValueError("no images to read")
        self.length, self._load, self._size = length, load, batch_size

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self.length, self._size):
            pairs = [self._load(i) for i in range(start, min(start + self._size, self.length))]
            yield torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])

    def __len__(self) -> int:
        return -(-self.length // self._size)


@dataclass(frozen=True)
class Packaged:
    """Images that ship with the package, for the embedded pairs.

    Args:
        task: `mnist` or `fashion`.
        split: `test` (for accuracies) or `objective` (for losses and gradients).
        limit: the first so many images only; all when None.
    """

    task: str
    split: str
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.task not in (tasks := ("mnist", "fashion")):
            raise ValueError(f"data.task={self.task}: must be one of {', '.join(tasks)}")
        if self.split not in (splits := ("test", "objective")):
            raise ValueError(f"data.split={self.split}: must be one of {', '.join(splits)}")

    def open(self, transform: Transform | None, batch_size: int) -> Batches:
        """Return the batches; the model's transform is applied to a whole uint8 array at once."""
        resource = files("deltalab") / "zoo" / f"{self.task}.npz"
        with as_file(resource) as path, np.load(path, allow_pickle=False) as arrays:
            x = torch.from_numpy(arrays[f"x_{self.split}"][: self.limit]).unsqueeze(1)
            y = torch.from_numpy(arrays[f"y_{self.split}"][: self.limit]).long()
        images = transform(x) if transform is not None else x.float() / 255
        return Batches(len(y), lambda i: (images[i], int(y[i])), batch_size)


@dataclass(frozen=True)
class Folder:
    """A directory with one sub-directory of images per class, as ImageNet is laid out.

    Args:
        dir: the directory; with `split`, the sub-directory of that name is read.
        split: for instance `val`; None when the class directories lie in `dir` itself.
        class_map: a JSON file `{"class name": index}` giving the model's output for every class
            directory; by default the classes are numbered in sorted order.
        limit: so many images, spread evenly over the sorted list; all when None.

    Raises:
        FileNotFoundError: the directory or the class map is missing.
        ValueError: no images in it, or a class that the class map does not name.
    """

    dir: str
    split: str | None = None
    class_map: str | None = None
    limit: int | None = None

    def open(self, transform: Transform | None, batch_size: int) -> Batches:
        """Return the batches; files are decoded when their batch is asked for."""
        root = Path(self.dir).expanduser() / (self.split or "")
        if not root.is_dir():
            raise FileNotFoundError(f"data.dir={root}: no such directory")
        names = sorted(p.name for p in root.iterdir() if p.is_dir())
        index = _class_index(names, self.class_map)
        from PIL import Image

        endings = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        paths = [
            (path, index[name])
            for name in names
            for path in sorted((root / name).rglob("*"))
            if path.suffix.lower() in endings
        ]
        if not paths:
            raise ValueError(f"data.dir={root}: no images in class sub-directories")
        paths = _spread(paths, self.limit)

        def load(i: int) -> tuple[Any, int]:
            path, label = paths[i]
            try:
                with Image.open(path) as image:
                    return _prepare(image, transform), label
            except OSError as error:
                raise ValueError(f"{path}: not a readable image ({error})") from None

        return Batches(len(paths), load, batch_size)


@dataclass(frozen=True)
class HubImages:
    """A Hugging Face image data set, from the hub, a local clone, or `imagefolder`.

    Args:
        path: the data set's id or directory, or `imagefolder` together with `dir`.
        split: the split to read.
        name: the configuration, where the data set has several.
        dir: `data_dir` of the builder.
        image: the image column.
        label: the label column.
        class_map: as for `Folder`, by the names of the label feature.
        limit: so many images, spread evenly; all when None.
    """

    path: str
    split: str
    name: str | None = None
    dir: str | None = None
    image: str = "image"
    label: str = "label"
    class_map: str | None = None
    limit: int | None = None

    def open(self, transform: Transform | None, batch_size: int) -> Batches:
        """Return the batches; rows are decoded when their batch is asked for."""
        import datasets

        if self.path == "imagefolder" and not Path(self.dir or "").is_dir():
            raise FileNotFoundError(f"data.dir={self.dir}: no such directory")
        try:
            rows = datasets.load_dataset(self.path, self.name, data_dir=self.dir, split=self.split)
        except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
            raise FileNotFoundError(f"data.path={self.path}: {error}") from None
        for setting, column in (("image", self.image), ("label", self.label)):
            if column not in rows.column_names:
                raise ValueError(
                    f"data.{setting}={column}: the columns of {self.path} are {rows.column_names}"
                )
        names = getattr(rows.features[self.label], "names", None)
        index = _class_index(names, self.class_map) if names else {}
        order = _spread(list(range(len(rows))), self.limit)

        def load(i: int) -> tuple[Any, int]:
            row = rows[order[i]]
            label = int(row[self.label])
            return _prepare(row[self.image], transform), index[names[label]] if names else label

        return Batches(len(order), load, batch_size)


def _class_index(names: Sequence[str], class_map: str | None) -> dict[str, int]:
    """Map class names to output indices, by a JSON file or by position."""
    if class_map is None:
        return {name: i for i, name in enumerate(names)}
    path = Path(class_map).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"data.class_map={class_map}: no such file")
    mapping: dict[str, int] = json.loads(path.read_text())
    if missing := [name for name in names if name not in mapping]:
        raise ValueError(f"data.class_map={class_map}: class {missing[0]!r} is not in it")
    return {name: int(mapping[name]) for name in names}


def _spread(items: list[Any], limit: int | None) -> list[Any]:
    """Return `limit` items at even distances, so that a sorted list keeps all its classes."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def _prepare(image: Any, transform: Transform | None) -> Tensor:
    if transform is None:
        array = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
        return torch.from_numpy(array).permute(2, 0, 1)
    return transform(image.convert("RGB"))
