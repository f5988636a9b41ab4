"""Preference pairs from a model's own answers: those that end in the right number, and the others.

Every problem is answered some times; each right answer is paired with a wrong one. Answers are cut
behind their number, as GSM8K's end. Problems that were answered are kept in `out.partial`, one a
line, so that a killed run goes on; each has its own seed, so that it goes on to the same pairs.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deltalab.data.rows import Row, read
from deltalab.data.text import Problems
from experiments.posttrain.state import digest

NUMBER = re.compile(r"####\s*(-?[\d.,]*\d)")


@dataclass(frozen=True)
class Sampling:
    """Everything that determines the pairs.

    Attributes:
        model: directory or hub id of the model that answers.
        data: file of problems, with question and answer.
        limit: the first so many problems; all when None.
        count: answers to every problem.
        temperature: of the sampling, above 0.
        tokens: most tokens of an answer.
        worked: whether the file's own answer is the right one where no sample is.
        seed: of the sampling.
    """

    model: str
    data: str
    limit: int | None = None
    count: int = 8
    temperature: float = 0.8
    tokens: int = 256
    worked: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("count", "tokens", "temperature", "limit"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} {value}: must be above 0")


def number(answer: str) -> str | None:
    """Return the number that an answer ends in, or None.

    >>> number("so 3 * 400 #### 1,200"), number("no idea")
    ('1200', None)
    """
    found = NUMBER.search(answer)
    return found[1].replace(",", "") if found else None


def cut(answer: str) -> str:
    r"""Return an answer without what follows its number.

    >>> cut("it is\n#### 3\nQuestion: and")
    'it is\n#### 3'
    """
    found = NUMBER.search(answer)
    return answer[: found.end()].strip() if found else answer.strip()


def pairs(answers: list[str], right: str, worked: str | None) -> list[tuple[str, str]]:
    """Pair each right answer with a wrong one, every one used once.

    Args:
        answers: sampled answers.
        right: the number that is right.
        worked: the answer to take as right where no sample is, if any.

    >>> pairs(["#### 3", "#### 4", "#### 3", "#### 5", "none"], "3", None)
    [('#### 3', '#### 4'), ('#### 3', '#### 5')]
    >>> pairs(["#### 4"], "3", "1+2 #### 3"), pairs(["#### 3"], "3", None)
    ([('1+2 #### 3', '#### 4')], [])
    """
    good = [a for a in answers if number(a) == right] or ([worked] if worked else [])
    return list(zip(good, [a for a in answers if number(a) not in (right, None)], strict=False))


def answered(spec: Sampling, device: str) -> Callable[[int, Row], list[dict[str, str]]]:
    """Load the model; return what makes a problem's pairs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(spec.model)
    model: Any = AutoModelForCausalLM.from_pretrained(spec.model).to(device).eval()
    template = Problems(spec.data).template

    @torch.no_grad()
    def answer(place: int, row: Row) -> list[dict[str, str]]:
        prompt = template.replace("{question}", row.text("question", "question"))
        worked = row.text("answer", "answer")
        tokens = tokenizer(prompt, return_tensors="pt").to(device)
        torch.manual_seed(spec.seed * 1_000_003 + place)
        output = model.generate(
            **{name: tokens[name] for name in ("input_ids", "attention_mask")},
            do_sample=True,
            temperature=spec.temperature,
            num_return_sequences=spec.count,
            max_new_tokens=spec.tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
        new = output[:, tokens["input_ids"].shape[1] :]
        found = [cut(text) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
        made = pairs(found, number(worked) or "", worked if spec.worked else None)
        return [{"prompt": prompt, "chosen": a, "rejected": b} for a, b in made]

    return answer


def sample(
    spec: Sampling, out: Path, device: str = "cpu", say: Callable[[str], None] = print
) -> int:
    """Write the pairs, or go on with them; return how many there are.

    Raises:
        ValueError: `out` is there already, or was begun with other settings; no pair was found.
    """
    if out.exists():
        raise ValueError(f"--out {out}: is there already; name another file")
    part = out.with_name(out.name + ".partial")
    head = json.dumps({**asdict(spec), "sha256": digest(spec.data)})
    done = _finished(part, head)
    rows = read(spec.data, limit=spec.limit)
    answer = answered(spec, device)
    with part.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in (head, *done))
        for place in range(len(done), len(rows)):
            done.append(json.dumps(answer(place, rows[place])))
            file.write(done[-1] + "\n")
            file.flush()
            say(f"problem {place + 1}/{len(rows)}: {len(json.loads(done[-1]))} pairs")
    found = [pair for line in done for pair in json.loads(line)]
    if not found:
        raise ValueError(f"no problem of {spec.data} was answered both right and wrong")
    whole = out.with_name(out.name + ".whole")
    whole.write_text("".join(json.dumps(p) + "\n" for p in found), encoding="utf-8")
    os.replace(whole, out)
    part.unlink()
    return len(found)


def _finished(part: Path, head: str) -> list[str]:
    """Return the lines of the problems that were answered before; a half-written one is dropped."""
    if not part.is_file():
        return []
    lines = part.read_text(encoding="utf-8").split("\n")[:-1]
    if lines and lines[0] != head:
        raise ValueError(f"{part}: begun with other settings or data; remove it")
    return lines[1:]
