from itertools import accumulate

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from deltalab.loss.objectives import CrossEntropy
from deltalab.loss.passes import (
    CHUNK,
    checkpointing,
    curvature,
    gradient,
    probing,
    slope,
    slopes,
    targets,
)
from deltalab.loss.quadrature import Rule
from deltalab.loss.riemann import term, terms


class Block(nn.Module):
    """A transformer block whose attention uses the fused kernel, as timm's and HF's do."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        q, k, v = (t.unsqueeze(1) for t in self.attn(self.norm(x)).chunk(3, -1))
        x = x + functional.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self, width=8, depth=3):
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.drop(x).mean(1))


def opened(*sizes):
    torch.manual_seed(1)
    x, y = torch.randn(sum(sizes), 6, 4), torch.randint(5, (sum(sizes),))
    return CrossEntropy(tuple(zip(x.split(sizes), y.split(sizes), strict=True)), most=4)


def made(dtype=torch.float64):
    torch.manual_seed(0)
    module = Transformer().to(dtype)
    post = {n: v.detach().clone() for n, v in module.state_dict().items()}
    shift = {n: 0.2 * torch.randn(v.shape, dtype=dtype) for n, v in post.items()}
    return module, post, shift


def dense(module, shift, loss):
    """Slope and v'Hv by tensor, by double differentiation of the whole mean loss."""
    module.eval()
    names, parameters = zip(*module.named_parameters(), strict=True)
    x, y = (torch.cat(parts) for parts in zip(*loss.batches, strict=True))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        value = functional.cross_entropy(module(x.to(parameters[0].dtype)), y)
        grads = torch.autograd.grad(value, parameters, create_graph=True)
        along = sum((g * shift[n]).sum() for n, g in zip(names, grads, strict=True))
        products = torch.autograd.grad(along, parameters)
    return along.item(), {
        n: (p * shift[n]).sum().item() for n, p in zip(names, products, strict=True)
    }


def test_forward_and_reverse_mode_agree_to_rounding_through_fused_attention():
    for dtype, tolerance in [(torch.float64, 1e-13), (torch.float32, 1e-5)]:
        module, post, shift = made(dtype)
        loss, touched = opened(7, 5), targets(module, shift)
        with probing(module, touched, post):
            reverse = sum(slopes(module, touched, shift, loss).values())
            forward = slope(module, touched, shift, loss)
        assert forward == pytest.approx(reverse, rel=tolerance)
        rules = [Rule("gauss", 3), Rule("left", 2)]
        a = terms(module, post, shift, loss, rules)
        b = terms(module, post, shift, loss, rules, engine="forward")
        for name in a:
            assert b[name].value == pytest.approx(a[name].value, rel=10 * tolerance)
            assert b[name].gradient_evaluations == a[name].gradient_evaluations
            assert (b[name].by_tensor, b[name].error) == (
                {},
                pytest.approx(a[name].error, abs=10 * tolerance),
            )


def test_the_forward_engine_stores_no_activations_and_uses_a_given_gradient():
    module, post, shift = made()
    loss = opened(7)
    first = gradient(module, loss)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        found = term(module, post, shift, loss, Rule("radau", 2), first=first)
        assert saved
        saved.clear()
        forward = terms(
            module, post, shift, loss, [Rule("radau", 2)], first=first, engine="forward"
        )["radau"]
        assert not saved
    assert forward.gradient_evaluations == 1
    assert forward.value == pytest.approx(found.value, rel=1e-12)


def test_a_partial_shift_in_forward_mode():
    module, post, shift = made()
    some = {n: shift[n] for n in ("blocks.1.attn.weight", "head.bias")}
    a, b = (
        terms(module, post, some, opened(6), [Rule("midpoint", 1)], engine=engine)["midpoint"]
        for engine in ("reverse", "forward")
    )
    assert a.value == pytest.approx(b.value, rel=1e-12)


def test_curvature_is_the_dense_one_tensor_by_tensor_and_batch_by_batch():
    module, post, shift = made()
    loss = opened(7, 1, 4)
    touched = targets(module, shift)
    with probing(module, touched, post):
        found = curvature(module, touched, shift, loss)
    along, expected = dense(made()[0], shift, loss)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    with probing(module, touched, post):  # and it is the slope's derivative along the shift
        assert slope(module, touched, shift, loss) == pytest.approx(along, rel=1e-12)
    h = 1e-4
    ends = [
        terms(module, {n: post[n] + t * shift[n] for n in post}, shift, loss, [Rule("left", 1)])
        for t in (-h, h)
    ]
    numeric = (ends[1]["left"].value - ends[0]["left"].value) / (2 * h)
    assert sum(found.values()) == pytest.approx(numeric, rel=1e-6)


def test_checkpointing_changes_memory_and_nothing_else():
    module, post, shift = made()
    loss, peaks, values = opened(6, 6), [], []
    for checkpoint in (False, True):
        live = []

        def pack(tensor, live=live):
            live.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            found = terms(module, post, shift, loss, [Rule("gauss", 2)], checkpoint=checkpoint)[
                "gauss"
            ]
        peaks.append(sum(live))
        values.append(found.by_tensor)
    assert values[0] == values[1]
    assert peaks[1] < peaks[0] / 2
    assert all("forward" not in part.__dict__ for part in module.modules())
    assert all(torch.equal(v, post[n]) for n, v in module.state_dict().items())


def test_checkpointing_recomputes_every_block_once():
    module = made()[0].eval()
    calls = []
    for block in module.blocks:
        block.norm.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    with checkpointing(module):
        value = module(x).sum()
        assert len(calls) == 3
        value.backward()
    assert len(calls) == 6


def peak_bytes(function):
    """Return the most bytes allocated at a time above those held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(size for _, size in changes))


def test_one_copy_of_the_largest_tensor_above_model_and_shift():
    width = 1024
    module = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(5)))
    post = {n: p.detach().clone() for n, p in module.named_parameters()}
    shift = {n: 0.01 * torch.randn_like(p) for n, p in post.items()}
    loss = CrossEntropy(((torch.randn(2, width), torch.zeros(2).long()),), most=0)
    largest = 4 * width**2

    def whole():
        loss(module, loss.batches[0])[0].sum().backward()
        module.zero_grad()

    def walk(engine):
        return lambda: terms(module, post, shift, loss, [Rule("gauss", 2)], engine=engine)

    assert peak_bytes(whole) > 4.9 * largest
    assert peak_bytes(walk("reverse")) < largest + 16 * CHUNK + 200_000
    assert peak_bytes(walk("forward")) < largest + 200_000
