"""What there is to choose from: edits with settings, as one would type them."""

from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from deltalab.settings import conf_dir, option_file

Candidate = tuple[str, ...]
"""Overrides, the edit first."""


def candidates(file: str | None = None) -> list[Candidate]:
    """Return all candidates of a file; None: of `conf/candidates.yaml`.

    Raises:
        ValueError: it is no mapping of edits to lists of values.

    >>> ("edit=bitdelta", "edit.axis=best") in candidates()
    True
    """
    path = Path(file).expanduser() if file else conf_dir() / "candidates.yaml"
    try:
        held: Any = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise ValueError(f"candidates={file}: {error.strerror}") from None
    except Exception as error:
        raise ValueError(f"candidates={path}: is no YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(held, dict) or not held:
        raise ValueError(f"candidates={path}: must be a mapping, as dare: {{p: [0.5, 0.9]}}")
    found: list[Candidate] = []
    for name, axes in held.items():
        if option_file("edit", str(name)) is None:
            raise ValueError(f"candidates={path}: {name}: no such edit")
        axes = axes or {}
        if not isinstance(axes, dict) or not all(isinstance(v, list) for v in axes.values()):
            raise ValueError(f"candidates={path}: {name}: must give lists, as {{p: [0.5, 0.9]}}")
        for values in product(*axes.values()):
            settings = [f"edit.{key}={_text(v)}" for key, v in zip(axes, values, strict=True)]
            found.append((f"edit={name}", *settings))
    return found


def label(candidate: Candidate) -> str:
    """Return a candidate as tables name it.

    >>> label(("edit=dare", "edit.p=0.5"))
    'dare p=0.5'
    """
    return " ".join(part.removeprefix("edit=").removeprefix("edit.") for part in candidate)


def _text(value: Any) -> str:
    return (
        {True: "true", False: "false", None: "null"}.get(value, str(value))
        if (value is None or isinstance(value, bool))
        else str(value)
    )
