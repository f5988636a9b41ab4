"""What a class that a config names says of itself, read from its source without importing it.

A point's key needs a class's version, its fields' defaults, and which fields name files. Importing
the class would import torch, and transformers with a language model, to find a point that is done.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Described:
    """A class as its source has it, base classes included.

    Attributes:
        name: the class's own name.
        defaults: default -> value of every field that has one; what is no literal, as text.
        constants: name -> value of the class variables that are literals: `version`, `reads`,
            `beside`, `contents`, `options`.
    """

    name: str
    defaults: Mapping[str, Any]
    constants: Mapping[str, Any]

    def get(self, name: str, default: Any) -> Any:
        """Return a class variable, or the default where the class has none of that name."""
        return self.constants.get(name, default)


def described(target: str) -> Described:
    """Return what the class of a dotted path says of itself.

    Raises:
        ValueError: there is no such class.

    >>> described("deltalab.classes.Described").name
    'Described'
    """
    module, _, name = target.rpartition(".")
    found = _found(module, name) if module else None
    if found is None:
        raise ValueError(f"_target_={target}: no such class")
    return found


@cache
def _found(module: str, name: str) -> Described | None:
    file = source_of(module)
    if file is None:
        return None
    tree = ast.parse(file.read_text(encoding="utf-8"))
    own = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
    if own is None:
        return None
    defaults: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for base in own.bases:
        origin = _origin(tree, module, base.id) if isinstance(base, ast.Name) else ("", "")
        if origin[0].split(".")[0] in ("", *sys.stdlib_module_names):
            continue  # typing and abc, which say nothing of a class
        if above := _found(*origin):
            defaults |= above.defaults
            constants |= above.constants
    for field, value, constant in _assigned(own):
        (constants if constant else defaults)[field] = _literal(value)
    return Described(name, defaults, constants)


def _assigned(own: ast.ClassDef) -> Iterator[tuple[str, ast.expr, bool]]:
    """Yield the name and value of every assignment in a class, and whether it is no field."""
    for line in own.body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            yield line.targets[0].id, line.value, True
        elif isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value:
            yield line.target.id, line.value, "ClassVar" in ast.unparse(line.annotation)


def _origin(tree: ast.Module, module: str, name: str) -> tuple[str, str]:
    """Return the module and name that a name of a module stands for."""
    for line in tree.body:
        if isinstance(line, ast.ImportFrom) and line.module and not line.level:
            for alias in line.names:
                if (alias.asname or alias.name) == name:
                    return line.module, alias.name
    return module, name


def _literal(value: ast.expr) -> Any:
    try:
        return ast.literal_eval(value)
    except ValueError:
        return ast.unparse(value)


@cache
def source_of(module: str) -> Path | None:
    """Return the file of a module, found without importing the packages that it lies in."""
    top, *parts = module.split(".")
    try:
        package = find_spec(top)
    except (ImportError, ValueError):
        return None
    if package is None or package.origin is None:
        return None
    if not parts:
        return Path(package.origin)
    for root in package.submodule_search_locations or ():
        place = Path(root, *parts)
        for file in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
            if file.is_file():
                return file
    return None
