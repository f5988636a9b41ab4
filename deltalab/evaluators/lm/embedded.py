"""What the task files of `deltalab/tasks` name: the embedded pair's data and GSM8K's own scoring.

The files work with the `lm_eval` command line as well, given `--include_path`.
"""

from pathlib import Path
from typing import Any

from deltalab.evaluators.lm.data import raw, read

ZOO = Path(__file__).parents[2] / "zoo" / "llm"


def problems(**_: Any) -> Any:
    """Return the held-out word problems: `question`, `answer` ending in `#### N`."""
    return _data("test.jsonl")


def counts(**_: Any) -> Any:
    """Return the held-out word problems of running counts."""
    return _data("counts_test.jsonl")


def groups(**_: Any) -> Any:
    """Return the held-out word problems of groups of equal size."""
    return _data("groups_test.jsonl")


def compares(**_: Any) -> Any:
    """Return the held-out word problems of comparisons and prices."""
    return _data("compares_test.jsonl")


def choices(**_: Any) -> Any:
    """Return questions with several choices: `question`, `choices`, `gold` (an index)."""
    return _data("choice.jsonl")


def _data(name: str) -> Any:
    import datasets

    return datasets.DatasetDict(test=datasets.Dataset.from_list(read(ZOO / name)))


def answer_loss(doc: Any, results: Any) -> dict[str, float]:
    """Return an answer's loss in nats, and whether greedy decoding would have given it."""
    ((log_likelihood, greedy),) = results
    return {"nats": -log_likelihood, "acc": float(greedy)}


def __getattr__(name: str) -> Any:
    """Return a list of lm-eval's own `gsm8k.yaml`: a change there is a change here."""
    keys = {"gsm8k_metrics": "metric_list", "gsm8k_filters": "filter_list"}
    if name not in keys:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import lm_eval

    return raw(Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml")[keys[name]]
