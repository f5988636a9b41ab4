"""One field's trip: what a real run writes, through everything that reads a record."""

import csv
import json
import sys
from contextlib import redirect_stdout
from dataclasses import make_dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from deltalab import cli
from deltalab.report import columns, command
from deltalab.report.figures import accuracy, parts
from deltalab.report.outcomes import by_pair, pair_names
from deltalab.store import exporting, pairs, reading, record
from deltalab.store.fields import NUMBER, Shows, held
from deltalab.store.record import Outcome, completed, parse, table, written
from deltalab.sweep import closing, status
from deltalab.tracking import runs, trackers

FAST = ["data.test.limit=32", "data.objective.limit=32", "riemann=both", "prediction=on"]
SWEPT = ["edit=dare", "edit.p=0.5", "edit.k=0", "seed=0,1"]
LARGE = ("config", "by_tensor", "by_layer", "nodes", "inner")
"""What stays in the record alone, and in a tracker's history."""


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Two points as a sweep writes them, with what the terminal said."""
    directory, told = tmp_path_factory.mktemp("real"), StringIO()
    arguments = ["deltalab", "-m", *SWEPT, *FAST, "evaluator=accuracy", f"results={directory}"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(told):
        patch.setattr(sys, "argv", arguments)
        cli.main()
    return directory, told.getvalue().splitlines()


def raw(directory: Path) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in (directory / "records").glob("*.json")]
    return sorted(found, key=lambda each: each["seed"])


def leaves(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every value of a record by its place, but for what is large and what is null."""
    if isinstance(value, dict):
        found = {}
        for name, each in value.items():
            found |= {} if name in LARGE else leaves(each, (*path, name))
        return found
    return {} if value in (None, "") else {path: value}


def flat_name(path: tuple[str, ...]) -> str:
    """How files call a value: by its place, a term by its rule, a metric as it is called."""
    if path[0] == "terms":
        return "/".join(("term", *path[1:])).removesuffix("/value")
    return "/".join(path[1:] if path[0] == "metrics" else path)


def kept(each: dict[str, Any]) -> dict[str, Any]:
    """What files must hold: the main term is among the terms, the objective is the pair's."""
    named = {path: value for path, value in leaves(each).items() if path[0] != "term"}
    flat = {flat_name(path): value for path, value in named.items()}
    return {n: v for n, v in flat.items() if n != "loss/objective" and not n.endswith("/rule")}


_FAMILY = ("merge", "merging", "experts", "kept", "learned", "overlap", "stream")
"""Fields of a family alone; see test_families."""


def test_a_run_writes_what_the_table_names(real) -> None:
    for each in raw(real[0]):
        point = parse(each)
        empty = {field.name for field in table() if getattr(point, field.name) in (None, "", {})}
        assert empty <= {*_FAMILY, "kind_of_failure", "message", "git", "digest", "salt", "half"}
        assert each["pair"] | {"id": ""} == {
            "label": "mnist_vit",
            "data": "mnist",
            "objective": "classification",
            "evaluator": "accuracy",
            "id": "",
        }
        assert {"first_order", "second_order", "closed_form"} <= each["prediction"].keys()


def test_nothing_is_lost_in_json_lines(real, tmp_path) -> None:
    points = reading.read(real[0], pytest.fail)
    again = reading.lines(exporting.write(points, tmp_path / "points.jsonl"))
    lines = [json.loads(text) for text in (tmp_path / "points.jsonl").read_text().splitlines()]
    for each, line in zip(raw(real[0]), lines, strict=True):
        gone = leaves(each).keys() - leaves(line).keys()
        assert {path[0] for path in gone} <= {"term", "loss"}
        assert {path[1] for path in gone if path[0] == "loss"} == {"objective"}
        both = leaves(each).keys() & leaves(line).keys()
        assert {path: leaves(each)[path] for path in both} == {
            path: leaves(line)[path] for path in both
        }
    for before, after in zip(points, again, strict=True):
        terms = {n: replace(t, nodes=(), inner=()) for n, t in before.terms.items()}
        assert after == replace(before, terms=terms, config={}, loss_name=None)


def test_nothing_is_lost_in_csv(real, tmp_path) -> None:
    assert command.main([f"results={real[0]}", f"export={tmp_path}/points.csv"]) == 0
    with open(tmp_path / "points.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for each, row in zip(raw(real[0]), rows, strict=True):
        for name, value in kept(each).items():
            assert row[name] == (str(value).lower() if isinstance(value, bool) else str(value)), (
                name
            )


def test_nothing_is_lost_in_a_tracker(real, tmp_path, monkeypatch) -> None:
    sent: dict[str, Any] = {}

    class Run:
        def __init__(self):
            self.summary = sent

        def define_metric(self, *_, **__):
            pass

        def log(self, row, step=None):
            sent.update(row)

        def finish(self, **_):
            pass

    def begun(self, config, **_):
        sent.update(config)
        return Run()

    monkeypatch.setattr(trackers.Wandb, "_begun", begun)
    for each in raw(real[0]):
        sent.clear()
        assert trackers.Wandb(dir=str(tmp_path)).log(each, group="g")
        missing = {name for name, value in kept(each).items() if sent.get(name) != value}
        assert missing <= {"schema"}
        assert sent["term"] == each["term"]["value"]
        assert sent["loss/objective"] == "classification"
        assert sent["left/inner"] == each["terms"]["left"]["inner"][-1]
        assert sent["model/post"] == "mnist", "the configuration too"
    assert len(reading.read_tracked(tmp_path, pytest.fail)) == 2
    sheet = closing.sheet([parse(each) for each in raw(real[0])])
    assert kept(raw(real[0])[0]).keys() <= set(sheet.columns)


def cells(text: str) -> list[dict[str, str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    heads, _, *rows = ([cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(heads, row, strict=True)) for row in rows]


TABLE = {
    "model", "edit", "seed", "class", "class, mnist test", "term left-5", "term gauss-3",
    "term closed form", "term first order", "term second order", "measured change",
    "error left-5", "error gauss-3", "error closed form", "error first order",
    "error second order", "mnist/accuracy", "mnist/accuracy_top5",
    "gradient evaluations", "seconds",
    "bits payload", "bits metadata", "bits bound", "bits model",
}  # fmt: skip


def test_the_table_has_all_that_is_shown_in_tables(real) -> None:
    points = reading.read(real[0], pytest.fail)
    pre, post, *rows = cells(columns.points_table(points))
    assert set(rows[0]) == TABLE
    assert "-" not in rows[0].values()
    one = raw(real[0])[0]
    assert pre["measured change"] == f"{one['loss']['pre'] - one['loss']['post']:+.4f}"
    assert post["mnist/accuracy"] == f"{one['reference']['post']['mnist/accuracy']:.3f}"
    shown = {each.name for each in table() if Shows.TABLE in each.shows}
    views = {each.name for each in table() if each.name in columns.VIEWS}
    assert shown - views == {"gradient_evaluations", "bits_per_weight", "merge", "merging"}


def test_the_console_names_what_is_swept_and_what_came_out(real) -> None:
    lines = [line for line in real[1] if line.startswith("mnist_vit")]
    for each, line in zip(
        raw(real[0]), sorted(lines, key=lambda line: "seed=1" in line), strict=True
    ):
        assert line.split("  ")[0] == "mnist_vit"
        for told in (
            "dare p=0.5 k=0",
            f"seed={each['seed']}",
            each["class"],
            f"gauss {each['terms']['gauss']['value']:+.4f}",
            f"change {each['loss']['change']:+.4f}",
            f"mnist/accuracy {each['metrics']['mnist/accuracy']:.4f}",
            f"{each['seconds']['total']:.1f} s",
        ):
            assert told in line, (told, line)
    assert "limit" not in "".join(lines), "it is the same in all points"


def test_status_says_what_came_out(real, capsys) -> None:
    assert status.main([f"results={real[0]}", "list=done"]) == 0
    *_, first, second = capsys.readouterr().out.splitlines()
    for each, line in zip(raw(real[0]), (first, second), strict=True):
        assert f"seed={each['seed']}: mnist_vit dare p=0.5 k=0 " in line
        assert f"change {each['loss']['change']:+.4f}" in line


def test_the_page_has_all_points(real, tmp_path) -> None:
    from test_page import held as rows_of

    from deltalab.report import page

    points = reading.read(real[0], pytest.fail)
    rows = rows_of(page.write(tmp_path, points, pytest.fail).read_text())
    for each, row in zip(raw(real[0]), rows, strict=True):
        assert None not in row.values()
        expected = {
            "model": "mnist_vit", "edit": "dare p=0.5 k=0", "seed": each["seed"], "select": "all",
            "class": each["class"], "experiment": "runs", "record": each["key"],
            "measured change": pytest.approx(each["loss"]["change"], rel=1e-5),
            "term left-5": pytest.approx(each["terms"]["left"]["value"], rel=1e-5),
            "term first order": pytest.approx(each["prediction"]["first_order"], rel=1e-5),
        }  # fmt: skip
        assert {name: row[name] for name in expected} == expected


def test_one_line_in_the_table_is_all_that_a_new_field_takes(real, tmp_path, monkeypatch) -> None:
    """It is written, read (from old records too), shown, exported and tracked."""
    energy = held(
        "touched.energy", NUMBER, "energy", spec=".3e", derive=lambda p: 2 * (p.change or 0)
    )
    larger = make_dataclass(
        "Larger", [("energy", float | None, energy)], bases=(Outcome,), frozen=True
    )
    monkeypatch.setattr(record, "Outcome", larger)
    one = raw(real[0])[0]
    value = 2 * one["loss"]["change"]
    people, exact = f"{value:.3e}", pytest.approx(value)
    assert completed(written(change=0.5, error=0.1))["touched"] == {"energy": 1.0}
    assert written(energy=3.0) == {"touched": {"energy": 3.0}}
    with pytest.raises(TypeError, match="energy='much': must be a number"):
        written(energy="much")
    points = reading.read(real[0], pytest.fail)
    assert cells(columns.points_table(points))[2]["energy"] == people
    assert f"energy {people}" in columns.describe(one)
    assert runs.numbers(points[0])["touched/energy"] == exact
    for name in ("a.jsonl", "a.csv"):
        exporting.write(points, tmp_path / name)
    assert reading.lines(tmp_path / "a.jsonl")[0].energy == exact  # type: ignore[attr-defined]
    assert '"energy": ' in (tmp_path / "a.jsonl").read_text().splitlines()[0]
    with open(tmp_path / "a.csv", newline="") as file:
        assert float(next(csv.DictReader(file))["touched/energy"]) == exact
    assert "touched/energy" in closing.sheet(points).columns
    from deltalab.report.page.points import tabulate

    shown = tabulate(points)
    assert shown.values("energy")[0] == pytest.approx(value, rel=1e-5)
    assert shown.fields["energy"].title == "energy"
    told = StringIO()
    with redirect_stdout(told):
        status.main([f"results={real[0]}", "list=done"])
    assert f"energy {people}" in told.getvalue()


def test_what_is_no_field_is_not_written() -> None:
    with pytest.raises(TypeError, match="no field of a record"):
        written(chnge=0.5)
    with pytest.raises(TypeError, match="must be a whole number"):
        written(seed="0")


# Which pair


def llm(post: str, accuracy: float, **more: Any) -> dict[str, Any]:
    """A record as versions before this one wrote it, without `pair`."""
    model = {"_target_": "deltalab.models.hf_llm.HfPair", "pre": "org/base", "post": post}
    objective = {"_target_": "deltalab.loss.answers.Answers", "limit": more.pop("limit", None)}
    config = {"model": model, "objective": objective, "evaluator": None}
    config["data"] = {"name": "gsm8k", "path": more.pop("path", "openai/gsm8k"), "split": "train"}
    p = more.pop("p", 0.5)
    term = {"rule": "left", "points": 5, "value": accuracy, "by_part": {"mlp": accuracy}}
    return {
        "schema": 1, "key": f"{post}{p}{accuracy}{more}", "status": "ok", "model": "hf_llm",
        "edit": {"name": "dare", "p": p}, "seed": 0, "experiment": "runs", "config": config,
        "term": term, "terms": {"left": term},
        "loss": {"objective": "answers", "unit": "nats", "pre": 2.0, "post": 1.0, "change": 0.1,
                 "error": 0.01},
        "metrics": {"gsm/acc": accuracy}, "reference": {"post": {"gsm/acc": accuracy}},
    } | more  # fmt: skip


def test_pairs_of_one_option_have_names_and_references_of_their_own(tmp_path) -> None:
    """Four became rows of one name, under the first one's scores, and were averaged as seeds."""
    posts = ["org/Qwen2-7B-Instruct", "org/Mistral", "runs/a/final", "runs/b/final"]
    points = [parse(llm(post, 0.1 * i, p=p)) for i, post in enumerate(posts, 1) for p in (0.3, 0.6)]
    named = [own[0].pair for own in by_pair(points)]
    assert named == ["hf_llm Qwen2-7B-Instruct", "hf_llm Mistral", "hf_llm final", "hf_llm final"]
    names = list(pair_names(points).values())
    assert names[2:] == [f"hf_llm final (model.post=runs/{n}/final)" for n in "ab"]
    rows = cells(columns.points_table(points))
    tops = {row["model"]: row["gsm/acc"] for row in rows if row["edit"] == "post"}
    assert tops == dict(zip(names, ("0.100", "0.200", "0.300", "0.400"), strict=True))
    assert [axes.get_title() for axes in accuracy.figure(points).axes] == names
    bars = parts.figure(points)
    assert [axes.get_title() for axes in bars.axes] == names
    widths = [patch.get_width() for axes in bars.axes for patch in axes.patches]
    assert widths == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])


def test_data_and_settings_of_the_objective_set_points_apart() -> None:
    points = [parse(llm("org/m", 0.1)), parse(llm("org/m", 0.2, path="my/other.jsonl"))]
    rows = cells(columns.points_table(points))
    assert [row["data"] for row in rows if row["edit"] == "post"] == [
        "gsm8k train",
        "gsm8k other train",
    ]
    assert columns.common_data(points) == ""
    points = [parse(llm("org/m", 0.1, limit=limit)) for limit in (64, 128)]
    assert list(pair_names(points).values()) == [
        f"hf_llm m (objective.limit={limit})" for limit in (64, 128)
    ]
    assert columns.common_data(points) == " on gsm8k train"


def test_a_bar_is_a_mean_over_seeds_alone() -> None:
    same = [parse(llm("org/m", 0.1 * n, seed=n)) for n in (1, 3)]
    (axes,) = parts.figure(same).axes
    assert [patch.get_width() for patch in axes.patches] == pytest.approx([0.2])
    other = [parse(llm("org/m", 0.1 * n, select=s)) for n, s in ((1, "all"), (3, "matrices"))]
    (axes,) = parts.figure(other).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "dare p=0.5, all",
        "dare p=0.5, matrices",
    ]


@pytest.mark.parametrize(
    ("option", "model", "name"),
    [
        ("llama3_8b", {"post": "meta-llama/Meta-Llama-3-8B-Instruct"}, "llama3_8b"),
        ("llama3_8b", {"post": "mine/tuned.safetensors"}, "llama3_8b tuned"),
        ("mnist_vit", {"post": "digits"}, "mnist_vit digits"),
        ("../../etc", {"post": "x"}, "../../etc x"),
        ("mine", None, "mine"),
    ],
)
def test_labels(option: str, model: Any, name: str) -> None:
    assert pairs.label(option, model) == name


def test_the_setting_label_wins_and_decides_no_key() -> None:
    from deltalab import keys

    assert "label" in keys.BESIDE
    told = parse(llm("org/m", 0.1) | {"pair": {"label": "my pair"}})
    assert (told.pair, told.data) == ("my pair", "gsm8k train")


def test_one_artefact_is_of_one_pair() -> None:
    from experiments.paper.found import one_pair

    with pytest.raises(ValueError, match="points of several pairs, must be of one: hf_llm a, hf"):
        one_pair([parse(llm("org/a", 0.1)), parse(llm("org/b", 0.1))])


def test_parquet_holds_what_csv_does_with_types(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    points = [
        record.Outcome("vit", "dare", {"p": 0.5}, change=0.25, seed=1),
        record.Outcome("vit", "shifted", {"amount": "fit", "p": 1}, change=0.5, seed=2),
    ]
    held = parquet.read_table(exporting.write(points, tmp_path / "points.parquet"))
    columns, rows = exporting.sheet(points)
    assert held.column_names == columns
    change = next(name for name in columns if "change" in name)
    assert held.column(change).to_pylist() == [row[columns.index(change)] for row in rows]
    assert {str(kind) for kind in held.schema.types} <= {
        "double",
        "int64",
        "string",
        "bool",
        "null",
    }
    assert [f.name for f in tmp_path.iterdir()] == ["points.parquet"]
