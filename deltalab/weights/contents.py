"""Which files hold a model, and one digest of all that they say.

A checkpoint's digest is of its tensors: name, dtype, shape and every byte. It does not change when
the same tensors are cut into other shards. Nothing here imports torch.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deltalab.store import digests
from deltalab.weights import configs, headers

ENDINGS = (".bin", ".pt", ".pth")
"""Of PyTorch's own files, which are pickles (`deltalab.weights.pickles`)."""
MANIFEST = "deltalab.json"
ADAPTER = "adapter_config.json"
"""What `deltalab-apply` says of a checkpoint that it wrote, beside it."""
BESIDE = (".json", ".jinja", ".model", ".py", ".spm", ".tiktoken", ".txt", ".vocab")
"""Endings of the files beside a model's weights that say how it computes and how it reads text."""
TENSORS = "tensors of "
"""The kind under which the digests of a file's tensors are remembered."""
_LOGS = ("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json")

FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""The dtypes that models are evaluated in, by their names in files."""


def main_file(path: Path) -> Path:
    """Return the index or the one file that holds a checkpoint."""
    if path.is_dir():
        kept = candidates(path)
        if len(kept) != 1:
            names = ", ".join(file.name for file in kept)
            raise FileNotFoundError(
                f"{path}: several checkpoints in this directory ({names}); name one file"
                if kept
                else f"{path}: no .safetensors file in this directory"
            )
        headers.inside(path, kept[0])
        path = kept[0]
    if not path.is_file():
        reason = "not a regular file" if path.exists() else "no such file or directory"
        raise FileNotFoundError(f"{path}: {reason}")
    if path.suffix == ".gguf":
        raise ValueError(f"{path}: a GGUF file cannot be read; convert it to safetensors first")
    return path


def candidates(directory: Path) -> list[Path]:
    """Return the files that may be meant by a directory: one, if it is clear which."""
    for ending in ("safetensors", "bin"):
        stem = {"safetensors": "model", "bin": "pytorch_model"}[ending]
        usual = [directory / f"{stem}.{ending}.index.json", directory / f"{stem}.{ending}"]
        if kept := [file for file in usual if file.is_file()]:
            return kept
        if kept := sorted(directory.glob(f"*.{ending}.index.json")):
            return kept
        if kept := sorted(directory.glob(f"*.{ending}")):
            return kept
    return sorted(f for end in (*ENDINGS, ".gguf") for f in directory.glob(f"*{end}"))


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter in place of a model."""
    if not (path / ADAPTER).is_file():
        return False
    files = {file for end in (".safetensors", *ENDINGS) for file in path.glob(f"*{end}")}
    return all(file.name.startswith("adapter_") for file in files)


def around(pre: Path, post: Path) -> Path:
    """Return where the configuration of a tuned model is: of an adapter, beside its base."""
    return pre if is_adapter(post) else post


def files_of(path: Path) -> list[Path]:
    """Return the files that hold a checkpoint's tensors.

    Args:
        path: a file or a directory, as for `weights.Checkpoint`.

    Raises:
        FileNotFoundError: there is none, or it is not clear which.
        ValueError: a damaged index.
    """
    main = main_file(path)
    return (
        sorted(set(headers.index(main).values())) if main.name.endswith(".index.json") else [main]
    )


def of_checkpoint(
    path: Path, full: bool = False, known: Mapping[Path, Mapping[str, str]] | None = None
) -> str:
    """Return the digest of a checkpoint's tensors, of PyTorch's own files that of their bytes.

    Args:
        path: a file or a directory, as for `weights.Checkpoint`.
        full: read again what is remembered.
        known: by file, the digests of tensors that have just been taken.

    Raises:
        FileNotFoundError: as for `files_of`.
        ValueError: a damaged index or header.
    """
    found: dict[str, str] = {}
    for file in files_of(path):
        if file.suffix in ENDINGS:
            found[f"file {len(found)}"] = digests.of_file(file, full)
        elif known is not None and file in known:
            found |= known[file]
        else:
            found |= digests.remembered([file], TENSORS, _tensors, full)[0]
    return digests.combined(found)


def of_model(path: Path, full: bool = False) -> str:
    """Return the digest of a model: its tensors and the files beside them, wherever it lies.

    Without weights the files beside them are enough to plan with; opening says what is missing.
    """
    around = beside(path)
    said = dict(zip((f.name for f in around), digests.of_files(around, full), strict=True))
    try:
        return digests.combined({**said, "": of_checkpoint(path, full)})
    except FileNotFoundError:
        if "config.json" not in said:
            raise
        return digests.combined(said)


def made_from(path: Path) -> str | None:
    """Return the digest of the base that a checkpoint was made from, where it says so.

    `deltalab-apply` leaves it in `deltalab.json`, which anyone may have written: what is no digest
    is none.
    """
    try:
        told = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        found = told["pre"]["digest"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def beside(path: Path) -> list[Path]:
    """Return the files beside a model's weights that decide what it computes, in order of name."""
    if not path.is_dir():
        return []
    return sorted(
        file
        for file in path.iterdir()
        if file.suffix in BESIDE
        and not file.name.startswith(".")
        and not file.name.endswith(".index.json")
        and file.name not in _LOGS
        and file.is_file()
    )


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def of_tree(root: Path, full: bool = False, is_hidden: Callable[[str], bool] = _is_hidden) -> str:
    """Return the digest of a directory: the names and contents of all files below it.

    Hidden files and directories are left out, by their names; of a link, what it leads to counts.
    """
    found: dict[str, Path] = {}
    seen: set[str] = set()  # a link may lead back up
    for folder, folders, names in os.walk(root, followlinks=True):
        fresh = os.path.realpath(folder) not in seen
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if fresh and not is_hidden(name))
        for name in names:
            path = Path(folder, name)
            if not is_hidden(name) and path.is_file():
                found[path.relative_to(root).as_posix()] = path
    return digests.combined(dict(zip(found, digests.of_files(found.values(), full), strict=True)))


def of_paths(paths: Iterable[Path], full: bool = False) -> str:
    """Return one digest of several files by their names."""
    files = list(paths)
    return digests.combined(
        dict(zip((f.name for f in files), digests.of_files(files, full), strict=True))
    )


def _tensors(file: Path) -> Mapping[str, str]:
    """Return the digest of every tensor of a safetensors file, read several at a time."""
    entries = headers.read(file)
    descriptor = os.open(file, os.O_RDONLY)
    try:

        def one(entry: headers.Entry) -> str:
            held = digests.of_bytes(descriptor, entry.begin, entry.end - entry.begin)
            return digests.of_tensor(entry.dtype, entry.shape, held)

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            return dict(zip(entries, pool.map(one, entries.values()), strict=True))
    finally:
        os.close(descriptor)


def dtype_of(path: Path) -> str | None:
    """Return the dtype that a model is to be evaluated in by what is said of it, as `bfloat16`.

    That is what its `config.json` says, also of its text part, else the dtype of the first
    floating-point tensor of its safetensors; None where neither tells.
    """
    content = configs.content((path if path.is_dir() else path.parent) / "config.json")
    parts = [content, content.get("text_config")]
    said = [
        p.get(name) for p in parts if isinstance(p, Mapping) for name in ("dtype", "torch_dtype")
    ]
    for name in (each.removeprefix("torch.") for each in said if isinstance(each, str)):
        if name in FLOATS.values():
            return name
    try:
        main = main_file(path)
        first = (
            next(iter(headers.index(main).values())) if main.name.endswith(".index.json") else main
        )
        found = headers.read(first) if first.suffix == ".safetensors" else {}
    except (OSError, ValueError):  # whoever opens it says what is wrong with it
        return None
    return next((FLOATS[e.dtype] for e in found.values() if e.dtype in FLOATS), None)
