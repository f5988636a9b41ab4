"""Statistics of layers against float64 references, in bounded memory, from any kind of model."""

from functools import partial

import numpy as np
import pytest
import timm
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from deltalab.artifacts import Store
from deltalab.calibration import collecting
from deltalab.calibration.providing import Calibration, check
from deltalab.data import splits
from deltalab.loss.answers import AnswerLoss
from deltalab.loss.objectives import CrossEntropy
from deltalab.weights.mapping import LazyWeights, ModelPair, meta


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6)) for _ in range(3)
        )
        self.head = nn.Linear(6, 4)

    def forward(self, images):
        rows = self.stem(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            rows = rows + block(rows)
        return self.head(rows.mean(1))


def images(count: int = 10, cut: int = 4) -> CrossEntropy:
    x, y = drawn(count, 1, 6, 6), torch.arange(count) % 4
    return CrossEntropy(tuple(zip(x.split(cut), y.split(cut), strict=True)), most=3)


def pair_of(module: nn.Module) -> ModelPair:
    post = {n: t.detach().clone() for n, t in module.state_dict().items()}
    pre = {n: t + 0.3 * drawn(*t.shape, seed=5).to(t.dtype) for n, t in post.items()}
    return ModelPair(pre, post, module.eval())


@pytest.fixture
def pair() -> ModelPair:
    torch.manual_seed(0)
    return pair_of(Blocks())


def inputs_of(module: nn.Module, name: str, batches) -> np.ndarray:
    """Return what a layer is given, in one list, by a hook of our own."""
    seen = []
    layer = module.get_submodule(name.removesuffix(".weight"))
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    with torch.no_grad():
        for x, _ in batches:
            module(x)
    handle.remove()
    return torch.cat(seen).double().numpy()


@pytest.mark.parametrize("cut", [1, 4, 10])
def test_grams_of_linear_layers_and_convolutions(pair: ModelPair, cut: int) -> None:
    loss = images(cut=cut)
    found = collecting.grams(pair.module, loss, [*collecting.layers(pair.module)])
    assert len(found) == 8
    for name in ("blocks.1.2.weight", "head.weight"):
        rows = inputs_of(pair.module, name, loss.batches)
        rows = rows.reshape(-1, rows.shape[-1])
        assert np.allclose(found[name].numpy(), rows.T @ rows / len(rows), atol=1e-6)
    x = np.pad(
        torch.cat([x for x, _ in loss.batches]).double().numpy(), [(0, 0)] * 2 + [(1, 1)] * 2
    )
    patches = [x[:, :, i : i + 3, j : j + 3] for i in (0, 2, 4) for j in (0, 2, 4)]
    rows = np.stack(patches).reshape(-1, 9)
    assert np.allclose(found["stem.weight"].numpy(), rows.T @ rows / len(rows), atol=1e-6)
    kept = pair.module.stem.weight.flatten(1).double().detach().numpy()
    out = rows @ kept.T  # what the gram is good for: the layer's outputs, without its bias
    own = np.trace(kept @ found["stem.weight"].double().numpy() @ kept.T)
    assert own == pytest.approx((out**2).sum(1).mean(), rel=1e-5)


@pytest.mark.parametrize("cut", [1, 4])
def test_fisher_is_the_mean_of_squared_gradients_of_examples(pair: ModelPair, cut: int) -> None:
    loss = images(cut=cut)
    names = ["head.weight", "blocks.0.0.bias"]
    found = collecting.fisher(pair.module, loss, names)
    squares = dict.fromkeys(names, 0.0)
    for x, y in images(cut=1).batches:
        pair.module.zero_grad()
        nn.functional.cross_entropy(pair.module(x), y).backward()
        for name in names:
            squares[name] += pair.module.get_parameter(name).grad.double().square() / 10
    pair.module.zero_grad(set_to_none=True)
    for name in names:
        assert torch.allclose(found[name].double(), squares[name], rtol=1e-4, atol=1e-9)
    assert all(p.grad is None for p in pair.module.parameters())


def test_statistics_are_of_half_a_and_of_the_model_named(pair: ModelPair) -> None:
    loss = images()
    half = splits.halved(loss, "A")
    for model in ("post", "pre"):
        module = Blocks().eval()
        module.load_state_dict(getattr(pair, model))
        own = Calibration(pair, loss, Store(None, {}), model=model).providers()
        for name in ("stem.weight", "blocks.2.0.weight"):
            assert torch.equal(own["gram"](name, {}), collecting.grams(module, half, [name])[name])
            wanted = collecting.fisher(module, half, [name])[name]
            assert torch.allclose(own["fisher"](name, {}), wanted, rtol=1e-5, atol=1e-12)
        assert own["gram"]("head.bias", {}) is None
        assert own["acts"]("head.weight", {}).shape == (6,)
        held = pair.module.state_dict()
        assert all(torch.equal(held[n], t) for n, t in pair.post.items())


def test_squared_gradients_can_be_of_a_model_and_data_of_their_own(pair: ModelPair) -> None:
    task, safety = images(), images(6)
    other = Calibration(pair, safety, Store(None, {}), model="pre")
    both = Calibration(pair, task, Store(None, {}), apart=other).providers()
    for name, need, own in (
        ("head.weight", "fisher", other),
        ("head.weight", "gram", Calibration(pair, task, Store(None, {}))),
    ):
        assert torch.equal(both[need](name, {}), own.providers()[need](name, {}))


def test_memory_is_bounded_and_what_was_collected_is_kept(pair, tmp_path, monkeypatch) -> None:
    passes = []
    for what in ("grams", "fisher"):
        made = partial(lambda f, *a: passes.append(a[2]) or f(*a), getattr(collecting, what))
        monkeypatch.setattr(collecting, what, made)
    loss, store = images(), Store(tmp_path / "kept", {"pair": "own"})
    whole = Calibration(pair, loss, Store(None, {})).providers()
    small = Calibration(pair, loss, store, limit=600)
    for need in ("gram", "fisher"):
        passes.clear()
        wanted = {name: whole[need](name, {}) for name in pair.post}
        assert len(passes) == 1
        passes.clear()
        for name in pair.post:
            found = small.providers()[need](name, {})
            assert (found is None) == (wanted[name] is None)
            assert found is None or torch.equal(found, wanted[name])
            held = small._held.get(need, (0, {}))[1].values()
            assert len(held) <= 1 or sum(4 * t.numel() for t in held) <= 600
        layers = [name for group in passes for name in group]
        assert len(passes) > 2, "some layers at a time"
        assert len(layers) == len(set(layers)), "each once"
    passes.clear()
    again = Calibration(pair, loss, store, limit=600).providers()
    for name in pair.post:
        again["gram"](name, {})
        again["fisher"](name, {})
    assert not passes, "read from the store"
    other = Calibration(pair, loss, store, about={"calibration": "other data"}, limit=600)
    other.providers()["gram"]("head.weight", {})
    assert passes


@pytest.mark.parametrize("side", ["post", "pre"])
def test_sequentially_a_block_sees_those_before_it_edited(pair: ModelPair, side: str) -> None:
    loss, seen, base = images(), {}, getattr(pair, side)
    own = Calibration(pair, loss, Store(None, {}), model=side, sequential=True)

    def load(name: str) -> torch.Tensor:
        seen[name] = own.gram(name)
        return pair.post[name] + 1.0

    names = sorted(pair.post, reverse=True)  # files list tensors in any order
    made = own.in_order(LazyWeights(names, load, partial(meta, pair.post)))
    assert list(made) == names
    assert all(torch.equal(made[n], pair.post[n] + 1.0) for n in names)
    held = pair.module.state_dict()
    assert all(torch.equal(held[n], t) for n, t in pair.post.items()), "the module is as it was"
    half = splits.halved(loss, "A")
    for index in range(3):
        module = Blocks().eval()
        edited = {
            n: pair.post[n] + 1.0
            if n.startswith(("stem", *(f"blocks.{i}." for i in range(index))))
            else t
            for n, t in base.items()
        }  # fmt: skip
        module.load_state_dict(edited)
        for name in (f"blocks.{index}.0.weight", f"blocks.{index}.2.weight"):
            wanted = collecting.grams(module, half, [name])[name]
            assert torch.allclose(seen[name], wanted, rtol=1e-5), name
    plain = Calibration(pair, loss, Store(None, {}), model=side).gram("blocks.2.0.weight")
    assert not torch.allclose(seen["blocks.2.0.weight"], plain, rtol=1e-3)


def test_any_causal_model_and_any_vit(tmp_path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    llama = pair_of(LlamaForCausalLM(config))
    ids = torch.randint(0, 32, (6, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[:, 7:] = 0
    text = AnswerLoss(((ids, mask, ids.masked_fill(mask == 0, -100)),))
    own = Calibration(llama, text, Store(None, {})).providers()
    grams = {n: own["gram"](n, {}) for n in llama.post}
    matrices = [n for n, t in llama.post.items() if t.ndim == 2 and "embed" not in n]
    assert [n for n, g in grams.items() if g is not None] == matrices
    cut = ids[:, :7]  # what is padding has no say
    short = AnswerLoss(((cut, torch.ones_like(cut), cut),))
    apart = Calibration(llama, short, Store(None, {})).providers()
    for name in matrices:
        assert torch.allclose(grams[name], apart["gram"](name, {}), rtol=1e-4, atol=1e-6), name
    assert own["fisher"]("model.embed_tokens.weight", {}).shape == (32, 16)

    vit = pair_of(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=4))
    x = drawn(4, 3, 32, 32)
    loss = CrossEntropy(((x, torch.arange(4)),), most=3)
    own = Calibration(vit, loss, Store(None, {})).providers()
    for name, tensor in vit.post.items():
        gram = own["gram"](name, {})
        layer = tensor.ndim in (2, 4) and name.endswith("weight")
        assert (gram is not None) == layer, name
        assert gram is None or gram.shape == 2 * (tensor[0].numel(),)
    assert own["fisher"]("blocks.0.attn.qkv.weight", {}).min() >= 0


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"model": "base"}, "calibration.model=base: must be one of post, pre"),
        ({"sequential": 1}, "calibration.sequential=1: must be true or false"),
        ({"fisher": {"model": "base"}}, "calibration.fisher.model=base: must be one of post, pre"),
    ],
)
def test_mistakes_are_told(given: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check(given)


def test_a_layer_stored_in_out_has_the_gram_of_its_inputs() -> None:
    """GPT-2's `Conv1D`: the weight is (in, out), and X has as many columns as it has rows."""
    from transformers.pytorch_utils import Conv1D

    module = torch.nn.Sequential(Conv1D(3, 5))
    assert collecting.width(collecting.layers(module)["0.weight"]) == 5
