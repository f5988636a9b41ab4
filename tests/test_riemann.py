import json
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.nn import functional

from deltalab.loss.passes import gradient, inner
from deltalab.loss.quadrature import RULES, Rule
from deltalab.loss.riemann import Riemann, term, terms


@dataclass
class Examples:
    """A loss given by a function of the module and rows of examples."""

    function: object
    batches: list
    unit: str = "nats per example"
    calls: list = field(default_factory=list)

    def __call__(self, module, batch):
        losses = self.function(module, batch)
        self.calls.append(len(losses))
        return losses, torch.ones_like(losses)


class Vector(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ParameterList([torch.randn(n, dtype=torch.float64) for n in sizes])

    def forward(self):
        return torch.cat(list(self.parts))


class Net(nn.Module):
    """A small network whose first and last matrices are tied, with dropout to be switched off."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(6, 6, dtype=dtype)
        self.norm = nn.LayerNorm(6, dtype=dtype)
        self.attn = nn.Linear(6, 6, dtype=dtype)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 6, dtype=dtype)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.norm(torch.tanh(self.embed(x)))
        return self.head(self.drop(x + torch.tanh(self.attn(x))))


def cross_entropy(module, batch):
    x, y = batch
    logits = module(x.to(module.norm.weight.dtype))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(logits, y, reduction="none")


def rows(*sizes):
    torch.manual_seed(1)
    x, y = torch.randn(sum(sizes), 6, dtype=torch.float64), torch.randint(6, (sum(sizes),))
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def state(module):
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def random_shift(post, scale=0.3, dtype=torch.float64):
    torch.manual_seed(2)
    shift = {n: scale * torch.randn(v.shape, dtype=dtype) for n, v in post.items()}
    if "head.weight" in shift:
        shift["head.weight"] = shift["embed.weight"]
    return shift


def mean_loss(module, loss, weights):
    with torch.no_grad():
        for name, value in module.state_dict().items():
            value.copy_(weights[name])
    module.eval()
    return torch.cat([loss.function(module, b) for b in loss.batches]).mean()


def dense(module, loss, post, shift, rule):
    """The term by plain autograd of the mean over one batch of everything."""
    total = 0.0
    for node, weight in zip(rule.nodes, rule.weights, strict=True):
        value = mean_loss(module, loss, {n: post[n] + node * shift[n] for n in post})
        grads = torch.autograd.grad(value, list(module.parameters()))
        names = [n for n, _ in module.named_parameters()]
        total += weight * sum(
            (g * shift[n]).sum().item() for n, g in zip(names, grads, strict=True)
        )
    return total


def quadratic():
    torch.manual_seed(3)
    root = torch.randn(7, 7, dtype=torch.float64)
    slope, hessian = torch.randn(7, dtype=torch.float64), root @ root.T - 2 * torch.eye(7)

    def function(module, batch):
        w = module()
        return (slope @ w + w @ hessian @ w / 2) * batch

    module = Vector(3, 4)
    return module, Examples(function, [torch.tensor([0.5, 1.5]).double()]), slope, hessian


def test_quadratic_loss_left_is_short_by_the_curvature_and_midpoint_is_exact():
    module, loss, slope, hessian = quadratic()
    post = state(module)
    shift = random_shift(post)
    w, e = module().detach(), torch.cat(list(shift.values()))
    true = (slope @ e + w @ hessian @ e + e @ hessian @ e / 2).item()
    curvature = (e @ hessian @ e).item()
    for points in (1, 2, 5, 11):
        left = term(module, post, shift, loss, Rule("left", points)).value
        assert left == pytest.approx(true - curvature / (2 * points), abs=1e-11)
        exact = term(module, post, shift, loss, Rule("midpoint", points)).value
        assert exact == pytest.approx(true, abs=1e-11)
    assert term(module, post, shift, loss, Rule("trapezoid", 2)).value == pytest.approx(true)


@pytest.mark.parametrize(
    ("name", "points", "degree"),  # a loss of degree d has slopes of degree d - 1
    [("midpoint", 3, 2), ("trapezoid", 4, 2), ("simpson", 3, 4), ("gauss", 2, 4), ("radau", 3, 5)],
)
def test_exactness_on_polynomial_losses(name, points, degree):
    for power, exact in [(degree, True), (degree + 1, False)]:
        module = Vector(2, 3)
        loss = Examples(lambda m, b, n=power: (m() ** n).sum() * b, [torch.ones(1).double()])
        post = state(module)
        shift = random_shift(post, 0.7)
        before, after = module().detach(), module().detach() + torch.cat(list(shift.values()))
        true = ((after**power) - (before**power)).sum().item()
        error = abs(term(module, post, shift, loss, Rule(name, points)).value - true)
        assert error < 1e-12 if exact else error > 1e-6


def test_agrees_with_dense_autograd_and_counts_tied_parameters_once():
    module = Net()
    post, loss = state(module), Examples(cross_entropy, rows(20))
    shift = random_shift(post)
    rules = [Rule(n, 3) for n in RULES]
    found = terms(module, post, shift, loss, rules)
    for rule in rules:
        assert found[rule.name].value == pytest.approx(
            dense(Net(), loss, post, shift, rule), abs=1e-10
        )
    assert "head.weight" not in found["left"].by_tensor
    assert "embed.weight" in found["left"].by_tensor


def test_many_nodes_converge_to_the_loss_change():
    module = Net()
    post, loss = state(module), Examples(cross_entropy, rows(20))
    shift = random_shift(post)
    true = mean_loss(Net(), loss, {n: post[n] + shift[n] for n in post}) - mean_loss(
        Net(), loss, post
    )
    assert term(module, post, shift, loss, Rule("gauss", 30)).value == pytest.approx(
        true.item(), abs=1e-10
    )
    errors = [
        abs(term(module, post, shift, loss, Rule("left", c)).value - true.item()) for c in (5, 20)
    ]
    assert errors[1] == pytest.approx(errors[0] / 4, rel=0.2)  # O(1/C)


def test_additive_by_tensor_and_by_part_and_consistent_with_its_nodes():
    module = Net()
    post, loss = state(module), Examples(cross_entropy, rows(9, 4))
    shift = random_shift(post)
    found = term(module, post, shift, loss, Rule("gauss", 3))
    assert sum(found.by_tensor.values()) == pytest.approx(found.value, abs=1e-14)
    assert sum(found.by_part.values()) == pytest.approx(found.value, abs=1e-14)
    weights = Rule("gauss", 3).weights
    assert sum(w * g for w, g in zip(weights, found.inner, strict=True)) == pytest.approx(
        found.value, abs=1e-14
    )
    assert found.by_part["norm"] == pytest.approx(
        found.by_tensor["norm.weight"] + found.by_tensor["norm.bias"], abs=1e-15
    )
    assert sum(found.by_layer.values()) == pytest.approx(found.value, abs=1e-14)
    record = json.loads(json.dumps(found.as_record()))
    assert (record["value"], record["by_part"]) == (found.value, found.by_part)
    # An edit of one tensor has exactly that tensor's share of no other path, but its own term.
    alone = term(module, post, {"attn.weight": shift["attn.weight"]}, loss, Rule("left", 1))
    both = term(module, post, shift, loss, Rule("left", 1))
    assert alone.value == pytest.approx(both.by_tensor["attn.weight"], abs=1e-14)


def test_micro_batches_change_nothing():
    values = []
    for sizes in [(20,), (7, 13), (1,) * 20]:
        module = Net()
        post = state(module)
        found = term(
            module,
            post,
            random_shift(post),
            Examples(cross_entropy, rows(*sizes)),
            Rule("gauss", 2),
        )
        values.append(found.value)
        assert found.gradient_evaluations == 2
    assert values[1:] == pytest.approx(values[:1] * 2, abs=1e-13)


def test_rules_share_nodes_and_a_given_gradient():
    module = Net()
    post, loss = state(module), Examples(cross_entropy, rows(20))
    shift = random_shift(post)
    rules = [Rule("left", 5), Rule("radau", 3), Rule("trapezoid", 6)]
    found = terms(module, post, shift, loss, rules)
    assert [t.gradient_evaluations for t in found.values()] == [5, 2, 1]
    assert len(loss.calls) == 8
    first = gradient(module, loss)
    again = terms(module, post, shift, loss, rules, first)
    assert [t.gradient_evaluations for t in again.values()] == [4, 2, 1]
    assert len(loss.calls) == 8 + 1 + 7
    for name in found:
        assert again[name].value == pytest.approx(found[name].value, abs=1e-13)


def test_the_gradient_is_the_dense_one_and_serves_every_tied_name():
    module, loss = Net(), Examples(cross_entropy, rows(9, 11))
    found = gradient(module, loss)
    dense_module = Net().eval()
    value = torch.cat([cross_entropy(dense_module, b) for b in loss.batches]).mean()
    names = [n for n, _ in dense_module.named_parameters()]
    for name, grad in zip(
        names, torch.autograd.grad(value, list(dense_module.parameters())), strict=True
    ):
        torch.testing.assert_close(found[name], grad, atol=1e-14, rtol=0)
    assert found["head.weight"] is found["embed.weight"]
    assert set(found) == set(module.state_dict())


def test_everything_is_put_back_bitwise():
    module = Net(torch.float32).train()
    module.drop.eval()
    module.attn.bias.requires_grad_(False)
    module.norm.bias.grad = torch.full((6,), 3.0)
    post, loss = state(module), Examples(cross_entropy, rows(9, 4))
    term(module, post, random_shift(post), loss, Rule("gauss", 3))
    gradient(module, loss)

    def broken(module, batch):
        if len(loss.calls) > 12:
            raise RuntimeError("half way")
        return cross_entropy(module, batch)

    loss.function = broken
    with pytest.raises(RuntimeError, match="half way"):
        term(module, post, random_shift(post), loss, Rule("left", 5))
    assert all(torch.equal(v, post[n]) for n, v in module.state_dict().items())
    assert (module.training, module.drop.training) == (True, False)
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == ["attn.bias"]
    assert torch.equal(module.norm.bias.grad, torch.full((6,), 3.0))
    assert module.attn.weight.grad is None
    assert not any(p._post_accumulate_grad_hooks for p in module.parameters())


def test_untouched_parameters_get_no_gradient_and_one_tensor_is_alive_at_a_time():
    module = Net()
    post = state(module)
    shift = {n: random_shift(post)[n] for n in ("attn.weight", "attn.bias")}
    alive = []

    def watched(module, batch):
        assert [n for n, p in module.named_parameters() if p.requires_grad] == list(shift)
        for parameter in module.attn.parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda _: alive.append(sum(p.grad is not None for p in module.parameters()))
            )
        return cross_entropy(module, batch)

    term(module, post, shift, Examples(watched, rows(5)), Rule("midpoint", 1))
    assert alive == [0, 0]  # our hook ran first and freed the gradient before the next came


def test_no_shift_no_cost():
    module = Net()
    post, loss = state(module), Examples(cross_entropy, rows(5))
    found = term(module, post, {n: 0 * v for n, v in post.items()}, loss, Rule("left", 5))
    assert (found.value, found.gradient_evaluations, found.by_tensor) == (0.0, 0, {})
    assert not loss.calls


def test_bf16_module_with_float32_shift_and_exact_inner_products():
    module = Net(torch.bfloat16)
    post, loss = state(module), Examples(cross_entropy, rows(16, 4))
    shift = random_shift(post, 0.05, torch.float32)
    found = term(module, post, shift, loss, Rule("left", 1))
    grads = gradient(module, loss)
    assert grads["attn.weight"].dtype == torch.float32
    expected = sum((grads[n].double() * shift[n].double()).sum().item() for n in found.by_tensor)
    # The gradient accumulates batches in float32, the term in float64: nothing else differs.
    assert found.value == pytest.approx(expected, rel=1e-6)
    reference = Net(torch.float64)
    reference.load_state_dict(post)
    exact = term(
        reference,
        {n: v.double() for n, v in post.items()},
        shift,
        Examples(cross_entropy, loss.batches),
        Rule("left", 1),
    )
    assert found.value == pytest.approx(exact.value, rel=0.05)


def test_nodes_are_written_from_the_stored_copies_and_rounded_once():
    module = Net(torch.bfloat16)
    post = state(module)
    shift = random_shift(post, 0.01, torch.float32)
    seen = []

    def watched(module, batch):
        seen.append(module.attn.weight.detach().clone())
        return cross_entropy(module, batch)

    rule = Rule("gauss", 3)
    term(module, post, shift, Examples(watched, rows(5)), rule)
    for node, weight in zip(rule.nodes, seen, strict=True):
        expected = (post["attn.weight"].double() + node * shift["attn.weight"].double()).float()
        torch.testing.assert_close(weight, expected.bfloat16(), atol=0, rtol=2**-8)


def test_inner_products_survive_cancellation():
    torch.manual_seed(0)
    a, b = torch.randn(1 << 16) * 1e4, torch.randn(1 << 16)
    a, b = torch.cat([a, -a, torch.ones(1)]), torch.cat([b, b, torch.full((1,), 1e-3)])
    assert inner(a, b).item() == pytest.approx(1e-3, rel=1e-5)
    strided = torch.randn(30, 40).T
    assert inner(strided, strided.contiguous()).item() == pytest.approx(
        (strided.double() ** 2).sum().item(), rel=1e-14
    )


def test_user_mistakes_are_named():
    module = Net()
    post, loss = state(module), Examples(cross_entropy, rows(5))
    with pytest.raises(ValueError, match="no parameter of the model"):
        term(module, post, {"nothing.weight": torch.ones(2)}, loss, Rule("left", 1))
    with pytest.raises(ValueError, match=r"attn.bias.*\(5,\).*\(6,\)"):
        term(module, post, {"attn.bias": torch.ones(5)}, loss, Rule("left", 1))
    bad = {"attn.bias": torch.full((6,), float("inf"))}
    with pytest.raises(ValueError, match=r"not finite at t=0.5"):
        term(module, post, bad, loss, Rule("midpoint", 1))
    with pytest.raises(ValueError, match="each rule once"):
        terms(module, post, {}, loss, [Rule("left", 1), Rule("left", 2)])
    with pytest.raises(ValueError, match="gauss is the main rule"):
        Riemann("gauss", 3, {"gauss": 2})
    assert Riemann(None).rules == ()
