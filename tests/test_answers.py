import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional

from deltalab.artifacts import Store
from deltalab.data.tokens import IGNORED
from deltalab.loss.answers import Answers, Dpo
from deltalab.loss.objectives import change, measure
from deltalab.loss.quadrature import Rule
from deltalab.loss.riemann import terms
from deltalab.weights.mapping import ModelPair


class Recurrent(nn.Module):
    """A small causal language model, with tied embeddings."""

    def __init__(self, vocabulary=11, width=6):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(2 * width, width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids, attention_mask):
        state, out = torch.zeros(len(ids), self.embed.embedding_dim).to(self.mix.weight), []
        for x in self.embed(ids).unbind(1):
            state = torch.tanh(self.mix(torch.cat([x, state], 1)))
            out.append(self.lm_head(state))
        return torch.stack(out, 1)


def sequences(count, seed):
    """Prompt and answer tokens of random lengths, as Python lists."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (count, 2), generator=draw).tolist()
    return [
        (
            torch.randint(11, (p,), generator=draw).tolist(),
            torch.randint(11, (a,), generator=draw).tolist(),
        )
        for p, a in lengths
    ]


def tokens(rows):
    width = max(len(p) + len(a) for p, a in rows)
    ids, mask = torch.zeros(len(rows), width).long(), torch.zeros(len(rows), width).long()
    labels = torch.full((len(rows), width), IGNORED)
    for i, (p, a) in enumerate(rows):
        n = len(p) + len(a)
        ids[i, :n], mask[i, :n] = torch.tensor(p + a), 1
        labels[i, len(p) : n] = torch.tensor(a)
    return ids, mask, labels


@dataclass(frozen=True)
class Text:
    count: int = 9

    def open(self, transform, batch_size):
        rows = sequences(self.count, 0)
        return [tokens(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]


@dataclass(frozen=True)
class Preferences:
    count: int = 9

    def open(self, transform, batch_size):
        one, two = sequences(self.count, 1), sequences(self.count, 2)
        return [
            (tokens(one[i : i + batch_size]), tokens(two[i : i + batch_size]))
            for i in range(0, self.count, batch_size)
        ]


def pair(dtype=torch.float64):
    torch.manual_seed(0)
    module = Recurrent().to(dtype)
    post = {n: v.detach().clone() for n, v in module.state_dict().items()}
    pre = {n: v + 0.3 * torch.randn_like(v) for n, v in post.items()}
    pre["lm_head.weight"] = pre["embed.weight"]
    return ModelPair(pre=pre, post=post, module=module)


def log_probability(module, prompt, answer):
    """Token by token, each from its own unpadded prefix."""
    total = 0.0
    for i, token in enumerate(answer):
        prefix = torch.tensor([prompt + answer[:i]])
        logits = module(prefix, torch.ones_like(prefix))[0, -1]
        total += functional.log_softmax(logits, -1)[token].item()
    return total


def test_answer_losses_are_those_of_every_token_given_its_prefix():
    p, rows = pair(), sequences(9, 0)
    for batch_size in (1, 4, 9):
        measured = measure(p.module, Answers(Text(), batch_size).open(p))
        with torch.no_grad():
            expected = [-log_probability(p.module, *row) for row in rows]
        assert measured.losses.tolist() == pytest.approx(expected, abs=1e-12)
        assert measured.weights.tolist() == [len(a) for _, a in rows]
        assert measured.mean == pytest.approx(sum(expected) / sum(len(a) for _, a in rows))


def test_dpo_loss_is_the_published_one_and_log_two_at_the_reference():
    p = pair()
    measured = measure(p.module, Dpo(Preferences(), beta=0.3, batch_size=4).open(p))
    assert all(torch.equal(v, p.post[n]) for n, v in p.module.state_dict().items())
    reference = Recurrent().double()
    reference.load_state_dict(p.pre)
    one, two = sequences(9, 1), sequences(9, 2)
    with torch.no_grad():
        for i, (w, lost) in enumerate(zip(one, two, strict=True)):
            policy = log_probability(p.module, *w) - log_probability(p.module, *lost)
            base = log_probability(reference, *w) - log_probability(reference, *lost)
            expected = -math.log(1 / (1 + math.exp(-0.3 * (policy - base))))
            assert measured.losses[i].item() == pytest.approx(expected, abs=1e-12)
    same = ModelPair(pre=p.post, post=p.post, module=p.module)
    assert measure(p.module, Dpo(Preferences()).open(same)).losses.tolist() == pytest.approx(
        [math.log(2)] * 9
    )


def test_the_reference_is_computed_once_and_kept(tmp_path):
    p, store = pair(torch.float32), Store(tmp_path, {"pair": "x"})
    first = Dpo(Preferences(), batch_size=4).open(p, store)
    broken = ModelPair(
        pre={n: v * float("nan") for n, v in p.pre.items()}, post=p.post, module=p.module
    )
    again = Dpo(Preferences(), batch_size=2).open(broken, store)
    assert torch.equal(measure(p.module, first).losses, measure(p.module, again).losses)


@pytest.mark.parametrize("spec", [Answers(Text(), 4), Dpo(Preferences(), beta=0.5, batch_size=4)])
def test_terms_converge_to_the_change_in_both_engines(spec):
    p = pair()
    loss = spec.open(p)
    shift = {n: 0.4 * (p.pre[n] - p.post[n]) for n in p.post}
    rule = Rule("gauss", 6)
    reverse, forward = (
        terms(p.module, p.post, shift, loss, [rule], engine=engine)["gauss"]
        for engine in ("reverse", "forward")
    )
    before = measure(p.module, loss)
    p.module.load_state_dict({n: p.post[n] + shift[n] for n in p.post})
    value, error = change(before, measure(p.module, loss))
    assert reverse.value == pytest.approx(value, abs=1e-8)
    assert forward.value == pytest.approx(reverse.value, rel=1e-11)
    assert 0 < error < 1


def test_limit_and_bad_input():
    p = pair()
    whole = measure(p.module, Answers(Text(), 4).open(p)).losses
    for limit in (1, 4, 6, 20):
        part = measure(p.module, Answers(Text(), 4, limit).open(p)).losses
        torch.testing.assert_close(part, whole[:limit], rtol=1e-14, atol=0)
    assert len(measure(p.module, Dpo(Preferences(), 0.1, 4, 6).open(p)).losses) == 6
    for spec, words in [(Answers(Text(0)), "no answer tokens"), (Dpo(Preferences(0)), "no pref")]:
        with pytest.raises(ValueError, match=words):
            spec.open(p)
    with pytest.raises(ValueError, match=r"objective.beta=0"):
        Dpo(Preferences(), beta=0)
    with pytest.raises(ValueError, match=r"objective.limit=0"):
        Answers(Text(), limit=0)
    small = ModelPair(pre=p.pre, post=p.post, module=p.module)
    small.module.lm_head.weight = nn.Parameter(small.module.lm_head.weight[:5].detach())
    with pytest.raises(ValueError, match="outputs 0 to 4"):
        measure(small.module, Answers(Text()).open(small))
