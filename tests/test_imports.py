"""Imports go one way: each module may import only modules of an earlier layer, or of its own."""

import ast
from pathlib import Path

import deltalab

LAYERS = (
    ("commands", "eviction", "files", "headers", "locks", "pickles", "provenance", "settings"),
    ("finite", "quadrature", "threshold", "rng", "weights", "passes", "factor", "fields"),
    ("pairs", "terms"),
    ("record",),
    ("outcomes", "records"),
    (
        "answers",
        "artifacts",
        "console",
        "data",
        "reading",
        "sweeps",
        "edits",
        "objectives",
        "select",
        "exporting",
        "columns",
        "formats",
        "keys",
        "rows",
        "runs",
        "summary",
        "tables",
        "text",
        "tokens",
        "translation",
    ),
    ("native",),
    ("fused", "models", "shards"),
    (
        "apply",
        "distill",
        "engine",
        "evaluators",
        "extras",
        "lines",
        "passes",
        "planning",
        "hours",
        "prediction",
        "riemann",
        "tracking",
        "annotations",
        "judges",
    ),
    ("audit", "comparison", "figures", "stream"),
    ("page",),
    ("report", "run"),
    ("closing", "preview"),
    ("gpus", "stopping"),
    ("cli",),
    ("cache", "launching", "save", "status"),
    ("clusters",),
    ("__main__",),
)
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}
ROOT = Path(deltalab.__file__).parent


def imported(path):
    """Yield the deltalab modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deltalab"):
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            yield from names
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("deltalab."):
                    yield alias.name.split(".")[1]


def sources():
    for path in sorted(ROOT.rglob("*.py")):
        module = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if module not in ("__init__", "plugins", "zoo"):
            yield module, path


def test_every_module_has_a_layer():
    assert {module for module, _ in sources()} <= set(RANK)


def test_imports_go_one_way():
    for module, path in sources():
        for other in imported(path):
            assert RANK[other] <= RANK[module], f"{path.name} imports {other}"


def test_the_package_never_imports_the_experiments():
    for _, path in sources():
        assert "import experiments" not in path.read_text()
        assert "from experiments" not in path.read_text()


def test_reports_need_neither_torch_nor_the_machinery():
    light = {"outcomes", "tables", "figures", "report", "console", "records", "reading", "summary"}
    light |= {
        "commands",
        "comparison",
        "files",
        "page",
        "fields",
        "record",
        "pairs",
        "terms",
        "columns",
    }
    light |= {"exporting", "settings"}
    for module, path in sources():
        if module in light:
            assert set(imported(path)) <= light
            assert "import torch" not in path.read_text()
