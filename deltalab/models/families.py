"""Several experts of one base: whether they fit each other, and look as if they were of it."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

from deltalab.linear.delta import difference
from deltalab.weights import contents
from deltalab.weights.mapping import ModelPair, Weights, meta

log = logging.getLogger(__name__)
STRANGE = 0.9
"""|W_expert - W_base| / |W_base| from which an expert looks like another base's: two models that
were trained apart come to 1.4."""


def check_base(pre: Path, posts: Mapping[str, Path]) -> None:
    """Refuse experts that are known to have been made from another base.

    Args:
        pre: the base's checkpoint.
        posts: the experts', by name.

    Raises:
        ValueError: their `deltalab.json` names the digest of another one.
    """
    wrong = []
    for name, post in posts.items():
        known = contents.made_from(post)
        if known is not None and known != contents.of_checkpoint(pre):
            wrong.append(name)
    if wrong:
        raise ValueError(
            f"model.experts: {', '.join(wrong)}: made from another base than {pre}, by the digest"
            f" in {posts[wrong[0]] / contents.MANIFEST}"
        )


def check_family(pairs: Mapping[str, ModelPair]) -> None:
    """Check that experts fit each other; warn of one that looks like another base's.

    Raises:
        ValueError: experts whose tensors differ in name or shape, all named, with the first
            difference.
    """
    (first, lead), *others = pairs.items()
    strangers = {name: text for name, pair in others if (text := _unlike(lead.post, pair.post))}
    if strangers:
        names, text = ", ".join(strangers), next(iter(strangers.values()))
        raise ValueError(f"model.experts: {names} cannot be merged with {first}: {text}")
    for name, pair in pairs.items():
        _warn(f"model.experts.{name}", pair)


def peers(pair: ModelPair, others: Mapping[str, ModelPair]) -> dict[str, Weights]:
    """Return the weights of further models of a pair's base; warn of one that looks like another's.

    Raises:
        ValueError: one whose tensors differ in name or shape, with the first difference.
    """
    for name, other in others.items():
        if text := _unlike(pair.post, other.post):
            raise ValueError(f"peers.{name}: of another base: {text}")
        _warn(f"peers.{name}", other)
    return {name: other.post for name, other in others.items()}


def _warn(setting: str, pair: ModelPair) -> None:
    if (share := distance(pair)) > STRANGE:
        log.warning("%s: |delta| is %.2f of |W|; is it of another base?", setting, share)


def _unlike(one: Weights, other: Weights) -> str:
    """Return the first difference of two models' tensors, empty where there is none."""
    for name in (*one, *other):
        if name not in one or name not in other:
            return f"tensor {name!r} is in one of the two only"
        shapes = meta(one, name).shape, meta(other, name).shape
        if shapes[0] != shapes[1]:
            return f"tensor {name!r} has shape {shapes[0]} there, {shapes[1]} here"
    return ""


def distance(pair: ModelPair) -> float:
    """Return |W_post - W_pre| / |W_pre| over all matrices; 0 where there is nothing."""
    moved = whole = 0.0
    for name in pair.post:
        about = meta(pair.post, name)
        if about.floating and len(about.shape) > 1:
            moved += float(difference(pair.pre[name], pair.post[name]).double().square().sum())
            whole += float(pair.pre[name].double().square().sum())
    return math.sqrt(moved / whole) if whole else 0.0
