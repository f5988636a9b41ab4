"""Where a model's files are: a local directory, or a snapshot of a repository on the hub."""

import json
import logging
import re
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from deltalab.store import reach
from deltalab.store.records import secret_in
from deltalab.weights import contents


class Absent(FileNotFoundError):
    """What a hub id names is neither here nor to be had from the hub now."""


_BESIDE = ["*.json", "*.txt", "*.model", "*.jinja"]
_IGNORED = ["*/*", "consolidated*"]  # the same weights again, in another layout
TEMPLATES = "additional_chat_templates"
"""The directory of a model's further chat templates."""


def directory(source: str, setting: str, revision: str | None = None, code: bool = False) -> Path:
    """Return the path of a checkpoint, fetched from the hub where it is not a local one.

    Of a repository, safetensors are fetched with the configuration and tokenizer files; PyTorch's
    own files only where there are no safetensors; Python files only with `code`.

    Args:
        source: a directory, a file, or a hub id (`org/name`).
        setting: the setting's name, for messages.
        revision: branch, tag or commit of a hub id; the main branch when None.
        code: whether the repository's own Python code is wanted.

    Raises:
        FileNotFoundError: neither a local path nor a repository that the hub hands out.
        ValueError: a revision of a local path.
    """
    if (path := _local(source, setting, revision)) is not None:
        return path
    from huggingface_hub import snapshot_download

    kinds = [*_BESIDE, *(["*.py"] if code else [])]
    fetch = partial(snapshot_download, source, revision=revision)
    path = _snapshot(fetch, source, setting, ["*.safetensors", *kinds])
    if not any(path.glob("*.safetensors")):
        path = _snapshot(fetch, source, setting, ["pytorch_model*", *kinds])
    return path


def _snapshot(fetch: Any, source: str, setting: str, wanted: list[str]) -> Path:
    """Return a snapshot with the files at a repository's top that match, and all templates."""
    path = _asked(fetch, source, setting, allow_patterns=wanted, ignore_patterns=_IGNORED)
    further = {"allow_patterns": [f"{TEMPLATES}/*.jinja"], "ignore_patterns": []}
    if (Path(path) / "chat_template.jinja").is_file():  # those that have one may have more
        _asked(fetch, source, setting, **further)
    return Path(path)


def around(source: str, setting: str, revision: str | None = None, code: bool = False) -> Path:
    """Return a directory that holds all but the weights; of a hub id nothing large is fetched.

    Raises:
        FileNotFoundError: as for `directory`.
        ValueError: likewise.
    """
    if (path := _local(source, setting, revision)) is not None:
        return path
    from huggingface_hub import snapshot_download

    kinds = [*_BESIDE, *(["*.py"] if code else [])]
    fetch = partial(snapshot_download, source, revision=revision)
    return _snapshot(fetch, source, setting, kinds)


def described(source: str, setting: str, revision: str | None = None, code: bool = False) -> Path:
    """Return a directory that holds the configuration, and of a hub id little or nothing else.

    Raises:
        FileNotFoundError: as for `directory`.
        ValueError: likewise.
    """
    if code:
        return around(source, setting, revision, code)
    local = _local(source, setting, revision)
    return local or _fetched(source, setting, revision, "config.json").parent


def identity(source: str, setting: str, revision: str | None = None, full: bool = False) -> str:
    """Return the digest of weights, configuration and tokenizer, or what stands for it.

    A repository is identified by its name and commit, so that nothing large is fetched for it; a
    local model by the content of its files.

    Args:
        source: a directory, a file, or a hub id.
        setting: the setting's name, for messages.
        revision: of a hub id.
        full: read files again whose digests are remembered.
    """
    if (path := _local(source, setting, revision)) is None:
        return f"{source}@{_fetched(source, setting, revision, 'config.json').parent.name}"
    try:
        return contents.of_model(path, full)
    except FileNotFoundError as error:
        if path.is_dir() and not any(path.glob("*")):
            raise FileNotFoundError(f"{setting}={source}: no model in this directory") from None
        raise FileNotFoundError(f"{setting}={source}: {error}") from None


def described_by(path: Path) -> dict[str, Any]:
    """Return the content of a directory's `config.json`, empty where it has none.

    Raises:
        ValueError: not a JSON object.
    """
    file = path / "config.json"
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must hold an object, not a {type(content).__name__}")
    return content


def _local(source: str, setting: str, revision: str | None) -> Path | None:
    """Return a local path, or None for a hub id; anything else is a mistake."""
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise ValueError(
                f"{setting}_revision={revision}: {source} is a local path, which has none"
            )
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        raise FileNotFoundError(f"{setting}={source}: no such file or directory")
    if name := secret_in(source):
        raise ValueError(f"{setting}: what {name} holds is not asked of the hub")
    return None


@lru_cache(maxsize=8)
def _fetched(source: str, setting: str, revision: str | None, file: str) -> Path:
    """Return one file of a repository; asked once a process, as every point of a sweep asks."""
    from huggingface_hub import hf_hub_download

    return Path(_asked(partial(hf_hub_download, source, file, revision=revision), source, setting))


def _asked(fetch: Any, source: str, setting: str, **options: Any) -> str:
    """Ask the hub, or its cache where there is no hub; whatever goes wrong becomes one line."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # it tells of every attempt
    try:
        return str(fetch(local_files_only=not reach.settle(), **options))
    except GatedRepoError:
        raise Absent(
            f"{setting}={source}: the hub hands it out to those who accepted its licence only;"
            " accept it on the model's page and log in with `hf auth login`"
        ) from None
    except LocalEntryNotFoundError:
        raise Absent(
            f"{setting}={source}: no such path here, not in the cache, and the hub cannot be"
            " reached; name a local directory"
        ) from None
    except Exception as error:  # several libraries stand between here and the hub
        raise Absent(
            f"{setting}={source}: no such path here, and not to be had from the hub"
            f" ({reach.reason(error)})"
        ) from None
    finally:
        log.setLevel(level)
