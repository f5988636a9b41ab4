"""How a problem is written: as question and answer, and in the other forms of base training."""

import random

from experiments.zoo.llm_problems import Problem, draw_problem

FORBIDDEN = ("Question", "Answer", "#")  # in no text of base training


def question_of(problem: Problem) -> str:
    """Return the story with its question."""
    return " ".join([*problem.facts, problem.question])


def answer_of(problem: Problem) -> str:
    """Return the steps, one a line, and the last line ``#### N`` as in GSM8K."""
    return "\n".join([*map(str, problem.steps), f"#### {problem.result}"])


def prompt_of(question: str) -> str:
    """Return the prompt that is used everywhere."""
    return f"Question: {question}\nAnswer:"


def ended(problem: Problem) -> str:
    """Return the conclusion as a clause."""
    return problem.conclusion.format(problem.result)


def told_along(problem: Problem, rng: random.Random) -> str:
    """A tale in which every event is followed at once by its calculation."""
    parts = []
    for fact, step in problem.events:
        parts.append(fact)
        if step is not None:
            parts.append(str(step) if rng.random() < 0.7 else f"That makes {step.equation}.")
    return " ".join(parts)


def told_after(problem: Problem, rng: random.Random) -> str:
    """A tale whose calculations follow at the end, with the result in words."""
    steps = [str(s) if rng.random() < 0.7 else f"{s.equation}." for s in problem.steps]
    return " ".join([*problem.facts, *steps, f"So {ended(problem)}."])


def wondered(problem: Problem, rng: random.Random) -> str:
    """A tale in which somebody wants to know and works it out, line by line."""
    asks = rng.choice(("We want to know", "Somebody wants to know", "Let us find out"))
    told, worked_out = wondered_parts(problem, asks)
    return told + worked_out


def wondered_parts(problem: Problem, asks: str = "We want to know") -> tuple[str, str]:
    """Return what is told and what is worked out; base is scored by how it goes on."""
    told = " ".join([*problem.facts, f"{asks} {problem.wonder}.\n"])
    steps = "\n".join(map(str, problem.steps))
    return told, f"{steps}\nSo {ended(problem)}."


def spoken(problem: Problem, rng: random.Random) -> str:
    """A dialogue of a teacher who tells and a pupil who calculates along."""
    lines = []
    for fact, step in problem.events:
        lines.append(f"Teacher: {fact}")
        if step is not None:
            lines.append(f"Pupil: {step}")
    last = f"Teacher: {problem.question}"
    return "\n".join([*lines, last, f"Pupil: {problem.result}, {ended(problem)}."])


def listed(problem: Problem, rng: random.Random) -> str:
    """A list of notes: the events, then the calculations."""
    notes = [f"- {fact}" for fact in problem.facts]
    return "\n".join(["Notes:", *notes, "Sums:", *(f"- {s.equation}" for s in problem.steps)])


def drawn_equation(rng: random.Random) -> str:
    """Return one calculation with numbers as large as the problems have them."""
    op = rng.choice("++--*/")
    if op in "+-":
        a, b = rng.randint(1, 60 if rng.random() < 0.5 else 110), rng.randint(1, 60)
        if op == "+":
            return f"{a} + {b} = {a + b}"
        return f"{max(a, b)} - {min(a, b)} = {abs(a - b)}"
    a, b = rng.randint(1, 12), rng.randint(2, 12)
    if rng.random() < 0.2:
        a, b = rng.randint(1, 60), 2
    return f"{a} * {b} = {a * b}" if op == "*" else f"{a * b} / {b} = {a}"


def equations(problem: Problem, rng: random.Random) -> str:
    """Bare equations, unrelated to any story, one a line."""
    return "\n".join(drawn_equation(rng) for _ in range(rng.randint(5, 9)))


FORMS = {
    told_along: 3,
    told_after: 3,
    wondered: 3,
    spoken: 2,
    listed: 1,
    equations: 2,
}


def base_text(rng: random.Random) -> str:
    """Return one document of base training: no question-and-answer format in it."""
    problem = draw_problem(rng, "train")
    form = rng.choices(list(FORMS), list(FORMS.values()))[0]
    return form(problem, rng)
