"""lm-eval in memory: the command line's documents, prompts, local data, mistakes, vLLM's plumbing."""

import copy
import json
import logging
import random
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from deltalab.evaluators import embedded, hflm, lm_requests, lm_tasks, vllm
from deltalab.evaluators.lm_eval import LmEval
from deltalab.text import Encoder
from deltalab.weights import ModelPair, loaded

SHARED = Path(__file__).parents[2] / "shared" / "data"
TINY = ("tiny_gsm", "tiny_choice", "tiny_likelihood")
CONTEXT = 256
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")


def problem(n):
    draw = random.Random(n)
    a, b = draw.randrange(2, 60), draw.randrange(2, 60)
    return {
        "question": f"Ann has {a} pens and buys {b} more. How many pens has she now?",
        "answer": f"She has {a} + {b} = {a + b} pens.\n#### {a + b}",
    }


@pytest.fixture(scope="module")
def tokenizer():
    tok = Tokenizer(models.BPE(unk_token=None))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"Question: {p['question']}\nAnswer: {p['answer']}" for p in map(problem, range(50))]
    tok.train_from_iterator(texts, trainer)
    return Fast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def llama(tokenizer, seed=0, tied=True, **settings):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def trained(tokenizer):
    """A model that has half learnt the problems: it stops, and is right now and then."""
    module = llama(tokenizer)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(module.parameters(), 4e-3)
    texts = [
        f"Question: {p['question']}\nAnswer: {p['answer']}</s>" for p in map(problem, range(8))
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    module.train()
    for _ in range(150):
        loss = module(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return module.eval()


@pytest.fixture
def pair(trained, tokenizer):
    module = copy.deepcopy(trained)
    post = {n: t.detach().clone() for n, t in module.state_dict().items()}
    torch.manual_seed(1)
    pre = {n: t + 0.02 * torch.randn_like(t) for n, t in post.items()}
    pre["lm_head.weight"] = pre["model.embed_tokens.weight"]
    return ModelPair(pre, post, module, Encoder(tokenizer, CONTEXT))


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    rows = [problem(n) for n in range(12)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    choices = []
    for n in range(12):
        right = int(rows[n]["answer"].split("#### ")[1])
        choices.append(
            {
                "question": rows[n]["question"],
                "choices": [str(right + d) for d in (1, 0, 10, 2)],
                "gold": 1,
            }
        )
    (tmp_path / "choice.jsonl").write_text("".join(json.dumps(r) + "\n" for r in choices))
    monkeypatch.setattr(embedded, "ZOO", tmp_path)
    lm_tasks.load.cache_clear()
    yield tmp_path
    lm_tasks.load.cache_clear()


def command_line(directory, tasks, tmp_path, monkeypatch, *more):
    """Run the `lm_eval` command line in this process; it would index 14,000 files otherwise."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.tasks import _index as index

    build = index.TaskIndex.build
    stock = Path(index.__file__).parent
    monkeypatch.setattr(
        index.TaskIndex,
        "build",
        staticmethod(lambda paths, **k: build([p for p in paths if Path(p) != stock], **k)),
    )
    out = tmp_path / "out"
    arguments = ["lm_eval", "run", "--model", "hf", "--tasks", ",".join(tasks)]
    arguments += ["--model_args", f"pretrained={directory},dtype=float32", "--device", "cpu"]
    arguments += ["--include_path", str(lm_tasks.EMBEDDED), "--batch_size", "5", "--log_samples"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--output_path", str(out), *more])
    cli_evaluate()
    samples = {}
    for path in out.rglob("samples_*.jsonl"):
        task = path.name.removeprefix("samples_").rsplit("_", 1)[0]
        samples[task] = [json.loads(line) for line in path.read_text().splitlines()]
    return samples


def test_documents_are_those_of_the_command_line(pair, zoo, tmp_path, monkeypatch):
    score = LmEval(TINY, batch_size=5).open(pair)
    before = score(pair.module)
    with loaded(pair.module, pair.pre, restore=pair.post):
        scores = score(pair.module)
        pair.module.save_pretrained(tmp_path / "saved")
    pair.transform.tokenizer.save_pretrained(tmp_path / "saved")
    samples = command_line(tmp_path / "saved", TINY, tmp_path, monkeypatch)
    compared = {
        "tiny_gsm/exact_match_strict": ("tiny_gsm", "strict-match", "exact_match"),
        "tiny_gsm/exact_match_flexible": ("tiny_gsm", "flexible-extract", "exact_match"),
        "tiny_choice/acc": ("tiny_choice", "none", "acc"),
        "tiny_choice/acc_norm": ("tiny_choice", "none", "acc_norm"),
        "tiny_likelihood/nats": ("tiny_likelihood", "none", "nats"),
        "tiny_likelihood/acc": ("tiny_likelihood", "none", "acc"),
    }
    assert set(scores.documents) == set(compared)
    for name, (task, chosen, metric) in compared.items():
        rows = sorted(
            (s for s in samples[task] if s["filter"] == chosen), key=lambda s: s["doc_id"]
        )
        theirs = torch.tensor([float(s[metric]) for s in rows], dtype=torch.float64)
        assert torch.equal(scores.documents[name], theirs), name
        assert scores.metrics[name] == pytest.approx(float(theirs.mean()))
    again = score(pair.module)
    assert again.metrics == before.metrics != scores.metrics
    assert 0 < before.metrics["tiny_gsm/exact_match_strict"] < 1
