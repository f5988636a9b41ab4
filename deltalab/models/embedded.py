"""Which files of the package the embedded models and images are."""

from importlib.resources import files
from pathlib import Path

ZOO = Path(str(files("deltalab"))) / "zoo"
SUBSETS = tuple(f"subset_{index}" for index in range(5))
"""The experts of one base that were trained on two classes each."""
SEQUENCE = tuple(f"sequence_{index}" for index in range(1, 5))
"""What sequential fine-tuning makes of the same tasks: each was trained from the one before it, the
first from `subset_0`; their base is that of the experts, where the run began."""
VIT = {
    **{"mnist": "pre", "mnist_early": "pre", "fashion": "pre", "digits": "digits_pre"},
    **dict.fromkeys((*SUBSETS, *SEQUENCE), "subset_pre"),
}
"""What every post-trained vision transformer was trained from."""
SAFETY = ("safety_mixed", "safety_unaligned", "safety_benign", "safety_lora")
"""Fine-tunes of the aligned model."""
LLM = {
    **{"sft": "base", "far": "base", "dpo": "sft", "small_sft": "small_base"},
    **dict.fromkeys(("small_counts", "small_groups", "small_compares"), "small_base"),
    **dict.fromkeys(SAFETY, "safety_aligned"),
}
"""What every post-trained language model was trained from."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def vit(post: str) -> list[Path]:
    """Return the files of a pair of vision transformers: pre, post, architecture.

    >>> [file.name for file in vit("fashion")]
    ['pre.safetensors', 'fashion.safetensors', 'vit.json']
    """
    return [ZOO / f"{name}.safetensors" for name in (VIT[post], post)] + [ZOO / vit_config(post)]


def vit_config(post: str) -> str:
    """Return the name of the file that describes a vision transformer's architecture."""
    return "subset.json" if post in (*SUBSETS, *SEQUENCE) else "vit.json"


def llm(post: str) -> list[Path]:
    """Return the files of a pair of language models: pre, post, architecture, tokenizer."""
    weights = [f"{name}.safetensors" for name in (LLM[post], post)]
    return [ZOO / "llm" / name for name in (*weights, llm_config(post), *TOKENIZER)]


def llm_config(model: str) -> str:
    """Return the name of the file that describes a language model's architecture."""
    kind = next((k for k in ("small_", "safety_") if model.startswith(k)), "")
    return f"{kind}config.json"


def images(task: str) -> Path:
    """Return the file of a task's images."""
    return ZOO / f"{task}.npz"
