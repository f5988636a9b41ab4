"""The rooms of the house, and that one may import only those to its left."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import deltalab

ORDER = (
    *(
        "settings",
        "classes",
        "allowed",
        "options",
        "rng",
        "provenance",
        "statistics",
        "store",
        "terminal",
        "drawing",
        "linear",
        "weights",
        "checkpoints",
        "artifacts",
        "data",
    ),
    *(
        "codes",
        "edits",
        "compressors",
        "merges",
        "budgets",
        "models",
        "visionfuse",
        "keys",
        "rekey",
        "kernels",
        "apply",
        "packing",
        "loss",
        "calibration",
        "api",
        "inference",
        "evaluators",
    ),
    *(
        "judging",
        "report",
        "tracking",
        "run",
        "plan",
        "sweep",
        "choosing",
        "cards",
        "cli",
        "save",
        "delta",
        "cache",
    ),
    *("plugins", "__main__", "testing", "__init__", "experiments"),
)
"""Packages and single modules of deltalab, and those that are to come; nothing else has a place."""
WITHOUT_TORCH = ("store", "report")
MOST_FLOORS, MOST_LINES = 9, 2600  # lines of a package
ROOT = Path(deltalab.__file__).parents[1]


@cache
def sources():
    """Return the files by module name; a package's name is that of its `__init__`."""
    found = {}
    for package in ("deltalab", "experiments"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def room(module):
    """Return where a module is: a package, or a module at the top of deltalab."""
    first, *rest = module.split(".")
    if first == "experiments":
        return first
    return rest[0] if rest else "__init__"


def named(path):
    """Yield the modules that a file imports, anywhere in it, in and outside deltalab."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports by a relative name"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in sources() else str(node.module)


@cache
def imports():
    """Return all arrows between modules of ours; the package itself gives only its version."""
    return {
        module: [n for n in dict.fromkeys(named(path)) if n in sources() and n != "deltalab"]
        for module, path in sources().items()
    }


@cache
def rooms():
    """Return which rooms each room imports, with one file and one name to show it."""
    found = {room(module): {} for module in sources()}
    for module, targets in imports().items():
        for target in targets:
            if room(target) != room(module):
                found[room(module)].setdefault(room(target), f"{module} imports {target}")
    return found


def circle(arrows):
    """Return a circle among arrows as a list that ends where it begins, or None.

    >>> circle({"a": ["b"], "b": ["c"], "c": ["b"]})
    ['b', 'c', 'b']
    """
    done = set()

    def visit(node, path):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for target in arrows.get(node, ()):
            if found := visit(target, [*path, node]):
                return found
        done.add(node)
        return None

    return next((found for node in arrows if (found := visit(node, []))), None)


def upward(arrows, order):
    """Return the arrows that run from left to right, which is up.

    >>> upward({"store": {"run": "store.a imports run"}, "run": {"store": ""}}, ["store", "run"])
    ['store -> run: store.a imports run']
    """
    rank = {name: index for index, name in enumerate(order)}
    return [
        f"{one} -> {other}: {why}"
        for one, targets in arrows.items()
        for other, why in targets.items()
        if rank[other] >= rank[one]
    ]


def floors(arrows):
    """Return every room's floor: one above the highest that it imports.

    >>> floors({"a": {}, "b": {"a": ""}, "c": {"a": "", "b": ""}})
    {'a': 1, 'b': 2, 'c': 3}
    """
    floor = cache(lambda name: 1 + max(map(floor, arrows[name]), default=0))
    return {name: floor(name) for name in arrows}


def test_every_module_has_a_room():
    strangers = sorted(set(rooms()) - set(ORDER))
    assert not strangers, f"no room in ORDER: {', '.join(strangers)}"


def test_no_room_imports_one_to_its_right():
    found = upward(rooms(), ORDER)
    assert not found, "upward:\n" + "\n".join(found)


def test_imports_make_no_circle():
    found = circle(imports())
    assert found is None, "circle: " + " -> ".join(found or ())


def test_the_house_is_not_too_high():
    assert not (found := circle(rooms())), "circle: " + " -> ".join(found or ())
    found = floors(rooms())
    assert max(found.values()) <= MOST_FLOORS, sorted(found.items(), key=lambda item: item[1])


def test_no_package_is_too_large():
    lines = dict.fromkeys(ORDER, 0)
    for module, path in sources().items():
        lines[room(module)] += len(path.read_text().splitlines())
    large = {n: count for n, count in lines.items() if count > MOST_LINES and n != "experiments"}
    assert not large


def test_every_package_says_what_lives_in_it():
    for module, path in sources().items():
        if path.name == "__init__.py" and "plugins" not in path.parts:
            assert ast.get_docstring(ast.parse(path.read_text())), f"{module} says nothing"


def reached(module):
    """Return all that importing a module may import, packages on the way included, and how."""
    how, work = {module: module}, [module]
    while work:
        here = work.pop()
        for target in named(sources()[here]) if here in sources() else ():
            parts = target.split(".")
            for depth in range(2 if parts[0] == "deltalab" else 1, len(parts) + 1):
                name = ".".join(parts[:depth])
                if name not in how:
                    how[name] = f"{how[here]} -> {name}"
                    work.append(name)
    return how


def test_one_door_leads_to_the_kernels():
    found = {one for one, targets in rooms().items() if "kernels" in targets}
    assert found <= {"apply", "experiments"}  # the bench looks in


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_without_torch(package):
    ours = [module for module in sources() if room(module) == package]
    assert ours
    for module in ours:
        assert "torch" not in (found := reached(module)), found["torch"]
    names = ", ".join(ours)
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0, f"{package} loads torch"


def test_what_is_said_of_a_house_that_is_wrong():
    arrows = {"left": {"right": "left.a imports right.b"}, "right": {"left": "right.b imports l"}}
    assert upward(arrows, ["left", "right"]) == ["left -> right: left.a imports right.b"]
    assert circle(arrows) == ["left", "right", "left"]
    assert "torch" in reached("deltalab.rng")
    assert "torch" not in reached("deltalab.settings")
