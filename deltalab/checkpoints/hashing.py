"""The digest of a checkpoint, taken by the pass that reads its tensors anyway.

Each piece is hashed as soon as it has been read, while the system still holds its bytes, so that
the disk gives them once. Pieces are read in any order and by any thread; a digest wants them in
theirs: a piece that comes too early is left to the thread that hashes the one before it.
"""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from deltalab.store import digests
from deltalab.weights import contents, headers
from deltalab.weights.shards import Entry

_BLOCK = 1 << 22


class Hashing:
    """Digests of the tensors of checkpoints, but for the files whose digests are remembered.

    Args:
        paths: checkpoints, as for `weights.Checkpoint`.

    Raises:
        FileNotFoundError, ValueError: as `contents.of_checkpoint`.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._stopped = False
        self._stamps: dict[Path, digests.Stamp] = {}
        self._tensors: dict[Path, dict[str, _Tensor]] = {}
        for file in (file for path in paths for file in contents.files_of(path)):
            known = file.suffix in contents.ENDINGS or digests.recalled(file, contents.TENSORS)
            if not known and file not in self._tensors:
                self._stamps[file] = digests.stamp(file)  # before its first byte is read
                found = headers.read(file)
                self._tensors[file] = {name: _Tensor(file, entry) for name, entry in found.items()}
        self._places = {
            (file, tensor.entry.begin): tensor
            for file, tensors in self._tensors.items()
            for tensor in tensors.values()
            if tensor.size
        }

    def read(
        self, entry: Entry, start: int, stop: int, data: "memoryview[int] | None" = None
    ) -> None:
        """Take note that bytes `start` to `stop` of a tensor have been read, and hash them if next.

        Each byte counts once, however often it is read.

        Args:
            entry: the tensor.
            start: first byte.
            stop: last byte, exclusive.
            data: these bytes, which spares reading them once more; None: not at hand.
        """
        if entry.load is None and (tensor := self._places.get((entry.file, entry.begin))):
            tensor.read(start, stop, self, data)

    @property
    def known(self) -> bool:
        """Whether all digests are remembered, so that none need be taken."""
        return not self._tensors

    def stop(self) -> None:
        """Let threads that hash come to an end soon."""
        self._stopped = True

    @property
    def stopped(self) -> bool:
        """Whether what is found is of no use any more."""
        return self._stopped

    def finish(self) -> dict[Path, dict[str, str]]:
        """Read what nobody has read, and return the digests of all tensors by file; remember them.

        Of files that were remembered before there is nothing.
        """
        tensors = [tensor for found in self._tensors.values() for tensor in found.values()]
        try:
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                list(pool.map(lambda tensor: tensor.read(tensor.at, tensor.size, self), tensors))
        except BaseException:
            self.stop()
            raise
        made = {
            file: {name: tensor.digest() for name, tensor in found.items()}
            for file, found in self._tensors.items()
        }
        entries = {file: (self._stamps[file], found) for file, found in made.items()}
        digests.remember(entries, contents.TENSORS)
        return made


class _Tensor:
    """One tensor: the digest of its bytes up to `at`, and what has been read beyond."""

    def __init__(self, file: Path, entry: headers.Entry) -> None:
        self.entry, self.size, self.at = entry, entry.end - entry.begin, 0
        self._file = file
        self._hash = hashlib.sha256()
        self._waiting: dict[int, int] = {}
        self._busy, self._lock = False, Lock()

    def read(
        self, start: int, stop: int, hashing: Hashing, data: "memoryview[int] | None" = None
    ) -> None:
        with self._lock:
            given = data if start == self.at and not self._busy else None
            if given is None and start < stop and start >= self.at:
                self._waiting[start] = max(stop, self._waiting.get(start, 0))
            if self._busy:
                return  # whoever is at work goes on with it
            self._busy = True
        if given is not None:
            self._hash.update(given)
            self.at = stop
        while (end := self._next()) and not hashing.stopped:
            self._feed(end, hashing)

    def _next(self) -> int:
        """Return where the piece ends that is to be hashed now; 0, and no more busy, for none."""
        with self._lock:
            stop = self._waiting.pop(self.at, 0)
            self._busy = bool(stop)
            return stop

    def _feed(self, stop: int, hashing: Hashing) -> None:
        with open(self._file, "rb", buffering=0) as handle:
            while self.at < stop and not hashing.stopped:
                size = min(_BLOCK, stop - self.at)
                block = os.pread(handle.fileno(), size, self.entry.begin + self.at)
                if not block:
                    raise OSError(f"{self._file}: ends too early")
                self._hash.update(block)
                self.at += len(block)

    def digest(self) -> str:
        assert self.at == self.size, "not all of it has been read"
        return digests.of_tensor(self.entry.dtype, self.entry.shape, self._hash.hexdigest())
