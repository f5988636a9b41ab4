"""The data files of the embedded language models: JSON lines of held-out problems."""

import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from experiments.zoo.llm_forms import answer_of, question_of
from experiments.zoo.llm_prefer import Preference
from experiments.zoo.llm_problems import Problem, Step, draw_problem

SIZES = {"test": 250, "objective": 128, "choice": 150, "preferences": 120}
CHOICES = 4
OTHER = {"+": "-", "-": "+", "*": "+", "/": "-"}


def draw_split(split: str, size: int, seed: int) -> list[Problem]:
    """Return so many different problems of a split, the same ones for the same seed."""
    rng = random.Random(f"{seed}:{split}")
    found: dict[str, Problem] = {}
    while len(found) < size:
        problem = draw_problem(rng, split)
        found.setdefault(question_of(problem), problem)
    return list(found.values())


def calculate(left: int, op: str, right: int) -> int | None:
    """Return the whole, positive value of a calculation, or None.

    >>> calculate(7, "/", 2), calculate(3, "*", 4)
    (None, 12)
    """
    if op == "/" and left % right:
        return None
    value = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[op]
    return value if value > 0 else None


def spoilt(problem: Problem, rng: random.Random) -> str | None:
    """Return a wrong answer: one slip or one wrong operation, all later steps following from it."""
    steps, at = list(problem.steps), rng.randrange(len(problem.steps))
    step = steps[at]
    op = OTHER[step.op] if rng.random() < 0.4 else step.op
    value = calculate(step.left, op, step.right)
    if op == step.op and value is not None:
        value += rng.choice((-10, -2, -1, 1, 2, 10))
    if value is None or value <= 0:
        return None
    old, steps[at] = step.value, replace(step, op=op, value=value)
    for i in range(at + 1, len(steps)):
        later, before = steps[i], steps[i - 1].value
        left, right = (before, later.right) if later.left == old else (later.left, before)
        result = calculate(left, later.op, right)
        if result is None:
            return None
        old, steps[i] = later.value, Step(left, later.op, right, result, later.sentence)
    if steps[-1].value == problem.result:
        return None
    return "\n".join([*map(str, steps), f"#### {steps[-1].value}"])


def choice(problem: Problem, rng: random.Random) -> dict[str, Any]:
    """Return a question with four answers of different results, one of them right."""
    answers = {str(problem.result): answer_of(problem)}
    while len(answers) < CHOICES:
        wrong = spoilt(problem, rng)
        if wrong is not None:
            answers.setdefault(wrong.rsplit(" ", 1)[1], wrong)
    right, choices = answer_of(problem), list(answers.values())
    rng.shuffle(choices)
    return {"question": question_of(problem), "choices": choices, "gold": choices.index(right)}


def problem_row(problem: Problem) -> dict[str, Any]:
    """Return a problem as GSM8K's files have it."""
    return {"question": question_of(problem), "answer": answer_of(problem)}


def preference_row(pair: Preference) -> dict[str, Any]:
    """Return a preference with the fields of preference files."""
    row = asdict(pair)
    return {"prompt": row["question"], "chosen": row["chosen"], "rejected": row["rejected"]}


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_problems(out: Path, seed: int) -> None:
    """Write the files that no model is needed for."""
    makers: dict[str, Callable[[Problem, random.Random], dict[str, Any]]] = {
        "test": lambda p, _: problem_row(p),
        "objective": lambda p, _: problem_row(p),
        "choice": choice,
    }
    for split, make in makers.items():
        rng = random.Random(f"{seed}:{split}:rows")
        rows = [make(p, rng) for p in draw_split(split, SIZES[split], seed)]
        write_lines(out / f"{split}.jsonl", rows)
