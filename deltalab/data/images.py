"""Image sources: frozen specs whose `open` yields fixed batches, the same at every pass.

Every source takes the model's own transform and gives `(x, y)` batches: x float32 of shape
(n, channels, height, width), y int64 of shape (n,), indices into the model's outputs.
"""

import json
import logging
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from deltalab.data import folders, pictures
from deltalab.settings import home
from deltalab.store import reach

Batch = tuple[Tensor, Tensor]
Transform = Callable[..., Tensor]
log = logging.getLogger(__name__)


class Images(Protocol):
    """What objectives and evaluators ask of a source of labelled images."""

    def open(self, transform: Transform | None, batch_size: int) -> "Batches":
        """Return the batches, in a fixed order."""
        ...


class Batches:
    """Batches that can be walked through any number of times; images are decoded as needed.

    Args:
        length: images in all.
        load: gives an image by its number, prepared, and its label.
        batch_size: images of a batch.
        classes: so many classes were numbered from 0, where no class map says which they are.

    Raises:
        ValueError: no images; on reading, images of different shapes.
    """

    def __init__(
        self,
        length: int,
        load: Callable[[int], tuple[Any, int]],
        batch_size: int,
        classes: int | None = None,
    ) -> None:
        if length == 0:
            raise ValueError("no images to read")
        self.length, self._load, self._size, self.classes = length, load, batch_size, classes

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self.length, self._size):
            pairs = [self._load(i) for i in range(start, min(start + self._size, self.length))]
            images = [x for x, _ in pairs]
            for number, x in enumerate(images):
                if x.shape != images[0].shape:
                    raise ValueError(
                        f"image {start + number} has shape {tuple(x.shape)} and image {start}"
                        f" {tuple(images[0].shape)}: the model's transform must make them equal"
                    )
            yield torch.stack(images), torch.tensor([y for _, y in pairs])

    def __len__(self) -> int:
        return -(-self.length // self._size)


@dataclass(frozen=True)
class Packaged:
    """Images that ship with the package, for the embedded pairs.

    Args:
        task: `mnist`, `fashion` or `digits`.
        split: `test` (for accuracies) or `objective` (for losses and gradients).
        limit: the first so many images only; all when None.
        classes: the labels whose images are taken; all when None.
    """

    task: str
    split: str
    limit: int | None = None
    classes: tuple[int, ...] | None = None
    contents: ClassVar = {"task": "packaged images"}
    reads: ClassVar = ("images",)

    def __post_init__(self) -> None:
        if self.task not in (tasks := ("mnist", "fashion", "digits")):
            raise ValueError(f"data.task={self.task}: must be one of {', '.join(tasks)}")
        if self.split not in (splits := ("test", "objective")):
            raise ValueError(f"data.split={self.split}: must be one of {', '.join(splits)}")
        _check_limit(self.limit)
        if self.classes is not None:
            object.__setattr__(self, "classes", tuple(self.classes))

    def open(self, transform: Transform | None, batch_size: int) -> Batches:
        """Return the batches; the model's transform is applied to a whole uint8 array at once.

        Raises:
            ValueError: no image is of these classes, or a model that images of this size are not
                for.
        """
        images, labels = packaged(self.task, self.split)
        kept = torch.isin(labels, torch.tensor(self.classes or labels.tolist()))
        if not kept.any():
            raise ValueError(f"data.classes={self.classes}: {self.task} has no image of them")
        x, y = images[kept][: self.limit], labels[kept][: self.limit]
        try:
            ready = transform(x) if transform is not None else x.float() / 255
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"data.task={self.task}: these images are for the embedded models, this model's"
                f" transform refuses them ({error})"
            ) from None
        return Batches(len(y), lambda i: (ready[i], int(y[i])), batch_size)


def packaged(task: str, split: str) -> tuple[Tensor, Tensor]:
    """Return a split of a packaged task: bytes (n, 1, 28, 28) and labels (n,)."""
    resource = files("deltalab") / "zoo" / f"{task}.npz"
    with as_file(resource) as path, np.load(path, allow_pickle=False) as arrays:
        images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long()


@dataclass(frozen=True)
class Folder:
    """A directory with one sub-directory of images per class, as ImageNet is laid out.

    Pictures are read as `pictures.rgb` says. Hidden files and directories are left out.

    Args:
        dir: the directory; with `split`, the sub-directory of that name is read.
        split: for instance `val`; None when the class directories lie in `dir` itself.
        class_map: a JSON file `{"class name": index}` giving the model's output for every class
            directory; by default the classes are numbered in sorted order, over all splits.
        limit: so many images, spread evenly over the sorted list; all when None.

    Raises:
        FileNotFoundError: the directory or the class map is missing.
        ValueError: no images in it, or a class that the class map does not name.
    """

    dir: str
    split: str | None = None
    class_map: str | None = None
    limit: int | None = None
    contents: ClassVar = {"dir": "images", "class_map": "file"}
    reads: ClassVar = ("images",)
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _check_limit(self.limit)

    def open(self, transform: Transform | None, batch_size: int) -> Batches:
        """Return the batches; files are decoded when their batch is asked for."""
        root = Path(self.dir).expanduser() / (self.split or "")
        if not root.is_dir():
            raise FileNotFoundError(f"data.dir={root}: no such directory")
        names = class_names(root, alone=not self.split)
        index = _class_index(names, self.class_map)
        from PIL import Image

        endings = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        found = {name: _files(root / name, endings) for name in names}
        paths = [(path, index[name]) for name in names for path in found[name]]
        if not paths:
            raise ValueError(f"data.dir={root}: no images in class sub-directories")
        some = [name for name in names if found[name]]
        if len(some) == 1:
            log.warning("data.dir=%s: all images are of one class, %s", root, some[0])
        elif missing := [name for name in names if name not in some]:
            log.warning(
                "data.dir=%s: no images of %d of %d classes, such as %s; classes are numbered over"
                " all splits", root, len(missing), len(names), missing[0],
            )  # fmt: skip
        paths, told = _spread(paths, self.limit), set[str]()

        def load(i: int) -> tuple[Any, int]:
            path, label = paths[i]
            with pictures.decoded(path, Image.open) as image:
                return _prepare(pictures.rgb(image, path, told), transform), label

        return Batches(len(paths), load, batch_size, None if self.class_map else len(names))


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
    contents: ClassVar = {"path": "tree", "dir": "tree", "class_map": "file"}
    reads: ClassVar = ("images",)
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _check_limit(self.limit)
        for name in ("path", "dir"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, home(given, f"data.{name}"))

    def open(self, transform: Transform | None, batch_size: int) -> Batches:
        """Return the batches; rows are decoded when their batch is asked for."""
        import datasets

        if self.path == "imagefolder" and not Path(self.dir or "").is_dir():
            raise FileNotFoundError(f"data.dir={self.dir}: no such directory")
        if not Path(self.path).exists() and self.path != "imagefolder":
            reach.settle()
        try:
            rows = datasets.load_dataset(self.path, self.name, data_dir=self.dir, split=self.split)
        except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
            raise FileNotFoundError(f"data.path={self.path}: {reach.reason(error)}") from None
        for setting, column in (("image", self.image), ("label", self.label)):
            if column not in rows.column_names:
                raise ValueError(
                    f"data.{setting}={column}: the columns of {self.path} are {rows.column_names}"
                )
        names = getattr(rows.features[self.label], "names", None)
        index = _class_index(names, self.class_map) if names else {}
        order, told = _spread(list(range(len(rows))), self.limit), set[str]()

        def load(i: int) -> tuple[Any, int]:
            where = f"row {order[i]} of {self.path}"
            row = pictures.decoded(where, lambda _: rows[order[i]])
            label = row[self.label]
            if type(label) is not int or label < 0 or (names and label >= len(names)):
                raise ValueError(f"{where}: data.label={self.label} is {label}, no class number")
            image = pictures.rgb(row[self.image], where, told)
            return _prepare(image, transform), index[names[label]] if names else label

        known = len(names) if names and not self.class_map else None
        return Batches(len(order), load, batch_size, known)


def class_names(root: Path, alone: bool) -> list[str]:
    """Return the classes of a split in the order of their numbers, the same for all its splits.

    Each directory is a class. Those of the directories beside the split count too where they share
    a class with it, as `train` and `val` do: a class without a directory in one split keeps its
    number in the others. Hidden directories and those of programs are none.

    Args:
        root: the directory of the split.
        alone: whether it is no split, so that nothing beside it counts.
    """
    found = set(folders.directories(root))
    around = [] if alone else folders.directories(root.parent)
    others = [set(folders.directories(root.parent / name)) for name in around]
    while joined := [names for names in others if names & found and not names <= found]:
        found.update(*joined)
    return sorted(found)


def _files(directory: Path, endings: Container[str]) -> list[Path]:
    """Return the images of a class, in its sub-directories too."""
    found = (path for path in directory.rglob("*") if path.suffix.lower() in endings)
    hidden = folders.is_hidden
    return sorted(p for p in found if not any(map(hidden, p.relative_to(directory).parts)))


def _class_index(names: Sequence[str], class_map: str | None) -> dict[str, int]:
    """Map class names to output indices, by a JSON file or by position."""
    if class_map is None:
        return {name: i for i, name in enumerate(names)}
    path = Path(class_map).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"data.class_map={class_map}: no such file")
    try:
        mapping = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data.class_map={class_map}: not valid JSON ({error})") from None
    if not isinstance(mapping, dict):
        raise ValueError(f"data.class_map={class_map}: must map class names to output numbers")
    if missing := [name for name in names if name not in mapping]:
        raise ValueError(f"data.class_map={class_map}: class {missing[0]!r} is not in it")
    for name in names:
        if type(mapping[name]) is not int or mapping[name] < 0:
            raise ValueError(
                f"data.class_map={class_map}: class {name!r} is {mapping[name]!r}, must be the"
                " number of an output, from 0"
            )
    return {name: mapping[name] for name in names}


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"data.limit={limit}: must be at least 1, or null for all images")


def _spread(items: list[Any], limit: int | None) -> list[Any]:
    """Return `limit` items at even distances, so that a sorted list keeps all its classes."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def _prepare(image: Any, transform: Transform | None) -> Tensor:
    if transform is None:
        array = np.asarray(image, dtype=np.float32) / 255
        return torch.from_numpy(array).permute(2, 0, 1)
    return transform(image)
