"""Twenty architectures against `from_pretrained`; `make architectures` holds all of them to it."""

import pytest
import tiny_lm

KINDS = [
    "bloom",
    "cohere",
    "deepseek_v3",
    "falcon",
    "gemma2",
    "gemma3_text",
    "glm4_moe",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "llama",
    "mamba",
    "mixtral",
    "mpt",
    "olmo2",
    "opt",
    "phi3",
    "qwen2_moe",
    "qwen3",
]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_losses_are_those_of_transformers(kind, tmp_path):
    logit, loss, gap = tiny_lm.compared(kind, tmp_path)
    assert logit == 0
    assert loss < 1e-5
    assert gap > 1e-4, "the ends are one model"
