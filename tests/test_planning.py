import pytest
import torch
from torch import nn

from deltalab.edits.bitdelta import BitDelta
from deltalab.edits.dare import Dare
from deltalab.edits.ties import Ties
from deltalab.planning import GIB, Plan, available, most_evaluations, plan, stored
from deltalab.riemann import Riemann


class Layer(nn.Module):
    """The weights of one decoder layer with grouped queries."""

    def __init__(self, width, inner, keys):
        super().__init__()
        self.q_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(width, keys, bias=False) for _ in range(2))
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.norms = nn.ParameterList([torch.ones(width), torch.ones(width)])

    def forward(self, x):
        y = x * self.norms[0]
        keys = self.k_proj(y) * self.v_proj(y)
        y = x + self.o_proj(self.q_proj(y) * keys.repeat(1, 1, x.shape[-1] // keys.shape[-1]))
        z = y * self.norms[1]
        return y + self.down_proj(torch.nn.functional.silu(self.gate_proj(z)) * self.up_proj(z))


class Decoder(nn.Module):
    def __init__(self, vocabulary, width, inner, keys, depth):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, inner, keys) for _ in range(depth))
        self.norm = nn.Parameter(torch.ones(width))
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x * self.norm)


def eight_billion():
    """The shapes of an 8B decoder: 128256 tokens, 4096 wide, 32 layers, nothing allocated."""
    with torch.device("meta"):
        return Decoder(128256, 4096, 14336, 1024, 32).to(torch.bfloat16)


def test_an_8b_model_is_planned_on_the_meta_device_and_refused_where_it_does_not_fit():
    module = eight_billion()
    names = [n for n, p in module.named_parameters() if "proj" in n]
    ids = torch.zeros(1, 512, dtype=torch.int64, device="meta")
    activations = stored(module, lambda: module(ids))
    edits = [Dare(p / 10, k) for p in range(1, 10) for k in (-1.0, -0.5, 0.0, 0.5, 0.8)]
    found = plan(module, names, edits, Riemann("adaptive"), activations)
    assert found.of_parameters == 8_030_261_248
    assert found.parameters == 6_979_321_856  # 32 layers of 218 million
    assert found.tensors == 7 * 32
    assert found.evaluations == 1 + 9 * 9
    assert found.held["model"] == 2 * found.of_parameters
    assert found.held["shift in float32"] == 4 * found.parameters
    # At least every linear layer's input, in bf16, and no more than a few times that.
    inputs = 2 * 512 * 32 * (4096 * 3 + 14336)
    assert inputs < activations < 6 * inputs
    largest = 2 * 4096 * 14336
    assert found.engines["reverse"] == largest + 16 * (1 << 22) + activations
    assert found.engines["reverse, checkpoint"] < found.engines["reverse"]
    found.check("reverse", 200 * GIB, "a large machine")
    with pytest.raises(ValueError, match=r"reverse needs \d+\.\d GiB, cpu has 16.0 GiB; no engine"):
        found.check("reverse", 16 * GIB, "cpu")
    assert "224 tensors, 6,979,321,856 of 8,030,261,248" in found.table()


def test_a_refusal_names_the_engines_that_fit():
    found = Plan(1, 1, 1, 1, {"model": GIB}, {"reverse": 3 * GIB, "forward": GIB}, True)
    found.check("forward", 2 * GIB, "cpu")
    with pytest.raises(ValueError, match="4.0 GiB, cpu has 2.0 GiB; these fit: forward"):
        found.check("reverse", 2 * GIB, "cpu")


def test_stored_activations_are_those_of_the_real_pass():
    with torch.device("meta"):
        shape = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    # Input of both layers; tanh keeps its output, which is the second one's input.
    x = torch.zeros(5, 8, device="meta")
    assert stored(shape, lambda: shape(x).sum()) == 4 * 5 * (8 + 16)
    real = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    assert stored(real, lambda: real(torch.zeros(5, 8)).sum()) == 4 * 5 * (8 + 16)


def test_tied_tensors_are_counted_once():
    module = Decoder(10, 8, 16, 4, 1)
    module.lm_head.weight = module.embed_tokens.weight
    found = plan(module, ["embed_tokens.weight", "lm_head.weight"], [], Riemann("left", 5))
    assert (found.tensors, found.parameters) == (1, 80)
    assert not found.activations
    assert "without activations" in found.table()
    assert plan(module, [], [], Riemann(None)).evaluations == 0


def test_evaluations_are_shared_along_lines_and_at_the_start():
    grid = [Dare(0.5, k) for k in (0.0, 0.5)] + [Ties(0.5, "model")]
    assert most_evaluations(grid, Riemann("left", 5)) == 1 + 3 * 4
    assert most_evaluations(grid, Riemann("gauss", 3)) == 9
    assert most_evaluations(grid, Riemann("gauss", 3, also={"left": 5})) == 1 + 3 * (3 + 4)
    assert most_evaluations(grid, Riemann("adaptive")) == 1 + 9 + 7
    bits = [BitDelta(c, "mean", 0.5, "tensor") for c in (0.5, 1.0, 2.0)]
    assert most_evaluations(bits, Riemann("adaptive")) == 1 + 3 * 7


def test_some_memory_is_available():
    assert GIB // 16 < available("cpu") < 1 << 50
