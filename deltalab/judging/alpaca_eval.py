"""AlpacaEval: outputs to instructions, judged against a reference's outputs."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from deltalab.data.text import Encoder
from deltalab.evaluators.scores import Scores
from deltalab.judging import annotations, difficulties, generation, references
from deltalab.judging.comparisons import Comparison
from deltalab.judging.decoding import Decoding
from deltalab.judging.difficulties import Array, Difficulty
from deltalab.judging.generation import Output
from deltalab.judging.judges import Endpoint, Likelihood, LocalJudge
from deltalab.judging.kept import write_json
from deltalab.judging.prompts import Prompts
from deltalab.judging.references import Reference
from deltalab.store.digests import key_of
from deltalab.weights.mapping import ModelPair

log = logging.getLogger(__name__)
NAME = "alpaca_eval"


@dataclass(frozen=True)
class AlpacaEval:
    """Win rate of a model's outputs against a reference's, raw and length-controlled.

    Outputs, verdicts and annotations are kept below `cache_dir` as they come, addressed by what
    determines them: a killed point goes on where it stopped, and no two models mix.

    Args:
        reference: reference outputs in AlpacaEval's format, `.json` or `.json.gz`.
        judge: what compares two outputs.
        cache_dir: where all is kept; `outputs/` and `annotations/` hold AlpacaEval's JSON files.
        limit: the first so many instructions only.
        batch_size: prompts generated at once; decides nothing beyond rounding.
        max_new_tokens: of an output.
        temperature: 0 takes the likeliest token.
        top_p: of the likeliest tokens with this much probability; 1 leaves all.
        seed: of the draws.
        chat: wrap instructions in the tokenizer's chat template; None does as the pair does.
        prompt: a text with `{instruction}`.
        instruction_difficulty: AlpacaEval's `df_gamed.csv`, or a CSV with the columns `index` and
            `instruction_difficulty`, for the length-controlled win rate; None leaves its term out.
    """

    reference: str
    judge: Endpoint | LocalJudge | Likelihood
    cache_dir: str
    limit: int | None = None
    batch_size: int = 16
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    chat: bool | None = None
    prompt: str = "{instruction}"
    instruction_difficulty: str | None = None
    beside: ClassVar[tuple[str, ...]] = ("cache_dir",)
    contents: ClassVar = {"reference": "file", "instruction_difficulty": "file"}

    def __post_init__(self) -> None:
        for name, value in (("limit", self.limit), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"evaluator.{name}={value}: must be at least 1")
        if not isinstance(self.judge, Endpoint | LocalJudge | Likelihood):
            raise ValueError(
                f"evaluator.judge={self.judge}: must be one of evaluator/judge=endpoint, local,"
                " likelihood"
            )
        _ = self._decoding, self._prompts  # checks their settings

    @property
    def _decoding(self) -> Decoding:
        return Decoding(self.max_new_tokens, self.temperature, self.top_p, self.seed)

    @property
    def _prompts(self) -> Prompts:
        return Prompts(self.prompt, self.chat)

    def open(self, pair: ModelPair) -> Callable[[nn.Module], Scores]:
        """Return a function that generates, judges and scores.

        Raises:
            ValueError: the reference, the difficulties, the judge or the chat template do not
                serve.
            OSError: a file cannot be read.
        """
        encoder = pair.transform
        if not isinstance(encoder, Encoder):
            raise ValueError("evaluator=alpaca_eval: needs a language model, as model=tiny_llm")
        rows = references.read(self.reference)[: self.limit]
        difficulty = self._difficulty(len(rows))
        prompts = self._prompts
        prompts.check(encoder)
        ids = [prompts.ids(encoder, row.instruction) for row in rows]
        root = Path(self.cache_dir).expanduser()
        judge = self.judge.open(pair, prompts, root)

        def score(module: nn.Module) -> Scores:
            state = generation.digest(module)
            said = generation.outputs(
                module, encoder, ids, self._decoding, self.batch_size, root / "generations", state
            )
            point = f"{state}-{key_of({'of': repr(self._decoding), 'prompts': ids})[:8]}"
            write_json(root / "outputs" / f"{point}.json", _exported(rows, said, point))
            pairs = [
                Comparison(row.instruction, one.text, row.output)
                for row, one in zip(rows, said, strict=True)
            ]
            preferences = judge(module, pairs)
            name = f"{point}-{key_of({'judge': repr(self.judge)})[:8]}"
            annotated = _annotated(rows, said, preferences, point, type(self.judge).__name__)
            write_json(root / "annotations" / f"{name}.json", annotated)
            return scores(rows, said, preferences, difficulty)

        return score

    def _difficulty(self, count: int) -> Difficulty | None:
        if self.instruction_difficulty is None:
            return None
        setting = "evaluator.instruction_difficulty"
        found = difficulties.read(self.instruction_difficulty, setting)
        where = f"{setting}={self.instruction_difficulty}"
        difficulties.check(found, range(count), where)
        return found


def scores(
    rows: Sequence[Reference],
    said: Sequence[Output],
    preferences: Array,
    difficulty: Difficulty | None,
) -> Scores:
    """Return the metrics of judged outputs.

    `win_rate` and `length_controlled_win_rate` are fractions with `..._error`s; `..._spread` is
    what the leaderboard calls the latter's standard error. `mean_length` counts characters,
    `unfinished` is the fraction of outputs that were cut, `judged` and `missing` count
    instructions with and without a verdict. The document scores are the preferences, NaN where
    there is none.
    """
    lengths = np.array([len(one.text) for one in said], np.float64)
    reference = np.array([len(row.output) for row in rows], np.float64)
    value, error = annotations.win_rate(preferences)
    controlled = annotations.length_controlled(preferences, lengths, reference, difficulty)
    if difficulty is None:
        log.info("length-controlled without the difficulty term: no instruction_difficulty given")
    missing = int(np.isnan(preferences).sum())
    if missing:
        log.warning("%d of %d instructions have no verdict", missing, len(rows))
    found = {
        "win_rate": value,
        "win_rate_error": error,
        "length_controlled_win_rate": controlled[0],
        "length_controlled_win_rate_error": controlled[1],
        "length_controlled_win_rate_spread": controlled[2],
        "mean_length": float(lengths.mean()),
        "unfinished": float(np.mean([not one.ended for one in said])),
        "judged": float(len(rows) - missing),
        "missing": float(missing),
    }
    documents = {f"{NAME}/preference": torch.from_numpy(preferences.copy())}
    return Scores({f"{NAME}/{k}": v for k, v in found.items()}, documents=documents)


def _exported(rows: Sequence[Reference], said: Sequence[Output], point: str) -> list[Any]:
    """Return outputs in AlpacaEval's format."""
    return [
        {
            "dataset": row.dataset,
            "instruction": row.instruction,
            "output": one.text,
            "generator": f"deltalab-{point}",
        }
        for row, one in zip(rows, said, strict=True)
    ]


def _annotated(
    rows: Sequence[Reference], said: Sequence[Output], preferences: Array, point: str, judge: str
) -> list[Any]:
    """Return annotations in AlpacaEval's format: preferences from 1, the reference's, to 2."""
    return [
        {
            "instruction": row.instruction,
            "output_1": row.output,
            "generator_1": row.generator,
            "output_2": one.text,
            "generator_2": f"deltalab-{point}",
            "dataset": row.dataset,
            "annotator": judge,
            "preference": None if np.isnan(preference) else 1.0 + float(preference),
        }
        for row, one, preference in zip(rows, said, preferences, strict=True)
    ]
