"""The tokenizer of a pair: opened without running code, compared with the pre-trained model's."""

from pathlib import Path
from typing import Any

from deltalab.weights.headers import plain

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def has_tokenizer(path: Path) -> bool:
    """Whether a directory holds a tokenizer's vocabulary."""
    return any((path / name).is_file() for name in FILES)


def opened(path: Path, setting: str, code: bool = False) -> Any:
    """Return the tokenizer in a directory.

    Args:
        path: the directory.
        setting: the setting that names it, for messages.
        code: whether Python code in the directory may be run.

    Raises:
        FileNotFoundError: no tokenizer there.
        ValueError: one that cannot be read.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(path):
        raise FileNotFoundError(
            f"{setting}={path}: no tokenizer there; name a directory or hub id with model.tokenizer"
        )
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=code)
    except Exception as error:  # a tokenizer's files are read by code that raises what it likes
        own = "it has code of its own, not run unless model.trust_remote_code=true"
        reason = own if "trust_remote_code" in str(error) else _line(error)
    raise ValueError(f"{setting}={path}: the tokenizer is not readable ({reason})")


def check_same(pre: Any, post: Any) -> None:
    """Check that a token means the same to both models; further tokens on either side are fine.

    Raises:
        ValueError: naming the first token whose number differs.
    """
    old, new = pre.get_vocab(), post.get_vocab()
    if old == new:
        return
    moved = [token for token in old if token in new and old[token] != new[token]]
    if moved:
        token = min(moved, key=old.__getitem__)
        raise ValueError(
            f"the tokenizers of model.pre and model.post differ: token {plain(token[:40])!r} is"
            f" {old[token]} in one and {new[token]} in the other"
        )
    extra = {*pre.get_added_vocab(), *post.get_added_vocab()}  # reserved tokens are often renamed
    of = {number: token for token, number in old.items()}
    for token, number in sorted(new.items(), key=lambda item: item[1]):
        other = of.get(number, token)
        if other != token and other not in extra and token not in extra:
            raise ValueError(
                f"the tokenizers of model.pre and model.post differ: {number} is token"
                f" {plain(other[:40])!r} in one and {plain(token[:40])!r} in the other"
            )


def beyond(tokenizer: Any, rows: int) -> str | None:
    """Return the line to warn with where the tokenizer has tokens that the model has not."""
    too_many = [t for t, number in tokenizer.get_vocab().items() if number >= rows]
    if not too_many:
        return None
    return (
        f"the tokenizer has {len(too_many)} tokens beyond the model's {rows} rows, such as"
        f" {plain(too_many[0][:40])!r}: text that holds one cannot be evaluated"
    )


def context_of(config: Any, tokenizer: Any, asked: int | None) -> int:
    """Return the most tokens that a sequence may have.

    Args:
        config: the model's configuration.
        tokenizer: its tokenizer.
        asked: the number that the user asks for, or None.

    Raises:
        ValueError: more than the model has positions for, or unknown and not given.
    """
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    positions = next((n for name in names if (n := getattr(config, name, None))), None)
    if asked is not None:
        if positions and asked > positions:
            raise ValueError(f"model.context={asked}: the model has {positions} positions")
        return asked
    longest = tokenizer.model_max_length
    known = [int(n) for n in (positions, longest) if n and n < 10**9]
    if not known:
        raise ValueError("model.context=null: neither model nor tokenizer says it; give a number")
    return min(known)


def _line(error: Exception) -> str:
    return plain(" ".join((str(error) or type(error).__name__).split())[:300])
