"""Matrices that a file has as (in, out): edits that look at axes see (out, in) in every path."""

from functools import partial

import pytest
import tiny_lm
import torch
from torch import nn

import deltalab as dl
from deltalab import keys
from deltalab.apply import editing, stream
from deltalab.apply.audit import Audit
from deltalab.apply.extras import Extras
from deltalab.data.tokens import Coded, padded
from deltalab.edits.bitdelta import BitDelta
from deltalab.edits.breadcrumbs import Breadcrumbs
from deltalab.edits.chain import Chain
from deltalab.edits.dare import Dare
from deltalab.edits.darex import Darex, best_scale
from deltalab.edits.della import Della
from deltalab.edits.multibit import Multibit
from deltalab.edits.ties import Ties
from deltalab.edits.twin import Twin
from deltalab.keys import Choices
from deltalab.loss import distill
from deltalab.loss.answers import AnswerLoss
from deltalab.weights.mapping import Checkpoint, ModelPair
from deltalab.weights.orientation import TURNED, turned

KINDS = ("gpt2", "openai-gpt")
bits = partial(BitDelta, multiple=1.0, magnitudes="mean", cv=0.0)
AXES = [
    bits(axis="row"),
    bits(axis="column"),
    Della(p=0.5, window=0.4),
    Breadcrumbs(beta=0.3, gamma=0.1),
    Chain(steps=[{"dare": {"p": 0.5}}, {"bitdelta": {"axis": "row"}}]),
]
BLIND = [
    Dare(p=0.3, k=0.0),
    Ties(keep=0.3, scope="model"),
    Twin(rank=3, rate=None),
    bits(axis="tensor"),
    Multibit(bits=2, blocks="equal_count"),
    Chain(steps=[{"dare": {"p": 0.5}}, "expo"]),
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    places = {kind: tiny_lm.pair(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}
    return {kind: (paths, tiny_lm.opened(paths)) for kind, paths in places.items()}


def upright(found):
    """Return a pair with every transposed matrix the right way round, and no configuration."""
    is_turned = turned(found.module.config.to_dict())
    sides = [{n: t.mT.contiguous() if is_turned(n) else t.clone() for n, t in side.items()}
             for side in (found.pre, found.post)]  # fmt: skip
    return ModelPair(*sides, nn.Linear(1, 1)), is_turned


def streamed(paths, out, edit):
    stream.stream(*paths, out, edit, select="all", seed=3)
    return Checkpoint(out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", AXES, ids=str)
def test_rows_are_outputs_in_every_path(edit, kind, pairs, tmp_path):
    """Live, streamed and audited: what the edit makes of the matrix that a linear layer has.

    Random numbers follow the file, so the masks that a matrix of linear layers would have for the
    same places are given to it here.
    """
    paths, found = pairs[kind]
    right, is_turned = upright(found)
    live = dl.edited(found, edit, seed=3)
    on_disk = streamed(paths, tmp_path / "out", edit)
    matrices = [name for name in live if is_turned(name)]
    assert len(matrices) == 8, "two blocks with four linear layers each"
    extras = Extras.of(edit, found, seed=3)
    for name, made in live.items():
        assert torch.equal(made, on_disk[name]), name
        if name not in matrices or "rng" not in edit.needs:
            plain = Extras(edit.needs, 3).for_tensor(name, {})
            wanted = editing.edited_tensor(right.pre[name], right.post[name], edit, **plain)
            assert torch.equal(made, wanted.mT if name in matrices else wanted), name
    told = Audit()
    again = dict(editing.edited(found.pre, found.post, edit, "all", extras, audit=told))
    assert all(torch.equal(again[name], live[name]) for name in live)
    assert told.said(found)["lost_in_storage"] < 1e-5


def test_rows_of_a_mask_are_those_of_outputs(pairs):
    """DELLA ranks in each output's inputs: its keep probabilities rise along them."""
    _, found = pairs["gpt2"]
    name = "transformer.h.0.mlp.c_fc.weight"
    edit, delta = Della(p=0.5, window=0.9), found.post[name] - found.pre[name]
    made = dl.edited(found, edit, select={"include": [name]}, seed=1)[name] - found.pre[name]
    kept = made != 0
    ranks = delta.mT.abs().argsort(1).argsort(1).mT / (delta.shape[0] - 1)
    wanted = delta / (1 - (0.5 + 0.9 * (0.5 - ranks)))
    torch.testing.assert_close(made[kept], wanted[kept], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("edit", BLIND, ids=str)
def test_what_looks_at_no_axis_has_the_bits_that_it_had(edit, pairs, tmp_path):
    paths, found = pairs["gpt2"]
    plain = Extras.of(edit, ModelPair(found.pre, found.post, nn.Linear(1, 1)), seed=3)
    before = dict(editing.edited(found.pre, found.post, edit, "all", plain))
    after, on_disk = dl.edited(found, edit, seed=3), streamed(paths, tmp_path / "out", edit)
    assert all(
        torch.equal(before[n], after[n]) and torch.equal(before[n], on_disk[n]) for n in before
    )


def test_one_seed_gives_one_mask_to_every_edit(pairs):
    """DELLA without a window is DARE, and the closed form drops what DARE drops."""
    _, found = pairs["gpt2"]
    one, other = (
        dl.edited(found, e, seed=5) for e in (Della(p=0.5, window=0.0), Dare(p=0.5, k=0.0))
    )
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-8)


def loss(count=4, size=2):
    draw = torch.Generator().manual_seed(5)
    coded = [
        Coded(torch.randint(3, 300, (n,), generator=draw).tolist(), [], "")
        for n in range(5, 5 + count)
    ]
    coded = [Coded(one.ids, one.ids, "") for one in coded]
    return AnswerLoss(tuple(padded(coded[i : i + size], 0) for i in range(0, count, size)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_closed_form_knows_the_inputs_of_all_linear_layers(kind, pairs):
    """Its rescale is that of the same numbers in an ordinary linear layer, found by hand."""
    _, found = pairs[kind]
    is_turned, edit = turned(found.module.config.to_dict()), Darex(p=0.6, q="closed_form")
    made = dl.edited(found, edit, seed=2, loss=loss())
    dare = dl.edited(found, Dare(p=0.6, k=0.0), seed=2)
    half = distill.splits.halved(loss(), "A")
    means = distill.mean_inputs(found.module, half)
    assert {n for n in found.post if is_turned(n)} <= set(means)
    name = next(n for n in found.post if n.endswith("h.1.mlp.c_proj.weight"))
    layer = found.module.get_submodule(name.removesuffix(".weight"))
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    for batch in half.batches:
        seen.clear()
        half(found.module, batch)
    handle.remove()
    delta = found.post[name] - found.pre[name]
    scale = best_scale(delta.mT, means[name], 0.6)
    assert abs(scale * 0.4 - 1) > 1e-3, "plain DARE would do as well"
    kept = dare[name] != found.pre[name]
    wanted = found.pre[name] + torch.where(kept, scale * delta, 0.0)
    torch.testing.assert_close(made[name], wanted)
    table = next(n for n in found.post if n.endswith(("wte.weight", "tokens_embed.weight")))
    torch.testing.assert_close(made[table], dare[table])


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "gpt_oss", "granitemoe"])
def test_inputs_that_are_not_known_are_told_and_never_plain_dare(kind, tmp_path):
    found = tiny_lm.opened(tiny_lm.pair(kind, tmp_path))
    edit = Darex(p=0.6, q="closed_form")
    told = r"tensor '.*(expert|_linear).*': the inputs of its layer are not known"
    with pytest.raises(ValueError, match=told):
        dl.edited(found, edit, select="linear", loss=loss())
    known = {"preset": "linear", "exclude": [r"experts?\.|put_linear"]}
    assert dl.edited(found, edit, select=known, loss=loss())


def test_a_module_of_ones_own_says_what_is_turned():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inward = nn.Parameter(torch.randn(3, 5))

        def forward(self, x):
            return x @ self.inward

    torch.manual_seed(0)
    found = dl.pair(Own(), Own())
    edit = bits(axis="row")
    delta = found.post["inward"] - found.pre["inward"]
    made = [
        dl.edited(found, edit, turned=hint)["inward"] - found.pre["inward"]
        for hint in ((), ["inward"])
    ]
    for got, axis in zip(made, (1, 0), strict=True):
        scale = delta.abs().mean(axis, keepdim=True)
        torch.testing.assert_close(got.abs(), scale.expand_as(delta))


def test_a_key_is_another_where_a_result_is(pairs, tmp_path):
    """Only of models with such matrices, and of edits that may look at axes."""
    llama = tiny_lm.pair("llama", tmp_path)

    def reads(paths, **edit):
        model = {
            "_target_": "deltalab.models.hf_llm.HfPair",
            "pre": str(paths[0]),
            "post": str(paths[1]),
        }
        found = keys.determinants(
            {"model": model, "edit": edit, "select": "all"}, Choices("m", "e", "o")
        )
        return found["reads"]

    della = {"_target_": "deltalab.edits.della.Della", "p": 0.5, "window": 0.4}
    dare = {"_target_": "deltalab.edits.dare.Dare", "p": 0.5, "k": 0.0}
    ties = {"_target_": "deltalab.edits.ties.Ties", "keep": 0.5, "scope": "model"}
    assert reads(pairs["gpt2"][0], **della) == {**reads(llama, **della), "turned": 1}
    for edit in (dare, ties):
        assert reads(pairs["gpt2"][0], **edit) == reads(llama, **edit)


@pytest.mark.parametrize(
    "kind", ["gpt2", "openai-gpt", "gpt_bigcode", "gpt_neo", "llama", "codegen"]
)
def test_the_table_names_what_transformers_transposes(kind):
    module = tiny_lm.model(kind)
    is_turned = turned(module.config.to_dict())
    wanted = {
        f"{n}.weight" for n, part in module.named_modules() if type(part).__name__ == "Conv1D"
    }
    assert {name for name, _ in module.named_parameters() if is_turned(name)} == wanted
    assert bool(wanted) == (kind in TURNED)
