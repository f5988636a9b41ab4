"""Text from elsewhere is text in every medium, and of a length that it has room for."""

import csv
import io
import json
import logging
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt

from deltalab.report.columns import terminal
from deltalab.store import exporting, reading, records, shown
from deltalab.store.record import parse
from deltalab.sweep import sweeps
from deltalab.terminal import console
from deltalab.tracking import runs

SIGNS = "\x1b]0;pwned\x07\x1b[2J\x9b1m\r\n\t\u202e\u2066\u200b\u2028\x00\ud800"
MARKS = "[bold][/x][/] :smile: <script>alert(1)</script> | ` *a* _b_ ~~c~~ [a](b)"
MARKS += " ![x](y) &lt; \\ $\\frac{"
HOSTILE = f"=1+1 {SIGNS} {MARKS} {'z' * 5000}"
NAMES = ("model", "experiment", "select", "device", "git")


def hostile(key: str, change: float) -> dict:
    """A record whose every text, also as a key, is hostile."""
    term = {"rule": HOSTILE, "value": -change, "points": 3, "by_part": {HOSTILE: change}}
    return {
        "schema": 1,
        "key": key,
        "status": "ok",
        **dict.fromkeys(NAMES, HOSTILE),
        "edit": {"name": f"{change}{HOSTILE}", HOSTILE: HOSTILE},
        "pair": dict.fromkeys(("label", "data", "objective", "evaluator", "id"), HOSTILE),
        "term": term,
        "terms": {HOSTILE: term, "left": {**term, "rule": "left"}},
        "loss": {"change": change, "error": 0.01, "gap": 1.0, "gap_error": 0.01, "unit": HOSTILE},
        "metrics": {f"{HOSTILE}/accuracy": 0.5, f"{HOSTILE}/loss_change": 0.1},
        "reference": {"pre": {f"{HOSTILE}/accuracy": 0.2}},
        "seconds": {"total": 1.0},
        "config": {"model": {"post": HOSTILE, "x": HOSTILE}, "data": {"name": HOSTILE}},
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A directory with hostile records, a failed one, a card, and a sweep."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "records").mkdir()
    failed = {
        **hostile("c", 0.1),
        "status": "error",
        "error": {"type": HOSTILE, "message": HOSTILE},
    }
    for each in (hostile("a", 0.1), hostile("b", -0.2), failed):
        (folder / "records" / f"{each['key']}.json").write_text(json.dumps(each))
    (folder / "records" / f"{SIGNS[:8]}.json").write_text("{")
    (folder / "paper").mkdir()
    names = ("name", "title", "kind", "claim", "verdict", "sentence", "command", "date")
    card = dict.fromkeys(names, HOSTILE) | {
        "notes": [HOSTILE],
        "tables": [{"title": HOSTILE, "columns": [HOSTILE], "rows": [[HOSTILE]]}],
        "figures": [{"file": HOSTILE}],
    }
    (folder / "paper" / "one.json").write_text(json.dumps(card))
    sweep = folder / "logs" / "s\x1b[2J"
    for number in range(4):
        (sweep / f"{number}").mkdir(parents=True)
    sweeps.write(sweep, [HOSTILE], [[f"seed={n}", HOSTILE] for n in range(4)])
    for number, key in enumerate("ac"):
        sweeps.note(sweep / f"{number}", sweeps.KEY, key)
    (sweep / "2" / sweeps.FAILURE).write_text(HOSTILE.replace("\ud800", ""))
    return folder


@pytest.fixture(scope="module")
def told(results) -> dict[str, str]:
    """What the commands print about it, in a process of their own."""
    found = {}
    env = {**os.environ, "PYTHONIOENCODING": "utf-8", "COLUMNS": "120"}
    for name, arguments in {
        "report": ["deltalab.report.command"],
        "unread": ["deltalab.report.command", "experiment=\x1b[2J"],
        "compare": ["deltalab.report.command", "compare=a;b"],
        "status": ["deltalab.sweep.status"],
        "listed": ["deltalab.sweep.status", "list=done"],
        "wrong": ["deltalab.sweep.status", "sweep=\x1b[2J"],
        "cache": ["deltalab.cache", "kind=\x1b[2J"],
    }.items():
        command = [sys.executable, "-m", *arguments, f"results={results}"]
        run = subprocess.run(command, capture_output=True, env=env)
        assert run.returncode == (2 if name in ("unread", "compare", "wrong", "cache") else 0), run
        found[name] = (run.stdout + run.stderr).decode()
    return found


def is_plain(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def test_terminals(told: dict[str, str]) -> None:
    for name, text in told.items():
        assert "Traceback" not in text, name
        assert is_plain(text), name
        assert max(map(len, text.split("\n"))) < 4 * shown.MESSAGE, name
    assert "[bold][/x][/] :smile:" in told["report"]
    assert told["status"].startswith("sweep s\\x1b[2J: deltalab -m =1+1 \\x1b]0;pwned")
    assert told["wrong"].count("\n") == told["cache"].count("\n") == 1


def test_a_table_in_colour(results: Path) -> None:
    points = [p for p in reading.read(results, lambda line: None) if p.failure is None]
    out = io.StringIO()
    drawn = console.rich_console(file=out, force_terminal=True, width=100)
    drawn.print(terminal(points, points[0].experiment, 100))
    text = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())  # rich's own colours
    assert is_plain(text)
    assert "[bold]" in "".join(text.split())


def test_lines_of_points_errors_and_logs(capsys, caplog) -> None:
    console.point_done(f"{HOSTILE}\nsecond")
    console.fail(HOSTILE)
    out, err = capsys.readouterr()
    assert is_plain(out + err)
    assert err.count("\n") == 1
    assert console.one_line(ValueError(HOSTILE)).isprintable()
    assert console.one_line(OSError(2, "No", HOSTILE)).isprintable()
    console.ready()
    with caplog.at_level(logging.INFO):
        logging.getLogger("deltalab").warning("%s: %.2f\nends", Path(f"a{SIGNS[1:8]}\nb"), 0.5)
    (entry,) = caplog.records
    assert is_plain(entry.getMessage())
    assert entry.getMessage().split("\n")[1:] == ["ends"]


class Tags(HTMLParser):
    """The elements of a page by name, and its text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: dict[str, int] = {}
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found[tag] = self.found.get(tag, 0) + 1

    def handle_data(self, data: str) -> None:
        if self.lasttag not in ("script", "style"):
            self.text.append(data)


def test_markdown(results: Path, told: dict[str, str]) -> None:
    (file,) = results.glob("*.md")
    text = file.read_text(encoding="utf-8")
    assert is_plain(text)
    made = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text)
    found = Tags(made)
    assert not {"script", "a", "code", "s", "del"} & set(found.found)
    assert found.found["em"] == found.found["img"]  # captions of our own
    assert MARKS[:40] in "".join(found.text)
    for table in made.split("<table>")[1:]:
        rows = {
            len(re.findall("<t[dh]", row)) for row in table.split("</table>")[0].split("<tr>")[1:]
        }
        assert len(rows) == 1, rows


def test_the_page(results: Path, told: dict[str, str]) -> None:
    text = (results / "index.html").read_text(encoding="utf-8")
    found = Tags(text)
    assert found.found["script"] == 5
    shown_text = "".join(found.text)
    assert is_plain(shown_text.replace("\r", ""))
    assert "<script>alert(1)</script>" in shown_text
    assert all(len(piece) <= 2 * shown.MESSAGE for piece in found.text), max(found.text, key=len)[
        :99
    ]
    held = re.search(r'id="points-data">(.*?)</script>', text)
    fields = json.loads(held[1])
    every = [str(cell) for row in fields["rows"] for cell in row]
    assert all(is_plain(cell) and len(cell) < 1000 for cell in every)


def test_figures(results: Path, told: dict[str, str]) -> None:
    drawn = list(results.glob("*_term.png")) + list(results.glob("*_parts.png"))
    assert len(drawn) == 2  # matplotlib refuses images that are too wide, and broken formulas


def test_files_of_points(results: Path, tmp_path: Path) -> None:
    points = reading.read(results, lambda line: None)
    exporting.write(points, tmp_path / "p.csv")
    rows = list(csv.reader(io.StringIO((tmp_path / "p.csv").read_text(encoding="utf-8"))))
    assert len(rows) == 4
    assert all(is_plain(cell) and cell[:1] not in ("=", "@") for row in rows for cell in row)
    assert not any(cell.startswith(("-", "+")) and not re.match(r"[\d.+-]", cell[1:2])
                   for row in rows for cell in row)  # fmt: skip
    exporting.write(points, tmp_path / "p.jsonl")
    assert is_plain((tmp_path / "p.jsonl").read_text(encoding="utf-8"))
    assert reading.lines(tmp_path / "p.jsonl")[0].label == points[0].label


def test_names_of_files_and_of_a_tracker(results: Path, tmp_path: Path) -> None:
    point = parse(hostile("a", 0.1))
    names = [runs.run_name(point), *runs.tags(point, HOSTILE)]
    assert all(is_plain(name) for name in names)
    assert [len(name) <= runs.MOST_OF_NAME for name in names[:1]] == [True]
    assert all(len(name) <= runs.MOST_OF_TAG for name in names[1:])
    for text in (HOSTILE, "..", ".", "a/b", "ü" * 200):
        for name in (shown.stem(text) + ".md", shown.folder(text)):
            (tmp_path / name).touch()
            assert (tmp_path / name).parent.resolve() == (tmp_path / name).resolve().parent
    assert unquote(shown.folder("fig/2 again..")) == "fig/2 again.."
    records.enrol(tmp_path, HOSTILE, "a")
    records.enrol(tmp_path, "..", "a")
    assert sorted(p.parent.parent.name for p in tmp_path.rglob("a")) == ["of", "of"]


def test_what_is_longer_keeps_its_difference() -> None:
    one, other = shown.name("z" * 5000), shown.name("z" * 5001)
    assert one != other
    assert len(one) == len(other) == shown.NAME
    assert shown.stem("z" * 5000) != shown.stem("z" * 5001)


def test_a_terminal_without_our_signs(results: Path) -> None:
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    for arguments in (["deltalab.report.command"], ["deltalab.sweep.status", "list=done"]):
        command = [sys.executable, "-m", *arguments, f"results={results}"]
        run = subprocess.run(command, capture_output=True, env=env)
        assert run.returncode == 0, run.stderr.decode()
        assert b"Traceback" not in run.stderr
        assert "+-" in run.stdout.decode("ascii")


def test_signs_that_an_encoding_lacks_are_written_out() -> None:
    assert "0.1 ± 0.2… é".encode("ascii", "shown") == b"0.1 +- 0.2... \\xe9"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("ascii", "shown")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["deltalab.sweep.status", "list=done"], 0),
        (["deltalab.report.command", "into=INTO"], 0),
        (["deltalab.report.command", "--help"], 0),
        (["deltalab.cache", "--help"], 0),
        (["deltalab.cache"], 2),
        (["deltalab.save", "--help"], 0),
        (["deltalab.save", "out="], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_who_reads_may_go(results: Path, tmp_path: Path, command, code, closed) -> None:
    """On the code before, a closed pipe ended in an exception, and the report in no page."""
    reader, writer = os.pipe()
    os.close(reader)  # as `| head -1` does, at the latest moment for the reader
    arguments = [each.replace("INTO", str(tmp_path)) for each in command]
    if arguments[-1][-1] not in "p=":
        arguments.append(f"results={results}")
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, closed: writer}
    try:
        run = subprocess.run([sys.executable, "-m", *arguments], **streams)
    finally:
        os.close(writer)
    said = (run.stdout or run.stderr or b"").decode()
    assert run.returncode == code, said
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    if "into=INTO" in command:
        assert (tmp_path / "index.html").exists()
