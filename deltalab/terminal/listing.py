"""`deltalab edits`, `models`, ...: what options a group has, with one line each; help, version."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from deltalab import __version__
from deltalab.settings import conf_dir, near, option_file, packages

WITHOUT = ("hydra",)
"""Groups that are not listed."""


def told(arguments: Sequence[str]) -> str | None:
    """Return what to print for a list or the version; None where neither is asked for.

    Raises:
        ValueError: a single word that is no group.

    >>> told(["edit=dare"]) is None
    True
    """
    if "--version" in arguments:
        return f"deltalab {__version__}"
    if {"-h", "--help"} & set(arguments):
        return helping(arguments)
    if len(arguments) != 1 or not re.fullmatch(r"[a-z]+", arguments[0]):
        return None
    known = {plural(p.name): p.name for p in _groups()}
    if arguments[0] not in known:
        lists, hint = ", ".join(sorted(known)), near(arguments[0], known)
        raise ValueError(f"{arguments[0]}: no setting and no list; lists are {lists}{hint}")
    return listed(known[arguments[0]], shutil.get_terminal_size((80, 24)).columns)


def helping(arguments: Sequence[str]) -> str:
    """Return the help: how to begin, all groups and settings with what they mean.

    With options among the arguments, as `edit=dare`, these come first.
    """
    file = conf_dir() / "hydra" / "help" / "deltalab.yaml"
    words: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    primary = (conf_dir() / "config.yaml").read_text("utf-8")
    chosen = []
    for argument in arguments:
        group, _, option = argument.partition("=")
        if group in {p.name for p in _groups()} and (own := option_file(group, option)):
            chosen += [
                argument,
                *(f"  {line}" for line in own.read_text("utf-8").splitlines()),
                "",
            ]
    groups = [f"{p.name}: {', '.join(sorted(f.stem for f in p.glob('*.yaml')))}" for p in _groups()]
    settings = primary.partition("\n\n")[2].partition("\nhydra:")[0].strip()
    return "\n".join([
        *chosen, words["header"], "",
        "Groups (group=option); `deltalab edits`, `models`, ... say a line of each", *groups, "",
        "Settings, and what they are where nothing else is said (key=value changes one)", settings,
        "", words["footer"].replace("$$", "$"),
    ])  # fmt: skip


def _groups() -> list[Path]:
    return sorted(p for p in conf_dir().iterdir() if p.is_dir() and p.name not in WITHOUT)


def plural(group: str) -> str:
    """Return what the list of a group is called.

    >>> plural("edit"), plural("data")
    ('edits', 'data')
    """
    return group if group == "data" else f"{group}s"


def listed(group: str, width: int) -> str:
    """Return the options of a group, one a line of at most so many characters."""
    places = [("", conf_dir()), *((f"{each.name}:", each.conf) for each in packages())]
    files = {f"{own}{f.stem}": f for own, p in places for f in sorted((p / group).glob("*.yaml"))}
    wide = max(map(len, files), default=0)
    return "\n".join(_cut(f"{n.ljust(wide)}  {about(f)}".rstrip(), width) for n, f in files.items())


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3].rstrip(" ,;:") + "..."


def about(file: Path) -> str:
    """Return the first sentence of the comment that a config opens with; empty without one."""
    lines = []
    for line in file.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.lstrip("# ").removeprefix("Claim:").strip())
    return re.split(r"[.](?:\s|$)", " ".join(lines), maxsplit=1)[0]
