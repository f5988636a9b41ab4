"""Generated arithmetic word problems and their splits, for the embedded language models.

A problem is a start (somebody has things, in boxes or not, or buys them at a price) and up to three
events, each of which changes a number. Its *template* is that sequence, for instance ``have+-``;
an *instance* is a template with its numbers. Splits are decided by hashes alone:

* an instance belongs to one split, so no instance of training is in any other split;
* held-out splits take their (name, object) pairs from an eighth that training never sees;
* whole templates in ``UNSEEN`` occur in no training text at all: a second, harder split.
"""

import hashlib
import random
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = {
    "She": _words("Ava Mia Zoe Lily Emma Nora Ruth Clara Iris Maya Sara Jane Ella Lucy Anna Rosa"),
    "He": _words("Ben Tom Leo Max Sam Noah Liam Jack Adam Omar Paul Eric Hugo Ivan Luke Carl"),
}
OBJECTS = _words(
    "apples pens books stamps cards shells coins marbles stickers cookies pears plums eggs cups "
    "plates toys balls stones flowers seeds nuts beads keys hats socks ribbons bricks tickets "
    "candles pencils buttons lemons"
)
BOXES = (("boxes", "box"), ("bags", "bag"), ("jars", "jar"), ("baskets", "basket"))
TEMPLATES = _words(
    "have+ have- have++ have+- have-+ have-- have+d haved- haved+ haveh+ have+h have-h have+s "
    "have-s have++- have+-- have-+- have--+ boxes boxes+ boxes- boxes+- boxes-- boxes-+ boxess "
    "boxesh days days+ days- days-- pair pair+ pair- pair-- pairs more moret fewer fewert times "
    "timest price pricec"
)
UNSEEN = frozenset(_words("have-+ haved- boxes+- days- pairs timest"))
SPLITS = ("train", "validation", "test", "objective", "choice", "preferences", "unseen")
LARGEST = 120  # of all numbers
PLUS = (
    "{p} bought {k} more {o}.",
    "{p} found {k} more {o}.",
    "{p} picked up {k} more {o}.",
    "{p} won {k} more {o}.",
    "Then {p} got {k} more {o} from {x}.",
    "After that {p} made {k} more {o}.",
)
MINUS = (
    "{p} gave {k} {o} to {x}.",
    "{p} lost {k} {o}.",
    "{p} sold {k} {o}.",
    "{p} threw away {k} {o}.",
    "Then {x} took {k} of the {o}.",
    "After that {p} dropped {k} {o}.",
)
HAVE = (
    "{n} had {a} {o}.",
    "In the morning {n} had {a} {o}.",
    "{n} started with {a} {o}.",
    "At first {n} had {a} {o}.",
)


@dataclass(frozen=True)
class Step:
    """One calculation ``left op right = value`` and the sentence around it (at ``{}``)."""

    left: int
    op: str
    right: int
    value: int
    sentence: str

    @property
    def equation(self) -> str:
        """Return for instance ``12 + 7 = 19``."""
        return f"{self.left} {self.op} {self.right} = {self.value}"

    def __str__(self) -> str:
        """Return the sentence with its equation."""
        return self.sentence.format(self.equation)


@dataclass(frozen=True)
class Problem:
    """A word problem: events as (fact, step or None), what is asked, and the result."""

    template: str
    numbers: tuple[int, ...]
    name: str
    thing: str
    events: tuple[tuple[str, Step | None], ...]
    question: str
    wonder: str
    conclusion: str

    @property
    def facts(self) -> list[str]:
        """Return the story's sentences."""
        return [fact for fact, _ in self.events]

    @property
    def steps(self) -> list[Step]:
        """Return the calculations in order."""
        return [step for _, step in self.events if step is not None]

    @property
    def result(self) -> int:
        """Return the last calculation's value."""
        return self.steps[-1].value


def digest(*parts: object) -> int:
    """Return a 64-bit hash of the parts' text, the same on every machine."""
    text = "|".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(template: str, numbers: tuple[int, ...]) -> str:
    """Return the one split that an instance belongs to.

    >>> split_of("timest", (3, 4))
    'unseen'
    """
    if template in UNSEEN:
        return "unseen"
    shares = ("validation",) * 2 + ("test",) * 2 + ("objective", "choice", "preferences")
    bucket = digest(template, numbers) % 32
    return shares[bucket] if bucket < len(shares) else "train"


def is_held_pair(name: str, thing: str) -> bool:
    """Return whether a (name, object) pair is kept from training: an eighth of them is."""
    return digest(name, thing) % 8 == 0


class Story:
    """A problem being told: the running number, its events so far and every number drawn."""

    def __init__(self, rng: random.Random, name: str, she: str, other: str, thing: str):
        self.rng, self.she, self.thing = rng, she, thing
        self.words = {"n": name, "x": other, "o": thing, "one": thing[:-1]}
        self.who = name
        self.events: list[tuple[str, Step | None]] = []
        self.numbers: list[int] = []
        self.value = 0

    def draw(self, least: int, most: int) -> int:
        """Draw a number that belongs to the instance."""
        self.numbers.append(self.rng.randint(least, most))
        return self.numbers[-1]

    def tell(self, fact: str, step: tuple[int, str, int] | None = None, said: str = "") -> None:
        """Add an event; a step becomes the running number."""
        if step is None:
            self.events.append((fact, None))
            return
        left, op, right = step
        value = {"+": left + right, "-": left - right, "*": left * right}.get(op)
        self.value = left // right if value is None else value
        self.events.append((fact, Step(left, op, right, self.value, said)))

    def say(self, text: str, **more: object) -> str:
        """Fill a sentence's slots."""
        return text.format(**self.words, **more)


def start(story: Story, kind: str) -> None:
    """Tell how a story of some kind begins."""
    rng, say = story.rng, story.say
    if kind == "have":
        story.value = story.draw(3, 60)
        story.tell(say(rng.choice(HAVE), a=story.value))
    elif kind == "boxes":
        a, b = story.draw(2, 9), story.draw(2, 12)
        boxes, box = rng.choice(BOXES)
        fact = say(
            "{n} had {a} {boxes} with {b} {o} in each {box}.", a=a, b=b, boxes=boxes, box=box
        )
        story.tell(fact, (a, "*", b), say("{n} had {{}} {o}."))
    elif kind == "days":
        a, b = story.draw(2, 9), story.draw(2, 12)
        verb = rng.choice(("found", "made", "bought"))
        fact = say("{n} {verb} {b} {o} a day for {a} days.", verb=verb, a=a, b=b)
        story.tell(fact, (a, "*", b), say("{n} had {{}} {o}."))
    elif kind == "pair":
        a, b = story.draw(2, 50), story.draw(2, 50)
        fact = say("{n} had {a} {o} and {x} had {b} {o}.", a=a, b=b)
        story.tell(
            fact + say(" They put all the {o} together."), (a, "+", b), say("They had {{}} {o}.")
        )
        story.who = story.she = "They"
    elif kind in ("more", "fewer", "times"):
        a, b = story.draw(5, 50), story.draw(2, 30)
        if kind == "times":
            a, b = story.numbers[-2:] = a % 12 + 2, b % 8 + 2
        story.tell(say("{n} had {a} {o}.", a=a))
        many = f"{b} times as many" if kind == "times" else f"{b} {kind}"
        than = "as" if kind == "times" else "than"
        op = {"more": "+", "fewer": "-", "times": "*"}[kind]
        fact = say("{x} had {many} {o} {than} {n}.", many=many, than=than)
        story.tell(fact, (a, op, b), say("{x} had {{}} {o}."))
        story.who = story.words["x"]
    else:
        a, b = story.draw(2, 12), story.draw(2, 9)
        story.tell(say("One {one} cost {a} coins.", a=a))
        story.tell(say("{n} bought {b} {o}.", b=b), (a, "*", b), say("The {o} cost {{}} coins."))


def go_on(story: Story, op: str) -> None:
    """Tell one more event."""
    rng, say, x, she = story.rng, story.say, story.value, story.she
    he = rng.choice((she, story.who))
    if op == "+":
        k = story.draw(2, 40)
        fact = say(rng.choice(PLUS), p="{p}", k=k)
        said = f"{story.who} had {{}} {story.thing}."
        story.tell(person(fact, he), (x, "+", k), said)
    elif op == "-":
        k = story.draw(2, 40)
        fact = say(rng.choice(MINUS), p="{p}", k=k)
        story.tell(person(fact, he), (x, "-", k), f"{story.who} had {{}} {story.thing} left.")
    elif op == "d":
        fact = say("Then the number of {o} doubled.")
        story.tell(fact, (x, "*", 2), f"{story.who} had {{}} {story.thing}.")
    elif op == "h":
        fact = person(say("{p} gave half of the {o} to {x}.", p="{p}"), he)
        story.tell(fact, (x, "/", 2), f"{story.who} had {{}} {story.thing} left.")
    elif op == "s":
        k = story.draw(2, 9)
        fact = person(say("{p} shared the {o} among {k} friends.", p="{p}", k=k), he)
        story.tell(fact, (x, "/", k), f"Each friend got {{}} {story.thing}.")
    elif op == "t":
        first = story.numbers[0]
        fact = f"They put all the {story.thing} together."
        story.tell(fact, (first, "+", x), f"They had {{}} {story.thing}.")
    else:
        c = story.draw(2, LARGEST)
        story.tell(
            say("{n} paid with {c} coins.", c=c), (c, "-", x), say("{n} got {{}} coins back.")
        )


def person(fact: str, who: str) -> str:
    """Put the acting person in; a pronoun is small inside a sentence."""
    small = who.lower() if who in ("She", "He", "They") else who
    return fact.replace("{p}", who if fact.startswith("{p}") else small)


def asked(story: Story, template: str) -> tuple[str, str, str]:
    """Return what is asked: as a question, as a clause, and the conclusion up to its number."""
    o = story.thing
    if template == "price":
        n = story.words["n"]
        return f"How many coins did {n} pay?", f"how many coins {n} paid", f"{n} paid {{}} coins"
    if template == "pricec":
        n = story.words["n"]
        question = f"How many coins did {n} get back?"
        return question, f"how many coins {n} got back", f"{n} got {{}} coins back"
    if template.endswith("s") and template[:-1] in ("have+", "have-", "boxes", "pair"):
        question = f"How many {o} did each friend get?"
        return question, f"how many {o} each friend got", f"each friend got {{}} {o}"
    who = "they" if template.endswith("t") or story.who == "They" else story.who
    end = story.rng.choice(("then", "in the end"))
    question = f"How many {o} did {who} have {end}?"
    return question, f"how many {o} {who} had {end}", f"{who} had {{}} {o} {end}"


def draw_problem(rng: random.Random, split: str) -> Problem:
    """Draw a problem of a split.

    >>> p = draw_problem(random.Random(0), "train")
    >>> split_of(p.template, p.numbers), p.result == p.steps[-1].value
    ('train', True)
    """
    while True:
        template = rng.choice(TEMPLATES)
        if (template in UNSEEN) != (split == "unseen"):
            continue
        she = rng.choice(tuple(NAMES))
        name, thing = rng.choice(NAMES[she]), rng.choice(OBJECTS)
        other = rng.choice([n for names in NAMES.values() for n in names if n != name])
        if is_held_pair(name, thing) != (split != "train"):
            continue
        if split == "train" and is_held_pair(other, thing):
            continue
        if template.startswith("price") and thing == "coins":
            continue
        kind = next(k for k in KINDS if template.startswith(k))
        for _ in range(200):  # numbers that fit, of the split
            state = rng.getstate()
            story = Story(rng, name, she, other, thing)
            start(story, kind)
            for op in template.removeprefix(kind):
                go_on(story, op)
            numbers = tuple(story.numbers)
            if fits(story) and split_of(template, numbers) == split:
                question, wonder, conclusion = asked(story, template)
                events = tuple(story.events)
                return Problem(template, numbers, name, thing, events, question, wonder, conclusion)
            assert rng.getstate() != state


KINDS = ("have", "boxes", "days", "pair", "more", "fewer", "times", "price")


def fits(story: Story) -> bool:
    """Return whether all results are whole numbers from 1 to ``LARGEST``, divisions exact."""
    steps = [step for _, step in story.events if step is not None]
    return all(
        1 <= s.value <= LARGEST and (s.op != "/" or s.value * s.right == s.left) for s in steps
    )
