"""What lies beside a written checkpoint for others: a model card, and the digest of every file.

`README.md` says what the model was made of and how, in the front matter that model hubs read;
`SHA256SUMS`, written last, is what `sha256sum -c` and `deltalab-apply verify DIR` read.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltalab.provenance import commit, versions
from deltalab.store import files, records, shown

SUMS, CARD = "SHA256SUMS", "README.md"


def write(
    out: Path, manifest: Mapping[str, Any], sources: Sequence[str], arguments: Sequence[str]
) -> None:
    """Write the card and the digests of a checkpoint.

    Args:
        out: its directory, whole otherwise.
        manifest: what `deltalab.json` says.
        sources: base and tuned models, as paths or hub ids; the first is the base.
        arguments: of the command that made it.
    """
    files.write(out / CARD, records.redacted(card(manifest, sources, arguments)))
    files.write(out / SUMS, sums(out))


def card(manifest: Mapping[str, Any], sources: Sequence[str], arguments: Sequence[str]) -> str:
    """Return the card of a checkpoint.

    >>> made = card({"edit": {"name": "dare", "p": 0.5}, "seed": 0}, ["org/base", "org/chat"], [])
    >>> made.splitlines()[1:5]
    ['base_model:', '- "org/base"', '- "org/chat"', 'base_model_relation: "finetune"']
    """
    names = [_name(source) for source in sources]
    merged = manifest.get("merge")
    front = ["---", "base_model:", *(f"- {json.dumps(name)}" for name in names)]
    front.append(f"base_model_relation: {json.dumps('merge' if merged else 'finetune')}")
    if told := next(filter(None, map(license_of, reversed(sources))), None):
        front.append(f"license: {json.dumps(told)}")
    front += ['library_name: "transformers"', "tags:", '- "deltalab"', "---"]
    steps = [(key, manifest[key]) for key in ("edit", "merge") if manifest.get(key)]
    rows = [(key, _settings(told)) for key, told in steps]
    rows += [(key, str(manifest[key])) for key in ("select", "seed") if key in manifest]
    for side in ("pre", "post"):
        if isinstance(manifest.get(side), Mapping) and "digest" in manifest[side]:
            rows.append((f"digest of {side}", str(manifest[side]["digest"])))
    rows += [("versions", ", ".join(f"{k} {v}" for k, v in versions().items()))]
    if found := commit():
        rows.append(("commit", found))
    table = ["| | |", "|:---|:---|", *(f"| {k} | {shown.line(v)} |" for k, v in rows)]
    line = shlex.join(["deltalab-apply", *arguments])
    title = " and ".join(f"`{shown.line(name)}`" for name in names)
    return "\n".join([
        *front, "", f"# Made of {title}", "",
        "The delta parameters of a post-trained model were edited by deltalab.", "", *table, "",
        "```", shown.line(line), "```", "",
        "The loss change and the scores of this model were not measured by this command.", "",
    ])  # fmt: skip


def _settings(told: Any) -> str:
    if not isinstance(told, Mapping):
        return str(told)
    rest = " ".join(f"{k}={v}" for k, v in told.items() if k != "name")
    return f"{told.get('name', '')} {rest}".strip()


def _name(source: str) -> str:
    """Return what a model is called: a hub id, or the last part of a path."""
    path = Path(source).expanduser()
    return path.name if path.exists() else source


def license_of(source: str) -> str | None:
    """Return the licence that a model's own card names, None where there is none here."""
    try:
        text = (Path(source).expanduser() / CARD).read_text("utf-8")
    except (OSError, ValueError):
        return None
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:\s*[\"']?([\w.+-]+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


def sums(out: Path) -> str:
    """Return the SHA-256 of every file of a directory but the list itself, one a line."""
    return "".join(f"{_digest(out / name)}  {name}\n" for name in _files(out))


def _files(out: Path) -> list[str]:
    found = (f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file())
    return sorted(name for name in found if name != SUMS)


def _digest(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def verify(out: Path) -> int:
    """Check every file of a written checkpoint against its digest; return how many there are.

    Raises:
        ValueError: a file that is missing, changed or was not there; all of them are named.
    """
    try:
        lines = (out / SUMS).read_text("utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{out / SUMS}: {error.strerror}; nothing to verify by") from None
    known: dict[str, str] = {}
    for line in lines:
        digest, _, name = line.partition("  ")
        if not re.fullmatch(r"[0-9a-f]{64}", digest) or not name:
            raise ValueError(f"{out / SUMS}: not a list of digests, by the line {line[:40]!r}")
        known[name] = digest
    there = _files(out)
    wrong = [f"{name}: missing" for name in known if name not in there]
    wrong += [f"{name}: not in the list" for name in there if name not in known]
    wrong += [f"{n}: changed" for n in there if n in known and _digest(out / n) != known[n]]
    if wrong:
        raise ValueError(f"{out}: {'; '.join(wrong)}")
    return len(known)
