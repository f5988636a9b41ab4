"""The requests of lm-eval's tasks: built once for a pair, asked again of every edit."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import Any

from deltalab.evaluators.lm.code import templates
from deltalab.evaluators.lm.hflm import quiet
from deltalab.evaluators.lm.tasks import LENGTHS, Entry, Run, seeded

_DEFAULT_NEW_TOKENS = 256  # what lm-eval generates where a task does not say


@dataclass(frozen=True, eq=False)
class Prepared:
    """A run with its requests, which every evaluation of a pair asks again.

    Attributes:
        run: the tasks.
        requests: each task's requests.
    """

    run: Run
    requests: Mapping[str, list[Any]]

    @property
    def entries(self) -> list[Entry]:
        """What to report."""
        return self.run.entries

    @property
    def answers(self) -> int:
        """How many answers an evaluation asks the model for."""
        return sum(r.repeats or 1 for requests in self.requests.values() for r in requests)

    def evaluate(self, lm: Any) -> Mapping[str, Any]:
        """Return lm-eval's results of a language model, with every document."""
        from lm_eval.evaluator import evaluate

        for name, task in self.run.tasks.items():
            for request in self.requests[name]:
                request.resps, request.filtered_resps = [], {}
            task._instances = self.requests[name]
            task.build_all_requests = lambda **_: None
        groups = self.run.groups
        tasks = {"tasks": self.run.tasks, "groups": groups}
        tasks["group_map"] = {name: group.child_names for name, group in groups.items()}
        with templates():
            results: Mapping[str, Any] = evaluate(
                lm=lm,
                task_dict=tasks,
                limit=self.run.limit,
                bootstrap_iters=0,
                log_samples=True,
                confirm_run_unsafe_code=True,  # `load` has refused what may not be run
            )
        return results


def prepare(run: Run, template: Any, multiturn: bool, seed: int) -> Prepared:
    """Build the requests of a run.

    Args:
        run: the tasks.
        template: the tokenizer whose chat template wraps the prompts; None for none.
        multiturn: in the template, whether every example is a turn of its own.
        seed: of the choice of examples.
    """
    requests = {}
    with quiet(), redirect_stderr(StringIO()), seeded(seed), templates():
        for name, task in run.tasks.items():
            task.set_fewshot_seed(seed)
            type(task).build_all_requests(
                task,
                limit=run.limit,
                apply_chat_template=template is not None,
                fewshot_as_multiturn=multiturn and template is not None,
                chat_template=chat(template) if template is not None else None,
            )
            requests[name] = list(task.instances)
    return Prepared(run, requests)


def chat(tokenizer: Any) -> Callable[..., str]:
    """Return what renders a conversation; without its system turn where the template has none."""

    def render(turns: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        settings = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        settings["continue_final_message"] = not add_generation_prompt
        from jinja2.exceptions import TemplateError

        try:
            text: str = tokenizer.apply_chat_template(turns, **settings)
        except TemplateError:
            turns = [turn for turn in turns if turn["role"] != "system"]
            text = tokenizer.apply_chat_template(turns, **settings)
        return text

    return render


def too_long(runs: Sequence[Prepared], tokenizer: Any, context: int) -> list[str]:
    """Return a line for every task of which lm-eval would silently cut prompts.

    Raises:
        ValueError: the context cannot hold what is to be generated.
    """
    lines = []
    for run in runs:
        for name, requests in run.requests.items():
            cut, room = 0, math.inf
            for request in requests:
                text, room = _text_and_room(name, request, context)
                if len(text.encode()) >= room:  # a token has at least one byte
                    with quiet():
                        cut += len(tokenizer.encode(text)) > room
            if cut:
                lines.append(
                    f"{name}: {cut} of {len(requests)} prompts are longer than the {room:.0f}"
                    f" tokens that the context of {context} leaves; their beginnings are cut off"
                )
    return lines


def _text_and_room(name: str, request: Any, context: int) -> tuple[str, float]:
    """Return what a request feeds to the model, and how many tokens of it the model sees."""
    if request.request_type == "loglikelihood":
        return "".join(request.args), context + 1  # the last token is only predicted
    if request.request_type != "generate_until":
        return "", math.inf  # long texts are scored in windows
    text, settings = request.args
    length = next((settings[k] for k in LENGTHS if settings.get(k)), _DEFAULT_NEW_TOKENS)
    if length >= context:
        raise ValueError(
            f"{name}: {length} tokens are to be generated and the context holds {context};"
            " set evaluator.max_new_tokens lower"
        )
    return text, context - length
