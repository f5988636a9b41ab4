"""A content-addressed store on disk for what many points share: gradients, line slopes, log-probs.

Tensors lie in `<root>/<kind>/<key>/`, `key` hashing everything that determines them, as
`data.safetensors` and `manifest.json`, which names the data's size and digest and comes last.
A directory without it does not exist; one whose data do not match it is computed again. Numbers are
one file `<root>/<kind>/<key>.json` with their digest inside. Both appear under their final name by
one rename, so several processes may share a store: one computes, the others wait and read, into
their own memory, so that nobody's removing takes it from them. What a store is, what in it can go
and what is none of its business is told by `deltalab.store.eviction`; a point never fails because
something cannot be kept.
"""

import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from deltalab.store import eviction, files, locks
from deltalab.store.digests import key_of
from deltalab.store.eviction import DATA, KINDS, LOCKS, MANIFEST
from deltalab.weights import headers

log = logging.getLogger(__name__)
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}


@dataclass(frozen=True)
class Store:
    """The artefacts of one set of determinants, for instance of a pair under an objective.

    Args:
        root: the directory of all artefacts; None keeps nothing on disk.
        determinants: everything that decides the artefacts' contents, ready for JSON:
            fingerprints of the checkpoints, the settings of model, objective and data.
        most_bytes: the store's size beyond which the least recently used artefacts are removed.
    """

    root: str | Path | None
    determinants: Mapping[str, Any]
    most_bytes: float = eviction.MOST_BYTES

    def tensors(
        self,
        kind: str,
        compute: Callable[[], Mapping[str, Tensor]],
        extra: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Return named tensors from disk, or compute, keep and return them.

        What comes back has the same bits either way, on the CPU when it comes from disk. Names
        that share one tensor share it again.

        Args:
            kind: what they are, one of `eviction.KINDS`; also the directory's name.
            compute: called when there is no intact copy.
            extra: determinants beside the store's own.
        """
        if self.root is None:
            return dict(compute())
        root, path = Path(self.root), self._path(kind, extra or {})
        if (held := _read_tensors(root, path)) is not None:
            return held
        with _alone(root, path):
            if (held := _read_tensors(root, path)) is not None:
                return held  # another process has made it meanwhile
            tensors = dict(compute())
            _kept(lambda: _publish(_place(root, path), tensors), path)
        _kept(lambda: eviction.evict(root, self.most_bytes), path)
        return tensors

    def numbers(self, kind: str, extra: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return a JSON artefact, or None where there is no intact copy.

        Args:
            kind: what it is, for instance `line`.
            extra: determinants beside the store's own.
        """
        if self.root is None:
            return None
        file = self._path(kind, extra).with_suffix(".json")
        try:
            held = json.loads(eviction.own(Path(self.root), kind, file.name).read_bytes())
            value: dict[str, Any] = held["value"]
            if held["sha256"] != _digest_of(value):
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        eviction.touch(file)
        return value

    def keep_numbers(self, kind: str, extra: Mapping[str, Any], value: Mapping[str, Any]) -> None:
        """Write a JSON artefact, in place of an earlier one; floats keep every bit."""
        if self.root is None:
            return
        root, path = Path(self.root), self._path(kind, extra).with_suffix(".json")
        text = json.dumps({"sha256": _digest_of(value), "value": value}, allow_nan=False)
        _kept(lambda: files.write(_place(root, path), text + "\n"), path)

    def _path(self, kind: str, extra: Mapping[str, Any]) -> Path:
        assert self.root is not None
        assert kind in KINDS, f"{kind} is no kind of artefact: eviction.KINDS lists them"
        return Path(self.root) / kind / key_of({"of": dict(self.determinants), **extra})


def _place(root: Path, path: Path) -> Path:
    """Return where an artefact goes: into a store, whose marker is there before anything else."""
    eviction.claim(root)
    return eviction.room(root, path.parent.name) / path.name


@contextmanager
def _alone(root: Path, path: Path) -> Iterator[None]:
    """Hold an artefact's lock; wait while another process makes the artefact."""
    lock = eviction.lock_of(root, path.parent.name, path.name)
    with ExitStack() as stack:
        while True:
            try:
                eviction.claim(root)
                eviction.room(root, LOCKS)
                stack.enter_context(locks.held(lock))
                break
            except locks.Busy as busy:
                log.info("%s is being made by %s: waiting", lock.name, busy.owner)
                locks.wait([lock])
            except OSError as problem:  # nothing can be written there: each makes its own
                log.info("no lock for %s: %s", lock.name, problem)
                break
        yield


def _kept(keep: Callable[[], object], path: Path) -> None:
    """Keep an artefact, or warn: the point has what it needs, and others compute it again."""
    try:
        keep()
    except OSError as problem:
        log.warning("artifacts: %s could not be kept: %s", path, problem.strerror or problem)


def _write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Save tensors, those that several names share once; the others' names go to the header."""
    first: dict[int, str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        owner = first.setdefault(id(tensor), name)
        if owner != name:
            aliases[name] = owner
    unique = {n: t.detach().contiguous().cpu() for n, t in tensors.items() if n not in aliases}
    order = json.dumps(list(tensors))
    save_file(unique, file, {"aliases": json.dumps(aliases), "order": order})


def _read_tensors(root: Path, path: Path) -> dict[str, Tensor] | None:
    """Return an artefact's tensors, None where it is not complete and intact."""
    try:
        data = eviction.own(root, path.parent.name, path.name, DATA)
        manifest = json.loads(
            eviction.own(root, path.parent.name, path.name, MANIFEST).read_bytes()
        )
        if data.stat().st_size != manifest["bytes"]:
            return None
        found, about, digest = _loaded(data)
        if digest != manifest["sha256"]:
            return None
        aliases: dict[str, str] = json.loads(about["aliases"])
        tensors = {name: found[aliases.get(name, name)] for name in json.loads(about["order"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    eviction.touch(path / MANIFEST)
    return tensors


def _loaded(file: Path) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Read a file into memory, in one pass: its tensors, its metadata and the digest of its bytes.

    It is not mapped: a file that another machine removes from a network file system would end a
    process that has it mapped (SIGBUS), where reading raises `OSError`.
    """
    claimed = headers.read(file)
    digest, tensors = hashlib.sha256(), {}
    with open(file, "rb", buffering=0) as handle:
        start = handle.read(8)
        header = handle.read(int.from_bytes(start, "little"))
        digest.update(start + header)
        for name, entry in claimed.items():
            raw = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
            view = raw.numpy().data
            while view and (count := handle.readinto(view)):
                digest.update(view[:count])
                view = view[count:]
            tensors[name] = raw.view(_DTYPES[entry.dtype]).reshape(entry.shape)
    return tensors, json.loads(header)["__metadata__"], digest.hexdigest()


def _digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _publish(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write data and then manifest into a temporary directory, and rename it into place."""
    made = files.temporary(path)
    made.mkdir()
    try:
        file = made / DATA
        _write_tensors(tensors, file)
        manifest = {"bytes": file.stat().st_size, "sha256": _digest(file)}
        (made / MANIFEST).write_text(json.dumps(manifest) + "\n", encoding="utf-8")
        _replace(made, path)
    finally:
        with suppress(OSError):
            eviction.discard(path.parent, made.name)


def _replace(made: Path, path: Path) -> None:
    """Put a directory in the place of another; a name that is taken meanwhile keeps its holder."""
    for _ in range(3):
        try:
            files.publish(made, path)
        except OSError as problem:  # something is there: move it out of the way, and try again
            if problem.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            with suppress(OSError):
                old = files.temporary(path)
                os.rename(path, old)
                eviction.discard(path.parent, old.name)
        else:
            return
