"""lm-eval's tasks: found among its files and the user's, and built once a process."""

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltalab.evaluators.lm import code, run_code
from deltalab.evaluators.lm import data as lm_data
from deltalab.evaluators.lm.asked import Asked, refusal
from deltalab.evaluators.lm.hflm import quiet
from deltalab.settings import near
from deltalab.store.latest import latest

EMBEDDED = Path(__file__).parents[2] / "tasks"
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What lm-eval calls the most tokens of an answer, the first given one counting."""
_NAME = re.compile(r"^\s*(?:- )?(?:task|group|tag):[ \t]*[\"']?([\w.\-]+)", re.MULTILINE)


@dataclass(frozen=True, eq=False)
class Entry:
    """One name to report on.

    Attributes:
        label: what its metrics are called.
        reported: the name of the task or group in lm-eval's results.
        leaves: the tasks that it consists of.
        metrics: the metrics to record; None: all.
        path: the setting, for messages.
    """

    label: str
    reported: str
    leaves: tuple[str, ...]
    metrics: tuple[str, ...] | None
    path: str


@dataclass(eq=False)
class Run:
    """Tasks that lm-eval evaluates together: of one limit, none of them twice.

    Attributes:
        limit: the first so many documents of every task only.
        entries: what to report.
        tasks: the tasks by name.
        groups: the groups by name.
    """

    limit: int | None
    entries: list[Entry] = field(default_factory=list)
    tasks: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)


@latest("tasks", "evaluator")
def load(spec: Any) -> tuple[Run, ...]:
    """Build the tasks of a `LmEval`, once: edits and pairs share them.

    Raises:
        ValueError: a task that does not exist, cannot be loaded, would run code that may not be
            run, or has fewer examples than are asked for.
    """
    runs: list[Run] = []
    with quiet(), redirect_stderr(StringIO()), seeded(spec.seed), code.templates():
        index = _index(spec)
        for task, count in [(each, n) for each in spec.tasks for n in each.shots]:
            for name, leaves, groups in _parts(_built(index, spec, task)):
                for leaf in leaves.values():
                    _configure(leaf, spec, task, count)
                label = f"{name}/{count}shot" if len(task.shots) > 1 else name
                path = f"evaluator.tasks.{task.name}"
                if any(label == entry.label for run in runs for entry in run.entries):
                    raise ValueError(f"{path}: another of the tasks has {name} in it as well")
                entry = Entry(label, name, tuple(leaves), task.metrics, path)
                if (offered := _offered(entry, leaves, groups)) is not None:
                    check_metrics(entry, task.metrics or (), offered)
                run = _room(runs, task.limit or spec.limit, leaves)
                run.entries.append(entry)
                run.tasks |= leaves
                run.groups |= groups
    return tuple(runs)


def _room(runs: list[Run], limit: int | None, leaves: Mapping[str, Any]) -> Run:
    """Return the first run of this limit that holds none of the tasks yet."""
    for run in runs:
        if run.limit == limit and not run.tasks.keys() & leaves.keys():
            return run
    runs.append(Run(limit))
    return runs[-1]


def _parts(built: Any) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield what is reported under a name of its own: tasks, and groups that have a score."""
    from lm_eval.api.group import Group

    for part in built if isinstance(built, list) else [built]:
        if not isinstance(part, Group):
            yield part.task_name, {part.task_name: part}, {}
            continue
        leaves = {task.task_name: task for task in part.get_all_tasks()}
        if part.has_aggregation:
            groups = {group.name: group for group in [part, *part.get_all_groups()]}
            yield part.name, leaves, groups
        else:
            yield from ((name, {name: leaf}, {}) for name, leaf in leaves.items())


def generation(
    own: Mapping[str, Any], chosen: Mapping[str, Any], length: int | None
) -> dict[str, Any]:
    """Return a task's generation settings with what was chosen in place of its own.

    Lengths have several names (`LENGTHS`), of which one is left: the chosen one.

    Args:
        own: the task file's.
        chosen: those set for this task.
        length: the most tokens, of all tasks; None leaves it to the task.

    >>> generation({"max_gen_toks": 256, "do_sample": False}, {"max_new_tokens": 9}, 50)
    {'do_sample': False, 'max_gen_toks': 9}
    """
    wanted = next((chosen[name] for name in LENGTHS if chosen.get(name)), length)
    if wanted is None or "max_length" in chosen:
        return {**own, **chosen}
    bounds = (*LENGTHS, "max_length")
    found = {k: v for k, v in {**own, **chosen}.items() if k not in bounds}
    return {**found, "max_gen_toks": wanted}


def _configure(leaf: Any, spec: Any, task: Asked, count: int | None) -> None:
    """Set what differs from the task's own settings, and keep its documents in memory."""
    where = f"evaluator.tasks.{task.name}"
    if getattr(leaf, "UNSAFE_CODE", False) and not spec.run_code:
        raise ValueError(refusal(task.name))
    own = leaf.get_config("num_fewshot")
    if own == 0 and count:
        raise ValueError(f"{where}.shots={count}: {leaf.task_name} is defined without examples")
    leaf.set_config("num_fewshot", count if count is not None else own or 0)
    examples = getattr(getattr(leaf, "sampler", None), "df", None)
    if examples is not None and (n := leaf.get_config("num_fewshot")) > len(examples):
        raise ValueError(f"{where}.shots={n}: its data hold {len(examples)} examples to draw from")
    if leaf.get_config("output_type") == "generate_until":
        chosen = {k: list(v) if isinstance(v, tuple) else v for k, v in task.generation}
        own = leaf.get_config("generation_kwargs") or {}
        asked = generation(own, chosen, spec.max_new_tokens)
        leaf.set_config("generation_kwargs", asked)
    documents = list(leaf.eval_docs)  # lm-eval would prepare them again at every look
    lm_data.check_nltk(documents, where)
    name = "test_docs" if leaf.has_test_docs() else "validation_docs"
    setattr(leaf, name, lambda: documents)


def _offered(
    entry: Entry, leaves: Mapping[str, Any], groups: Mapping[str, Any]
) -> list[str] | None:
    """Return the metrics that an entry will have, where that can be known beforehand."""
    leaf = next(iter(leaves.values()))
    listed = leaf.get_config("metric_list")
    if not listed or any(callable(metric["metric"]) for metric in listed):
        return None
    metrics = [metric["metric"] for metric in listed]
    if entry.reported in groups:
        metrics = [m.metric for m in groups[entry.reported].aggregate_metric_list]
    filters = [chosen.name for chosen in getattr(leaf, "_filters", [])] or ["none"]
    return short([f"{metric},{chosen}" for chosen in filters for metric in metrics])


def check_metrics(entry: Entry, wanted: Iterable[str], offered: Iterable[str]) -> None:
    """Raise `ValueError` where a metric is asked for that a task does not have."""
    offered = list(offered)
    if missing := [metric for metric in wanted if metric not in offered]:
        raise ValueError(
            f"{entry.path}.metrics: {entry.reported} has no {missing[0]}; it has"
            f" {', '.join(offered)}"
        )


def short(names: Sequence[str]) -> list[str]:
    """Return lm-eval's `metric,filter` without what does not tell them apart.

    >>> short(["acc,none", "acc_norm,none"])
    ['acc', 'acc_norm']
    >>> short(["exact_match,strict-match", "exact_match,flexible-extract"])
    ['exact_match_strict', 'exact_match_flexible']
    """
    split = [name.rsplit(",", 1) for name in names]
    if len({chosen for _, chosen in split}) < 2:
        return [metric for metric, _ in split]
    brief = [f"{metric}_{chosen.split('-')[0]}" for metric, chosen in split]
    if len(set(brief)) == len(brief):
        return brief
    return [f"{metric}_{chosen.replace('-', '_')}" for metric, chosen in split]


def _built(index: Any, spec: Any, task: Asked) -> Any:
    """Return the task, group, or list of tasks of a name."""
    where = f"evaluator.tasks.{task.name}"
    entry = index.task_index[task.name]
    overrides = lm_data.overrides(index.task_index, task.name, spec.data_dir)
    if entry.yaml_path and lm_data.raw(entry.yaml_path).get("unsafe_code") and not spec.run_code:
        raise ValueError(refusal(task.name))  # before its file imports what would run the code
    try:
        stock = (_stock(), EMBEDDED)
        with (
            run_code.in_place() if spec.run_code else nullcontext(),
            code.refused(stock, spec.run_task_code),
        ):
            return index._factory.build(entry, overrides=overrides, registry=index.task_index)
    except code.Refused as error:
        raise ValueError(f"{where}: {error}") from None
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{where}: needs the package {error.name}, which is not installed"
        ) from None
    except Exception as error:  # of whatever library reads the data
        if spec.data_dir is not None and isinstance(error, OSError | ValueError):
            raise
        raise ValueError(f"{where}: {lm_data.unreachable(entry, error)}") from error


def _index(spec: Any) -> Any:
    """Return lm-eval's index of the folders that hold the tasks; of all folders only if need be.

    Reading all fourteen thousand task files takes more than ten seconds.

    Raises:
        ValueError: a task that no file names, or whose file cannot be read.
    """
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    stock = _stock()
    own = [EMBEDDED, *(lm_data.directory(d, "evaluator.include") for d in spec.include)]
    names = [task.name for task in spec.tasks]
    folders = [
        d for d in sorted(stock.iterdir()) if d.is_dir() and any(_within(n, d.name) for n in names)
    ]
    index = TaskManager(include_defaults=False, include_path=[*folders, *own])
    missing = [name for name in names if name not in index.task_index]
    if not missing:
        return index
    files = _files([stock, *own])
    for name in missing:
        if name not in files:
            raise ValueError(f"evaluator.tasks.{name}: no such task{near(name, files)}")
        try:
            load_yaml(files[name], resolve_func=False)
        except Exception as error:  # lm-eval passes over such files in silence
            reason = str(error).replace("\n", " ")[:200]
            raise ValueError(f"{files[name]}: not a task file ({reason})") from None
    index = TaskManager(include_path=own)
    if gone := [name for name in missing if name not in index.task_index]:
        raise ValueError(f"evaluator.tasks.{gone[0]}: {files[gone[0]]} names it, but not as a task")
    return index


def _stock() -> Path:
    """Return the directory of lm-eval's own task files."""
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks"


def _within(task: str, folder: str) -> bool:
    return task == folder or task.startswith(f"{folder}_")


def _files(roots: Iterable[Path]) -> dict[str, Path]:
    """Return which file names which task, group or tag, found by their text."""
    found: dict[str, Path] = {}
    for root in roots:
        for path in sorted(root.rglob("*.yaml")):
            found |= dict.fromkeys(_NAME.findall(path.read_text(errors="replace")), path)
    return found


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every global generator as lm-eval does, and put its state back afterwards."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        random.seed(0)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
