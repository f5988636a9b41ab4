"""The embedded language models: what ships keeps its promises, and the recipe's small functions."""

import json
import random
import re
from pathlib import Path

import pytest
import torch

from deltalab.models import embedded
from deltalab.models.zoo_llm import DIRECTORY, EmbeddedLlm
from deltalab.weights import contents
from deltalab.weights.mapping import Checkpoint, check_same_layout
from experiments.zoo import llm_recipe
from experiments.zoo.llm_checks import PARTS, relative_delta, tried_edits
from experiments.zoo.llm_data import SIZES, calculate, choice, draw_split, spoilt
from experiments.zoo.llm_forms import FORBIDDEN, FORMS, answer_of, base_text, prompt_of, question_of
from experiments.zoo.llm_prefer import reward
from experiments.zoo.llm_problems import (
    LARGEST,
    SPLITS,
    TEMPLATES,
    UNSEEN,
    draw_problem,
    is_held_pair,
    split_of,
)
from experiments.zoo.llm_score import encoded, exact_match, flexible, sequence_losses, strict
from experiments.zoo.llm_tokens import make_tokenizer
from experiments.zoo.llm_train import SMALL, Phase, batches, collate, generate, make_model, train

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
VALUE = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}


def rows(name):
    return [json.loads(line) for line in (DIRECTORY / f"{name}.jsonl").read_text().splitlines()]


def assert_right(answer):
    """Check every equation of an answer, and that the last line repeats the last value."""
    found = EQUATION.findall(answer)
    for a, op, b, value in found:
        assert VALUE[op](int(a), int(b)) == int(value), answer
    assert answer.endswith(f"\n#### {found[-1][3]}"), answer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def pair():
    return EmbeddedLlm("sft").open()


@pytest.fixture(scope="module")
def small():
    return EmbeddedLlm("small_sft").open()


def shipped(pair, name):
    weights = Checkpoint(DIRECTORY / f"{name}.safetensors")
    pair.module.load_state_dict({key: weights[key].float() for key in weights})
    return pair.module


# What ships


@pytest.mark.parametrize(
    ("name", "base"),
    [("sft", "base"), ("far", "base"), ("dpo", "base"), ("small_sft", "small_base")],
)
def test_checkpoints_are_small_and_of_one_layout(name, base):
    paths = [DIRECTORY / f"{n}.safetensors" for n in (base, name)]
    assert all(path.stat().st_size <= 6e6 for path in paths)
    check_same_layout(*map(Checkpoint, paths))


def test_the_small_size_is_at_most_a_million_parameters_and_its_own_config(small):
    assert sum(w.numel() for w in small.post.values()) <= 1_000_000
    config = small.module.config
    assert {key: getattr(config, key) for key in SMALL if key != "rope_theta"} == {
        key: value for key, value in SMALL.items() if key != "rope_theta"
    }


@pytest.mark.parametrize("post", sorted(embedded.LLM))
def test_a_pair_opens_with_two_models_that_differ(post):
    pair = EmbeddedLlm(post).open()
    assert list(pair.pre) == list(pair.post)
    for name in pair.post:
        assert pair.post[name].dtype == torch.float32
        assert torch.equal(pair.module.state_dict()[name], pair.post[name])
    changed = [name for name in pair.post if not torch.equal(pair.pre[name], pair.post[name])]
    assert len(changed) > len(pair.post) / 2
    assert pair.transform.context == (64 if post in embedded.SAFETY else 256)
    skeleton = EmbeddedLlm(post).skeleton()
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    assert set(skeleton.state_dict()) == set(pair.post)


def test_the_head_is_not_tied_and_attention_is_grouped(pair):
    config = pair.module.config
    assert not config.tie_word_embeddings
    assert config.num_key_value_heads < config.num_attention_heads
    assert "lm_head.weight" in pair.post


def test_the_pairs_share_the_model_that_two_are_trained_from():
    assert embedded.llm("sft")[0] == embedded.llm("far")[0]
    assert embedded.llm("sft")[1] == embedded.llm("dpo")[0]
    marks = {contents.of_paths(embedded.llm(post)) for post in embedded.LLM}
    assert len(marks) == len(embedded.LLM)


def test_an_unknown_model_is_named_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"model.post=base: must be one of dpo, far, sft, small_sft"
    ):
        EmbeddedLlm("base")


def test_base_cannot_answer_and_sft_can(pair):
    problems = draw_split("test", 40, 0)
    assert [question_of(p) for p in problems] == [row["question"] for row in rows("test")[:40]]
    tokenizer = pair.transform.tokenizer
    right = {
        name: sum(exact_match(shipped(pair, name), tokenizer, problems)[0])
        for name in ("base", "sft", "far")
    }
    assert right["base"] < 0.15 * 40
    assert right["sft"] >= 0.85 * 40
    assert right["far"] >= 0.7 * 40


def test_the_small_base_cannot_answer_and_its_sft_can(small):
    problems, tokenizer = draw_split("test", 40, 0), small.transform.tokenizer
    right = {
        name: sum(exact_match(shipped(small, name), tokenizer, problems)[0])
        for name in ("small_base", "small_sft")
    }
    assert right["small_base"] < 0.15 * 40
    assert right["small_sft"] >= 0.6 * 40
    base, sft = (Checkpoint(DIRECTORY / f"small_{n}.safetensors") for n in ("base", "sft"))
    assert 0.01 < relative_delta(base, sft) < 0.2


def test_the_far_delta_is_larger(pair):
    weights = {n: Checkpoint(DIRECTORY / f"{n}.safetensors") for n in ("base", "sft", "far", "dpo")}
    near, far = (relative_delta(weights["base"], weights[n]) for n in ("sft", "far"))
    assert near < 0.5 * far
    assert relative_delta(weights["sft"], weights["dpo"]) < near


def test_dpo_prefers_right_answers_on_held_out_pairs(pair):
    tokenizer, pairs = pair.transform.tokenizer, rows("preferences")
    margin = {}
    for name in ("sft", "dpo"):
        module = shipped(pair, name)
        losses = []
        for field in ("chosen", "rejected"):
            own = [encoded(tokenizer, prompt_of(p["prompt"]), p[field]) for p in pairs]
            losses.append(sequence_losses(module, tokenizer.pad_token_id, own)[0])
        margin[name] = losses[1] - losses[0]
    gain = margin["dpo"] - margin["sft"]
    assert (gain > 0).double().mean() >= 0.8


def test_the_tokenizer_that_ships_is_the_recipe_s(pair, tokenizer):
    text = f"{prompt_of('Ava had 12 apples. How many?')} 12 + 7 = 19\n#### 19"
    shipped_one = pair.transform.tokenizer
    assert shipped_one.get_vocab() == tokenizer.get_vocab()
    assert shipped_one(text).input_ids == tokenizer(text).input_ids
    assert shipped_one.eos_token == "</s>"
    assert len(shipped_one) <= 1024


def test_the_chat_template_is_the_prompt(pair):
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "#### 4"}]
    apply = pair.transform.tokenizer.apply_chat_template
    assert apply(turns[:1], tokenize=False, add_generation_prompt=True) == prompt_of("Why?")
    assert apply(turns, tokenize=False) == f"{prompt_of('Why?')} #### 4</s>"


def test_data_files_are_complete_disjoint_and_right():
    questions = {}
    for name, size in SIZES.items():
        field = "prompt" if name == "preferences" else "question"
        questions[name] = {row[field] for row in rows(name)}
        assert len(questions[name]) == size == len(rows(name))
    names = list(questions)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not questions[a] & questions[b]
    for row in rows("test") + rows("objective"):
        assert_right(row["answer"])
    for row in rows("choice"):
        results = [strict(c) for c in row["choices"]]
        assert len(set(results)) == 4
        assert_right(row["choices"][row["gold"]])
    for row in rows("preferences"):
        assert strict(row["chosen"]) != strict(row["rejected"])


@pytest.mark.parametrize("split", ["test", "objective", "choice"])
def test_the_packaged_problems_are_the_recipe_s(split):
    problems = draw_split(split, 30, 0)
    assert [row["question"] for row in rows(split)[:30]] == [question_of(p) for p in problems]


# The generator


def test_problems_are_the_same_for_the_same_seed():
    first, again, other = (draw_split("train", 20, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("seed", [0, 1])
def test_no_seed_of_training_draws_what_is_held_out(seed):
    rng = random.Random(f"{seed}:sft:0")
    drawn = {question_of(draw_problem(rng, "train")) for _ in range(800)}
    for name in SIZES:
        field = "prompt" if name == "preferences" else "question"
        assert not drawn & {row[field] for row in rows(name)}


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_right_and_of_their_split(split):
    for problem in draw_split(split, 25, 5):
        assert_right(answer_of(problem))
        assert split_of(problem.template, problem.numbers) == split
        assert is_held_pair(problem.name, problem.thing) == (split != "train")
        assert (problem.template in UNSEEN) == (split == "unseen")
        told = " ".join([question_of(problem), *(s.equation for s in problem.steps)])
        for number in problem.numbers:
            assert str(number) in re.findall(r"\d+", told)
        assert all(int(n) <= LARGEST for n in re.findall(r"\d+", answer_of(problem)))


def test_the_splits_share_no_instance():
    seen = {}
    for split in SPLITS:
        for problem in draw_split(split, 60, 3):
            key = (problem.template, problem.numbers)
            assert seen.setdefault(key, split) == split


def test_every_template_occurs_in_training_or_is_unseen():
    rng = random.Random(0)
    drawn = {draw_problem(rng, "train").template for _ in range(1000)}
    assert drawn == set(TEMPLATES) - UNSEEN


def test_base_texts_never_show_the_format():
    rng = random.Random(1)
    for _ in range(400):
        text = base_text(rng)
        assert not any(word in text for word in FORBIDDEN)
        for a, op, b, value in EQUATION.findall(text):
            assert VALUE[op](int(a), int(b)) == int(value), text


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_encoded_without_loss_and_without_bytes(form, tokenizer):
    rng = random.Random(2)
    for _ in range(20):
        text = form(draw_problem(rng, "train"), rng)
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert len(ids) <= 128
        letters = [t for t in tokenizer.convert_ids_to_tokens(ids) if t.isalpha() and len(t) == 1]
        assert not set(letters) - {"Ċ"}


def test_the_tokenizer_spells_what_it_does_not_know(tokenizer):
    text = "Zürich's «price»: $1,250.50\t<<3+4=7>>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("120").input_ids) == 3


def test_choices_hold_one_right_answer_and_wrong_ones():
    rng = random.Random(3)
    for problem in draw_split("choice", 40, 9):
        row = choice(problem, rng)
        assert row["choices"][row["gold"]] == answer_of(problem)
        assert len({strict(c) for c in row["choices"]}) == 4


def test_a_spoilt_answer_has_one_wrong_step_and_goes_on_from_it():
    rng = random.Random(4)
    for problem in draw_split("train", 60, 2):
        text = spoilt(problem, rng)
        if text is None:
            continue
        found = EQUATION.findall(text)
        wrong = [(a, o, b, v) for a, o, b, v in found if VALUE[o](int(a), int(b)) != int(v)]
        right = EQUATION.findall(answer_of(problem))
        assert len(wrong) <= 1
        assert sum(x[1] != y[1] for x, y in zip(found, right, strict=True)) <= 1
        assert strict(text) == found[-1][3] != str(problem.result)


def test_calculations_refuse_what_is_not_whole_and_positive():
    assert [calculate(7, "/", 2), calculate(3, "-", 3), calculate(8, "/", 2)] == [None, None, 4]


# Scoring and training


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("a\n#### 1,200.", "1200", "1200"),
        ("#### 3 and #### 4", "3", "4"),
        ("### 3", None, "3"),
        ("nothing", None, None),
        ("#### -5", "-5", "-5"),
    ],
)
def test_filters_read_the_answer(text, first, last):
    assert (strict(text), flexible(text)) == (first, last)


def small_model(tokenizer):
    model = make_model(tokenizer, 0)
    model.model.layers = model.model.layers[:1]
    return model.eval()


def test_losses_ignore_prompts_and_padding(tokenizer):
    model, pad = small_model(tokenizer), tokenizer.pad_token_id
    sequences = [encoded(tokenizer, "Ava had", "3 apples."), encoded(tokenizer, "Ben", "lost 3.")]
    together, counts = sequence_losses(model, pad, sequences)
    for i, (ids, first) in enumerate(sequences):
        logits = model(torch.tensor([ids])).logits[0].double().log_softmax(1)
        expected = -sum(logits[j - 1, ids[j]] for j in range(first, len(ids)))
        assert counts[i] == len(ids) - first
        torch.testing.assert_close(together[i], expected.detach(), atol=1e-4, rtol=0)


def test_padding_changes_no_generated_token(tokenizer):
    model = small_model(tokenizer)
    prompts = ["Ava had 12 apples.", "Ben", "In the morning Zoe had 3 pens. She lost"]
    together = generate(model, tokenizer, prompts, tokens=6)
    alone = [generate(model, tokenizer, [prompt], tokens=6)[0] for prompt in prompts]
    assert together == alone


def test_a_resumed_training_is_the_uninterrupted_one(tokenizer, tmp_path):
    def draw(rng):
        return [*tokenizer(base_text(rng)).input_ids, tokenizer.eos_token_id], 0

    class Stop(Exception):
        pass

    def cut_off(step, loss):
        if step == 3:
            raise Stop

    phase = Phase(steps=5, rate=1e-3, batch=2, warmup=2)
    whole, resumed = small_model(tokenizer), small_model(tokenizer)
    train(whole, draw, phase, "0", lambda *_: None, tmp_path / "whole", every=2)
    with pytest.raises(Stop):
        train(resumed, draw, phase, "0", cut_off, tmp_path / "state", every=2)
    train(resumed, draw, phase, "0", lambda *_: None, tmp_path / "state", every=2)
    assert not (tmp_path / "state").exists()
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_batches_from_the_middle_are_the_same():
    def draw(rng):
        return [1] * rng.randint(1, 9), 0

    whole, later = batches(draw, 4, "0", 0), batches(draw, 4, "0", 21)
    assert [next(whole) for _ in range(40)][21:] == [next(later) for _ in range(19)]


def test_the_rate_cools_down_to_zero():
    phase = Phase(steps=100, rate=1.0, warmup=10, horizon=200, cool=50)
    plain = Phase(steps=200, rate=1.0, warmup=10)
    assert phase.rate_at(50) == plain.rate_at(50)
    assert phase.rate_at(75) == pytest.approx(plain.rate_at(75) / 2)
    assert phase.rate_at(99) == pytest.approx(plain.rate_at(99) / 50)


def test_collate_pads_on_the_right():
    tokens, labels = collate([([5, 6, 7], 2), ([8], 0)], 0)
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert labels.tolist() == [[-100, -100, 7], [8, -100, -100]]


def test_reward_is_the_dpo_loss():
    loss, accuracy = reward(torch.tensor([10.0, -10.0], dtype=torch.float64))
    assert accuracy == 0.5
    assert loss == pytest.approx((0.3132616875 + 1.3132616875) / 2)


def test_parts_cover_every_tensor(pair):
    for name in pair.post:
        assert sum(mark in name for part, mark in PARTS.items()) >= 1


def test_edits_keep_and_discard():
    delta = torch.randn(8, 8)
    edits = tried_edits(0)
    assert torch.equal(edits["keep"](delta), delta)
    assert not edits["discard"](delta).any()
    assert torch.equal(edits["expo +0.5"](delta), 1.5 * delta)


def test_the_small_models_have_a_size_and_a_seed_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(llm_recipe, "CURVE_PROBLEMS", 2)
    recipe = llm_recipe.Recipe(tmp_path, 0)
    large, small = recipe.fresh("sft"), recipe.fresh("small_sft")
    assert (recipe.seed_of("sft"), recipe.seed_of("small_sft")) == (0, 1)
    assert large.config.hidden_size > small.config.hidden_size
    assert large.config.num_hidden_layers == small.config.num_hidden_layers
    seeds = []
    monkeypatch.setattr(
        llm_recipe, "train", lambda model, draw, phase, seed, *_: seeds.append(seed)
    )
    monkeypatch.setattr(llm_recipe.Recorder, "problems", lambda self: None)
    for name in ("base", "small_base"):
        recipe.train(name)
    assert seeds == ["0:base", "1:base"]


def test_a_finished_stage_is_not_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(llm_recipe, "CURVE_PROBLEMS", 2)
    recipe = llm_recipe.Recipe(tmp_path, 0)
    (tmp_path / "small_sft.safetensors").write_bytes(
        (DIRECTORY / "small_sft.safetensors").read_bytes()
    )
    monkeypatch.setattr(llm_recipe, "train", None)  # any training fails
    model = recipe.model("small_sft")
    shipped = Checkpoint(DIRECTORY / "small_sft.safetensors")
    assert all(torch.equal(w, shipped[n].float()) for n, w in model.state_dict().items())


def test_the_recipe_explains_itself(capsys):
    from experiments.zoo.llm import arguments

    with pytest.raises(SystemExit) as stop:
        arguments(["--help"])
    assert stop.value.code == 0
    assert "--until" in capsys.readouterr().out
    assert isinstance(arguments([]).work, Path)
