"""Well-formed inputs of language models that mean something else than they seem to, by kind.

Every kind has its right value from elsewhere: transformers itself, a difference quotient, one
sequence at a time, arithmetic by hand.
"""

import copy
import json

import pytest
import texts
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from deltalab import distill
from deltalab.answers import AnswerLoss, DpoLoss
from deltalab.models.hf_llm import HfPair
from deltalab.models.zoo_llm import EmbeddedLlm
from deltalab.objectives import measure
from deltalab.passes import gradient
from deltalab.quadrature import Rule
from deltalab.riemann import term
from deltalab.tokens import Coded, padded

SIZE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def save(model, path):
    """Save a model with its tokenizer and return the directory."""
    model.save_pretrained(path)
    texts.tokenizer().save_pretrained(path)
    return path


def moved(model, scale=0.02, seed=1):
    """Return the model with noise on every parameter: its post-trained version."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value += scale * torch.randn(value.shape, generator=draw).to(value.dtype)
    return model


def llama(seed=0, **changes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZE, **changes})).eval()


def configure(path, file="config.json", **changes):
    place = path / file
    content = json.loads(place.read_text()) if place.is_file() else {}
    place.write_text(json.dumps(content | changes))


@pytest.fixture
def pair(tmp_path):
    """The directories of a Llama pair that a test may change."""
    return save(llama(), tmp_path / "pre"), save(moved(llama()), tmp_path / "post")


def opened(paths, **settings):
    return HfPair(*map(str, paths), **{"dtype": "float32", "device": "cpu", **settings}).open()


def sequences(count=8, low=3, high=25, banned=(0,)):
    """Return random sequences of unlike lengths, their last tokens the answers."""
    draw = torch.Generator().manual_seed(5)
    found = []
    for length in torch.linspace(low, high, count).long().tolist():
        ids = torch.randint(3, 300, (length,), generator=draw).tolist()
        found.append(Coded(ids, [-100] * 2 + ids[2:], ""))
    return found


def batches(coded, size, pad=0):
    return tuple(padded(coded[i : i + size], pad) for i in range(0, len(coded), size))


# Padding.


@pytest.mark.parametrize("source", ["directories", "embedded"])
def test_a_padding_token_in_the_text_has_its_gradient(source, pair):
    """As where a model pads with its end-of-sequence token and turns of a chat end in it."""
    found = opened(pair) if source == "directories" else EmbeddedLlm("sft").open()
    module = copy.deepcopy(found.module).double()
    pad = module.config.pad_token_id
    table = module.get_input_embeddings().weight
    ids = [5, pad, 7, pad, 9, 11]
    loss = AnswerLoss((padded([Coded(ids, ids, "")], 0),))
    name = next(n for n, p in module.named_parameters() if p is table)
    start = table.detach().clone()
    shift = torch.zeros_like(start)
    shift[pad] = torch.linspace(-1, 1, shift.shape[1])
    value = term(module, {name: start}, {name: shift}, loss, Rule("left", 1)).value
    ends, step = [], 2e-5
    for h in (step, -step):
        with torch.no_grad():
            table.copy_(start + h * shift)
        ends.append(measure(module, loss).mean)
    assert abs(value) > 1e-3
    assert value == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-2)
    assert gradient(module, loss)[name][pad].any()


def test_a_padding_token_changes_no_output(pair):
    theirs = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32).eval()
    ids = torch.tensor([[5, 0, 7, 0, 9]])
    with torch.no_grad():
        assert torch.equal(opened(pair).module(ids).logits, theirs(ids).logits)


def test_a_padding_token_beyond_the_vocabulary_is_named(pair):
    configure(pair[1], pad_token_id=300)
    with pytest.raises(ValueError, match=r"pad_token_id=300 .*beyond the vocabulary of 300"):
        opened(pair)


def preferences(size):
    coded = sequences()
    both = zip(batches(coded, size), batches(coded[::-1], size), strict=True)
    return DpoLoss(tuple((c, r, torch.zeros(len(c[0]))) for c, r in both), beta=0.1)


OBJECTIVES = {"answers": lambda size: AnswerLoss(batches(sequences(), size)), "dpo": preferences}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_padding_and_the_size_of_batches_change_no_mean_input(kind, pair):
    module = opened(pair).module
    alone, together = (distill.mean_inputs(module, OBJECTIVES[kind](size)) for size in (1, 8))
    assert len(alone) == 15
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-4, atol=1e-6)
    if kind == "answers":  # the mean over single unpadded sequences, counted here
        inputs, layer = [], module.model.layers[0].mlp.down_proj
        with layer.register_forward_pre_hook(lambda _, x: inputs.append(x[0][0])), torch.no_grad():
            for coded in sequences():
                module(torch.tensor([coded.ids]))
        right = torch.cat(inputs).double().mean(0).float()
        name = "model.layers.0.mlp.down_proj.weight"
        torch.testing.assert_close(together[name], right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_padding_and_the_size_of_batches_change_no_learned_scale(kind, pair):
    found = opened(pair)
    names = [n for n in found.post if found.post[n].ndim == 2 and "layers" in n]
    deltas = {n: found.post[n] - found.pre[n] for n in names}
    start, one, three, eight = (
        distill.scales(found.module, found.pre, deltas, OBJECTIVES[kind](size), steps=n, lr=0.1)
        for n, size in ((0, 1), (4, 1), (4, 3), (4, 8))
    )
    assert any(abs(one[n] / start[n] - 1) > 0.05 for n in names), "nothing was learned"
    for name in names:
        torch.testing.assert_close(eight[name], one[name], rtol=1e-3, atol=0)
        torch.testing.assert_close(three[name], one[name], rtol=1e-3, atol=0)
