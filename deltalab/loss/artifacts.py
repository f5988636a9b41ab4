"""A content-addressed store on disk for what many points share: gradients, line slopes, log-probs.

Tensors lie in `<root>/<kind>/<key>/`, `key` hashing everything that determines them, as
`data.safetensors` and `manifest.json`, which names the data's size and digest and comes last.
A directory without it does not exist; one whose data do not match it is computed again. Numbers are
one file `<root>/<kind>/<key>.json` with their digest inside. Both appear under their final name by
one rename, so several processes may share a store: one computes, the others wait and read. The
store's size is bounded (`deltalab.store.eviction`), and a point never fails because it cannot be
kept.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deltalab.store import eviction, files, locks
from deltalab.store.digests import key_of
from deltalab.store.eviction import DATA, MANIFEST

log = logging.getLogger(__name__)


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

    def tensors(self, kind: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return named tensors from disk, or compute, keep and return them.

        What comes back has the same bits either way, on the CPU when it comes from disk. Names
        that share one tensor share it again.

        Args:
            kind: what they are, for instance `gradient`; also the directory's name.
            compute: called when there is no intact copy.
        """
        if self.root is None:
            return dict(compute())
        path = self._path(kind, {})
        if (held := _read_tensors(path)) is not None:
            return held
        with _alone(eviction.lock_of(Path(self.root), kind, path.name)):
            if (held := _read_tensors(path)) is not None:
                return held  # another process has made it meanwhile
            tensors = dict(compute())
            _kept(lambda: _publish(path, tensors), path)
        _kept(lambda: eviction.evict(Path(str(self.root)), self.most_bytes), path)
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
            held = json.loads(file.read_text())
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
        path = self._path(kind, extra).with_suffix(".json")
        text = json.dumps({"sha256": _digest_of(value), "value": value}, allow_nan=False)
        _kept(lambda: files.write(path, text + "\n"), path)

    def _path(self, kind: str, extra: Mapping[str, Any]) -> Path:
        assert self.root is not None
        return Path(self.root) / kind / key_of({"of": dict(self.determinants), **extra})


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold an artefact's lock; wait while another process makes the artefact."""
    with ExitStack() as stack:
        while True:
            try:
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


def _read_tensors(path: Path) -> dict[str, Tensor] | None:
    data = path / DATA
    eviction.pin(data)
    if not _intact(data):
        return None
    eviction.touch(path / MANIFEST)
    try:
        with safe_open(data, framework="pt", device="cpu") as file:
            about = file.metadata()
            aliases: dict[str, str] = json.loads(about["aliases"])
            unique = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None
    return {name: unique[aliases.get(name, name)] for name in json.loads(about["order"])}


def _intact(data: Path) -> bool:
    """Whether the data belong to a complete artefact and their bytes are those written."""
    try:
        manifest = json.loads((data.parent / MANIFEST).read_text())
        return bool(
            data.stat().st_size == manifest["bytes"] and _digest(data) == manifest["sha256"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _publish(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write data and then manifest into a temporary directory, and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        file = temporary / DATA
        _write_tensors(tensors, file)
        manifest = {"bytes": file.stat().st_size, "sha256": _digest(file)}
        (temporary / MANIFEST).write_text(json.dumps(manifest) + "\n")
        os.chmod(temporary, 0o755)  # mkdtemp's 0700 would shut out other users of the store
        _replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(new: Path, path: Path) -> None:
    """Put a directory in the place of another; a name that is taken meanwhile keeps its holder."""
    for _ in range(3):
        try:
            os.rename(new, path)
        except OSError:  # something is there: move it out of the way, and try again
            try:
                old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
                os.rename(path, old)
                shutil.rmtree(old, ignore_errors=True)
            except OSError:
                continue
        else:
            return
