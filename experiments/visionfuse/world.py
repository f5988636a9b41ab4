"""The small world of the multimodal models: what is asked, in which words, and what is right."""

import random
from collections.abc import Sequence
from typing import Any

GARMENTS = (
    "tshirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
PRICES = (3, 7, 0, 5, 9, 2, 6, 1, 8, 4)
"""Of every garment, so that none can be told by how rare its totals are."""
SHOES = ("sandal", "sneaker", "boot")
TASKS = ("mnist", "fashion")
ENCODERS = {
    "digits": {"vit": "mnist", "task": "mnist"},
    "clothes": {"vit": "fashion", "task": "fashion"},
    "general": {"vit": "pre", "task": "fashion"},
}
"""Every encoder sees one part of the picture; the third sees garments, and less well."""
SEES = {"digits": "digit", "clothes": "garment", "general": "garment"}
BOTH = ("total", "match")
"""Questions that need both parts."""


def answer(question: str, digit: int, garment: int) -> str:
    """Return the right answer.

    >>> answer("total", 4, 1), answer("match", 4, 5), answer("match", 3, 5)
    ('11', 'yes', 'no')
    """
    if question == "digit":
        return str(digit)
    if question == "garment":
        return GARMENTS[garment]
    if question == "total":
        return str(digit + PRICES[garment])
    return "yes" if (digit % 2 == 0) == (GARMENTS[garment] in SHOES) else "no"


QUESTIONS = ("digit", "garment", *BOTH)


def prompt(question: str) -> str:
    """Return a question in words."""
    return f"{question} ?"


def words() -> list[str]:
    """Return the vocabulary."""
    numbers = [str(n) for n in range(9 + max(PRICES) + 1)]
    return ["<pad>", "</s>", "?", "yes", "no", "is", *QUESTIONS, *numbers, *GARMENTS]


def told(digit: int | None, garment: int | None) -> list[str]:
    """Return what is known in words."""
    facts = [] if digit is None else [f"digit is {digit}"]
    return facts + ([] if garment is None else [f"garment is {GARMENTS[garment]}"])


def drawn(rng: random.Random) -> tuple[str, str]:
    """Draw facts with a question about them, and its answer."""
    question = rng.choice(QUESTIONS)
    digit, garment = rng.randrange(10), rng.randrange(10)
    needed = (question != "garment", question != "digit")
    known = [need or rng.random() < 0.5 for need in needed]
    facts = told(digit if known[0] else None, garment if known[1] else None)
    rng.shuffle(facts)
    return " ".join([*facts, prompt(question)]), answer(question, digit, garment)


def table() -> dict[str, Any]:
    """Return the world as models of `deltalab.visionfuse` hold it."""

    def rows(question: str) -> Sequence[Sequence[str]]:
        return [[answer(question, d, g) for g in range(10)] for d in range(10)]

    asked = {q: {"prompt": prompt(q), "answers": rows(q)} for q in QUESTIONS}
    return {"tasks": TASKS, "encoders": ENCODERS, "questions": asked}
