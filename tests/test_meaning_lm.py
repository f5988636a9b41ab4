"""Well-formed inputs of language models that mean something else than they seem to, by kind.

Every kind has its right value from elsewhere: transformers itself, a difference quotient, one
sequence at a time, arithmetic by hand.
"""

import copy
import json

import pytest
import texts
import torch
from transformers import AutoModelForCausalLM, GenerationMixin, LlamaConfig, LlamaForCausalLM

from deltalab.data.text import Encoder
from deltalab.data.tokens import Coded, padded
from deltalab.evaluators.lm import hflm, requests, tasks
from deltalab.inference import greedy
from deltalab.loss import distill
from deltalab.loss.answers import AnswerLoss, DpoLoss
from deltalab.loss.objectives import measure
from deltalab.loss.passes import gradient
from deltalab.loss.quadrature import Rule
from deltalab.loss.riemann import term
from deltalab.models.hf_llm import HfPair
from deltalab.models.zoo_llm import EmbeddedLlm

pytestmark = pytest.mark.meaning("padding, generation and templates")

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


# Generation.

ASKED = [f"Question: what is {i} plus one?\nAnswer:" for i in range(4)]


def said(found, settings, size=2, context=128):
    """Return what lm-eval's requests with these settings get from the live module, and lengths."""
    from lm_eval.api.instance import Instance

    lengths, whole, continued = [], GenerationMixin.generate, greedy.continued

    def watched(model, *args, **given):
        out = whole(model, *args, **given)
        lengths.append(out.shape[1] - given["input_ids"].shape[1])
        assert out.shape[1] <= context
        return out

    def followed(*args):
        """What is decoded greedily, without `generate`."""
        for group in continued(*args):
            lengths.extend(len(text.tokens) for text in group)
            assert all(len(text.row) + len(text.tokens) <= context for text in group)
            yield group

    asked = [
        Instance("generate_until", {}, (t, copy.deepcopy(settings)), n) for n, t in enumerate(ASKED)
    ]
    live = hflm.wrapper(found.module, copy.deepcopy(found.transform.tokenizer), context, size)
    with live(found.module) as lm, pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerationMixin, "generate", watched)
        patch.setattr(greedy, "continued", followed)
        return lm.generate_until(asked), max(lengths)


@pytest.mark.parametrize(
    "file",
    [
        {"max_new_tokens": 40},
        {"max_new_tokens": 400},
        {"max_new_tokens": 2},
        {"max_length": 4},
        {"max_length": 90, "max_new_tokens": 3, "max_time": 1e-9},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 9.0, "top_k": 3},
        {"return_dict_in_generate": True, "output_scores": True},
        {"stop_strings": ["never said at all"]},
    ],
    ids=str,
)
def test_what_a_task_says_of_its_answers_wins(file, pair):
    plain, most = said(opened(pair), {"until": ["\n\n"], "max_gen_toks": 7, "do_sample": False})
    assert most == 7
    configure(pair[1], "generation_config.json", eos_token_id=2, bos_token_id=1, **file)
    found = opened(pair, attn="eager")
    assert all(getattr(found.module.generation_config, k) == v for k, v in file.items())
    again, length = said(found, {"until": ["\n\n"], "max_gen_toks": 7, "do_sample": False})
    assert (again, length) == (plain, 7)


def test_what_a_task_leaves_open_the_checkpoint_says(pair):
    """As for the lm_eval command on the saved checkpoint."""
    configure(pair[1], "generation_config.json", eos_token_id=2, repetition_penalty=50.0)
    settings = {"until": ["\n\n"], "max_gen_toks": 9, "do_sample": False}
    found = opened(pair)
    ids = found.transform.tokenizer(ASKED[0], return_tensors="pt").input_ids
    theirs = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32)
    drawn = theirs.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)[
        0, ids.shape[1] :
    ]
    right = found.transform.tokenizer.decode(drawn, skip_special_tokens=True)
    assert said(found, settings, size=1)[0][0] == right
    configure(pair[1], "generation_config.json", repetition_penalty=1.0)
    assert said(opened(pair, attn="eager"), settings, size=1)[0][0] != right


@pytest.mark.parametrize("size", [1, 4])
def test_beams_end_at_stops_as_transformers_ends_them(size, pair):
    found = opened(pair)
    tokenizer = found.transform.tokenizer
    wanted = []
    plain = [said(found, {"until": [], "max_gen_toks": 12, "num_beams": 3}, size=size)[0]]
    stop = next(word for text in plain[0] for word in (text[4:5], text[3:4]) if word.strip())
    for text in ASKED:
        ids = tokenizer(text, return_tensors="pt").input_ids
        drawn = found.module.generate(
            ids, max_new_tokens=12, num_beams=3, do_sample=False, pad_token_id=0,
            stop_strings=[stop], tokenizer=tokenizer,
        )  # fmt: skip
        answer = tokenizer.decode(drawn[0, ids.shape[1] :], skip_special_tokens=True)
        wanted.append(answer.split(stop)[0])
    settings = {"until": [stop], "max_gen_toks": 12, "num_beams": 3, "do_sample": False}
    assert said(found, settings, size=size)[0] == wanted
    assert wanted != plain[0]


def test_the_length_that_is_set_is_the_only_one():
    own = {"max_gen_toks": 256, "max_length": 999, "until": ["x"]}
    rest = {"until": ["x"]}
    assert tasks.generation(own, {}, None) == own
    assert tasks.generation(own, {}, 5) == {**rest, "max_gen_toks": 5}
    assert tasks.generation(own, {"max_new_tokens": 7}, 5) == {**rest, "max_gen_toks": 7}
    assert tasks.generation(own, {"num_beams": 2}, None) == {**own, "num_beams": 2}


# Chat templates.

TURNS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<U>{{ m['content'] }}"
    "{% elif m['role'] == 'system' %}SYSTEM{% else %}"
    "<A>{{ ANSWER }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<A>BEGUN{% endif %}"
)
ANSWERS = {"plain": "m['content']", "stripped": "m['content'].split('</think>')[-1] | trim"}
QUESTION, SECOND = "What is 1 plus 1?", "And 2 plus 2?"


def template(answer, begun="", system="{{ m['content'] }}"):
    return (
        TURNS.replace("ANSWER", ANSWERS[answer]).replace("BEGUN", begun).replace("SYSTEM", system)
    )


@pytest.mark.parametrize(
    ("chosen", "said", "right"),
    [
        (template("plain"), "It is 2.", "It is 2.</s>"),
        (template("stripped", "<think>\n"), "It is 2.", "It is 2.</s>"),
        (template("stripped", "<think>\n"), "<b>2</b>", "<b>2</b></s>"),
        (template("stripped", "<think>\n"), "<think>\none and one</think>\n2", "2</s>"),
        (template("plain", "<think>\n"), "<think>\na</think>\n2", "a</think>\n2</s>"),
        (template("stripped", "<think>\n"), "<t", "<t</s>"),
    ],
)  # fmt: skip
def test_a_template_that_begins_the_answer(chosen, said, right):
    tokenizer = copy.deepcopy(texts.tokenizer())
    tokenizer.chat_template = chosen
    encoder = Encoder(tokenizer, 256, chat=True)
    marked = encoder.pair(QUESTION, " ", said, "file:1")
    assert [marked.text[slice(*span)] for span in marked.spans] == [right]
    turns = [QUESTION, said, SECOND, said]
    roles = ["user", "assistant"] * 2
    chat = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]
    marked = encoder.dialogue(chat, "file:1")
    assert [marked.text[slice(*span)] for span in marked.spans] == [right, right]


def test_a_template_that_rewrites_earlier_turns_is_refused_for_that():
    tokenizer = copy.deepcopy(texts.tokenizer())
    tokenizer.chat_template = template("plain").replace(
        "<A>{{", "<A>{{ '' if loop.last else 'x' }}{{"
    )
    encoder = Encoder(tokenizer, 256, chat=True)
    chat = [{"role": r, "content": r} for r in ("user", "assistant", "user", "assistant")]
    assert encoder.dialogue(chat[:2], "file:1").spans
    with pytest.raises(ValueError, match="message 1 otherwise when it is followed by more"):
        encoder.dialogue(chat, "file:1")


def test_a_template_without_a_system_role():
    tokenizer = copy.deepcopy(texts.tokenizer())
    tokenizer.chat_template = template("plain", system="{{ raise_exception('no system role') }}")
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    assert requests.chat(tokenizer)(turns) == "<U>Hi<A>"
    with pytest.raises(ValueError, match="the chat template refuses it"):
        Encoder(tokenizer, 256, chat=True).render(turns, "file:1")
