"""The recipe that post-trains a language model: what it learns, and that a kill costs nothing."""

import json

import pytest
import torch
from texts import model, tokenizer, write

from deltalab.data.text import Encoder, Problems
from deltalab.loss.answers import Answers
from deltalab.loss.objectives import measure
from deltalab.weights.mapping import Checkpoint, ModelPair
from experiments.posttrain import lora
from experiments.posttrain.__main__ import main
from experiments.posttrain.batches import joined, order
from experiments.posttrain.recipe import Recipe
from experiments.posttrain.sample import Sampling, sample
from experiments.posttrain.train import train

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model with its tokenizer, and problems and preferences about sums."""
    home = tmp_path_factory.mktemp("start")
    model().save_pretrained(home / "model")
    tokenizer().save_pretrained(home / "model")
    sums = [(i, j) for i in range(6) for j in range(4)]
    rows = [{"question": f"{i}+{j}", "answer": f"it is\n#### {i + j}"} for i, j in sums]
    write(home / "problems.jsonl", rows)
    pairs = [
        {"prompt": f"{i}+{j}", "chosen": f"is {i + j}", "rejected": f"was {i * j + 11}"}
        for i, j in sums
    ]
    write(home / "pairs.jsonl", pairs)
    return home


def recipe(start, kind="sft", **settings):
    data = {"sft": "problems", "dpo": "pairs"}[kind]
    known = {"held": 6, "batch": 6, "micro": 4, "rate": 3e-3, "precision": "float32", "epochs": 4}
    return Recipe(kind, str(start / "model"), str(start / f"{data}.jsonl"), **(known | settings))


def silent(line):
    pass


def weights(directory):
    opened = Checkpoint(directory)
    return {name: opened[name] for name in opened}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 4])
def test_the_held_out_loss_falls(start, tmp_path, precision, rank):
    found = recipe(start, precision=precision, lora=rank, rate=3e-2 if rank else 3e-3)
    lines = []
    manifest = train(found, tmp_path / "out", score=4, say=lines.append)
    held = manifest["held_out"]
    assert held["after"] < held["before"] - 0.3
    assert held["change"] == pytest.approx(held["after"] - held["before"])
    assert 0 < held["error"] < -held["change"]
    assert [p["step"] for p in manifest["curve"]] == list(range(1, 13))
    assert "held_out" in manifest["curve"][3]
    assert len(lines) == 13
    assert json.loads((tmp_path / "out" / "posttrain.json").read_text()) == manifest
    assert not (tmp_path / "out.partial").exists()


def test_what_is_written_is_what_was_measured(start, tmp_path):
    """The pair opens as any other, and the objective finds the very losses of the manifest."""
    manifest = train(recipe(start), tmp_path / "out", say=silent)
    module = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    post = {n: v.clone() for n, v in module.state_dict().items()}
    pair = ModelPair(post, post, module, Encoder(tokenizer(), 256))
    loss = Answers(Problems(str(tmp_path / "out" / "held_out.jsonl"))).open(pair)
    assert measure(module, loss).mean == pytest.approx(manifest["held_out"]["after"], rel=1e-5)
    same = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert same("1+1 is 2")["input_ids"] == tokenizer()("1+1 is 2")["input_ids"]
    assert set(weights(tmp_path / "out")) == set(weights(start / "model"))


@pytest.mark.parametrize("settings", [{}, {"lora": 2}, {"kind": "dpo"}, {"precision": "bfloat16"}])
def test_a_killed_run_goes_on_to_the_same_weights(start, tmp_path, settings):
    found = recipe(start, epochs=2, **settings)
    whole = train(found, tmp_path / "whole", say=silent)
    assert train(found, tmp_path / "cut", save=2, stop=3, say=silent) == {}
    assert not (tmp_path / "cut").exists()
    rest = []
    again = train(found, tmp_path / "cut", save=2, say=rest.append)
    assert "going on after step 3" in rest[0]
    assert len(rest) == 1 + 3
    assert again["curve"] == whole["curve"]
    assert again["held_out"] == whole["held_out"]
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert train(found, tmp_path / "cut", say=rest.append) == again
    assert "finished already" in rest[-1]


def test_micro_batches_change_nothing(start, tmp_path):
    for micro in (1, 6):
        train(recipe(start, micro=micro, epochs=1), tmp_path / str(micro), say=silent)
    one, other = weights(tmp_path / "1"), weights(tmp_path / "6")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=2e-5)


def test_preferences_are_learnt(start, tmp_path):
    manifest = train(recipe(start, "dpo", rate=1e-3, beta=0.5), tmp_path / "out", say=silent)
    held = manifest["held_out"]
    assert held["before"] == pytest.approx(0.693147, abs=1e-5)
    assert held["after"] < 0.5
    assert held["accuracy"] == 1.0
    assert manifest["curve"][0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_adapters_merge_to_the_same_function_and_names():
    plain, names = model(), [n for n, _ in model().named_parameters()]
    ids = torch.arange(6, 30).view(2, 12)
    expected = plain(ids).logits
    lora.adapt(plain, 3, seed=0)
    assert torch.equal(plain(ids).logits, expected), "training must begin at the model itself"
    trained = [n for n, p in plain.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 7
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    adapted = plain(ids).logits
    before = {n: p.clone() for n, p in model().named_parameters()}
    lora.merge(plain)
    assert [n for n, _ in plain.named_parameters()] == names
    torch.testing.assert_close(plain(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    for name, p in plain.named_parameters():
        rank = (
            int(torch.linalg.matrix_rank((p - before[name]).double(), rtol=1e-4))
            if p.ndim == 2
            else 0
        )
        assert rank == (3 if "proj" in name else 0)


def test_what_does_not_train_is_bitwise_as_it_was(start, tmp_path):
    """With adapters in low precision, the frozen weights must not take on its rounding."""
    train(recipe(start, lora=2, epochs=1, precision="bfloat16"), tmp_path / "out", say=silent)
    pre, post = weights(start / "model"), weights(tmp_path / "out")
    for name in pre:
        assert torch.equal(pre[name], post[name]) == ("proj" not in name)


def test_training_rows_are_never_held_out(start, tmp_path):
    train(recipe(start, epochs=1, limit=7), tmp_path / "out", say=silent)
    rows = (start / "problems.jsonl").read_text().splitlines()
    held = (tmp_path / "out" / "held_out.jsonl").read_text().splitlines()
    assert [json.loads(x) for x in held] == [json.loads(x) for x in rows[-6:]]
    manifest = json.loads((tmp_path / "out" / "posttrain.json").read_text())
    assert manifest["examples"] == {"train": 7, "held_out": 6}
    for epochs in (1, 3):
        steps = order(7, recipe(start, batch=3, epochs=epochs))
        assert sorted(i for step in steps for i in step) == sorted(list(range(7)) * epochs)


def test_joined_batches_of_one_are_the_batch(start):
    source, encoder = Problems(str(start / "problems.jsonl")), Encoder(tokenizer(), 256)
    (whole,) = source.open(encoder, 100)
    for one, other in zip(whole, joined(source.open(encoder, 1), pad=0), strict=True):
        assert torch.equal(one, other)


def test_mistakes_are_one_line(start, tmp_path, capsys):
    out = tmp_path / "out"
    train(recipe(start, epochs=1), out, say=silent)
    with pytest.raises(ValueError, match=r"--out .*out: something else is there"):
        train(recipe(start, epochs=2), out, say=silent)
    train(recipe(start, epochs=1), tmp_path / "cut", stop=1, say=silent)
    with pytest.raises(ValueError, match=r"state.pt: begun with rate=0.003, now 0.1"):
        train(recipe(start, epochs=1, rate=0.1), tmp_path / "cut", say=silent)
    for settings, words in [
        ({"rate": 0.0}, "--rate 0.0"),
        ({"batch": 0}, "--batch 0"),
        ({"precision": "fp8"}, "--precision fp8"),
        ({"warmup": 1.0}, "--warmup"),
    ]:
        with pytest.raises(ValueError, match=words):
            recipe(start, **settings)
    with pytest.raises(ValueError, match=r"--held 24: .* has 24 rows"):
        train(recipe(start, held=24), tmp_path / "other", say=silent)
    command = ["sft", "--model", str(start / "model"), "--data", "nowhere.jsonl", "--out", str(out)]
    assert main(command) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err


def test_pairs_of_the_model_s_own_answers(start, tmp_path, monkeypatch):
    """The model learns the problems half; its right and wrong answers make pairs that DPO reads."""
    train(recipe(start, epochs=12), tmp_path / "half", say=silent)
    spec = Sampling(str(tmp_path / "half"), str(start / "problems.jsonl"), limit=8, worked=True)
    count = sample(spec, tmp_path / "pairs.jsonl", say=silent)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == count > 0
    answers = {f"Question: {i}+{j}\nAnswer:": i + j for i in range(6) for j in range(4)}
    for row in rows:
        assert row["chosen"].endswith(f"#### {answers[row['prompt']]}")
        assert not row["rejected"].endswith(f"#### {answers[row['prompt']]}")
        assert "####" in row["rejected"]

    class Killed(Exception):
        pass

    def kill(line):
        if "5/8" in line:
            raise Killed

    with pytest.raises(Killed):
        sample(spec, tmp_path / "again.jsonl", say=kill)
    lines = []
    sample(spec, tmp_path / "again.jsonl", say=lines.append)
    assert len(lines) == 3
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "pairs.jsonl").read_text()
    assert not (tmp_path / "again.jsonl.partial").exists()
    with pytest.raises(ValueError, match="is there already"):
        sample(spec, tmp_path / "again.jsonl", say=silent)
    with pytest.raises(ValueError, match="--count 0"):
        Sampling("m", "d", count=0)
