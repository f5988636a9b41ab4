"""`deltalab-report`: turn the records of a results directory into tables and figures.

For every experiment found in `DIR/records/*.json` it writes `DIR/<experiment>.md` and its figures
`DIR/<experiment>_*.png` and `.svg`, and prints the table; then one page of everything there,
`DIR/index.html`. The same records give the same bytes. Where git tracks such a file, the report
goes to `DIR/report` instead, unless `into` says otherwise.
"""

import re
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from deltalab.report import placing
from deltalab.report.columns import common_data, points_table, terminal
from deltalab.report.outcomes import at_margin, pair_names, rules
from deltalab.report.summary import agreement, summary
from deltalab.report.tables import Column, markdown, signed
from deltalab.store import exporting, files, shown
from deltalab.store.effects import check_margin
from deltalab.store.reading import TRACKED, cards, read, read_tracked
from deltalab.store.record import Outcome
from deltalab.terminal.commands import command

USAGE = """\
usage: deltalab-report [results=DIR] [into=DIR] [experiment=NAME] [from=wandb] [margin=SHARE]
                       [compare='EDIT;EDIT'] [export=FILE]

Turn DIR/records/*.json into DIR/NAME.md, DIR/NAME_*.png and DIR/NAME_*.svg, and print the table.
DIR/index.html shows all of them, and the artefacts of DIR/paper and DIR/merging, on one page.

  results=DIR      where the records are and the report goes (default: results)
  into=DIR         where the report goes instead; without it nothing that git tracks is overwritten:
                   a report goes to DIR/report where git tracks one of its files in DIR
  experiment=NAME  report this experiment alone (default: every one there is)
  from=wandb       read what tracker=wandb has logged, DIR/wandb, instead of DIR/records
  margin=SHARE     class the points by another margin than that of their records: which share of
                   post-training's gain in loss counts as no change
  compare='A;B'    instead, compare two points document by document: each named by its key or as
                   the table names it, such as 'dare p=0.5 k=0;ties keep=0.3 scope=model'
  export=FILE      instead, write every field of every point to FILE.jsonl, .csv or .parquet
"""
SETTINGS = {
    "results": "results", "into": "", "experiment": "", "from": "records", "margin": "",
    "compare": "", "export": "",
}  # fmt: skip
SOURCES = {"records": "records/*.json", "wandb": f"{TRACKED}/*/*/*"}


LEGEND = (
    "**Term** is the Riemann approximation of the loss change from the post-trained model to the"
    " edited one, by the paper's rule (left, Eq. 1) and by an accurate one (gauss), each with its"
    " number of nodes. **Measured change** is the difference of the two losses on the same examples"
    " ± its paired standard error; **error** is each term's distance from it, relative to it."
    " **Class**: competitive where the change is shown, by two standard errors to each side, to lie"
    " within a margin around no change, improved or decreased where it is shown to lie beyond, else"
    " undecided; the margin is a share of the gap between the losses of pre and post. **pre** and"
    " **post** are the unedited models. A **?** marks a term whose own error estimate is larger"
    " than was wanted. An edit that is fitted to the objective reads half of its examples, and its"
    " losses, terms and class are of the other half."
)


DRAWS = (
    "What differs in the seed alone, together: the mean change ± its standard error over draws and"
    " examples, and the class by it. Where draws are few the interval is wider than two errors, as"
    " Student's t says."
)
BOUND = (
    "\\* The examples' own losses were not kept: the error is an upper bound, the draws' spread and"
    " the examples' error of one draw together."
)
MOST_ROWS = 500
"""Points that the terminal shows; the page has all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 on success and 2 on a user's mistake, told in one line."""
    return command("deltalab-report", USAGE, _report, argv)


def _report(arguments: Sequence[str]) -> None:
    given = settings(arguments)
    report(source=given.pop("from"), **given)


def settings(arguments: Sequence[str]) -> dict[str, str]:
    """Read `key=value` arguments over the defaults.

    >>> settings(["results=out", "margin=0.05"])["margin"], settings([])["results"]
    ('0.05', 'results')
    """
    found = dict(SETTINGS)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name not in SETTINGS or not equals:
            known = ", ".join(f"{key}=..." for key in SETTINGS)
            raise ValueError(f"unknown argument {argument!r}: must be one of {known}")
        if not value:
            raise ValueError(f"{argument!r}: needs a value")
        found[name] = value
    return found


def report(
    results: str,
    experiment: str = "",
    compare: str = "",
    export: str = "",
    source: str = "records",
    margin: str = "",
    into: str = "",
) -> None:
    """Write and print the report of one experiment, or of all (`experiment` empty)."""
    share = _share(margin)
    directory = Path(results).expanduser()
    if not directory.is_dir():
        raise ValueError(f"results={results}: no such directory")
    points = _points(directory, source)
    points = points if share is None else at_margin(points, share)
    if not points and (experiment or compare or export or not cards(directory)):
        _no_records(results, directory, source)
    names = sorted({point.experiment for point in points})
    if experiment and experiment not in names:
        raise ValueError(f"experiment={experiment}: no record of it; there are {', '.join(names)}")
    if compare:
        own = [p for p in points if p.failure is None and experiment in ("", p.experiment)]
        _compare(own, compare, directory)
        return
    if export:
        own = [point for point in points if experiment in ("", point.experiment)]
        print(f"wrote {shown.line(exporting.write(own, Path(export).expanduser()))}")
        return
    chosen = [experiment] if experiment else names
    place = _place(directory, into, chosen)
    figures = find_spec("matplotlib") is not None
    if not figures and points and place:
        _warn("no figures without matplotlib (pip install deltalab[report])")
    for name in chosen:
        own = [point for point in points if point.experiment == name]
        _show(own, name)
        if place:
            print(f"wrote {shown.line(write(own, name, place, figures=figures))}")
    if place:
        _page(points, directory, place)


def _place(directory: Path, into: str, experiments: Sequence[str]) -> Path | None:
    """Return where the report goes, None where nothing can be written beside the records."""
    from deltalab.report.figures import FIGURES
    from deltalab.report.page import NAME

    names = [NAME]
    for one in map(shown.stem, experiments):
        names += [f"{one}.md", *(f"{one}_{f}.{kind}" for f in FIGURES for kind in ("png", "svg"))]
    place = Path(into).expanduser() if into else placing.place(directory, names)
    if (why := placing.refusal(place)) is None:
        return place
    if into:
        raise ValueError(f"into={into}: no report can be written there ({why})")
    _warn(f"no report can be written in {place} ({why}): name a directory with into=DIR")
    return None


def _share(margin: str) -> float | None:
    """Return the margin that was given, if any."""
    if not margin:
        return None
    try:
        return check_margin(float(margin))
    except ValueError:
        raise ValueError(f"margin={margin}: must be a share of the gap, in (0, 1)") from None


def _points(directory: Path, source: str) -> list[Outcome]:
    if source not in SOURCES:
        raise ValueError(f"from={source}: must be one of {', '.join(SOURCES)}")
    if source == "records":
        return read(directory, _warn)
    return read_tracked(directory, _warn)


def _warn(line: str) -> None:
    print(f"warning: {shown.line(line)}", file=sys.stderr)


def _page(points: Sequence[Outcome], directory: Path, place: Path) -> None:
    """Write the page of the whole directory, whichever experiment was asked for."""
    from deltalab.report import page
    from deltalab.report.page.libraries import missing

    if absent := missing():
        _warn(f"no index.html without {', '.join(absent)} (pip install deltalab[report])")
    else:
        print(f"wrote {shown.line(page.write(directory, points, _warn, place))}")


def _compare(points: Sequence[Outcome], names: str, directory: Path) -> None:
    from deltalab.report.comparison import chosen, compare, documents, table

    if len(pair := [name.strip() for name in names.split(";")]) != 2:
        raise ValueError(f"compare={names!r}: must name two points, as 'A;B'")
    first, second = (chosen(points, name) for name in pair)
    found = compare(documents(directory, first), documents(directory, second))
    if not found:
        raise ValueError(f"compare={names!r}: these points share no documents")
    print(markdown(table(found, (first.label, second.label))))


def _no_records(results: str, directory: Path, source: str) -> NoReturn:
    kind = "readable record" if any(directory.glob(SOURCES[source])) else "record"
    raise ValueError(f"results={results}: no {kind} in {directory}/{SOURCES[source]}")


def write(points: Sequence[Outcome], experiment: str, directory: Path, *, figures: bool) -> Path:
    """Write an experiment's Markdown page, and its figures if asked; return the page's path."""
    name = shown.stem(experiment)
    done = [point for point in points if point.failure is None]
    sections = [f"# {shown.markdown(experiment)}", ""]
    if done:
        sections += [
            *_legend(done),
            points_table(done),
            "",
            summary(done),
            *_draws(done, directory),
        ]
    sections += _parts(done)
    if done and figures:
        from deltalab.report.figures import draw

        for path, caption in draw(done, directory, name):
            sections += [f"![{re.split('[,;.]', caption)[0]}]({path.name})", "", f"*{caption}*", ""]
    sections += _failures([point for point in points if point.failure is not None])
    return files.write(directory / f"{name}.md", "\n".join(sections).rstrip("\n") + "\n")


def _draws(points: Sequence[Outcome], directory: Path) -> list[str]:
    """Class the random edits by the mean over their draws."""
    from deltalab.report.draws import drawn, table

    found = drawn(points, partial(_examples, directory))
    if not found:
        return []
    note = DRAWS + ("" if all(each.exact for each in found) else f" {BOUND}")
    return ["## Classes over the draws", "", note, "", markdown(table(found)), ""]


def _examples(directory: Path, point: Outcome) -> list[float] | None:
    """Return what the examples say of a point's change, None where it was not kept."""
    from deltalab.report.comparison import documents

    try:
        return documents(directory, point).get("objective/change")
    except ValueError:
        return None


def _parts(points: Sequence[Outcome]) -> list[str]:
    """Split the main terms by part of the model."""
    split = [(p, p.terms[p.main].by_part) for p in points if p.main and p.terms[p.main].by_part]
    if not split:
        return []
    heads = dict.fromkeys(name for _, parts in split for name, value in parts.items() if value)
    pairs = pair_names([p for p, _ in split])
    table = [
        Column("model", [pairs[p.of] for p, _ in split], right=False),
        Column("edit", [p.label for p, _ in split], right=False),
        *(Column(name, [signed(parts.get(name)) for _, parts in split]) for name in heads),
    ]
    return ["## The term by part of the model", "", markdown(table), ""]


def _legend(points: Sequence[Outcome]) -> list[str]:
    """Say what the table's columns mean, and in which unit."""
    measures = sorted({(p.objective or "", p.unit) for p in points if p.unit})
    units = "; ".join(f"{unit} ({name})" if name else f"{unit}" for name, unit in measures)
    units = shown.markdown(units)
    where = shown.markdown(common_data(points))
    told = f"{_count(points)}{where}."
    lines = [f"{told} Losses and terms are in {units}." if units else told * bool(where)]
    lines.append(LEGEND)
    return [line for text in lines if text for line in (text, "")]


def _count(points: Sequence[Outcome]) -> str:
    return f"{len(points)} point{'s' if len(points) > 1 else ''}"


def _failures(points: Sequence[Outcome]) -> list[str]:
    if not points:
        return []
    pairs = pair_names(points)
    table = [
        Column("model", [pairs[p.of] for p in points], right=False),
        Column("edit", [p.label for p in points], right=False),
        Column("seed", [str(p.seed) for p in points]),
        Column("failure", [p.failure or "" for p in points], right=False),
        Column("record", [p.key for p in points], right=False),
    ]
    return ["## Failed points", "", markdown(table), ""]


def _show(points: Sequence[Outcome], title: str) -> None:
    from deltalab.terminal.console import rich_console

    console = rich_console()
    width = console.width if console.is_terminal else None
    done = [point for point in points if point.failure is None]
    failed = len(points) - len(done)
    if width is None:
        console = rich_console(width=1000)
    if done:
        console.print(terminal(done[:MOST_ROWS], title, width))
    if len(done) > MOST_ROWS:
        print(f"and {len(done) - MOST_ROWS} more points, all of them in the page")
    if rules(done):
        for rule in zip(*(column.cells for column in agreement(done)), strict=True):
            title, count, median, largest, _, signs, ranks, classes = rule
            console.print(
                f"{title}: relative error {median} (median), {largest} (largest) on {count} of"
                f" {_count(done)}; same sign {signs}; Spearman {ranks}; class right {classes}"
            )
    if failed:
        console.print(f"{failed} failed, listed in the report", style="red")


if __name__ == "__main__":
    sys.exit(main())
