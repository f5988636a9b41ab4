"""Tasks of lm-eval, scored on the live module: no checkpoint is written and no task built twice.

The numbers are those of the `lm_eval` command line on the saved checkpoint, document by document.
"""

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltalab.evaluators.lm import asked, hflm, requests, vllm
from deltalab.evaluators.lm import tasks as lm_tasks
from deltalab.evaluators.scores import Scores
from deltalab.terminal.console import steps
from deltalab.weights.mapping import ModelPair

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LmEval:
    """Tasks of lm-eval on the live module; every metric with its documents and standard error.

    Metrics are named `<task>/<metric>`; of several shot counts `<task>/<n>shot/<metric>`, and of
    tasks with several filters `<metric>_<filter>`, such as `gsm8k/exact_match_strict`. Where a
    metric is the mean of its documents, `<metric>_error` is its standard error.

    Args:
        tasks: a mapping of names to settings (shots, metrics, limit, generation), or names.
        include: directories of further task files.
        limit: the first so many documents of every task only; all when None.
        batch_size: of how many of the longest sequences a forward pass may have the tokens; `auto`
            tries how many the device holds.
        chat: whether prompts are wrapped in the chat template; None: as the model's pair says.
        fewshot_as_multiturn: in the chat template, whether every example is a turn of its own.
        seed: of the choice of examples and of sampling, set anew before each evaluation.
        backend: `hf` scores the live module, `vllm` writes it to a directory and starts vLLM.
        data_dir: a directory that holds the tasks' data, read in place of the hub's.
        run_code: whether tasks may run the code that the model writes (HumanEval).
        run_task_code: whether task files of `include` may run Python that lies beside them.
        max_new_tokens: the most tokens to generate; None: as the task says.
        share: whether the beginnings that prompts share are computed once; scores differ by
            rounding, as they do with another batch size.
    """

    tasks: tuple[Any, ...]
    include: tuple[str, ...] = ()
    limit: int | None = None
    batch_size: int | str = 32
    chat: bool | None = None
    fewshot_as_multiturn: bool = True
    seed: int = 1234
    backend: str = "hf"
    data_dir: str | None = None
    run_code: bool = False
    max_new_tokens: int | None = None
    run_task_code: bool = False
    share: bool = True
    beside: ClassVar = ("run_task_code", "share")
    contents: ClassVar = {"include": "tree", "data_dir": "tree"}
    reads: ClassVar = ("lm_eval", "tokens")

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", asked.asked(self.tasks))
        object.__setattr__(self, "include", tuple(self.include))
        for field in ("limit", "max_new_tokens", "batch_size"):
            value = getattr(self, field)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"evaluator.{field}={value}: must be at least 1")
        if isinstance(self.batch_size, str) and self.batch_size != "auto":
            raise ValueError(f"evaluator.batch_size={self.batch_size}: must be a number or auto")
        if self.backend not in ("hf", "vllm"):
            raise ValueError(f"evaluator.backend={self.backend}: must be hf or vllm")
        for task in self.tasks:
            if task.name.startswith("humaneval") and not self.run_code:
                raise ValueError(asked.refusal(task.name))

    def open(self, pair: ModelPair) -> Callable[[nn.Module], Scores]:
        """Return a function that scores a module of the pair on all tasks.

        Raises:
            ValueError: an unknown task or metric, code that may not be run, a missing package, chat
                template or data set, or no room in the context for what is to be generated.
        """
        asked.check_installed()
        encoder = pair.transform
        chat = encoder.chat if self.chat is None else self.chat
        tokenizer = copy.deepcopy(encoder.tokenizer)  # lm-eval adds a padding token where none is
        if chat and not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"evaluator.chat={self.chat}: the tokenizer has no chat template")
        if self.backend == "vllm":
            live = vllm.launcher(tokenizer, encoder.context, self.batch_size, self.seed)
        else:
            live = hflm.wrapper(
                pair.module, tokenizer, encoder.context, self.batch_size, self.share
            )
        runs = [
            requests.prepare(run, tokenizer if chat else None, self.fewshot_as_multiturn, self.seed)
            for run in lm_tasks.load(self)
        ]
        for line in requests.too_long(runs, tokenizer, encoder.context):
            log.warning(line)
        total = sum(run.answers for run in runs)

        def score(module: nn.Module) -> Scores:
            found: list[Found] = []
            with live(module) as lm, steps("lm-eval", total) as step:
                lm.set_cache_hook(hflm.Ticks(step))
                for run in runs:
                    with lm_tasks.seeded(self.seed):
                        found += collect(run, run.evaluate(lm))
            return scores(found)

        return score


@dataclass(frozen=True, eq=False)
class Found:
    """One metric of one task.

    Attributes:
        name: `<task>/<metric>`.
        value: what lm-eval reports.
        documents: the documents' own values in their order; None where they are no numbers.
    """

    name: str
    value: float
    documents: Tensor | None


def collect(run: requests.Prepared, results: Mapping[str, Any]) -> list[Found]:
    """Return the metrics that were asked for from one result of lm-eval."""
    found = []
    for entry in run.entries:
        reported = {**results["results"], **results.get("groups", {})}[entry.reported]
        names = [n for n in reported if "," in n and "_stderr," not in n]
        metrics = dict(zip(lm_tasks.short(names), names, strict=True))
        wanted = metrics if entry.metrics is None else entry.metrics
        lm_tasks.check_metrics(entry, wanted, metrics)
        for metric in wanted:
            samples = [results["samples"][leaf] for leaf in entry.leaves]
            documents = own_values(samples, *metrics[metric].rsplit(",", 1))
            value = float(reported[metrics[metric]])
            found.append(Found(f"{entry.label}/{metric}", value, documents))
    return found


def own_values(
    samples: Sequence[Sequence[Mapping[str, Any]]], metric: str, chosen: str
) -> Tensor | None:
    """Return one metric of every document after one filter, shape (documents,), if numbers."""
    values = [s.get(metric) for leaf in samples for s in leaf if s["filter"] == chosen]
    try:
        return torch.tensor([float(v) for v in values], dtype=torch.float64)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def scores(found: Sequence[Found]) -> Scores:
    """Return the metrics, and the documents and standard errors of those that are means."""
    metrics, documents = {}, {}
    for one in found:
        metrics[one.name] = one.value
        own = one.documents
        if own is not None and math.isclose(float(own.mean()), one.value, abs_tol=1e-9):
            documents[one.name] = own
            if len(own) > 1:
                metrics[f"{one.name}_error"] = float(own.std() / math.sqrt(len(own)))
    return Scores(metrics, documents=documents)
