"""The tokenizer of the embedded language models: whole words, single digits, bytes for the rest.

A word-level vocabulary with all 256 bytes below it: every word of the generated texts is one
token, any other text is spelt in bytes, so that encoding loses nothing. There is no start token
(as in Qwen's models); ``</s>`` ends every document.
"""

import random
from collections import Counter
from typing import Any

from experiments.zoo.llm_forms import FORMS, answer_of, prompt_of, question_of
from experiments.zoo.llm_problems import SPLITS, draw_problem

PAD, START, END = "<pad>", "<s>", "</s>"
PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DOCUMENTS = 4000
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}Answer: {{ m['content'] }}</s>"
    "{% else %}Question: {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)


def sample_texts(seed: int) -> list[str]:
    """Return texts in which every word of the generator occurs: training split, both formats."""
    rng = random.Random(f"{seed}:vocabulary")
    texts = []
    for form in FORMS:
        texts += [form(draw_problem(rng, "train"), rng) for _ in range(DOCUMENTS // len(FORMS))]
    for _ in range(DOCUMENTS // 4):
        problem = draw_problem(rng, "train")
        texts.append(f"{prompt_of(question_of(problem))} {answer_of(problem)}")
    return texts


def make_tokenizer(seed: int = 0) -> Any:
    """Build the tokenizer (a fast one of transformers) from sample texts."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), behavior="isolated"), byte_level]
    )
    counts: Counter[str] = Counter()
    for text in sample_texts(seed):
        counts.update(piece for piece, _ in pieces.pre_tokenize_str(text))
    words = sorted(word for word in counts if len(word) > 1)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([PAD, START, END, *alphabet, *words])}
    # No merges: with `ignore_merges` a piece is looked up whole, else it falls to its bytes.
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    core.pre_tokenizer = pieces
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    tokenizer.chat_template = CHAT
    return tokenizer


__all__ = ["END", "SPLITS", "make_tokenizer"]
