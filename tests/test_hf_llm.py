"""Pairs of Hugging Face language models: opened, edited, saved and loaded by transformers."""

import json
import logging
import shutil
import sys

import pytest
import texts
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

import deltalab.save as save
from deltalab import options
from deltalab.apply import editing
from deltalab.apply.extras import Extras
from deltalab.edits.dare import Dare
from deltalab.edits.discard import Discard
from deltalab.edits.ties import Ties
from deltalab.keys import Choices
from deltalab.models import hub, vocabulary
from deltalab.models.hf_llm import HfPair
from deltalab.run.building import build, prepare
from deltalab.settings import conf_dir, tidy
from deltalab.weights.mapping import loaded

IDS = torch.randint(6, 250, (2, 24), generator=torch.Generator().manual_seed(0))
COMMON = {
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
ARCHITECTURES = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma2": ("Gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "phi": ("Phi", {"partial_rotary_factor": 0.5}),
}
RENAMED = {"gpt_neox": ("GPTNeoX", {})}


def write(path, architecture="llama", seed=0, scale=1.0, dtype=torch.bfloat16, **changes):
    """Write a randomly initialised model in shards, with its tokenizer."""
    import transformers

    name, own = (ARCHITECTURES | RENAMED)[architecture]
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **own, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases begin equal in every model
            parameter += scale * 0.02 * torch.randn(parameter.shape).to(dtype)
    model.generation_config.eos_token_id = [2, 4]
    model.save_pretrained(path, max_shard_size="30KB")
    texts.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Return the directories of an architecture's pair, written once."""
    made = {}

    def get(architecture):
        if architecture not in made:
            place = tmp_path_factory.mktemp(architecture)
            made[architecture] = (
                write(place / "pre", architecture),
                write(place / "post", architecture, scale=1.1),
            )
        return made[architecture]

    return get


@pytest.fixture
def pair(pairs, tmp_path):
    """A Llama pair that a test may damage."""
    for side, path in zip(("pre", "post"), pairs("llama"), strict=True):
        shutil.copytree(path, tmp_path / side)
    return tmp_path / "pre", tmp_path / "post"


@pytest.fixture
def tied(pairs, tmp_path):
    """A tied pair, likewise."""
    for side, path in zip(("pre", "post"), pairs("llama_tied"), strict=True):
        shutil.copytree(path, tmp_path / side)
    return tmp_path / "pre", tmp_path / "post"


def spec(paths, **settings):
    return HfPair(str(paths[0]), str(paths[1]), **{"device": "cpu", **settings})


def reference(path, **settings):
    from transformers import AutoModelForCausalLM

    settings = {"dtype": torch.bfloat16, **settings}
    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True, **settings).eval()


@torch.no_grad()
def logits(module):
    return module(IDS).logits


def edited(found, edit, select="all", seed=0):
    extras = Extras(edit.needs, seed)
    return dict(editing.edited(found.pre, found.post, edit, select, extras))


def stream(paths, out, *settings):
    return save.save(
        ["model=hf_llm", f"model.pre={paths[0]}", f"model.post={paths[1]}", f"out={out}", *settings]
    )


def merge(path, change):
    """Rewrite a directory's shards as one file, its tensors changed."""
    weights = {}
    for file in path.glob("*.safetensors"):
        weights |= load_file(file)
        file.unlink()
    (path / "model.safetensors.index.json").unlink()
    change(weights)
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def configure(path, file="config.json", **changes):
    content = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps(content | changes))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.meaning("tables, ties and names of tensors")
def test_a_pair_opens_as_transformers_opens_it(architecture, pairs):
    paths = pairs(architecture)
    found = spec(paths).open()
    assert len(list(paths[1].glob("*.safetensors"))) > 1, "not in shards"
    theirs = reference(paths[1])
    assert torch.equal(logits(found.module), logits(theirs))
    with loaded(found.module, found.pre, restore=found.post):
        assert torch.equal(logits(found.module), logits(reference(paths[0])))
    assert torch.equal(logits(found.module), logits(theirs))
    ours = dict(found.module.named_buffers())
    for name, buffer in theirs.named_buffers():
        assert ours[name].dtype == buffer.dtype, name
        assert torch.equal(ours[name], buffer), name
    assert found.module.generation_config.eos_token_id == [2, 4]
    assert not found.module.training
    parameters = {id(p): p.numel() for p in found.module.parameters()}
    assert sum(found.post[name].numel() for name in found.post) == sum(parameters.values())
    assert {id(found.module.get_parameter(name)) for name in found.post} == set(parameters)


DRAWS = [(), ("draws=independent",), ("draws=independent", "label=a pair of mine")]


def test_the_command_draws_what_a_point_draws(pairs, tmp_path):
    """With every salt, which the file's manifest says; numbers are those that were meant."""
    paths, made = pairs("llama"), []
    found = spec(paths).open()
    given = ["edit=dare", "edit.p=.30000000000000004", "select=all", "seed=3"]
    given += ["model=hf_llm", f"model.pre={paths[0]}", f"model.post={paths[1]}"]
    for number, more in enumerate(DRAWS):
        out = tmp_path / str(number)
        manifest = save.save([*given, *more, f"out={out}"])
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            cfg = compose("config", [*given, *more])
        values = tidy(options.plain(cfg))
        point = prepare(values, Choices("hf_llm", "dare", "classification"))
        assert manifest["salt"] == point.salt == ("", "hf_llm", "a pair of mine")[number]
        extras = Extras.of(point.edit, found, seed=point.seed, salt=point.salt)
        live = dict(editing.edited(found.pre, found.post, point.edit, point.select, extras))
        written = {n: t for f in out.glob("*.safetensors") for n, t in load_file(f).items()}
        assert set(live) == set(written)
        assert all(torch.equal(live[name], written[name]) for name in live)
        made.append(written)
    name = next(n for n in made[0] if made[0][n].ndim > 1)
    assert not any(torch.equal(made[i][name], made[i - 1][name]) for i in range(3))
    with pytest.raises(ValueError, match="draws=some: must be one of paired, independent"):
        save.save([*given, "draws=some", f"out={tmp_path / 'bad'}"])
    with pytest.raises(ValueError, match="seed=x: must be a whole number"):
        save.save([*given[:2], *given[4:], "seed=x", f"out={tmp_path / 'bad'}"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("edit", [Dare(p=0.5, k=0.0), Ties(keep=0.3, scope="model")], ids=str)
def test_edited_saved_and_loaded_is_what_was_evaluated(architecture, edit, pairs, tmp_path):
    """In memory, streamed by the command, and loaded again: the same bits and the same logits."""
    paths = pairs(architecture)
    found = spec(paths).open()
    changed = edited(found, edit)
    name, settings = {
        Dare: ("dare", ["edit.p=.5"]),
        Ties: ("ties", ["edit.keep=.3", "edit.scope=model"]),
    }[type(edit)]
    stream(paths, tmp_path / "out", f"edit={name}", *settings, "select=all")
    streamed = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        streamed |= load_file(file)
    assert set(changed) == set(streamed)
    for name, tensor in changed.items():
        assert torch.equal(tensor.view(torch.int16), streamed[name].view(torch.int16)), name
    with loaded(found.module, changed, restore=found.post):
        live = logits(found.module)
        found.module.save_pretrained(tmp_path / "live", max_shard_size="30KB")
    assert not torch.equal(live, logits(found.module))
    assert torch.equal(live, logits(reference(tmp_path / "out")))
    assert torch.equal(live, logits(reference(tmp_path / "live")))


@pytest.mark.meaning("tables, ties and names of tensors")
def test_tensors_that_transformers_renames_are_edited_under_the_files_names(pairs, tmp_path):
    paths = pairs("gpt_neox")
    found = spec(paths).open()
    assert "embed_out.weight" in found.post
    assert "lm_head.weight" not in found.post
    stream(paths, tmp_path / "out", "edit=dare", "edit.p=.5", "select=all")
    changed = edited(found, Dare(p=0.5, k=0.0))
    with loaded(found.module, changed, restore=found.post):
        assert torch.equal(logits(found.module), logits(reference(tmp_path / "out")))
    assert torch.equal(logits(found.module), logits(reference(paths[1])))


def test_the_streamed_directory_holds_the_tokenizer_and_all_else(pairs, tmp_path):
    from transformers import AutoTokenizer

    paths = pairs("llama")
    stream(paths, tmp_path / "out", "edit=dare", "edit.p=.9")
    again = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert again.get_vocab() == texts.tokenizer().get_vocab()
    assert again.chat_template == texts.TEMPLATE
    for file in paths[1].iterdir():
        assert (tmp_path / "out" / file.name).is_file(), file.name
    assert reference(tmp_path / "out").generation_config.eos_token_id == [2, 4]


def both_names(paths, sides=("pre", "post")):
    """Save the head of a tied pair too, as some programs do."""
    for path in paths:
        if path.name in sides:
            merge(path, lambda w: w.update({"lm_head.weight": w[TABLE].clone()}))


TABLE = "model.embed_tokens.weight"


@pytest.mark.parametrize("select", ["all", "linear", "matrices", "{include: [lm_head]}"])
@pytest.mark.parametrize("sides", [("pre", "post"), ("post",)])
@pytest.mark.meaning("tables, ties and names of tensors")
def test_a_tied_tensor_with_two_names_is_edited_once(select, sides, tied, tmp_path):
    both_names(tied, sides)
    stream(tied, tmp_path / "out", "edit=dare", "edit.p=.5", f"select={select}")
    streamed = load_file(tmp_path / "out" / "model.safetensors")
    found = spec(tied).open()
    chosen = {"preset": "all", "include": ["lm_head"]} if "include" in select else select
    changed = edited(found, Dare(p=0.5, k=0.0), chosen)
    assert len({TABLE, "lm_head.weight"} & set(changed)) == 1
    assert "lm_head.weight" in found.post
    for name, tensor in changed.items():
        assert torch.equal(tensor, streamed[name]), name
        assert not torch.equal(tensor, found.post[name]), name
    with loaded(found.module, changed, restore=found.post) as module:
        assert module.lm_head.weight is module.model.embed_tokens.weight
        live = logits(module)
    assert torch.equal(live, logits(reference(tmp_path / "out")))
    assert torch.equal(logits(found.module), logits(reference(tied[1])))


@pytest.mark.meaning("tables, ties and names of tensors")
def test_a_tied_tensor_with_two_values_is_refused(tied):
    merge(tied[1], lambda w: w.update({"lm_head.weight": w[TABLE] + 1}))
    with pytest.raises(ValueError, match=r"model\.post: 'model.embed_tokens.weight' and 'lm_head"):
        spec(tied).open()


@pytest.mark.meaning("tables, ties and names of tensors")
def test_a_tied_tensor_saved_as_the_head_alone(tied):
    merge(tied[1], lambda w: w.update({"lm_head.weight": w.pop(TABLE)}))
    found = spec(tied).open()
    assert "lm_head.weight" in list(found.post)
    assert TABLE not in list(found.post)
    discarded = edited(found, Discard())
    with loaded(found.module, discarded, restore=found.post):
        assert torch.equal(logits(found.module), logits(reference(tied[0])))


def test_pytorch_files_give_the_same_pair(pair):
    first = spec(pair).open()
    wanted = {name: first.post[name].clone() for name in first.post}
    live = logits(first.module)
    post, index = pair[1], {}
    for file in sorted(post.glob("*.safetensors")):
        name = file.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        weights = load_file(file)
        torch.save(weights, post / name)
        index |= dict.fromkeys(weights, name)
        file.unlink()
    (post / "model.safetensors.index.json").unlink()
    content = {"metadata": {}, "weight_map": index}
    (post / "pytorch_model.bin.index.json").write_text(json.dumps(content))
    again = HfPair(str(pair[0]), str(post), device="cpu", context=64).open()
    assert again is not first
    assert torch.equal(logits(again.module), live)
    assert all(torch.equal(again.post[name], wanted[name]) for name in wanted)


@pytest.mark.meaning("tables, ties and names of tensors")
def test_weights_are_cast_to_the_dtype_evaluated(pairs):
    found = spec(pairs("llama"), dtype="float32").open()
    assert {found.post[n].dtype for n in found.post} == {torch.float32}
    assert {p.dtype for p in found.module.parameters()} == {torch.float32}
    assert found.module.config.dtype == torch.float32
    theirs = logits(reference(pairs("llama")[1], dtype=torch.float32))
    assert torch.equal(logits(found.module), theirs)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_attention_is_as_asked(attn, pairs):
    found = spec(pairs("llama"), attn=attn).open()
    assert found.module.config._attn_implementation == attn
    theirs = reference(pairs("llama")[1], attn_implementation=attn)
    assert torch.equal(logits(found.module), logits(theirs))


def test_attention_that_is_not_installed_is_told(pairs, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match=r"model\.attn=flash_attention_2: .*FlashAttention2"):
        spec(pairs("llama"), attn="flash_attention_2").open()
    assert spec(pairs("llama"), attn="flash_attention_2").skeleton()


def test_the_skeleton_needs_no_weights(pairs, tmp_path):
    paths = pairs("qwen2")
    for side, path in zip(("pre", "post"), paths, strict=True):
        (tmp_path / side).mkdir()
        shutil.copy(path / "config.json", tmp_path / side)
    bare = spec((tmp_path / "pre", tmp_path / "post"))
    module = bare.skeleton()
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    ours = {name: tensor.shape for name, tensor in module.state_dict().items()}
    assert ours == {n: t.shape for n, t in spec(paths).open().module.state_dict().items()}
    assert identity(tmp_path / "post") != identity(paths[1])
    (tmp_path / "post" / "tokenizer.json").write_bytes((paths[1] / "tokenizer.json").read_bytes())
    with pytest.raises(FileNotFoundError, match="no .safetensors file in this directory"):
        bare.open()


def identity(path):
    return hub.identity(str(path), "model.post")


@pytest.mark.parametrize("name", ["chat_template.jinja", "vocab.txt", "spiece.model", "own.py"])
def test_a_models_identity_is_of_weights_configuration_and_tokenizer(pair, name):
    marks = [identity(pair[1])]
    configure(pair[1], rms_norm_eps=1e-3)
    marks.append(identity(pair[1]))
    (pair[1] / name).write_text("one")
    marks.append(identity(pair[1]))
    (pair[1] / name).write_text("two")
    marks.append(identity(pair[1]))
    (pair[1] / "README.md").write_text("tells nothing")
    assert len(set(marks)) == 4
    assert identity(pair[1]) == marks[-1]


def test_context_is_what_model_and_tokenizer_allow(pair):
    assert spec(pair).open().transform.context == 128
    configure(pair[1], "tokenizer_config.json", model_max_length=100)
    assert spec(pair, attn="eager").open().transform.context == 100
    assert spec(pair, context=64).open().transform.context == 64
    with pytest.raises(ValueError, match=r"model\.context=129: the model has 128 positions"):
        spec(pair, context=129).open()


def test_a_chat_needs_a_template(pair):
    assert spec(pair, chat=True).open().transform.chat
    (pair[1] / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="model.chat=true: this model's tokenizer has no chat"):
        spec(pair, chat=True, context=32).open()


def retokenize(path, **renamed):
    """Rename tokens of a directory's tokenizer."""
    text = (path / "tokenizer.json").read_text()
    content = json.loads(text)
    words = content["model"]["vocab"]
    content["model"]["vocab"] = {renamed.get(word, word): i for word, i in words.items()}
    content["model"]["merges"] = []
    (path / "tokenizer.json").write_text(json.dumps(content))


def test_tokenizers_must_agree(pair):
    retokenize(pair[0], A="B", B="A")
    message = r"the tokenizers of model.pre and model.post differ: token '.' is \d+ in one and \d+"
    with pytest.raises(ValueError, match=message):
        spec(pair).open()
    retokenize(pair[0], A="B", B="A")
    spec(pair, context=33).open()  # the same vocabulary again, though other bytes
    retokenize(pair[0], A="AAA")
    with pytest.raises(ValueError, match=r"differ: \d+ is token 'AAA' in one and 'A' in the other"):
        spec(pair, context=34).open()


def test_further_tokens_and_another_chat_template_are_fine(pair):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(pair[1], local_files_only=True)
    other.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    other.chat_template = "{{ messages }}"
    other.save_pretrained(pair[1])
    assert spec(pair).open().transform.tokenizer.chat_template == "{{ messages }}"


@pytest.mark.meaning("tables, ties and names of tensors")
def test_tokens_that_the_model_lacks_are_told(tmp_path, caplog):
    paths = [write(tmp_path / side, vocab_size=280) for side in ("pre", "post")]
    spec(paths).open()
    known = len(texts.tokenizer().get_vocab())
    assert f"the tokenizer has {known - 280} tokens beyond the model's 280 rows" in caplog.text


def test_a_tokenizer_from_elsewhere(pair, tmp_path):
    other = tmp_path / "tokenizer"
    other.mkdir()
    for file in pair[1].glob("*token*"):
        shutil.move(file, other / file.name)
    with pytest.raises(FileNotFoundError, match=r"model\.post=.*: no tokenizer there; name a dir"):
        spec(pair).open()
    found = spec(pair, tokenizer=str(other)).open()
    assert found.transform.tokenizer.get_vocab() == texts.tokenizer().get_vocab()


@pytest.mark.parametrize("architecture", ["llama", "llama_tied"])
@pytest.mark.meaning("tables, ties and names of tensors")
def test_vocabularies_of_unlike_size(architecture, tmp_path):
    paths = tmp_path / "pre", tmp_path / "post"
    write(paths[0], architecture, vocab_size=300)
    write(paths[1], architecture, scale=1.1, vocab_size=304)
    message = "'model.embed_tokens.weight': a vocabulary of 300 rows in the pre-trained model, of"
    with pytest.raises(ValueError, match=message):
        spec(paths).open()
    found = spec(paths, mismatch="keep_post").open()
    assert TABLE not in found.post
    assert "lm_head.weight" not in found.post
    changed = edited(found, Dare(p=0.5, k=0.0))
    stream(paths, tmp_path / "out", "edit=dare", "edit.p=.5", "select=all", "mismatch=keep_post")
    with loaded(found.module, changed, restore=found.post):
        assert torch.equal(logits(found.module), logits(reference(tmp_path / "out")))
    assert torch.equal(logits(found.module), logits(reference(paths[1])))


RAN = "ran.txt"
CODE = f"""
from pathlib import Path
Path(__file__).with_name({RAN!r}).write_text("ran")
Path({{out!r}}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "unheard_of"
class Model(LlamaForCausalLM):
    config_class = Config
class Words(PreTrainedTokenizerFast):
    pass
"""


def with_code(path, out, model_type):
    (path / "code.py").write_text(CODE.format(out=str(out)))
    named = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    configure(path, auto_map=named, model_type=model_type)
    words = {"AutoTokenizer": [None, "code.Words"]}
    known = model_type == "llama"
    name = "PreTrainedTokenizerFast" if known else "Words"
    configure(path, "tokenizer_config.json", auto_map=words, tokenizer_class=name)


def test_code_beside_a_model_is_not_run(pair, tmp_path):
    """A known architecture opens without its code, an unknown one asks for leave."""
    out = tmp_path / RAN
    live = logits(spec(pair).open().module)
    for path in pair:
        with_code(path, out, "llama")
    assert torch.equal(logits(spec(pair, context=32).open().module), live)
    spec(pair).skeleton()
    for path in pair:
        with_code(path, out, "unheard_of")
    with pytest.raises(ValueError, match=r"not run unless model\.trust_remote_code=true"):
        spec(pair).open()
    with pytest.raises(ValueError, match=r"not run unless model\.trust_remote_code=true"):
        spec(pair).skeleton()
    for path in pair:
        configure(path, model_type="llama")
    with pytest.raises(ValueError, match=r"tokenizer is not readable .*trust_remote_code=true\)"):
        spec(pair).open()
    assert not out.exists()


def test_code_runs_when_asked_with_one_warning(pair, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    live = logits(spec(pair).open().module)
    for path in pair:
        with_code(path, tmp_path / RAN, "unheard_of")
    with caplog.at_level(logging.WARNING, "deltalab"):
        found = spec(pair, trust_remote_code=True).open()
    assert (tmp_path / RAN).exists(), "the test's own code does not work"
    assert type(found.module).__name__ == "Model"
    assert torch.equal(logits(found.module), live)
    assert caplog.text.count("trust_remote_code=true") == 1


def test_attention_that_a_file_names_is_not_fetched(pair):
    configure(pair[1], attn_implementation="someone/kernel", _attn_implementation="someone/kernel")
    assert spec(pair).open().module.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"dtype": "int8"},
            "model.dtype=int8: must be one of auto, bfloat16, float16, float32, float64",
        ),
        ({"attn": "fast"}, "model.attn=fast: must be one of null, eager, sdpa, flash_attention_2"),
        ({"mismatch": "pad"}, "model.mismatch=pad: must be one of error, keep_post"),
        ({"context": 1}, "model.context=1: must be at least 2 tokens"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        HfPair("a/b", "c/d", **settings)


def test_inputs_are_checked(pair, tmp_path):
    pre, post = pair
    with pytest.raises(FileNotFoundError, match=r"model\.pre=.*nothing: no such file or directory"):
        spec((tmp_path / "nothing", post)).open()
    with pytest.raises(ValueError, match=r"model\.pre_revision=v1: .* is a local path, which has"):
        spec(pair, pre_revision="v1").open()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"model\.post=.*empty: no config.json"):
        spec((pre, tmp_path / "empty")).open()
    with pytest.raises(FileNotFoundError, match=r"model\.post=.*empty: no model in this directory"):
        identity(tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=r"model\.post=.*empty: an adapter without its tensors"
    ):
        spec((pre, tmp_path / "empty")).open()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "its weights are quantised"),
        ({"model_type": "t5", "architectures": ["T5Model"]}, "makes no causal language model"),
        ({"model_type": "unheard_of"}, "config.json: .*unheard_of"),
        ({"num_hidden_layers": 3}, r"'model\.layers\.2\.\S+' is missing, which the architecture"),
        ({"num_hidden_layers": 1}, r"'model\.layers\.1\.\S+' is none of the architecture"),
        ({"intermediate_size": 64}, r"'model\S+' has shape \(48, 32\), the architecture of config"),
        ({"num_key_value_heads": "two"}, "config.json|makes no causal"),
    ],
)
def test_a_configuration_that_does_not_fit(changes, message, pair):
    configure(pair[1], **changes)
    with pytest.raises(ValueError, match=message) as caught:
        spec(pair).open()
    assert "\n" not in str(caught.value)


def test_a_config_that_is_no_object(pair):
    (pair[1] / "config.json").write_text("[1")
    with pytest.raises(ValueError, match=r"config.json: not valid JSON"):
        spec(pair).open()


@pytest.mark.meaning("tables, ties and names of tensors")
def test_tables_that_old_versions_saved_are_ignored(pair):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    for path in pair:
        merge(path, lambda w: w.update({name: torch.ones(4)}))
    found = spec(pair).open()
    assert name not in found.post
    assert torch.equal(logits(found.module), logits(reference(pair[1])))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rms_norm_eps": 1e-2, "transformers_version": "4.0"}, "rms_norm_eps"),
        ({"rope_parameters": None, "rope_theta": 1e6}, "rope_theta"),
        ({"rope_parameters": None}, None),  # the default is 10000, as the other side has it
        ({"rope_parameters": {"rope_theta": 10000, "rope_type": "linear", "factor": 2.0}}, "rope"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope"),
        ({"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None}, None),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": False, "mlp_bias": False}, None),
        ({"dtype": None, "torch_dtype": "float16", "use_cache": False, "_name_or_path": "x"}, None),
        ({"eos_token_id": 5, "architectures": ["Other"], "id2label": {"0": "a"}}, None),
    ],
)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.meaning("configurations by meaning")
def test_configurations_are_compared_by_what_they_mean(changes, told, side, pair, caplog, tmp_path):
    configure(pair[side], **changes)
    file = pair[side] / "config.json"  # null stands for a field that is not there
    content = {k: v for k, v in json.loads(file.read_text()).items() if v is not None}
    file.write_text(json.dumps(content))
    spec(pair).open()
    warning = "config.json of model.pre and model.post differ in "
    assert (warning in caplog.text) == (told is not None)
    assert f"{warning}{told or ''}" in caplog.text or told is None
    caplog.clear()
    stream(pair, tmp_path / "out")
    written = {"rope_parameters": None} in ({k: changes[k]} for k in changes) and len(changes) < 3
    if told is None or not written:  # without transformers a default that is not written is unknown
        assert (warning in caplog.text) == (told is not None)


class Fake:
    """A hub of one repository, as far as it is asked here."""

    def __init__(self, root, files):
        self.path = root / "snapshots" / "c0ffee"
        self.path.mkdir(parents=True)
        self.files, self.asked = files, []

    def snapshot_download(self, source, *, allow_patterns, ignore_patterns, **options):
        from huggingface_hub.utils import filter_repo_objects

        wanted = filter_repo_objects(
            self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for name in wanted:
            self.fetch(name)
        return str(self.path)

    def hf_hub_download(self, source, file, **options):
        self.fetch(file)
        return str(self.path / file)

    def fetch(self, name):
        self.asked.append(name)
        (self.path / name).parent.mkdir(exist_ok=True)
        (self.path / name).write_text("{}")


FILES = ["config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "model.py"]
TOOLS = "additional_chat_templates/tool_use.jinja"


@pytest.mark.parametrize(
    "weights",
    [
        ["model.safetensors", "pytorch_model.bin", "consolidated.safetensors"],
        ["pytorch_model.bin", "training_args.bin", "original/consolidated.00.pth"],
    ],
)
@pytest.mark.parametrize("code", [False, True])
def test_of_a_repository_only_what_is_needed_is_fetched(weights, code, tmp_path, monkeypatch):
    fake = Fake(tmp_path, [*FILES, TOOLS, *weights, "original/params.json", "onnx/model.onnx"])
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake.snapshot_download)
    assert hub.directory("org/name", "model.pre", "v2", code) == fake.path
    beside = [*FILES, TOOLS] if code else [*FILES[:-1], TOOLS]
    assert sorted({*fake.asked}) == sorted([*beside, weights[0]])


def test_a_plan_fetches_the_configuration_alone(tmp_path, monkeypatch):
    fake = Fake(tmp_path, [*FILES, "model.safetensors"])
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake.hf_hub_download)
    hub._fetched.cache_clear()
    try:
        first = hub.identity("org/name", "model.post")
        assert first == hub.identity("org/name", "model.post") != hub.identity("o/n", "model.post")
        assert hub.described("org/name", "model.post") == fake.path
        assert fake.asked == ["config.json"] * 2  # once a repository
        monkeypatch.setattr("huggingface_hub.snapshot_download", fake.snapshot_download)
        assert hub.described("org/name", "model.post", code=True) == fake.path
        assert sorted(fake.asked[2:]) == sorted(FILES)
    finally:
        hub._fetched.cache_clear()


def test_without_a_hub_one_line_says_so():
    with pytest.raises(FileNotFoundError, match=r"model\.pre=org/name: no such path here, not in"):
        hub.directory("org/name", "model.pre")
    with pytest.raises(FileNotFoundError, match=r"model\.pre=\.\./up/x: no such file or directory"):
        hub.directory("../up/x", "model.pre")


def test_a_licence_that_was_not_accepted_is_told(monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    def refuses(*arguments, **options):
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuses)
    with pytest.raises(
        FileNotFoundError, match="model.pre=org/name: .*log in with `hf auth login`"
    ):
        hub.directory("org/name", "model.pre")


PRESETS = {
    "llama3_8b": ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct"),
    "llama3_70b": ("meta-llama/Meta-Llama-3-70B", "meta-llama/Meta-Llama-3-70B-Instruct"),
    "mistral_7b": ("mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-Instruct-v0.3"),
    "qwen2_7b": ("Qwen/Qwen2-7B", "Qwen/Qwen2-7B-Instruct"),
    "zephyr_7b_dpo": (
        "alignment-handbook/zephyr-7b-sft-full",
        "alignment-handbook/zephyr-7b-dpo-full",
    ),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_papers_pairs(preset):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", [f"model={preset}"])
        other = compose("config", [f"model={preset}", "data=plain", "data.path=x"])
    assert build(options.plain(cfg)["model"], "model") == HfPair(*PRESETS[preset])
    preferences = preset == "zephyr_7b_dpo"
    assert cfg.data.name == ("preferences" if preferences else "gsm8k")
    assert cfg.objective._target_.endswith("answers.Dpo" if preferences else "answers.Answers")
    assert "lm_eval" in cfg.evaluator._target_
    assert other.objective.data.path == "x"


def test_timm_loads_what_was_streamed(tmp_path):
    """An edited image model, by its directory and by its file, is the one that was evaluated."""
    import timm
    from timm.models import save_for_hf

    arguments = {"img_size": 16, "patch_size": 8, "depth": 2, "num_classes": 5}
    name = "vit_tiny_patch16_224"
    for seed, side in enumerate(("pre", "post")):
        torch.manual_seed(seed)
        model = timm.create_model(name, **arguments)
        save_for_hf(model, tmp_path / side, model_args=arguments, safe_serialization=True)
    out = tmp_path / "out"
    paths = [f"model.{side}={tmp_path / side}" for side in ("pre", "post")]
    save.save(["model=timm_vit", *paths, "edit=expo", "edit.alpha=.3", "select=all", f"out={out}"])
    written = load_file(out / "model.safetensors")
    pre, post = (load_file(tmp_path / side / "model.safetensors") for side in ("pre", "post"))
    torch.testing.assert_close(
        written, {n: pre[n] + 1.3 * (post[n] - pre[n]) for n in post}, rtol=1e-5, atol=1e-6
    )
    file = str(out / "model.safetensors")
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = timm.create_model(name, **arguments)
    expected.load_state_dict(written)
    with torch.no_grad():
        wanted = expected.eval()(images)
        for made in (
            timm.create_model(f"local-dir:{out}", pretrained=True),
            timm.create_model(name, checkpoint_path=file, **arguments),
        ):
            assert torch.equal(made.eval()(images), wanted)


def test_a_tokenizer_that_is_not_readable(tmp_path):
    assert not vocabulary.has_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model\.tokenizer=.*: the tokenizer is not readable"):
        vocabulary.opened(tmp_path, "model.tokenizer")
