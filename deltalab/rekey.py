"""`python -m deltalab.rekey DIR`: give records of version 1 the keys that this version looks for.

Keys were a hash of module paths, settings and sampled fingerprints of the files. A record is
carried over where its old key comes out again from its own config and from the files as they lie
here, so that nothing it was computed from has changed as far as was looked at then; it says so by
`"digest": "sampled"`. The old record goes to `records/version-1`.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from deltalab import keys
from deltalab.models import clip_heads, embedded, hub
from deltalab.settings import conf_dir
from deltalab.store import records
from deltalab.store.digests import key_of
from deltalab.store.record import completed
from deltalab.terminal.commands import command
from deltalab.weights import contents, headers

USAGE = "usage: python -m deltalab.rekey DIR\n\nDIR is a results directory; its records are kept.\n"
_BESIDE = {
    "AlpacaEval": ("cache_dir",),
    "Endpoint": (
        "concurrency", "timeout", "retries", "backoff", "longest_wait", "ask_again",
        "price_in", "price_out", "max_cost",
    ),
}  # fmt: skip
_FILES = {
    **dict.fromkeys(("Problems", "Chats", "Plain", "Preferences"), ("path",)),
    **dict.fromkeys(("Endpoint", "LocalJudge"), ("template",)),
    "AlpacaEval": ("reference", "instruction_difficulty"),
    "ClipPair": ("head",),
}
_AROUND = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def rekey(results: Path) -> tuple[int, int]:
    """Write every finished record of version 1 under its new key too.

    Returns:
        How many were carried over, and how many could not be.
    """
    done = left = 0
    further = records.enrolled(results)
    for file in sorted((results / "records").glob("*.json")):
        record = records.read(results, file.stem)
        if record is None or "salt" in record or record.get("digest") == "sampled":
            continue
        try:
            found = determinants(record) if old_key(record) == file.stem else None
        except (OSError, ValueError, KeyError, TypeError):
            found = None
        if found is None:
            left += 1
            continue
        new, pair = key_of(found), {**(record.get("pair") or {}), "id": keys.pair_id(found)}
        about = {"key": new, "salt": "", "digest": "sampled", "pair": pair}
        records.write(results, completed({**record, **about}))
        documents = results / "documents" / f"{file.stem}.json"
        if documents.is_file():
            records.write_documents(results, new, json.loads(documents.read_text()))
        for experiment in further.get(file.stem, ()):
            records.enrol(results, experiment, new)
        (results / "records" / "version-1").mkdir(exist_ok=True)
        file.replace(results / "records" / "version-1" / file.name)
        done += 1
    return done, left


def determinants(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides a point as this version sees it; its digest is the point's key."""
    choices = keys.Choices(record["model"], record["edit"]["name"], record["loss"]["objective"])
    return keys.determinants(_today(record["config"]), choices)


def old_key(record: Mapping[str, Any]) -> str:
    """Return the key that version 1 gave to a point, from the files as they lie here."""
    config = record["config"]
    found = {name: _determining(value) for name, value in config.items()}
    found |= {"select": record["select"], "choices": [record["model"], record["edit"]["name"]]}
    return key_of({**found, "inputs": _inputs(config["model"])})


def _today(node: Any) -> Any:
    """Return a config whose classes are named by where they are now."""
    if isinstance(node, Mapping):
        found = {key: _today(value) for key, value in node.items()}
        if "_target_" in found:
            found["_target_"] = _targets()[found["_target_"].rpartition(".")[2]]
        return found
    return [_today(each) for each in node] if isinstance(node, list) else node


@cache
def _targets() -> dict[str, str]:
    """Return where the configs' classes are, by their own names."""
    found: dict[str, str] = {}
    for file in conf_dir().rglob("*.yaml"):
        for target in _named(OmegaConf.to_container(OmegaConf.load(file))):
            found[target.rpartition(".")[2]] = target
    return found


def _named(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield str(node["_target_"])
        for value in node.values():
            yield from _named(value)


def _determining(node: Any) -> Any:
    if not isinstance(node, Mapping):
        return node
    kind = str(node.get("_target_")).rpartition(".")[2]
    found = {k: _determining(v) for k, v in node.items() if k not in _BESIDE.get(kind, ())}
    for name in _FILES.get(kind, ()):
        value = node.get(name)
        file = Path(value).expanduser() if isinstance(value, str) else None
        if file is not None and file.is_file():
            found[f"{name} content"] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return found


def _inputs(model: Mapping[str, Any]) -> tuple[str, str]:
    """Return the fingerprints of both models as version 1 took them."""
    post = str(model["post"])
    match str(model["_target_"]).rpartition(".")[2]:
        case "EmbeddedVit":
            files = embedded.vit(post)
            return _sampled(files[0]), _sampled(files[1])
        case "EmbeddedLlm":
            files = embedded.llm(post)
            beside = b"".join(file.read_bytes() for file in files[2:])
            one, two = (_short(_sampled(file).encode() + beside) for file in files[:2])
            return one, two
        case "TimmPair":
            return _sampled(Path(model["pre"]).expanduser()), _sampled(Path(post).expanduser())
        case "SmolLM2":
            return _identity(str(model["cache"])), _identity(post)
        case "HfPair":
            own = _identity(post, model["post_revision"])
            if model["tokenizer"] is not None:
                own = _short(f"{own}{_identity(model['tokenizer'])}".encode())
            return _identity(str(model["pre"]), model["pre_revision"]), own
        case _:
            own = _identity(post)
            if model["head"] is None:
                words = json.dumps(clip_heads.prompts(model["task"]))
                text = _identity(model["text"]) if model["text"] else ""
                own = _short(f"{own}{words}{text}".encode())
            return _identity(str(model["pre"])), own


def _identity(source: str, revision: str | None = None) -> str:
    path = Path(source).expanduser()
    if not path.exists():
        return _short(hub.identity(source, "model", revision).encode())
    digest = hashlib.sha256()
    code = sorted(path.glob("*.py")) if path.is_dir() else []
    for file in [*(path / name for name in _AROUND), *code]:
        if file.is_file():
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    digest.update(_sampled(path).encode())
    return digest.hexdigest()[:16]


@cache
def _sampled(path: Path) -> str:
    """Return the fingerprint of version 1: above 64 MiB of the size, the start and samples."""
    digest = hashlib.sha256()
    main = contents.main_file(path)
    shards = headers.index(main).values() if main.name.endswith(".index.json") else [main]
    for file in sorted(set(shards)):
        size = file.stat().st_size
        digest.update(str(size).encode())
        with open(file, "rb") as handle:
            if size <= 64 << 20:
                digest.update(handle.read())
                continue
            digest.update(handle.read(1 << 20))
            for block in range(64):
                handle.seek(block * (size - (64 << 10)) // 63)
                digest.update(handle.read(64 << 10))
    return digest.hexdigest()[:16]


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def main(argv: list[str] | None = None) -> int:
    """Carry the records of one results directory over, and say how many."""

    def body(arguments: list[str]) -> int:
        if len(arguments) != 1 or not (Path(arguments[0]) / "records").is_dir():
            raise ValueError("name a results directory, which has records")
        done, left = rekey(Path(arguments[0]))
        print(f"{done} records carried over, {left} left: their files have changed or are not here")
        return 0

    return command("deltalab.rekey", USAGE, body, argv)


if __name__ == "__main__":
    sys.exit(main())
