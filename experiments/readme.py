"""Copy the demo's table from `results/demo.md` into the README: `python -m experiments.readme`."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
START, END = "<!-- demo table: written by `make results` -->\n", "<!-- end -->"


def table(page: str) -> str:
    """Return the first table of a Markdown page."""
    lines = page.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    last = next(i for i in range(first, len(lines)) if not lines[i].startswith("|"))
    return "\n".join(lines[first:last]) + "\n"


def with_table(readme: str, page: str) -> str:
    """Return the README with the page's table between its markers."""
    before, rest = readme.split(START)
    return before + START + "\n" + table(page) + "\n" + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_table(path.read_text(), (ROOT / "results" / "demo.md").read_text()))
