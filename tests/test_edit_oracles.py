"""The edits against independent implementations: PEFT, mergekit, NumPy.

PEFT and mergekit come with the optional group `oracles`; without them those tests are skipped.
"""

import os

import numpy as np
import pytest
import torch
from torch import Tensor

from deltalab.apply.editing import edited_tensor
from deltalab.edits.dare import Dare
from deltalab.edits.drop_only import DropOnly
from deltalab.edits.expo import Expo
from deltalab.edits.ties import Ties
from deltalab.edits.twin import Twin
from deltalab.linear.factor import svd
from deltalab.rng import Rng

os.environ.setdefault("HF_HUB_OFFLINE", "1")
SHAPES = {"a.weight": (64, 32), "b.weight": (48, 40), "b.bias": (100,)}


def optional(module: str):
    return pytest.importorskip(module, reason=f"{module} comes with the optional group `oracles`")


def tensor(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pair() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    pre = {n: tensor(s, i) for i, (n, s) in enumerate(SHAPES.items())}
    post = {n: t + 0.1 * tensor(tuple(t.shape), 7) for n, t in pre.items()}
    return pre, post


def ours(pair, edit, **needs) -> dict[str, Tensor]:
    pre, post = pair
    return {n: edited_tensor(pre[n], post[n], edit, **needs) for n in pre}


@pytest.fixture(scope="module")
def merged(pair):
    methods = optional("mergekit.merge_methods")
    pre, post = pair

    def run(method: str, **parameters):
        models = {"base": dict(pre), "post": dict(post)}
        return methods.merge_state_dicts(models, method, base="base", parameters=parameters)

    return run


@pytest.mark.parametrize("keep", [0.1, 0.2, 0.5, 0.9])
def test_ties_is_mergekits(pair, merged, keep: float) -> None:
    theirs = merged("ties", weight=1.0, density=keep, normalize=False)
    got = ours(pair, Ties(keep=keep, scope="tensor"), quantile=None)
    for name in SHAPES:
        assert torch.equal(got[name] == pair[0][name], theirs[name] == pair[0][name])
        assert torch.allclose(got[name], theirs[name], atol=1e-6)


@pytest.mark.parametrize("alpha", [-0.5, 0.3, 1.0])
def test_expo_is_mergekits_task_arithmetic(pair, merged, alpha: float) -> None:
    theirs = merged("task_arithmetic", weight=1.0, normalize=False, **{"lambda": 1 + alpha})
    for name, got in ours(pair, Expo(alpha=alpha)).items():
        assert torch.allclose(got, theirs[name], atol=1e-6)


def test_drop_only_drops_as_often_as_mergekit_and_changes_nothing_else(pair, merged) -> None:
    """Other random numbers, so the count is compared; kept and dropped values are exact."""
    theirs = merged("dare_linear", weight=1.0, density=0.5, rescale=False, normalize=False)
    got = ours(pair, DropOnly(p=0.5), rng=Rng(0, "w"))
    for found in (theirs, got):
        for name, t in found.items():
            dropped = torch.isclose(t, pair[0][name], rtol=0, atol=1e-7)
            kept = torch.isclose(t, pair[1][name], rtol=0, atol=1e-6)
            assert (dropped | kept).all()
            n = t.numel()
            assert abs(dropped.sum().item() - 0.5 * n) < 4 * (0.25 * n) ** 0.5


@pytest.mark.parametrize("keep", [0.1, 0.29, 0.5])
def test_ties_is_pefts_magnitude_pruning(pair, keep: float) -> None:
    prune = optional("peft.utils.merge_utils").prune
    for name in SHAPES:
        delta = pair[1][name] - pair[0][name]
        count = int(keep * delta.numel())
        got = Ties(keep=count / delta.numel(), scope="tensor")(delta, quantile=None)
        assert torch.equal(got, prune(delta.clone(), count / delta.numel(), "magnitude"))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dare_rescales_as_peft_does(p: float) -> None:
    """The same two values and, within 4 sigma, the same share of each."""
    prune = optional("peft.utils.merge_utils").prune
    delta = torch.ones(100_000)
    theirs = prune(delta.clone(), density=1 - p, method="random", rescale=True)
    got = Dare(p=p, k=0.0)(delta, rng=Rng(0, "w"))
    assert torch.allclose(got.unique(), theirs.unique(), rtol=1e-6)
    for found in (got, theirs):
        rate = (found == 0).double().mean().item()
        assert abs(rate - p) < 4 * (p * (1 - p) / 1e5) ** 0.5


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (70, 70)], ids=str)
@pytest.mark.parametrize("rank", [1, 5, 40])
def test_twin_is_numpys_truncated_svd(shape: tuple[int, int], rank: int) -> None:
    delta = tensor(shape, 3)
    u, s, vh = np.linalg.svd(delta.double().numpy(), full_matrices=False)
    expected = torch.from_numpy((u[:, :rank] * s[:rank]) @ vh[:rank])
    got = Twin(rank=rank, rate=None)(delta, svd=lambda: svd(delta)).double()
    assert (got - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])
def test_the_factorisation_holds_on_badly_conditioned_deltas(decay: float) -> None:
    """Singular values falling over up to ten orders of magnitude, and exact zeros."""
    u, _ = torch.linalg.qr(tensor((80, 60), 1).double())
    v, _ = torch.linalg.qr(tensor((100, 60), 2).double())
    s = 10 ** (-decay * torch.arange(60) / 20).double()
    delta = ((u * s) @ v.T).float()
    for rank in (1, 10, 30, 59):
        exact_u, exact_s, exact_v = np.linalg.svd(delta.double().numpy(), full_matrices=False)
        expected = torch.from_numpy((exact_u[:, :rank] * exact_s[:rank]) @ exact_v[:rank])
        got = Twin(rank=rank, rate=None)(delta, svd=lambda: svd(delta)).double()
        best = np.sqrt((exact_s[rank:] ** 2).sum())
        error = (got - delta.double()).norm().item()
        assert error <= best * (1 + 1e-4) + 1e-6 * exact_s[0]
        if decay:  # with distinct singular values the truncation itself is unique
            assert (got - expected).norm() / expected.norm() < 1e-4
