"""Beginnings computed once: against every request alone, on many architectures and all budgets."""

import random

import pytest
import tiny_lm
import torch
from transformers import DynamicCache

from deltalab.inference import beginnings, budget, greedy, passes, scoring

CONTEXT = 120


def requests(seed=0, shots=40, documents=20, vocabulary=280):
    """Return few-shot questions with choices: what is fed, and the choice it scores."""
    draw = random.Random(seed)

    def some(n):
        return [draw.randrange(3, vocabulary) for _ in range(n)]

    examples, asked = some(shots), []
    for _ in range(documents):
        question = examples + some(draw.randrange(4, 12))
        for _ in range(draw.choice((1, 2, 4))):
            choice = some(draw.randrange(1, 5))
            asked.append((question + choice[:-1], choice))
    asked += [asked[3], ([*examples, 5], [6]), (some(9), some(2)), (examples[:7], examples[5:8])]
    asked.append((asked[0][0] + asked[0][1][-1:], [*asked[0][1][-1:], 9]))  # goes on after another
    return asked


def alone(model, asked):
    """Return log-likelihoods in float64 sums, each from a pass of its own without a cache."""
    found = []
    with torch.no_grad():
        for fed, said in asked:
            logits = model(input_ids=torch.tensor([fed]), use_cache=False).logits[0].double()
            own = torch.log_softmax(logits, -1)[-len(said) :]
            likely = own[torch.arange(len(said)), torch.tensor(said)].sum()
            found.append((float(likely), own.argmax(-1).tolist() == said))
    return found


def told(model, asked, rows=8, share=True, **limits):
    """Return the same from passes that share beginnings, and how many tokens they had."""
    made, found = passes.Passes(model), {}
    own = limits.get("budget") or budget.Budget(rows)
    for part in scoring.answers(made, beginnings.scored(asked), own, share):
        for answer, value in part:
            found |= dict.fromkeys(answer.places, value)
    return [found[n] for n in range(len(asked))], made.tokens


def close(found, truth):
    pairs = list(zip(found, truth, strict=True))
    assert max(abs(a[0] - b[0]) / abs(b[0]) for a, b in pairs) < 1e-4
    assert [a[1] for a, _ in pairs] == [b[1] for _, b in pairs]


SHARING = (
    *("llama", "gpt2", "gpt_neox", "bloom", "mpt", "opt", "falcon", "gemma2", "gemma3_text"),
    *("mistral", "qwen3", "phi3", "cohere2", "mixtral", "deepseek_v3", "gpt_oss", "gpt_bigcode"),
)


@pytest.mark.parametrize("kind", SHARING)
def test_likelihoods_and_texts_are_those_of_each_prompt_alone(kind):
    model = tiny_lm.model(kind, scale=0.1)
    assert passes.refusal(model, CONTEXT) is None
    asked = requests()
    truth = alone(model, asked)
    found, tokens = told(model, asked)
    close(found, truth)
    assert 3 * tokens < sum(len(fed) for fed, _ in asked)
    prompts = [fed for fed, _ in asked[::3]]
    check_texts(model, prompts, *texts(model, prompts, 6))


def texts(model, prompts, most, rows=4, ends=(7, 8)):
    made, found = passes.Passes(model), {}
    stream = greedy.continued(
        made,
        beginnings.prompts(prompts),
        lambda row: most,
        lambda said: said[-1] in ends,
        budget.Budget(rows),
    )
    for part in stream:
        for text in part:
            found |= dict.fromkeys(text.row.places, text)
    return [found[n] for n in range(len(prompts))], made


def check_texts(model, prompts, found, _, most=6, ends=(7, 8)):
    """Hold every text against the likeliest tokens of passes without a cache."""
    different = 0
    for prompt, text in zip(prompts, found, strict=True):
        said = list(prompt)
        for token in text.tokens:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([said]), use_cache=False).logits[0, -1]
            if token != int(logits.argmax()):
                gap = logits.max() - logits[token]
                assert gap <= greedy.TIE * logits.max().abs()
                assert text.near
                different += 1
                break
            said.append(token)
        else:
            assert len(text.tokens) == most or text.tokens[-1] in ends
        assert not set(text.tokens[:-1]) & set(ends)
    assert different <= 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mamba", "its cache has a LinearAttentionLayer"),
        ("jamba", "its cache has a LinearAttention"),
        ("bert", "a beginning kept moves its logits by"),  # it sees what follows
        ("openai-gpt", "ValueError: "),  # it has no cache
    ],
)
def test_other_models_are_refused_by_name_and_scored_without_sharing(kind, reason):
    model = tiny_lm.model(kind, scale=0.1)
    assert reason in passes.refusal(model, CONTEXT)
    if kind == "mamba":
        asked = requests(documents=5, shots=10)
        close(told(model, asked, share=False)[0], alone(model, asked))


def test_a_wrong_position_after_a_beginning_is_noticed(monkeypatch):
    model = tiny_lm.model("llama", scale=0.1)
    length = DynamicCache.get_seq_length
    monkeypatch.setattr(
        DynamicCache, "get_seq_length", lambda self, *a: max(length(self, *a) - 1, 0)
    )
    assert passes.refusal(model, CONTEXT) is not None


def test_every_budget_gives_the_same_and_fills_its_passes():
    model = tiny_lm.model("llama", scale=0.1)
    asked = requests(1)
    truth, longest = alone(model, asked), max(len(fed) for fed, _ in asked)
    sizes = []
    handle = model.register_forward_pre_hook(
        lambda _, __, given: sizes.append(_size(given)), with_kwargs=True
    )
    for rows in (1, 3, 1000):
        sizes.clear()
        close(told(model, asked, rows)[0], truth)
        assert max(n * length for n, length in sizes) <= rows * longest
    assert len(sizes) < 12
    sizes.clear()
    unshared, tokens = told(model, asked, share=False)
    close(unshared, truth)
    assert tokens > 2 * told(model, asked)[1]
    handle.remove()


def _size(given):
    cache = given.get("past_key_values")
    past = cache.get_seq_length() if cache is not None else 0
    return len(given["input_ids"]), past + given["input_ids"].shape[1]


class Small:
    """A model whose memory holds so many tokens."""

    def __init__(self, model, most):
        self.most, self.refused = most, 0
        self.handle = model.register_forward_pre_hook(self.check, with_kwargs=True)

    def check(self, _, __, given):
        rows, length = _size(given)
        if rows * length > self.most:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_pass_that_does_not_fit_is_halved_and_nothing_is_lost(caplog):
    model = tiny_lm.model("llama", scale=0.1)
    asked = requests(2)
    truth = alone(model, asked)
    small = Small(model, 4 * 60)
    own = budget.Budget(64)
    close(told(model, asked, budget=own)[0], truth)
    assert 0 < small.refused <= 6
    assert "memory ran out in a pass of" in caplog.text
    refused = small.refused
    close(told(model, asked, budget=own)[0], truth)
    assert small.refused == refused  # it is remembered
    small.most = 30
    with pytest.raises(torch.OutOfMemoryError):
        told(model, asked, budget=own)
    small.handle.remove()


def test_generation_goes_on_in_smaller_batches_where_memory_runs_out():
    model = tiny_lm.model("llama", scale=0.1)
    prompts = [fed for fed, _ in requests(3)[::2]]
    small = Small(model, 5 * 70)
    found, made = texts(model, prompts, 6, rows=64)
    small.handle.remove()
    assert small.refused
    check_texts(model, prompts, found, made)


def test_a_budget_found_by_trial_doubles_while_it_fits():
    own = budget.Budget("auto", "cuda")
    start = own.tokens(10)
    for _ in range(3):
        own.passed(own.tokens(10))
    own.passed(10)  # says nothing of larger ones
    assert own.tokens(10) == 8 * start
    assert own.ran_out(32)
    own.passed(own.tokens(10))
    assert own.tokens(10) == 4 * start
    assert not own.ran_out(1)
    bounded = budget.Budget("auto", "cpu")
    for _ in range(9):
        bounded.passed(bounded.tokens(10))
    assert bounded.tokens(10) == budget.MOST["cpu"]


def test_ended_rows_make_room_for_the_next_prompts():
    model = tiny_lm.model("llama", scale=0.1)
    draw = random.Random(5)
    prompts = [[draw.randrange(3, 280) for _ in range(8)] for _ in range(24)]
    order = {tuple(p): n for n, p in enumerate(prompts)}
    lengths = [2 if n % 3 else 20 for n in range(24)]
    made, found, rows = passes.Passes(model), {}, []
    handle = model.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    room = lambda row: lengths[order[tuple(row.tokens.tolist())]]  # noqa: E731
    own = budget.Budget(6)
    for part in greedy.continued(made, beginnings.prompts(prompts), room, lambda said: False, own):
        found |= {text.row.places[0]: text.tokens for text in part}
    handle.remove()
    assert [len(found[n]) for n in range(24)] == lengths
    for n in (0, 1, 12, 23):
        (single,), _ = texts(model, [prompts[n]], lengths[n], ends=())
        assert single.tokens == found[n]
    useful = sum(lengths) - 24 + sum(map(len, prompts))
    assert made.tokens < 1.25 * useful  # without it rows wait for the longest: 20 steps each
    assert max(rows) <= 6 * 28 // 10


def test_choices_share_their_question_where_no_examples_are_shared():
    draw = random.Random(6)
    asked = []
    for _ in range(12):
        question = [draw.randrange(3, 280) for _ in range(30)]
        asked += [([*question, n, n + 1], [n, n + 1, 2]) for n in (20, 30, 40, 50)]
    model = tiny_lm.model("qwen3", scale=0.1)
    found, tokens = told(model, asked)
    close(found, alone(model, asked))
    assert tokens <= 12 * (30 + 4 * 3)


def test_one_token_choices_cost_one_row():
    asked = [([9, 8, 7, n], [c]) for n in range(5) for c in (11, 12, 13, 14)]
    rows = beginnings.scored(asked)
    assert len(rows) == 5
    assert all(len(row.answers) == 4 and len(row) == 4 for row in rows)


def test_a_tree_holds_every_row_once_below_its_own_beginning():
    for seed in range(5):
        rows = beginnings.scored(requests(seed, shots=seed * 10, documents=60))
        seen = []

        def walk(node, above, seen=seen):
            assert node.depth > above or not above
            for shared, group in node.groups:
                for row in group:
                    seen.append(row)
                    assert shared <= row.first
                    assert row.tokens[: node.depth].tolist() == node.tokens[: node.depth].tolist()
                    assert row.tokens[:shared].tolist() == group[0].tokens[:shared].tolist()
            for child in node.below:
                walk(child, node.depth)

        walk(beginnings.tree(rows), 0)
        assert sorted(map(id, seen)) == sorted(map(id, rows))
