"""Where tasks read their data: a local directory in place of the hub, and the embedded files."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from deltalab.data import formats
from deltalab.store import reach

_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
_USUAL = re.compile(r"(auxiliary_)?(train|test|valid|dev)")
_CORRECT, _INCORRECT = "Correct Answers", "Incorrect Answers"
_FORMATS = ("json", "csv", "parquet", "arrow", "text", "pandas")


@dataclass(frozen=True)
class Local:
    """A task's data, read into memory from a directory.

    The directory is a clone of the data set's repository, or holds a file a split: `<split>.jsonl`,
    `.json`, `.csv` or `.parquet`, also in parts (`<split>-00000-of-00002.parquet`), in a directory
    named as the configuration, in `data`, or itself. A lone file of another name is every split.

    Args:
        place: the directory.
        setting: what named it, for messages.
    """

    place: Path
    setting: str

    def __call__(self, config_source: str = "", **_: Any) -> Any:
        """Return the splits that a task file names; lm-eval calls this with the file's path.

        Raises:
            FileNotFoundError: the split to evaluate is missing.
        """
        import datasets

        config = raw(Path(config_source))
        wanted = dict.fromkeys(s for key in _SPLITS if (s := config.get(key)))
        evaluated = config.get("test_split") or config.get("validation_split")
        found = {split: self.rows(split, config.get("dataset_name")) for split in wanted}
        if not found.get(evaluated):
            raise FileNotFoundError(
                f"{self.setting}: no {evaluated}.jsonl, .json, .csv or .parquet in {self.place}"
                f" for the task {config.get('task')}"
            )
        made = {split: datasets.Dataset.from_list(rows) for split, rows in found.items() if rows}
        empty = made[evaluated].select([])
        return datasets.DatasetDict({split: made.get(split, empty) for split in wanted})

    def rows(self, split: str, name: str | None) -> list[dict[str, Any]]:
        """Return the documents of a split, none where there is no file of it."""
        places = [self.place / name] if name else []
        for place in (*places, self.place / "data", self.place):
            files = sorted(p for p in place.glob("*") if p.name.endswith(formats.ENDINGS))
            own = [p for p in files if p.name.startswith((f"{split}.", f"{split}-"))]
            if not own and len(files) == 1 and not _USUAL.match(files[0].name):
                own = files
            if own:
                return [_document(row) for path in own for row in read(path)]
        return []


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file; TruthfulQA's CSV had Chinese quotation marks for some years.

    Raises:
        ValueError: the file is not what its ending says.
    """
    try:
        return [fields for _, fields in formats.rows(path)]
    except ValueError:
        if path.suffix != ".csv":
            raise
        try:
            text = path.read_bytes().decode("gb18030")
        except UnicodeDecodeError:
            text = ""
        found = list(csv.DictReader(io.StringIO(text, newline="")))
        if not found or not all(_INCORRECT in row and _CORRECT in row for row in found):
            raise
        return found


def _document(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as the hub has it: TruthfulQA's own CSV becomes its multiple-choice form."""
    return multiple_choice(row) if _INCORRECT in row else row


def multiple_choice(row: Mapping[str, str]) -> dict[str, Any]:
    """Return a row of TruthfulQA's CSV as questions with one, and with several, right choices.

    The one right choice is the best answer, put first; the wrong ones are all incorrect answers.

    >>> row = {"Question": "?", "Best Answer": "a", "Correct Answers": "a; b",
    ...        "Incorrect Answers": "c; d"}
    >>> made = multiple_choice(row)
    >>> made["mc1_targets"]
    {'choices': ['a', 'c', 'd'], 'labels': [1, 0, 0]}
    >>> made["mc2_targets"]
    {'choices': ['a', 'b', 'c', 'd'], 'labels': [1, 1, 0, 0]}
    """
    right, wrong = (
        list(dict.fromkeys(a.strip() for a in row[column].split(";") if a.strip()))
        for column in (_CORRECT, _INCORRECT)
    )
    best = row["Best Answer"].strip()

    def targets(right: list[str]) -> dict[str, Any]:
        return {"choices": [*right, *wrong], "labels": [1] * len(right) + [0] * len(wrong)}

    return {
        "question": row["Question"],
        "mc1_targets": targets([best]),
        "mc2_targets": targets(right),
    }


def overrides(index: Mapping[str, Any], name: str, data_dir: str | None) -> dict[str, Any]:
    """Return what makes a task or group read `data_dir`; nothing where it has its own files.

    Raises:
        FileNotFoundError: the directory, or the data set's directory in it, is missing.
    """
    if data_dir is None:
        return {}
    root = directory(data_dir, "evaluator.data_dir")
    leaf = _first_leaf(index, name)
    config = raw(leaf.yaml_path) if leaf is not None and leaf.yaml_path else {}
    source = config.get("dataset_path")
    if not source or source in _FORMATS or config.get("custom_dataset"):
        return {}
    names = (source.split("/")[-1], name, leaf.yaml_path.parent.name if leaf else "")
    for plain in map(_plain, names):
        for place in sorted(root.iterdir()):
            if place.is_dir() and _plain(place.name) == plain:
                return {"custom_dataset": Local(place, f"evaluator.data_dir={data_dir}")}
    raise FileNotFoundError(
        f"evaluator.data_dir={data_dir}: no directory {names[0]} in it for the task {name}:"
        f" a clone of the data set {source}, or a file for each split"
    )


def _plain(name: str) -> str:
    """Return a name without what its spellings differ in.

    >>> _plain("truthful_qa") == _plain("TruthfulQA")
    True
    """
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _first_leaf(index: Mapping[str, Any], name: str) -> Any:
    """Return the index's entry of the first task that a task, group or tag leads to."""
    entry = index.get(name)
    members = [] if entry is None else sorted(entry.tags) if entry.kind.name == "TAG" else []
    if entry is not None and entry.kind.name == "GROUP":
        listed = entry.cfg.get("task") or []
        members = [m if isinstance(m, str) else m.get("task") or m.get("group") for m in listed]
    return _first_leaf(index, members[0]) if members else entry


@lru_cache(maxsize=256)
def raw(path: Path) -> dict[str, Any]:
    """Return a task file's settings with what it includes; functions are not imported."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config: dict[str, Any] = load_yaml(path, resolve_func=False)
    return config


def check_nltk(documents: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raise `ValueError` where IFEval would fail after generating, for want of nltk's data.

    Its import only tries to download them, and two of its instructions cannot be checked without.
    """
    needing = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}
    if not any(needing.intersection(d.get("instruction_id_list") or ()) for d in documents):
        return
    import nltk  # type: ignore[import-untyped]

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        raise ValueError(
            f"{where}: needs nltk's data, once: python -m nltk.downloader punkt_tab"
        ) from None


def directory(path: str, setting: str) -> Path:
    """Return a directory that a setting names.

    Raises:
        FileNotFoundError: there is none.
    """
    found = Path(path).expanduser()
    if not found.is_dir():
        raise FileNotFoundError(f"{setting}={path}: no such directory")
    return found.resolve()


def unreachable(entry: Any, error: Exception) -> str:
    """Return why a task could not be built, and what would help."""
    source = raw(entry.yaml_path).get("dataset_path") if entry.yaml_path else None
    reason = reach.reason(error)[:200]
    if source is None or source in _FORMATS:
        return f"cannot be loaded ({type(error).__name__}: {reason})"
    return (
        f"cannot be loaded ({type(error).__name__}: {reason}); its data set is {source}, and"
        " evaluator.data_dir=DIR reads a local copy of it"
    )
