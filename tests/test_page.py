import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_report import demo_records, record, save

from deltalab.report import page
from deltalab.report.page.chart import chart, is_symlog
from deltalab.report.page.parsing import read_cards
from deltalab.report.page.plain import without_card
from deltalab.report.page.points import gather, tabulate
from deltalab.store import reading

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HOSTILE = '</script><script>window.pwned=1</script><img src=x onerror="window.pwned=1">{{7*7}}\''
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20">'
    '<rect width="40" height="20" fill="#0072B2"/></svg>'
)


def card(folder: Path, name: str, /, **more: Any) -> dict:
    """Write a whole card of that name, with its figure and its points; return it."""
    folder = folder / "paper"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.svg").write_text(SVG)
    made = {
        "name": name,
        "title": f"What {name} shows",
        "kind": "artefact",
        "claim": "nothing falls",
        "verdict": "agrees",
        "sentence": "0.1 falls to 0.09.",
        "notes": ["The stand-ins are small."],
        "command": f"make {name}",
        "paper_command": f"make {name} SCALE=paper",
        "paper_hours": "12",
        "stand_ins": "large -> tiny_llm",
        "points": 3,
        "seeds": [0, 1, 2],
        "minutes": 7.1,
        "hardware": "2 cores",
        "versions": {"torch": "2.9"},
        "date": "2026-11-21",
        "commit": "abc1234",
        "figures": [{"file": f"{name}.svg", "caption": "Score against p."}],
        "tables": [
            {
                "title": "Scores",
                "columns": ["k", "ours"],
                "rows": [[9, "76.4 ± 0.3"], [10, "-0.5 ± 0.1"], [11, "-2 of 20"], [12, "-"]],
            }
        ],
        "lines": None,
    }
    made |= more
    (folder / f"{name}.json").write_text(json.dumps(made))
    return made


def points_lines(path: Path, keys: list[str], **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, key in enumerate(keys):
        line = {"key": key, "experiment": path.stem, "model": "tiny_llm", "status": "ok"}
        line |= {"edit": {"name": "dare", "p": 0.5, "k": 0}, "seed": index, "select": "all"}
        line |= {"class": "decreased", "loss": {"change": 0.5, "error": 0.01}}
        line |= {"terms": {"left": {"rule": "left", "value": 0.4}}} | more
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))


def refuse(line: str) -> None:
    raise AssertionError(line)


def written(folder: Path, warn: Any = refuse) -> str:
    return page.write(folder, reading.read(folder, warn), warn).read_text()


class Elements(HTMLParser):
    """All elements of a page, by their names, with the attributes of each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: dict[str, list[dict]] = {}
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.setdefault(tag, []).append(dict(attrs))

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and data.strip():
            self.scripts.append(data)


def held(text: str) -> list[dict]:
    """The points that a page holds, each as a mapping of titles."""
    found = re.search(r'id="points-data">(.*?)</script>', text)
    if not found:
        return []
    data = json.loads(found[1])
    return [
        dict(zip((f["title"] for f in data["fields"]), row, strict=True)) for row in data["rows"]
    ]


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """A page with everything: records, a report's figures, cards with files of points."""
    folder = save(tmp_path_factory.mktemp("full"), demo_records())
    for name, minutes in (("fig10", 3.5), ("table1", 20), ("fig2", 10), ("rules", 1)):
        kind = {"kind": "study", "verdict": "finding"} if name == "rules" else {}
        card(folder, name, minutes=minutes, lines=f"{name}.jsonl", **kind)
        points_lines(folder / "paper" / f"{name}.jsonl", [f"{name}{i}" for i in range(3)])
    (folder / "demo.md").write_text("# demo\n")
    (folder / "demo_term.svg").write_text(SVG)
    written(folder)
    return folder


def test_cards_stand_in_the_order_of_the_paper(full: Path) -> None:
    text = (full / "index.html").read_text()
    ids = [a["id"] for a in Elements(text).found["article"]]
    assert ids == ["table1", "fig2", "fig10", "rules", "demo"]
    links = [a["href"] for a in Elements(text).found["a"]]
    assert {f"#{name}" for name in ids} <= set(links)
    for told in ("What fig10 shows", "0.1 falls to 0.09.", "make fig2 SCALE=paper", "torch 2.9"):
        assert told in text


def test_points_come_from_records_and_files_of_points(full: Path) -> None:
    rows = held((full / "index.html").read_text())
    records = demo_records()
    assert len(rows) == len(records) + 12
    by_key = {row["record"]: row for row in rows}
    one = next(r for r in records if r["loss"])
    row = by_key[one["key"]]
    assert row["measured change"] == pytest.approx(one["loss"]["change"], rel=1e-5)
    assert row["term left"] == pytest.approx(one["terms"]["left"]["value"], rel=1e-5)
    told = by_key["fig21"]
    assert (told["edit"], told["seed"], told["term gauss-3"], told["term left"]) == (
        "dare p=0.5 k=0",
        1,
        None,
        0.4,
    )


def test_a_point_is_there_once_and_names_all_its_experiments(tmp_path: Path) -> None:
    one = record("dare", 0.1)
    save(tmp_path, [one])
    card(tmp_path, "fig1", lines="fig1.jsonl")
    points_lines(tmp_path / "paper" / "fig1.jsonl", [one["key"], "other"])
    (first,) = reading.read(tmp_path, refuse)
    twice = [first, reading.replace(first, experiment="fig7")]
    found = gather(twice, read_cards(tmp_path, refuse), refuse)
    assert {(p.key, p.experiment) for p in found} == {(one["key"], "demo, fig7"), ("other", "fig1")}


def test_cards_alone_and_records_alone_and_nothing(tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    card(alone, "fig1", lines="fig1.jsonl")
    points_lines(alone / "paper" / "fig1.jsonl", ["a", "b"])
    assert len(held(written(alone))) == 2
    text = written(save(tmp_path / "records-alone", [record("dare", 0.1)]))
    assert "1 point:" in text
    assert "Overview" not in text
    assert 'id="demo"' in text
    assert not held(written(tmp_path))


def test_report_of_a_clone_without_records(tmp_path: Path, capsys) -> None:
    from deltalab.report.command import main

    card(tmp_path, "fig1")
    assert main([f"results={tmp_path}"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'index.html'}\n"
    assert main([f"results={tmp_path}", "experiment=fig1"]) == 2


def test_report_without_the_page_s_packages(tmp_path: Path, capsys, monkeypatch) -> None:
    from deltalab.report.command import main
    from deltalab.report.page import libraries

    save(tmp_path, [record("dare", 0.1)])
    monkeypatch.setitem(libraries.NEEDED, "no_such_module", "some-package")
    assert main([f"results={tmp_path}"]) == 0
    told = capsys.readouterr().err
    assert told == "warning: no index.html without some-package (pip install deltalab[report])\n"
    assert not (tmp_path / "index.html").exists()


def test_the_page_covers_all_whichever_experiment_is_asked_for(tmp_path: Path) -> None:
    from deltalab.report.command import main

    save(tmp_path, [record("keep", 0.0), record("dare", 0.1, experiment="fig/2")])
    assert main([f"results={tmp_path}", "experiment=fig/2"]) == 0
    text = (tmp_path / "index.html").read_text()
    assert len(held(text)) == 2
    assert 'id="fig-2"' in text
    assert 'id="demo"' in text


@pytest.mark.parametrize("value", [None, "", [], {}])
def test_every_field_may_be_absent(tmp_path: Path, value: Any) -> None:
    fields = list(card(tmp_path, "fig0"))
    for index, field in enumerate(fields[1:], start=1):
        card(tmp_path, f"fig{index}", **{field: value})
    card(tmp_path, "fig99", name=value)
    ids = [a["id"] for a in Elements(written(tmp_path)).found["article"]]
    assert ids == [*(f"fig{index}" for index in range(len(fields))), "fig99"]
    (tmp_path / "paper" / "fig1.json").write_text("{}")
    assert 'id="fig1"' in written(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "not a card but a list"),
        ('{"name": ', "Expecting"),
        ('{"tables": [3]}', "table 3, must be an object"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_broken_cards_are_skipped_with_a_warning(
    tmp_path: Path, content: str, message: str
) -> None:
    card(tmp_path, "fig2")
    (tmp_path / "paper" / "fig1.json").write_text(content)
    lines: list[str] = []
    assert 'id="fig2"' in written(tmp_path, lines.append)
    (line,) = lines
    assert "fig1.json" in line
    assert re.search(message, line)


@pytest.mark.parametrize(
    "name", ["../secret.svg", "/etc/hostname", "fig1.json", "no.svg", "a\0.svg"]
)
def test_a_card_shows_no_file_but_its_own(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.svg").write_text("<svg>secret</svg>")
    card(tmp_path, "fig1", figures=[{"file": name}], lines=name)
    lines: list[str] = []
    text = written(tmp_path, lines.append)
    assert len(lines) == 2
    assert "img" not in Elements(text).found
    assert "secret</svg" not in text


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.svg").write_text("<svg>secret</svg>")
    card(tmp_path, "fig1", figures=["link.svg"])
    (tmp_path / "paper" / "link.svg").symlink_to(tmp_path / "secret.svg")
    lines: list[str] = []
    assert "img" not in Elements(written(tmp_path, lines.append)).found
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"loss": 3}, "line 1: loss 3, must be an object"),
        ({"edit": "dare"}, "line 1: edit 'dare'"),
        ({"status": "?"}, "line 1: status '?'"),
    ],
)
def test_broken_files_of_points_are_skipped_with_a_warning(tmp_path: Path, more, message) -> None:
    card(tmp_path, "fig1", lines="fig1.jsonl")
    points_lines(tmp_path / "paper" / "fig1.jsonl", ["a"], **more)
    lines: list[str] = []
    assert held(written(tmp_path, lines.append)) == []
    assert message in lines[0]
    (tmp_path / "paper" / "fig1.jsonl").write_text('{"key": "a",\n')
    written(tmp_path, lines.append)
    assert "line 1: " in lines[1]


def hostile(folder: Path) -> Path:
    """A results directory whose every text would be a script if it were not escaped."""
    save(
        folder,
        [
            record("dare", 0.1, model=HOSTILE, experiment="demo " + HOSTILE),
            record(HOSTILE, -0.2, settings={HOSTILE: HOSTILE}) | {"class": HOSTILE},
        ],
    )
    made = card(folder, "fig1")
    for name, value in made.items():
        if isinstance(value, str) and name != "lines":
            made[name] = HOSTILE
    made |= {"notes": [HOSTILE], "seeds": [HOSTILE], "versions": {HOSTILE: HOSTILE}}
    made["figures"][0]["caption"] = HOSTILE
    made["tables"] = [{"title": HOSTILE, "columns": [HOSTILE] * 2, "rows": [[HOSTILE, 1]]}]
    (folder / "paper" / "fig1.json").write_text(json.dumps(made))
    (folder / "paper" / "fig1.svg").write_text(f"<svg>{HOSTILE}</svg>")
    return folder


def test_what_records_and_cards_tell_is_text(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    card(save(plain, [record("dare", 0.1), record("ties", 0.2)]), "fig1")
    expected = Elements(written(plain))
    lines: list[str] = []
    found = Elements(text := written(hostile(tmp_path / "hostile"), lines.append))
    assert ["verdict" in line for line in lines] == [True]
    assert len(found.found["script"]) == len(expected.found["script"]) == 5
    assert len(found.found["img"]) == 1
    assert set(found.found) <= set(expected.found)
    assert not any(key.startswith("on") for each in found.found.values() for a in each for key in a)
    assert HOSTILE in {row["model"] for row in held(text)}
    assert "49" not in text.split("<main")[1].split("<script")[0]


def test_nothing_is_fetched(full: Path) -> None:
    found = Elements((full / "index.html").read_text()).found
    assert "link" not in found
    assert not any("src" in script for script in found["script"])
    assert all(image["src"].startswith("data:image/") for image in found["img"])
    assert all(image["alt"] for image in found["img"])
    policy = next(m["content"] for m in found["meta"] if "http-equiv" in m)
    assert policy.startswith("default-src 'none';")
    assert "unsafe-eval" not in policy
    assert "http" not in policy


def test_the_same_files_give_the_same_bytes(full: Path, tmp_path: Path) -> None:
    from deltalab.report.page import libraries

    shutil.copytree(full, tmp_path / "again")
    (tmp_path / "again" / "index.html").unlink()
    libraries.vega.cache_clear()
    assert written(tmp_path / "again") == (full / "index.html").read_text()


def test_many_points_are_thinned_evenly_and_said_to_be(tmp_path: Path, monkeypatch) -> None:
    points = [reading.parse(record("dare", 0.1, seed=seed)) for seed in range(1000)]
    seeds = tabulate(points, most=100).values("seed")
    assert seeds == list(range(0, 1000, 10))
    assert len(tabulate(points, most=1000).rows) == 1000
    assert "100 of 1000 points" in page.render([], tabulate(points, most=100), 1000)


def test_what_is_not_finite_is_absent(tmp_path: Path) -> None:
    made = [record("dare", float("nan")), record("ties", float("inf")), record("expo", 1e300)]
    rows = held(written(save(tmp_path, made)))
    assert {row["edit"]: row["measured change"] for row in rows} == {
        "dare": None,
        "ties": None,
        "expo": 1e300,
    }


def test_no_scatter_without_a_term() -> None:
    points = tabulate([reading.parse(record("dare", None))])
    assert chart(points) is None
    assert "#scatter" not in page.render([], points, 1).split("<style")[0]


@pytest.mark.parametrize("sizes", [(0.1, 0.2), (0.0,), (1e-9, 0.3), (-0.2, -0.1), (-1e-5, 10.0)])
def test_both_axes_are_alike_and_hold_all_points(sizes: tuple[float, ...]) -> None:
    points = tabulate([reading.parse(record("dare", size, seed=i)) for i, size in enumerate(sizes)])
    made = chart(points)
    marks = made["layer"][-1]["encoding"]
    assert marks["x"]["scale"] == marks["y"]["scale"]
    low, high = marks["x"]["scale"]["domain"]
    assert all(low < size < high for size in sizes)
    assert low <= 0 <= high
    assert is_symlog(made) == (max(map(abs, sizes)) > 20 * min(map(abs, sizes)) > 0)
    ticks = marks["x"]["axis"].get("values", [0.0])
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= 10


def test_experiments_without_a_card_are_told_by_their_reports(tmp_path: Path) -> None:
    (tmp_path / "demo.md").write_text("# demo\n")
    (tmp_path / "notes.md").write_text("# no report\n")
    (tmp_path / "demo_term.svg").write_text(SVG)
    (one,) = without_card(tmp_path, [], [])
    assert (one.name, one.page, len(one.figures)) == ("demo", "demo.md", 1)
    assert ("points", "no records here") in one.facts
    assert without_card(tmp_path, [], ["demo"]) == []


# In a browser.


@pytest.fixture(scope="module")
def browser():
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"needs a browser: one of {', '.join(BROWSERS)}")
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """Open a page from its file; afterwards it must have told nothing and fetched nothing."""
    contexts, told, fetched = [], [], []

    def opened(path: Path, width: int = 1280, ready: bool = True, **more: Any):
        size = {"width": width, "height": 900}
        contexts.append(browser.new_context(viewport=size, offline=True, **more))
        view = contexts[-1].new_page()
        view.on("console", lambda message: told.append(message.text))
        view.on("pageerror", lambda error: told.append(str(error)))
        view.on("dialog", lambda dialog: told.append(dialog.message))
        view.on("request", lambda request: fetched.append(request.url))
        view.goto((path / "index.html").as_uri())
        if ready:
            view.wait_for_selector("html[data-ready]", timeout=60_000, state="attached")
        return view

    yield opened
    for context in contexts:
        context.close()
    assert told == []
    assert not [url for url in fetched if not url.startswith(("file:", "data:", "blob:null/"))]
    assert sum(url.startswith("file:") for url in fetched) == len(contexts)


def column(view: Any, table: str, place: int) -> list[str]:
    return view.locator(f"{table} tbody tr td:nth-child({place})").all_inner_texts()


def until(asked: Any, wanted: Any) -> None:
    """Ask until the answer is the one that is wanted: a page answers in its own time."""
    end = time.monotonic() + 10
    while (answer := asked()) != wanted and time.monotonic() < end:
        time.sleep(0.05)
    assert answer == wanted


def test_overview_sorts_by_number_and_by_the_papers_order(visit, full: Path) -> None:
    view = visit(full)
    shown = ["Table 1", "Fig. 2", "Fig. 10", "Rules"]
    until(lambda: column(view, "#overview", 1), shown)
    view.locator("#overview th", has_text="minutes").click()
    until(lambda: column(view, "#overview", 5), ["1", "3.5", "10", "20"])
    assert (
        view.locator("#overview th", has_text="minutes").get_attribute("aria-sort") == "ascending"
    )
    view.locator("#overview th", has_text="minutes").click()
    until(lambda: column(view, "#overview", 5), ["20", "10", "3.5", "1"])
    view.locator("#overview th", has_text="artefact").click()
    until(lambda: column(view, "#overview", 1), shown)


def test_a_cards_table_sorts_by_the_number_that_leads_a_cell(visit, full: Path) -> None:
    view = visit(full)
    view.locator("#fig2 th", has_text="ours").click()
    until(lambda: column(view, "#fig2 table", 2), ["-", "-2 of 20", "-0.5 ± 0.1", "76.4 ± 0.3"])
    view.locator("#fig2 th", has_text="k").click()
    until(lambda: column(view, "#fig2 table", 1), ["9", "10", "11", "12"])


def test_all_points_sort_and_are_searched(visit, full: Path) -> None:
    view = visit(full)
    titles = [text.strip() for text in view.locator("#all-points th").all_inner_texts()]
    place = titles.index("measured change") + 1
    view.locator("#all-points th", has_text="measured change").click()
    everything = [row["measured change"] for row in held((full / "index.html").read_text())]
    least = sorted(change for change in everything if change is not None)[:25]
    rough = [f"{change:.2g}" for change in least]
    until(lambda: [f"{float(c):.2g}" for c in column(view, "#all-points", place) if c], rough)
    view.locator("#points input[type=search]").fill("rules1")
    assert column(view, "#all-points", titles.index("record") + 1) == ["rules1"]


def test_scatter_shows_the_chosen_points_and_what_they_are(visit, tmp_path: Path) -> None:
    made = [record("dare", 1.0, left=-0.5, settings={"p": 0.25}), record("ties", -1.0, model="b")]
    written(save(tmp_path, [*made, record("keep", None)]))
    view = visit(tmp_path)
    marks = view.locator("#scatter svg .mark-symbol.role-mark path")
    assert marks.count() == 2
    places = [mark.get_attribute("transform") for mark in marks.all()]
    view.locator("#choices select").first.select_option(label="term gauss-3")
    until(lambda: marks.first.get_attribute("transform") == places[0], False)
    view.locator("#choices select").nth(2).select_option(label="mnist_vit")
    until(marks.count, 1)
    marks.first.hover()
    tip = view.locator("#vg-tooltip-element").inner_text()
    for told in ("mnist_vit", "dare p=0.25", "1.002", "decreased", "demo", made[0]["key"]):
        assert told in tip


def test_scatter_of_many_points_is_drawn_as_pixels(visit, tmp_path: Path) -> None:
    points = [reading.parse(record("dare", 0.1 + i / 1e4, seed=i)) for i in range(3500)]
    (tmp_path / "index.html").write_text(page.render([], tabulate(points), 3500))
    view = visit(tmp_path)
    assert view.locator("#scatter canvas").count() == 1
    assert "of 3,500" in view.locator("#points .dt-info").inner_text()


@pytest.mark.parametrize("width", [1280, 390])
def test_no_page_is_wider_than_its_window(visit, full: Path, width: int) -> None:
    view = visit(full, width)
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    assert view.locator("article img").first.bounding_box()["width"] <= width
    box = view.locator("#scatter svg").first.bounding_box()
    assert box["x"] + box["width"] <= width


def test_text_of_records_and_cards_runs_nothing(visit, tmp_path: Path) -> None:
    written(hostile(tmp_path), lambda line: None)
    view = visit(tmp_path)
    view.locator("#scatter svg .mark-symbol.role-mark path").first.hover()
    assert HOSTILE in view.locator("#vg-tooltip-element").inner_text()
    for select in range(4):
        view.locator("#choices select").nth(select).select_option(index=1)
    view.locator("#all-points th").first.click()
    until(lambda: HOSTILE in " ".join(column(view, "#all-points", 1)), True)
    assert view.evaluate("window.pwned") is None
    assert view.locator("img").count() == 1


def test_the_policy_stops_a_script_that_is_not_the_pages(browser, tmp_path: Path) -> None:
    written(save(tmp_path, [record("dare", 0.1)]))
    text = (tmp_path / "index.html").read_text()
    tampered = text.replace("</main>", "<script>window.pwned=1</script><img src=x></main>")
    (tmp_path / "index.html").write_text(tampered)
    view = browser.new_page()
    view.goto((tmp_path / "index.html").as_uri())
    view.wait_for_selector("html[data-ready]", state="attached")
    assert view.evaluate("window.pwned") is None
    view.close()


def test_cards_are_read_without_scripts(visit, full: Path) -> None:
    view = visit(full, ready=False, java_script_enabled=False)
    until(lambda: column(view, "#overview", 1), ["Table 1", "Fig. 2", "Fig. 10", "Rules"])
    assert view.locator("noscript").count() == 1


def test_dark_scheme(visit, full: Path) -> None:
    colours = []
    for scheme in ("light", "dark"):
        view = visit(full, color_scheme=scheme)
        colours.append(view.evaluate("getComputedStyle(document.body).backgroundColor"))
    light, dark = (sum(map(int, re.findall(r"\d+", colour))) for colour in colours)
    assert light > 700
    assert dark < 100
