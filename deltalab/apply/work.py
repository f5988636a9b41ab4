"""What threads do for a file that is being written: pieces to edit, and pieces to hash."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from deltalab.checkpoints.hashing import Hashing
from deltalab.weights.shards import Entry, item


class Work:
    """Tasks for a pool: not many at a time, so that none is far ahead of another."""

    def __init__(self, pool: ThreadPoolExecutor, hashing: Hashing) -> None:
        self._pool, self.hashing = pool, hashing
        self._most = 4 * torch.get_num_threads()
        self._begun: deque[Future[None]] = deque()

    def submit(self, function: Callable[..., None], *given: Any) -> None:
        """Have a function called, once few enough others are under way."""
        self._begun.append(self._pool.submit(function, *given))
        while len(self._begun) > self._most:
            self._begun.popleft().result()

    def hash(self, entry: Entry, part: tuple[int, int]) -> None:
        """Have entries hashed that are being read."""
        start, stop = (count * item(entry) for count in part)
        self.submit(self.hashing.read, entry, start, stop)

    def wait(self) -> None:
        """Wait for all."""
        while self._begun:
            self._begun.popleft().result()

    def stop(self) -> None:
        """Begin no more, and wait for those under way."""
        if self._begun:
            self.hashing.stop()
        for future in self._begun:
            future.cancel()
        wait(self._begun)
