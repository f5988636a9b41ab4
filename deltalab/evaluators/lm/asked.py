"""What the settings ask of lm-eval: tasks by name, each with shots, metrics and a limit."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from deltalab.settings import near


@dataclass(frozen=True)
class Asked:
    """One task, group or tag of lm-eval as the settings ask for it.

    Args:
        name: as lm-eval knows it, or as a task file of `include` names it.
        shots: examples in the prompt, one evaluation for each count; None: as the task says.
        metrics: the metrics to record, without the task's name; None: all.
        limit: the first so many documents only; None: as many as the evaluator's limit says.
        generation: generation settings in place of the task's own.
    """

    name: str
    shots: tuple[int | None, ...] = (None,)
    metrics: tuple[str, ...] | None = None
    limit: int | None = None
    generation: tuple[tuple[str, Any], ...] = ()


def asked(tasks: Any) -> tuple[Asked, ...]:
    """Return the tasks that a mapping of names to settings, or a list of names, asks for.

    >>> [task.name for task in asked(["gsm8k", "hellaswag"])]
    ['gsm8k', 'hellaswag']
    >>> asked({"gsm8k": {"shots": 5}})[0].shots
    (5,)
    """
    if not isinstance(tasks, Mapping):
        tasks = {t.name if isinstance(t, Asked) else t: t for t in tasks}
    if not tasks:
        raise ValueError("evaluator.tasks: empty; choose some, as evaluator/tasks=gsm8k")
    return tuple(
        settings if isinstance(settings, Asked) else _one(str(name), settings)
        for name, settings in tasks.items()
    )


def _one(name: str, settings: Any) -> Asked:
    where = f"evaluator.tasks.{name}"
    if settings is None or settings == name:
        return Asked(name)
    if not isinstance(settings, Mapping):
        raise ValueError(f"{where}={settings}: must be a mapping, as {{shots: 5}}")
    known = ("shots", "metrics", "limit", "generation")
    for key, value in settings.items():
        if key not in known:
            hint = near(f"{where}.{key}", (f"{where}.{k}" for k in known))
            raise ValueError(f"{where}.{key}={value}: no such setting{hint}")
    shots, metrics, limit, generation = (settings.get(key) for key in known)
    counts = tuple(shots) if isinstance(shots, list | tuple) else (shots,)
    wrong = [n for n in counts if n is not None and (type(n) is not int or n < 0)]
    if wrong or not counts or len(set(counts)) < len(counts):
        raise ValueError(f"{where}.shots={shots}: must be a count, or different counts, from 0")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"{where}.limit={limit}: must be a whole number, at least 1")
    if generation is not None and not isinstance(generation, Mapping):
        raise ValueError(f"{where}.generation={generation}: must be a mapping")
    if any(isinstance(value, Mapping) for value in (generation or {}).values()):
        raise ValueError(f"{where}.generation={generation}: must hold numbers, texts and lists")
    chosen = (metrics,) if isinstance(metrics, str) else metrics
    return Asked(
        name,
        counts,
        None if chosen is None else tuple(str(metric) for metric in chosen),
        limit,
        tuple((str(k), _hashable(v)) for k, v in (generation or {}).items()),
    )


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def refusal(name: str) -> str:
    """Return the message for a task that would run the model's code without being allowed to."""
    return (
        f"evaluator.run_code=false: {name} runs the code that the model writes, on this machine;"
        f" set evaluator.run_code=true to allow it, or leave it out by ~evaluator.tasks.{name}"
    )


def check_installed() -> None:
    """Raise `ValueError` where a package that lm-eval's tasks need is missing."""
    for package in ("lm_eval", "transformers", "datasets"):
        if find_spec(package) is None:
            raise ValueError(
                f"evaluator=lm_eval: needs the package {package}, as deltalab[llm] has"
            )
