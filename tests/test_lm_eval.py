"""lm-eval in memory: the command line's documents, stops, local data, mistakes, vLLM."""

import copy
import dataclasses
import json
import random
import socket
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from deltalab.data.text import Encoder
from deltalab.evaluators.lm import (
    asked as lm_asked,
)
from deltalab.evaluators.lm import (
    embedded,
    hflm,
    run_code,
    vllm,
)
from deltalab.evaluators.lm import (
    requests as lm_requests,
)
from deltalab.evaluators.lm import (
    tasks as lm_tasks,
)
from deltalab.evaluators.lm_eval import LmEval
from deltalab.store import latest
from deltalab.weights.mapping import ModelPair, loaded

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
    optimizer = torch.optim.AdamW(module.parameters(), 8e-3)
    texts = [
        f"Question: {p['question']}\nAnswer: {p['answer']}</s>" for p in map(problem, range(4))
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    module.train()
    for _ in range(80):
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
    latest.forget()
    yield tmp_path
    latest.forget()


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
        if metric == "nats":
            assert torch.allclose(scores.documents[name], theirs, rtol=1e-5), name
        else:
            assert torch.equal(scores.documents[name], theirs), name
        assert scores.metrics[name] == pytest.approx(float(theirs.mean()))
    again = score(pair.module)
    assert again.metrics == before.metrics != scores.metrics
    assert 0 < before.metrics["tiny_gsm/exact_match_strict"] < 1


def stock(module, tokenizer, batch_size):
    from lm_eval.models.huggingface import HFLM

    with hflm.quiet():
        return HFLM(
            pretrained=module,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            max_length=CONTEXT,
        )


@pytest.mark.parametrize(
    "stops", [["Question:", "</s>"], ["pens", "#"], [" = ", "."], ["\n", "1 "]]
)
def test_rows_stop_where_lm_eval_would_stop_each_alone(trained, tokenizer, stops):
    from lm_eval.api.instance import Instance

    texts = [f"Question: {problem(n)['question']}\nAnswer:" for n in range(20, 28)]
    settings = {"until": stops, "do_sample": False, "max_gen_toks": 40}
    asked = [
        Instance("generate_until", {}, (text, copy.deepcopy(settings)), n, ("t", n, 1))
        for n, text in enumerate(texts)
    ]
    with hflm.quiet():
        alone = stock(trained, tokenizer, 1).generate_until(asked, disable_tqdm=True)
    steps = []
    live = hflm.wrapper(trained, copy.deepcopy(tokenizer), CONTEXT, 8)
    handle = trained.register_forward_hook(lambda *_: steps.append(1))
    with live(trained) as lm:
        assert lm.generate_until(asked) == alone
    handle.remove()
    longest = max(len(tokenizer.encode(text)) for text in alone)
    assert len(steps) <= longest + 4  # the batch ends with its last row
    assert len(set(alone)) > 1


def test_only_the_likeliest_tokens_are_chosen_without_transformers(trained, tokenizer, monkeypatch):
    from lm_eval.api.instance import Instance
    from transformers import GenerationMixin

    def refuse(*_, **__):
        raise AssertionError("transformers generates")

    own = copy.deepcopy(trained.generation_config)
    settings = {"until": ["Question:"], "max_gen_toks": 12}
    asked = [Instance("generate_until", {}, ("Question: a", settings), 0, ("t", 0, 1))]
    with hflm.wrapper(trained, copy.deepcopy(tokenizer), CONTEXT, 8)(trained) as lm:
        monkeypatch.setattr(GenerationMixin, "generate", refuse)
        (text,) = lm.generate_until(asked)
    assert text
    assert hflm.plain({"do_sample": False, "temperature": 0.0}, own)
    for change in ({"num_beams": 2}, {"do_sample": True}, {"repetition_penalty": 1.2}):
        assert not hflm.plain(change, own)
    own.no_repeat_ngram_size = 3
    assert not hflm.plain({}, own)


def test_a_model_that_generates_in_a_way_of_its_own_is_asked(trained, tokenizer, monkeypatch):
    """Its class, or whoever wrapped it, may do more than the likeliest token of every step."""
    from lm_eval.api.instance import Instance

    own, lengths = trained.generate, []

    def generate(*args, **given):
        out = own(*args, **given)
        lengths.append(out.shape[1] - given["input_ids"].shape[1])
        return out

    settings = {"until": ["no such text"], "max_gen_toks": 5, "do_sample": False}
    asked = [Instance("generate_until", {}, ("Question: a", settings), 0, ("t", 0, 1))]
    with hflm.wrapper(trained, copy.deepcopy(tokenizer), CONTEXT, 8)(trained) as lm:
        (told,) = lm.generate_until(asked)
        monkeypatch.setattr(trained, "generate", generate)
        assert lm.generate_until(asked) == [told]
    assert lengths == [5]


def test_a_token_that_cannot_complete_a_stop_is_not_decoded(tokenizer):
    closing = hflm.closing_tokens(tokenizer, ("Question:", "</s>", "x "), len(tokenizer) + 3)
    colon, eos = tokenizer.encode(":")[0], tokenizer.eos_token_id
    assert closing[:, colon].tolist() == [True, False, True]
    assert closing[:, eos].tolist() == [False, True, True]
    assert closing[:, -3:].all()
    assert closing[0].float().mean() < 0.6  # lone bytes of longer characters may complete any


def test_a_head_apart_from_its_embedding_stays_apart(pair, zoo, tmp_path):
    module = pair.module
    with torch.no_grad():
        head = torch.nn.Parameter(module.lm_head.weight * 0)
    module.lm_head.weight = head
    scores = LmEval(("tiny_likelihood",)).open(pair)(module)
    assert module.lm_head.weight is head
    tokens = torch.tensor(
        [len(pair.transform.tokenizer.encode(f" {problem(n)['answer']}")) for n in range(12)]
    )
    expected = tokens.double() * torch.tensor(len(pair.transform.tokenizer)).double().log()
    assert torch.allclose(scores.documents["tiny_likelihood/nats"], expected, rtol=1e-5)
    vllm.write(module, pair.transform.tokenizer, str(tmp_path / "apart"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "apart")
    assert not again.lm_head.weight.any()
    assert again.model.embed_tokens.weight.any()
    assert module.config.tie_word_embeddings


CHOICE = """
task: {name}
custom_dataset: !function deltalab.evaluators.lm.embedded.choices
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{prefix}{{{{question}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def include(tmp_path):
    folder = tmp_path / "more"
    folder.mkdir()
    for name in ("left", "right"):
        (folder / f"{name}.yaml").write_text(CHOICE.format(name=name, prefix=f"{name}: "))
    (folder / "both.yaml").write_text(
        "group: both\ntask: [left, right]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    (folder / "plain.yaml").write_text("group: plain\ntask: [left, right]\n")
    (folder / "broken.yaml").write_text("task: broken\ndoc_to_text: [\n")
    (folder / "runs.yaml").write_text(CHOICE.format(name="runs", prefix="") + "unsafe_code: true\n")
    return str(folder)


def test_groups_are_scored_over_all_their_documents(pair, zoo, include):
    score = LmEval(("both", "plain"), include=(include,), run_task_code=True, limit=5).open(pair)
    scores = score(pair.module)
    assert list(scores.documents) == ["both/acc", "left/acc", "right/acc"]
    parts = [scores.documents[f"{name}/acc"] for name in ("left", "right")]
    assert torch.equal(scores.documents["both/acc"], torch.cat(parts))
    assert scores.metrics["both/acc"] == pytest.approx(float(torch.cat(parts).mean()))


def test_several_shot_counts_in_one_run(pair, zoo, include):
    task = {"left": {"shots": [0, 2], "metrics": ["acc"]}, "right": {"shots": 1, "limit": 3}}
    spec = LmEval(task, include=(include,), run_task_code=True, limit=4)
    score = spec.open(pair)
    first = score(pair.module)
    assert list(first.documents) == ["left/0shot/acc", "left/2shot/acc", "right/acc"]
    assert [len(d) for d in first.documents.values()] == [4, 4, 3]
    assert score(pair.module).metrics == first.metrics
    prompts = {}
    for run in lm_tasks.load(spec):
        prepared = lm_requests.prepare(run, None, multiturn=False, seed=1234)
        for entry in run.entries:
            prompts[entry.label] = prepared.requests[entry.reported][0].args[0]
    assert prompts["left/0shot"].count("left: ") == 1
    assert prompts["left/2shot"].count("left: ") == 3
    assert prompts["right"].count("right: ") == 2
    deviation = first.documents["left/2shot/acc"].std() / 2
    assert first.metrics["left/2shot/acc_error"] == pytest.approx(float(deviation))


def test_tasks_are_built_once_and_global_generators_left_alone(pair, zoo):
    spec = LmEval(TINY, limit=2)
    random.seed(7), torch.manual_seed(7)
    expected = random.random(), torch.rand(1)
    random.seed(7), torch.manual_seed(7)
    score = spec.open(pair)
    runs = lm_tasks.load(spec)
    score(pair.module), score(pair.module)
    assert lm_tasks.load(LmEval(TINY, limit=2)) is runs
    assert (random.random(), torch.rand(1)) == expected


def test_prompts_in_the_chat_template_are_lm_evals(pair, tokenizer, zoo, include):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = (
        "{% for m in messages %}<s>{{m['role']}}: {{m['content']}}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    run = lm_tasks.load(LmEval({"left": {"shots": 2}}, include=(include,), run_task_code=True))[0]
    for multiturn in (True, False):
        ours = lm_requests.prepare(run, chatty, multiturn, 1234).requests["left"]
        task = run.tasks["left"]
        task.set_fewshot_seed(1234)
        with hflm.quiet():
            type(task).build_all_requests(
                task,
                apply_chat_template=True,
                fewshot_as_multiturn=multiturn,
                chat_template=stock(pair.module, chatty, 1).apply_chat_template,
            )
        assert [r.args for r in ours] == [r.args for r in task.instances]
    plain = lm_requests.prepare(run, None, False, 1234).requests["left"][0].args[0]
    assert "assistant" in ours[0].args[0]
    assert "assistant" not in plain
    with pytest.raises(ValueError, match="evaluator.chat=True: the tokenizer has no chat template"):
        LmEval(("left",), include=(include,), run_task_code=True, chat=True).open(pair)


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@needs_data
def test_local_gsm8k_has_the_prompts_of_the_stock_file(pair, offline):
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    spec = LmEval({"gsm8k": {"shots": 5}}, limit=3, data_dir=str(SHARED))
    run = lm_tasks.load(spec)[0]
    ours = lm_requests.prepare(run, None, False, 1234).requests["gsm8k"]
    stock_file = load_yaml(Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml")
    files = {split: str(SHARED / "gsm8k" / f"{split}.jsonl") for split in ("train", "test")}
    changed = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }
    with hflm.quiet():
        manager = TaskManager(include_defaults=False, include_path=[])
        theirs = manager.load([{**stock_file, **changed}])["tasks"]["gsm8k"]
        theirs.set_fewshot_seed(1234)
        theirs.build_all_requests(limit=3)
    assert [r.args for r in ours] == [r.args for r in theirs.instances]
    assert ours[0].args[0].count("Question:") == 6
    assert len(list(run.tasks["gsm8k"].eval_docs)) == 1319


@needs_data
def test_local_truthfulqa_scores(pair, offline, caplog):
    spec = LmEval(("truthfulqa_mc1", "truthfulqa_mc2"), limit=3, data_dir=str(SHARED))
    scores = spec.open(pair)(pair.module)
    assert [len(d) for d in scores.documents.values()] == [3, 3]
    assert 0 < scores.metrics["truthfulqa_mc2/acc"] < 1
    assert "truthfulqa_mc1: " in caplog.text
    assert "prompts are longer than the 257 tokens that the context of 256 leaves" in caplog.text


def test_embedded_tasks_use_gsm8ks_own_filters():
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml

    stock_file = load_yaml(Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml")
    tiny = load_yaml(lm_tasks.EMBEDDED / "tiny_gsm.yaml")
    for key in ("metric_list", "filter_list", "doc_to_text", "doc_to_target", "output_type"):
        assert tiny[key] == stock_file[key]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ()}, "evaluator.tasks: empty"),
        ({"tasks": {"a": {"shot": 5}}}, r"a.shot=5: no such setting; did you mean .*a.shots\?"),
        ({"tasks": {"a": {"shots": -1}}}, "a.shots=-1: must be a count"),
        ({"tasks": {"a": {"shots": [5, 5]}}}, "different counts"),
        ({"tasks": {"a": {"limit": 0}}}, "a.limit=0: must be a whole number"),
        ({"tasks": {"a": 5}}, "a=5: must be a mapping"),
        ({"tasks": {"a": {"generation": 5}}}, "a.generation=5: must be a mapping"),
        ({"tasks": {"a": {"generation": {"until": {}}}}}, "must hold numbers, texts and lists"),
        ({"tasks": ("a",), "batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"tasks": ("a",), "batch_size": "many"}, "batch_size=many: must be a number or auto"),
        ({"tasks": ("a",), "backend": "tpu"}, "backend=tpu: must be hf or vllm"),
        (
            {"tasks": ("humaneval",)},
            "run_code=false: humaneval runs the code that the model writes",
        ),
    ],
)
def test_settings_that_cannot_be_meant(settings, message):
    with pytest.raises(ValueError, match=message):
        LmEval(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ("tiny_gms",)}, r"tasks.tiny_gms: no such task; did you mean tiny_gsm\?"),
        ({"tasks": ("runs",)}, "run_code=false: runs runs the code that the model writes"),
        ({"tasks": ("broken",)}, r"broken.yaml: not a task file"),
        ({"tasks": {"left": {"metrics": "f1"}}}, "left has no f1; it has acc"),
        ({"tasks": {"both": {"metrics": "f1"}}}, "both has no f1; it has acc"),
        ({"tasks": {"tiny_gsm": {"metrics": ["exact"]}}}, "exact_match_strict, exact_match_flexi"),
        ({"tasks": {"tiny_gsm": {"shots": 5}}}, "shots=5: tiny_gsm is defined without examples"),
        ({"tasks": ("plain", "left")}, "tasks.left: another of the tasks has left in it as well"),
        ({"tasks": {"left": {"shots": 50}}}, "left.shots=50: its data hold 12 examples"),
        ({"tasks": ("tiny_gsm",), "max_new_tokens": 256}, "256 tokens .* the context holds 256"),
        ({"tasks": ("gsm8k",), "data_dir": "nowhere"}, "data_dir=nowhere: no such directory"),
        ({"tasks": ("gsm8k",), "data_dir": "."}, "no directory gsm8k in it for the task gsm8k"),
        ({"tasks": ("left",), "include": ("nowhere",)}, "include=nowhere: no such directory"),
    ],
)
def test_mistakes_are_told_in_one_line(pair, zoo, include, settings, message, monkeypatch):
    monkeypatch.chdir(zoo)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        LmEval(**{"include": (include,), "run_task_code": True, **settings}).open(pair)
    assert "\n" not in str(caught.value)


def test_missing_files_and_packages_are_named(pair, tmp_path, monkeypatch):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_text(json.dumps(problem(0)) + "\n")
    with pytest.raises(
        FileNotFoundError, match="no test.jsonl, .json, .csv or .parquet in .*gsm8k"
    ):
        LmEval(("gsm8k",), data_dir=str(tmp_path)).open(pair)
    (tmp_path / "gsm8k" / "test.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="test.jsonl:1: not valid JSON"):
        LmEval(("gsm8k",), data_dir=str(tmp_path)).open(pair)
    row = {"key": 1, "prompt": "Two sentences.", "kwargs": [{"num_sentences": 2}]}
    row["instruction_id_list"] = ["length_constraints:number_sentences"]
    (tmp_path / "ifeval").mkdir()
    (tmp_path / "ifeval" / "input.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    monkeypatch.setattr("nltk.download", lambda *_: False)
    with pytest.raises(ValueError, match="tasks.ifeval: needs nltk's data, once: python -m nltk"):
        LmEval(("ifeval",), data_dir=str(tmp_path), max_new_tokens=8).open(pair)
    monkeypatch.setitem(sys.modules, "langdetect", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=r"tasks.ifeval: needs the package langdetect"):
        LmEval(("ifeval",)).open(pair)


ADD = "def add(a, b):\n    return a {} b"


def test_programs_pass_only_when_they_reach_their_end():
    tests = "assert add(2, 3) == 5"
    wrong = ["exit(0)", "raise SystemExit", "while True: pass", "x = 'a' * 2**33", "(", "\x00"]
    metric, passed = run_code.CodeEval().compute(
        references=[tests, tests],
        predictions=[[ADD.format("+"), ADD.format("-")], [ADD.format("+"), wrong[0]]],
        k=[1, 2, 3],
    )
    assert passed == {0: [True, False], 1: [True, False]}
    assert metric == {"pass@1": 0.5, "pass@2": 1.0}
    assert not any(run_code.passes(program) for program in wrong)
    assert run_code.passes("print('x' * 9)\nimport sys\nsys.stderr.write('y')")


def test_humaneval_runs_the_code_when_it_may(pair, tmp_path, monkeypatch, offline):
    row = {
        "task_id": "HumanEval/0",
        "prompt": "def add(a, b):\n",
        "canonical_solution": "    return a + b\n",
        "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
        "entry_point": "add",
    }
    other = {**row, "test": row["test"].replace("5", "-1")}
    (tmp_path / "humaneval").mkdir()
    lines = "".join(json.dumps(r) + "\n" for r in (row, other))
    (tmp_path / "humaneval" / "test.jsonl").write_text(lines)
    monkeypatch.setattr(vllm, "start", lambda *a: Standin(*a, text=row["canonical_solution"]))
    spec = LmEval(("humaneval",), run_code=True, data_dir=str(tmp_path), backend="vllm")
    with pytest.raises(ValueError, match="1024 tokens are to be generated"):
        spec.open(pair)
    scores = dataclasses.replace(spec, max_new_tokens=9).open(pair)(pair.module)
    assert scores.metrics["humaneval/pass@1"] == 0.5
    assert scores.documents["humaneval/pass@1"].tolist() == [1, 0]


def test_long_prompts_are_counted(pair, zoo, caplog):
    LmEval(("tiny_gsm",), max_new_tokens=CONTEXT - 20).open(pair)
    assert "tiny_gsm: 12 of 12 prompts are longer than the 20 tokens" in caplog.text
    caplog.clear()
    LmEval(("tiny_gsm",)).open(pair)
    assert not caplog.text


class Standin:
    """What vLLM is to lm-eval, without vLLM: it reads the directory and answers by rote."""

    def __new__(cls, directory, context, batch_size, seed, fail=False, text="#### 7"):
        from lm_eval.api.model import LM

        class Rote(LM):
            def loglikelihood(self, requests):
                if fail:
                    raise RuntimeError("out of memory")
                self.module = AutoModelForCausalLM.from_pretrained(directory)
                return [(-float(r.idx), False) for r in requests]

            def loglikelihood_rolling(self, requests):
                raise NotImplementedError

            def generate_until(self, requests):
                return [text] * len(requests)

        return Rote()


def test_vllm_gets_the_edited_model_and_its_directory_goes_away(pair, zoo, monkeypatch):
    seen = []

    def start(directory, *settings):
        seen.append((Path(directory), settings))
        assert (Path(directory) / "tokenizer.json").is_file()
        saved = AutoModelForCausalLM.from_pretrained(directory)
        for name, tensor in saved.state_dict().items():
            assert torch.equal(tensor, pair.pre[name])
        return Standin(directory, *settings)

    monkeypatch.setattr(vllm, "start", start)
    score = LmEval(TINY, backend="vllm").open(pair)
    with loaded(pair.module, pair.pre, restore=pair.post):
        scores = score(pair.module)
    assert scores.metrics["tiny_choice/acc"] == 0  # the first choice is the likeliest, never right
    assert seen[0][1] == (CONTEXT, 32, 1234)
    monkeypatch.setattr(vllm, "start", lambda *a: seen.append((Path(a[0]),)) or Standin(*a, True))
    with pytest.raises(RuntimeError, match="out of memory"):
        LmEval(TINY, backend="vllm").open(pair)(pair.module)
    assert len(seen) == 2
    assert not any(directory.exists() for directory, *_ in seen)


def test_missing_packages_are_said_before_anything_runs(pair, zoo, monkeypatch):
    monkeypatch.setattr(lm_asked, "find_spec", lambda name: None if name == "datasets" else 1)
    with pytest.raises(ValueError, match="evaluator=lm_eval: needs the package datasets"):
        LmEval(TINY).open(pair)
    monkeypatch.undo()
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="backend=vllm: needs the package vllm"):
        LmEval(TINY, backend="vllm").open(pair)


def test_every_choice_of_tasks_composes():
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from deltalab.run.building import build
    from deltalab.settings import conf_dir

    folder = conf_dir() / "evaluator" / "tasks"
    built = {}
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for path in sorted(folder.glob("*.yaml")):
            chosen = [f"evaluator/tasks={path.stem}", "evaluator.run_code=true"]
            if path.stem == "none":
                chosen.append("+evaluator.tasks.mine={shots: 3}")
            cfg = compose("config", ["evaluator=lm_eval", *chosen])
            node = OmegaConf.to_container(cfg.evaluator, resolve=True)
            built[path.stem] = build(node, "evaluator")
    assert {t.name: t.shots for t in built["paper"].tasks} == {
        "arc_challenge": (25,),
        "gsm8k": (5,),
        "hellaswag": (10,),
        "humaneval": (0,),
        "ifeval": (0,),
        "mmlu": (5,),
        "truthfulqa_mc2": (0,),
        "winogrande": (5,),
    }
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        follows = compose("config", ["evaluator=lm_eval", "data=gsm8k"]).evaluator.tasks
    assert list(follows) == ["gsm8k"]
    assert built["none"].tasks[0].shots == (3,)
    assert built["tiny"] == built["tiny_llm"]
    assert len({hash(spec) for spec in built.values()}) == len(built) - 2


@pytest.mark.skipif(not (embedded.ZOO / "sft.safetensors").is_file(), reason="no embedded pair")
def test_a_point_of_the_embedded_pair_records_scores_and_their_changes(tmp_path):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from deltalab.keys import Choices
    from deltalab.run import run
    from deltalab.settings import conf_dir

    chosen = ["model=tiny_llm", "edit=drop_only", "edit.p=0.9", "riemann=off", "objective.limit=4"]
    chosen += ["evaluator.limit=6", "evaluator.batch_size=6", f"results={tmp_path}"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        settings = OmegaConf.to_container(compose("config", chosen), resolve=True)
    latest.forget()
    record, skipped = run(settings, Choices("tiny_llm", "drop_only", "answers"))
    metrics, post = record["metrics"], record["reference"]["post"]
    assert not skipped
    for name in ("tiny_gsm/exact_match_strict", "tiny_choice/acc", "tiny_likelihood/nats"):
        assert metrics[f"{name}_change"] == pytest.approx(metrics[name] - post[name])
    assert metrics["tiny_likelihood/nats_change"] > 0.1
    assert post["tiny_gsm/exact_match_strict"] > 0.5
