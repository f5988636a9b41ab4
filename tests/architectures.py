"""Every causal language model that transformers makes tiny from a configuration, held against it.

    python tests/architectures.py FILE.md

Writes for each `model_type` whether both ends of a pair have the logits and losses of
`from_pretrained`, or why there was nothing to compare.
"""

import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1"
)

import tiny_lm
import torch

NOT_MADE = "no tiny model made"


def row(kind):
    """Return the outcome of one architecture, and what there is to say of it."""
    try:
        tiny_lm.model(kind)
    except Exception as error:
        return NOT_MADE, line(error)
    try:
        with tempfile.TemporaryDirectory() as place:
            logit, loss, gap = tiny_lm.compared(kind, Path(place))
    except ValueError as error:
        return "refused", line(error)
    except Exception as error:
        return "failed", f"{type(error).__name__}: {line(error)}"
    if not gap:
        return "failed", "both ends have one loss"
    if logit == 0 and loss < 1e-5:
        return "equal", ""
    return (
        "equal" if logit < 1e-5 and loss < 1e-5 else "different"
    ), f"logits by {logit:.1e}, losses by {loss:.1e}"


def line(error):
    text = " ".join((str(error) or type(error).__name__).split()).replace("|", "/")
    return text[:160]


def main(out):
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KINDS

    found = {}
    for kind in sorted(KINDS):
        found[kind] = row(kind)
        print(kind, *found[kind], flush=True)
    equal = [kind for kind, (outcome, said) in found.items() if outcome == "equal" and not said]
    rest = {kind: each for kind, each in found.items() if kind not in equal}
    lines = [
        "# Architectures, held against `from_pretrained`",
        "",
        "`make architectures`: of every `model_type` for which transformers"
        f" {transformers.__version__} has a causal language model,",
        "a pair of tiny random models was written by `save_pretrained` and opened by `model=hf_llm`"
        " in float32; logits and",
        "losses of both ends were compared with those of `from_pretrained` on the same directories."
        " Twenty of them are in the test suite.",
        "",
        f"**Equal to the bit: {len(equal)} of {len(found)}.** {', '.join(equal)}.",
        "",
        "| the others | outcome | |",
        "|---|---|---|",
        *(f"| {kind} | {outcome} | {said} |" for kind, (outcome, said) in rest.items()),
    ]
    Path(out).write_text("\n".join(lines) + "\n")
    return sum(outcome in ("different", "failed") for outcome, _ in found.values())


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sys.exit(main(sys.argv[1]))
