import json
import os
import statistics
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import spearmanr

from deltalab.report import columns, outcomes, summary, tables
from deltalab.report.command import main
from deltalab.report.figures import accuracy, agreement, parts
from deltalab.store import effects, reading
from deltalab.store.record import Outcome

PARTS = {"attention": 0.3, "mlp": 0.6, "norm": 0.02, "embedding": 0.03, "head": 0.05, "other": 0.0}
PRE = {"mnist/accuracy": 0.52, "mnist/loss": 1.61}
PRE |= {"mnist/loss_change": 1.45, "mnist/loss_change_error": 0.05}
POST = {"mnist/accuracy": 0.957, "mnist/loss": 0.16}


def term(rule: str, value: float, nodes: list[float]) -> dict:
    return {
        "rule": rule,
        "points": len(nodes),
        "value": value,
        "nodes": nodes,
        "inner": [value * (1 + (t - 0.5) / 2) for t in nodes],
        "by_part": {name: share * value for name, share in PARTS.items()},
    }


def record(edit: str, change: float | None, *, left: float = -0.1, **more: Any) -> dict:
    """A record as a run writes it; `left` is the error of the left rule, relative to the change."""
    settings = more.pop("settings", {})
    model, seed = more.pop("model", "mnist_vit"), more.pop("seed", 0)
    accuracy = more.pop("accuracy", 0.957 - (change or 0) * 0.3)
    error = more.pop("error", 0.1 * abs(change or 0) + 1e-4)
    name = " ".join([model, edit, *(f"{k}={v}" for k, v in settings.items()), str(seed)])
    base = {
        "schema": 1,
        "key": f"{zlib.crc32(name.encode()):016x}",
        "status": "ok",
        "error": None,
        "experiment": "demo",
        "model": model,
        "edit": {"name": edit, **settings},
        "seed": seed,
        "select": "matrices",
        "touched": {"tensors": 18, "parameters": 1_200_000, "of_parameters": 1_240_000},
        "term": None,
        "terms": None,
        "prediction": None,
        "loss": None,
        "metrics": {
            "mnist/accuracy": accuracy,
            "mnist/accuracy_top5": 0.999,
            "mnist/loss": 0.16 + (change or 0),
        },
        "reference": {"pre": PRE, "post": POST},
        "class": None,
        "seconds": {"total": 4.2, "term": 2.9, "loss": 0.4, "evaluate": 0.8},
        "gradient_evaluations": 8,
        "config": {"edit": {"name": edit, **settings}, "seed": seed},
    }
    if change is not None:
        gauss = term("gauss", change * 1.002, [0.113, 0.5, 0.887])
        first = term("left", change * (1 + left), [0.0, 0.2, 0.4, 0.6, 0.8])
        base |= {"term": gauss, "terms": {"left": first, "gauss": gauss}}
        base["loss"] = {
            "objective": "classification",
            "unit": "nats per example",
            "pre": 1.60,
            "post": 0.15,
            "edited": 0.15 + change,
            "change": change,
            "error": error,
            "gap": 1.45,
            "gap_error": 0.05,
        }
        base["class"] = effects.classify(change, error, 1.45, 0.05)
        base["class_two_errors"] = effects.two_errors(change, error)
        base["metrics"] |= {"mnist/loss_change": change * 0.9, "mnist/loss_change_error": error}
    return base | more


def demo_records() -> list[dict]:
    """What a small sweep leaves: all edits, DARE over p, k and seeds, on two pairs."""
    found = [
        record("keep", 0.0, error=0.0),
        record("discard", 1.45, left=0.6, accuracy=0.52),
        record("bitdelta", 0.2024, left=-0.12),
        record("ties", 0.1819, left=-0.2, settings={"keep": 0.3, "scope": "model"}),
        record("twin", 0.2581, left=-0.1, settings={"rank": 4}),
        record("expo", -0.0421, left=0.14, settings={"alpha": 0.2}),
        record("expo", 0.0276, left=-1.66, settings={"alpha": 0.5}),
    ]
    for p in (0.1, 0.5, 0.9):
        found.append(record("drop_only", 0.5 * p**1.2, settings={"p": p}))
        for k in (-0.5, 0.0, 0.8):
            for seed in (0, 1, 2):
                change = 0.004 * p / (1 - p) * (1 - k) ** 2 * (1 + 0.2 * seed)
                at = {"settings": {"p": p, "k": k}, "seed": seed, "error": 0.002}
                left = -0.1 - p * 0.4
                found.append(record("dare", change, left=left, **at))
    early = [dict(r, model="mnist_vit_early", key="e" + r["key"]) for r in found if not r["seed"]]
    return found + early


def save(directory: Path, records: list[dict]) -> Path:
    (directory / "records").mkdir(parents=True, exist_ok=True)
    for each in records:
        (directory / "records" / f"{each['key']}.json").write_text(json.dumps(each))
    return directory


def parsed(records: list[dict]) -> list[Outcome]:
    return sorted(map(reading.parse, records), key=reading.sort_key)


def body(page: str) -> list[list[str]]:
    """The cells of the first Markdown table of a page, its heading first and its rule left out."""
    lines = page[page.index("| model") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [cells[0], *cells[2:]]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save(tmp_path_factory.mktemp("demo"), demo_records())
    assert main([f"results={directory}"]) == 0
    return directory


def test_table_has_every_point_below_the_unedited_models(demo: Path) -> None:
    heads, *rows = body((demo / "demo.md").read_text())
    table = [dict(zip(heads, row, strict=True)) for row in rows]
    assert len(table) == len(demo_records()) + 2 * 2
    assert [row["edit"] for row in table[:2]] == ["**pre**", "**post**"]
    assert table[0]["mnist/accuracy"] == "**0.520**"
    assert table[0]["measured change"] == "**+1.4500**"
    assert table[1]["mnist/accuracy"] == "**0.957**"
    models = [row["model"].strip("*") for row in table]
    assert models == sorted(models)
    assert table[models.index("mnist_vit_early")]["edit"] == "**pre**"
    expo = next(r for r in table if r["edit"] == "expo alpha=0.5")
    # Left: 0.0276 * (1 - 1.66); gauss: 0.0276 * 1.002; error: 0.1 * 0.0276 + 1e-4.
    assert expo["term left-5"] == "-0.0182"
    assert expo["term gauss-3"] == "+0.0277"
    assert expo["measured change"] == "+0.0276 ± 0.0029"
    assert (expo["error left-5"], expo["error gauss-3"]) == ("166 %", "0.2 %")
    # The margin is 2 % of 1.45: 0.029 lies within 0.0276 -+ 0.0058.
    assert (expo["class"], expo["class, mnist test"]) == ("undecided", "undecided")
    bits = next(r for r in table if r["edit"] == "bitdelta")
    assert (bits["class"], bits["class, mnist test"]) == ("decreased", "decreased")
    assert (expo["gradient evaluations"], expo["seconds"]) == ("8", "4.2")
    keep = next(r for r in table if r["edit"] == "keep")
    assert (keep["measured change"], keep["error left-5"]) == ("0", "-")


def test_rows_are_in_the_order_of_the_numbers() -> None:
    values = [10.0, 9.0, -1.0, 0.5]
    found = parsed([record("dare", 0.1, settings={"k": k}) for k in values])
    assert [p.settings["k"] for p in found] == [-1.0, 0.5, 9.0, 10.0]
    mixed = parsed([record("twin", 0.1, settings={"rank": r}) for r in ("all", None, 4)])
    assert [p.settings["rank"] for p in mixed] == [4, "all", None]


def test_columns_that_never_vary_are_left_out() -> None:
    same = [record("dare", 0.1, settings={"p": p}) for p in (0.1, 0.2)]
    titles = [column.title for column in columns.columns(parsed(same))]
    assert not {"seed", "select"} & set(titles)
    other = [*same, record("dare", 0.1, settings={"p": 0.1}, seed=1, select="linear")]
    assert {"seed", "select"} < {column.title for column in columns.columns(parsed(other))}


def test_per_class_metrics_and_losses_are_no_scores() -> None:
    metrics = {
        "a/top1": 0.1,
        "a/top5": 0.2,
        "a/accuracy/7": 0.3,
        "a/loss": 1.0,
        "a/acc_stderr": 0.1,
    }
    point = Outcome("vit", "dare", metrics=metrics)
    assert tables.scores([point]) == ["a/top1", "a/top5"]


def test_summary_agrees_with_independent_statistics() -> None:
    records = demo_records()
    left = [r["terms"]["left"]["value"] for r in records]
    change = [r["loss"]["change"] for r in records]
    errors = [abs(t - c) / abs(c) for t, c in zip(left, change, strict=True) if c]
    cells = {c.title: c.cells[0] for c in summary.agreement(parsed(records))}
    assert cells["rule"] == "left-5"
    assert cells["points"] == str(len(records))
    assert cells["median relative error"] == f"{100 * statistics.median(errors):.0f} %"
    assert cells["largest relative error"] == "166 %"
    assert float(cells["Spearman correlation"]) == round(spearmanr(left, change).statistic, 3)
    wrong = sum(t * c < 0 for t, c in zip(left, change, strict=True))
    assert cells["same sign"] == f"{len(errors) - wrong} of {len(errors)}"
    text = summary.summary(parsed(records))
    assert (
        "Wrong sign by left-5: expo alpha=0.5 on mnist_vit, expo alpha=0.5 on mnist_vit_e" in text
    )
    counts = [sum(r["class"] == name for r in records) for name in effects.CLASSES]
    named = [f"{n} {name}" for n, name in zip(counts, effects.CLASSES, strict=True)]
    assert f"Classes on the objective: {', '.join(named)}." in text


def test_spearman_with_ties() -> None:
    left, right = [1.0, 2.0, 2.0, 3.0, 0.0], [0.3, 0.1, 0.4, 0.4, 0.2]
    assert outcomes.spearman(left, right) == pytest.approx(spearmanr(left, right).statistic)


def test_class_on_the_test_split_can_differ() -> None:
    one = record("dare", 0.05, error=0.01)
    one["metrics"] |= {"mnist/loss_change": -0.05, "fashion/loss_change": 0.05}
    one["metrics"] |= {"mnist/loss_change_error": 0.001, "fashion/loss_change_error": 0.04}
    gaps = {"mnist/loss_change": 1.0, "mnist/loss_change_error": 0.1}
    gaps |= {"fashion/loss_change": 1.0, "fashion/loss_change_error": 0.1}
    one["reference"] = {"pre": gaps, "post": {}}
    point = reading.parse(one)
    assert point.classed == "decreased"
    assert outcomes.split_classes(point) == {"mnist": "improved", "fashion": "undecided"}


def test_a_second_process_writes_the_same_bytes_without_torch(demo: Path, tmp_path: Path) -> None:
    save(tmp_path, list(reversed(demo_records())))
    code = (
        "import sys; from deltalab.report.command import main;"
        " code = main(['results=' + sys.argv[1]]);"
        "sys.exit(3 if 'torch' in sys.modules else code)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert run.returncode == 0, run.stderr
    names = sorted(path.name for path in demo.iterdir() if path.is_file())
    figures = ["accuracy", "parts", "term"]
    pictures = [f"demo_{f}.{kind}" for f in figures for kind in ("png", "svg")]
    assert names == sorted(["demo.md", "index.html", *pictures])
    for name in names:
        assert (demo / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_page_links_its_figures(demo: Path) -> None:
    page = (demo / "demo.md").read_text()
    for name in ("accuracy", "term", "parts"):
        assert f"](demo_{name}.png)" in page
    assert (demo / "demo_term.png").read_bytes().startswith(b"\x89PNG")


def test_help_and_mistakes_are_fast() -> None:
    code = (
        "import sys; from deltalab.report.command import main; assert main(['--help']) == 0;"
        "assert main(['results=/nowhere']) == 2;"
        "sys.exit(bool({'torch', 'matplotlib', 'rich', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "usage: deltalab-report" in run.stdout


def test_broken_records_are_skipped_with_a_warning_each(tmp_path, capsys) -> None:
    save(tmp_path, [record("keep", 0.0), record("dare", 0.01)])
    folder = tmp_path / "records"
    (folder / "cut.json").write_text('{"schema": 1, "sta')
    (folder / "binary.json").write_bytes(b"\xff\xfe\x00")
    (folder / ".half.tmp").write_text("{")
    odd = record("dare", 0.02, key="odd")
    odd["loss"]["change"] = "?"
    (folder / "odd.json").write_text(json.dumps(odd))
    assert main([f"results={tmp_path}"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[2].endswith("odd.json: loss.change '?', must be a number")
    assert "binary.json" in lines[0]
    assert "cut.json" in lines[1]
    assert "3 points." in (tmp_path / "demo.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2"),
        ({"status": "done"}, "status 'done'"),
        ({"model": None}, "model None"),
        ({"edit": {}}, "edit.name None"),
        ({"edit": "dare"}, "edit 'dare'"),
        ({"terms": {"left": 3}}, "left 3"),
    ],
)
def test_what_is_no_record_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reading.parse(record("dare", 0.1) | change)
    with pytest.raises(ValueError, match="list"):
        reading.parse([])


def test_odd_values_become_absent_numbers() -> None:
    one = record("dare", 0.1)
    one["loss"]["change"] = "0.1"
    one["terms"]["left"]["value"] = None
    one["metrics"] = {"mnist/accuracy": None, "mnist/loss": True}
    point = reading.parse(one)
    assert (point.change, point.terms["left"].value, dict(point.metrics)) == (None, None, {})


def test_failed_points_are_listed_apart(tmp_path: Path, capsys) -> None:
    error = {"type": "RuntimeError", "message": "out of memory | device 0"}
    failed = record("ties", None, settings={"keep": 0.5}) | {"status": "error", "error": error}
    save(tmp_path, [record("keep", 0.0), failed])
    assert main([f"results={tmp_path}"]) == 0
    page = (tmp_path / "demo.md").read_text()
    above, below = page.split("## Failed points")
    assert "ties" not in above
    assert "| ties keep=0.5 |" in below
    assert "RuntimeError: out of memory \\| device 0" in below
    assert "1 failed, listed" in capsys.readouterr().out


def test_points_without_terms_metrics_or_experiment(tmp_path: Path) -> None:
    bare = record("dare", None, experiment=None, metrics=None, reference=None, seconds=None)
    save(tmp_path, [bare])
    assert main([f"results={tmp_path}"]) == 0
    page = (tmp_path / "runs.md").read_text()
    assert "No point has a term." in page
    assert "![" not in page
    assert body(page)[1][:2] == ["mnist_vit", "dare"]


def test_one_term_alone_is_enough() -> None:
    one = record("dare", 0.1) | {"terms": None}
    assert {n: t.value for n, t in reading.parse(one).terms.items()} == {"gauss": 0.1 * 1.002}


def test_experiment_chooses_what_is_written(tmp_path: Path) -> None:
    save(tmp_path, [record("keep", 0.0), record("dare", 0.1, experiment="fig/2")])
    assert main([f"results={tmp_path}", "experiment=fig/2"]) == 0
    assert (tmp_path / "fig-2.md").exists()
    assert not (tmp_path / "demo.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["results={}/missing"], "no such directory"),
        (["results={}"], "no record in"),
        (["results={}", "format=pdf"], "unknown argument 'format=pdf': must be one of results="),
        (["demo"], "unknown argument 'demo'"),
        (["results="], "needs a value"),
        (
            ["results={}/full", "experiment=nope"],
            "experiment=nope: no record of it; there are demo",
        ),
        (["results={}/broken"], "no readable record"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(tmp_path, capsys, arguments, message) -> None:
    save(tmp_path / "full", [record("keep", 0.0)])
    (tmp_path / "broken" / "records").mkdir(parents=True)
    (tmp_path / "broken" / "records" / "a.json").write_text("[]")
    assert main([argument.format(tmp_path) for argument in arguments]) == 2
    printed = capsys.readouterr()
    *warnings, line = printed.err.splitlines()
    assert all(warning.startswith("warning: ") for warning in warnings)
    assert message in line
    assert printed.out == ""


@pytest.mark.parametrize("width", [80, 100, 120])
def test_terminal_table_leaves_out_columns_until_it_fits(width: int) -> None:
    from rich.console import Console

    points = parsed([r for r in demo_records() if r["seed"] == 0 and r["model"] == "mnist_vit"])
    whole = columns.terminal(points, "demo", None)
    table = columns.terminal(points, "demo", width)
    assert 5 <= len(table.columns) < len(whole.columns)
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table)
    lines = console.export_text().splitlines()
    assert sum("dare p=0.5 k=-0.5" in line for line in lines) == 1
    assert sum("+0.0276 ± 0.0029" in line for line in lines) == 1


def test_accuracy_curves_are_means_over_seeds() -> None:
    records = demo_records()
    figure = accuracy.figure(parsed(records))
    assert [axes.get_title() for axes in figure.axes] == ["mnist_vit", "mnist_vit_early"]
    curves = {line.get_label(): line for line in figure.axes[0].lines}
    assert {"k = -0.5", "k = 0", "k = 0.8"} < curves.keys()
    dares = [r for r in records if r["model"] == "mnist_vit" and r["edit"].get("k") == -0.5]
    for p, height in zip(*curves["k = -0.5"].get_data(), strict=True):
        at = [r["metrics"]["mnist/accuracy"] for r in dares if r["edit"]["p"] == p]
        assert len(at) == 3
        assert height == pytest.approx(statistics.fmean(at))
    heights = {line.get_ydata()[0] for line in figure.axes[0].lines if len(line.get_xdata()) == 2}
    assert heights == {PRE["mnist/accuracy"], POST["mnist/accuracy"]}
    bands = figure.axes[0].collections
    assert len(bands) == 3
    assert not figure.axes[1].collections


def test_no_accuracy_figure_for_a_single_drop_rate() -> None:
    points = [record("dare", 0.1, settings={"p": 0.5, "k": k}) for k in (0.0, 0.5)]
    assert accuracy.figure(parsed(points)) is None
    other = [record("drop_only", 0.1, settings={"p": p}) for p in (0.1, 0.5)]
    assert accuracy.figure(parsed(other)) is None


def test_term_figure_shows_every_point_on_equal_axes() -> None:
    records = [r for r in demo_records() if r["model"] == "mnist_vit"]
    figure = agreement.figure(parsed(records))
    assert [axes.get_title() for axes in figure.axes] == ["mnist_vit, left-5", "mnist_vit, gauss-3"]
    for axes, rule in zip(figure.axes, ("left", "gauss"), strict=True):
        assert axes.get_xlim() == axes.get_ylim()
        assert axes.get_xscale() == axes.get_yscale() == "symlog"
        drawn = {tuple(map(float, xy)) for line in axes.lines for xy in line.get_xydata()}
        expected = {(r["loss"]["change"], r["terms"][rule]["value"]) for r in records}
        assert expected <= drawn
        low, high = axes.get_xlim()
        assert all(low < v < high for xy in expected for v in xy)
        assert 4 <= len(axes.get_xticks()) <= 10
    assert [text.get_text() for text in figure.axes[0].texts] == ["expo alpha=0.5"]
    assert not figure.axes[1].texts


@pytest.mark.parametrize("sizes", [(0.1, 0.2), (0.0,), (1e-9, 0.3), (-0.2, -0.1), (1e-12,)])
def test_term_figure_takes_any_sizes(sizes: tuple[float, ...], tmp_path: Path) -> None:
    points = parsed([record("dare", s, error=0.0, settings={"p": i}) for i, s in enumerate(sizes)])
    figure = agreement.figure(points)
    figure.savefig(tmp_path / "a.png")
    low, high = figure.axes[0].get_xlim()
    assert all(low < size < high for size in sizes)


def test_parts_are_stacked_to_the_term() -> None:
    points = parsed([r for r in demo_records() if r["model"] == "mnist_vit"])
    (axes,) = parts.figure(points).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert not {"keep", "discard"} & set(names)
    at = names.index("expo alpha=0.2")
    bars = [b for b in axes.patches if round(b.get_y() + b.get_height() / 2) == at]
    assert len(bars) == len(PARTS) - 1  # not the part that is zero everywhere
    assert max(bar.get_x() for bar in bars) == pytest.approx(0.0)
    ends = [bar.get_x() + bar.get_width() for bar in bars]
    assert min(ends) == pytest.approx(-0.0421 * 1.002)
    many = [replace(points[0], settings={"i": i}) for i in range(parts.MOST_BARS + 1)]
    assert parts.figure(many[1:]) is not None
    assert parts.figure(many) is None


if __name__ == "__main__":
    sys.exit(main([f"results={save(Path(sys.argv[1]), demo_records())}"]))


def test_predictions_stand_beside_the_rules(tmp_path):
    made = [
        record("dare", 0.03, prediction={"first_order": -0.01, "second_order": 0.031}),
        record("expo", -0.02, prediction={"first_order": -0.05, "second_order": -0.021}),
        record("ties", 0.2, prediction={"first_order": 0.1, "second_order": 0.2}),
    ]
    points = [reading.parse(r) for r in made]
    table = {column.title: list(column.cells) for column in summary.agreement(points)}
    row = table["rule"].index("second order")
    assert table["same sign"][row] == "3 of 3"
    assert table["Spearman correlation"][row] == "1.000"
    assert table["class right"][row] == "2 of 2"
    first = table["rule"].index("first order")
    assert table["same sign"][first] == "2 of 3"
    assert table["class right"][first] == "1 of 2"
    assert "Wrong sign by first order: dare" in summary.summary(points)


def test_terms_that_are_not_settled_are_marked_and_parts_have_a_table(tmp_path):
    made = record("expo", -0.02)
    made["terms"]["gauss"] |= {"converged": False, "by_part": {"mlp": -0.015, "head": -0.005}}
    made["term"] = made["terms"]["gauss"]
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "a.json").write_text(json.dumps(made))
    assert main([f"results={tmp_path}"]) == 0
    page = (tmp_path / "demo.md").read_text()
    assert "| -0.0200? |" in page
    assert "## The term by part of the model" in page
    assert "| -0.0150 | -0.0050 |" in page


def shell(*command: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
    """Run a command as a person would, and return what it said."""
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", **env},
    )


@pytest.fixture
def reporting(checkout: Path, capsys, monkeypatch) -> Callable[..., subprocess.CompletedProcess]:
    """Run the command in the checkout, without another process for each report."""
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")

    def run(*arguments: str) -> subprocess.CompletedProcess:
        code = main(arguments)
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose report is committed, and one record that is not."""
    results = save(tmp_path / "results", [record("keep", 0.0)])
    for name in ("index.html", "demo.md", "demo_term.png", "README.md"):
        (results / name).write_text("committed\n")
    (tmp_path / ".gitignore").write_text("results/records/\nresults/report/\n")
    me = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    for command in (("init", "-q"), ("add", "-A"), (*me, "commit", "-q", "-m", "x")):
        assert shell("git", *command, cwd=tmp_path).returncode == 0
    return tmp_path


def test_a_report_overwrites_nothing_that_git_tracks(checkout: Path, reporting) -> None:
    for arguments in (["results=results"], ["results=results", "experiment=demo"], []):
        run = reporting(*arguments)
        assert run.returncode == 0, run.stderr
        assert "wrote results/report/index.html" in run.stdout
    assert shell("git", "status", "--porcelain", cwd=checkout).stdout == ""
    assert "demo.md" in (checkout / "results" / "report" / "index.html").read_text()
    assert (checkout / "results" / "report" / "demo.md").is_file()
    told = reporting("results=results", "into=results")
    assert "wrote results/index.html" in told.stdout
    assert "results/index.html" in shell("git", "status", "--porcelain", cwd=checkout).stdout


def test_one_tracked_figure_is_enough_and_an_untracked_file_is_not(
    checkout: Path, reporting
) -> None:
    other = save(checkout / "other", [record("keep", 0.0)])
    assert "wrote other/index.html" in reporting("results=other").stdout
    shell("git", "add", "-f", other / "demo_term.svg", cwd=checkout)
    assert "wrote other/report/index.html" in reporting("results=other").stdout
    shell("git", "add", "-f", other / "report", cwd=checkout)
    run = reporting("results=other")
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "git tracks the report there and in other/report; name another" in run.stderr


def test_without_git_a_checkout_is_not_overwritten(checkout, reporting, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for _ in range(2):
        run = reporting("results=results")
        assert run.returncode == 0, run.stderr
        assert "wrote results/report/index.html" in run.stdout
    assert (checkout / "results" / "index.html").read_text() == "committed\n"


def test_what_cannot_be_written_is_shown(tmp_path: Path) -> None:
    directory = save(tmp_path / "results", [record("keep", 0.0)])
    script = (
        'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" || exit 99;'
        'python=$1; shift; "$python" -m deltalab.report.command results="$0" "$@"'
    )
    run = shell("unshare", "-rm", "bash", "-c", script, directory, sys.executable)
    if run.returncode == 99 or "unshare" in run.stderr:
        pytest.skip("no mounts of one's own here")
    assert run.returncode == 0, run.stderr
    assert "mnist_vit" in run.stdout
    assert "wrote" not in run.stdout
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"warning: no report can be written in {directory} (Read-only")
    out = tmp_path / "out"
    run = shell("unshare", "-rm", "bash", "-c", script, directory, sys.executable, f"into={out}")
    assert (run.returncode, run.stderr) == (0, "")
    assert {"index.html", "demo.md"} <= {path.name for path in out.iterdir()}
