"""Text sources: exactly the answer is labelled, nothing is cut unsaid, mistakes are named."""

import copy
import csv
import gzip
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from texts import model, tokenizer, write

from deltalab.data import formats
from deltalab.data.rows import read
from deltalab.data.text import Chats, Encoder, Plain, Preferences, Problems
from deltalab.data.tokens import IGNORED, Marked, code
from deltalab.loss.answers import Answers, Dpo
from deltalab.loss.objectives import measure
from deltalab.weights.mapping import ModelPair

pytest.importorskip("transformers")
GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"
SUM = {"question": "what is 2 plus one?", "answer": "it is\n#### 3"}
TURNS = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "it is 1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "it is 2"},
]


@pytest.fixture
def problems(tmp_path):
    return write(tmp_path / "p.jsonl", [SUM | {"question": f"what is {i}?"} for i in range(7)])


def encoder(context=256, chat=False, **special):
    return Encoder(tokenizer(**special), context, chat)


def shown(batch, row=0):
    """The text of a row's tokens, and of its labels alone."""
    ids, mask, labels = (x[row].tolist() for x in batch)
    kept = [i for i, m in zip(ids, mask, strict=True) if m]
    return tokenizer().decode(kept), tokenizer().decode([i for i in labels if i != IGNORED])


def pair(module, context=256, chat=False):
    post = {n: v.detach() for n, v in module.state_dict().items()}
    return ModelPair(post, post, module, encoder(context, chat))


def uniform():
    """A model that finds every token equally likely."""
    module = model(tied=False)
    with torch.no_grad():
        module.lm_head.weight.zero_()
    return module


def test_exactly_the_answer_and_its_end_are_labelled(tmp_path):
    path = write(tmp_path / "p.jsonl", [SUM])
    (batch,) = Problems(path).open(encoder(), 4)
    text, answer = shown(batch)
    assert text == "Question: what is 2 plus one?\nAnswer: it is\n#### 3</s>"
    assert answer == " it is\n#### 3</s>"
    ids, mask, labels = batch
    assert all(x.dtype == torch.int64 for x in batch)
    assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])
    assert bool(mask.all())


def test_batches_keep_the_order_and_pad_on_the_right_to_their_own_longest(tmp_path):
    rows = [{"question": "a" * n, "answer": "b" * n} for n in (9, 2, 5, 30, 1)]
    source = Problems(write(tmp_path / "p.jsonl", rows), template="{question}:", separator="")
    batches = source.open(encoder(), 2)
    assert [len(ids) for ids, _, _ in batches] == [2, 2, 1]
    seen = [shown(b, i)[0] for b in batches for i in range(len(b[0]))]
    assert seen == [f"{r['question']}:{r['answer']}</s>" for r in rows]
    for ids, mask, labels in batches:
        assert int(mask.sum(1).max()) == ids.shape[1]
        assert bool((mask[:, :-1] >= mask[:, 1:]).all()), "padding is on the right"
        assert bool((labels[mask == 0] == IGNORED).all())
        assert bool((ids[mask == 0] == 0).all())


@pytest.mark.parametrize("special", [{}, {"bos": True}, {"eos": True}, {"bos": True, "eos": True}])
@pytest.mark.meaning("rows of text as they come")
def test_special_tokens_come_as_the_tokenizer_adds_them_and_one_end(problems, special):
    (batch,) = Problems(problems, limit=1).open(encoder(**special), 1)
    text, answer = shown(batch)
    assert text.startswith("<s>Question") if "bos" in special else text.startswith("Question")
    assert text.count("</s>") == 1
    assert answer == " it is\n#### 3</s>"


PROMPTS = ["Question: what is 1?\nAnswer:", "it", "what is", "x", "plus one", "é", "日", "####"]
ANSWERS = [" it is\n#### 3", "it is", " plus", "s", "\n#### 12", " 日本", "what", "é"]


@pytest.mark.parametrize("special", [{}, {"bos": True}])
def test_the_split_is_that_of_lm_eval(special):
    """Context and continuation token by token, wherever lm-eval's split loses no character."""
    from lm_eval.api.model import TemplateLM

    made, kept = tokenizer(**special), 0

    class Scorer:
        backend = "causal"
        tok_encode = staticmethod(made.encode)

    for prompt, answer in itertools.product(PROMPTS, ANSWERS):
        text = prompt + answer
        (coded,) = code(made, [Marked(text, ((len(prompt), len(text)),), "")])
        assert coded.ids == made.encode(text)
        before, after = TemplateLM._encode_pair(Scorer(), prompt, answer)
        if before + after == coded.ids:
            assert coded.ids[: coded.prompt] == before
            assert coded.labels[coded.prompt :] == after
            kept += 1
        else:
            assert coded.prompt < len(before)
    assert kept > 50


@pytest.mark.meaning("rows of text as they come")
def test_a_token_across_the_boundary_belongs_to_the_answer(tmp_path, caplog):
    """A template that ends in a space: as lm-eval does, the space goes with the answer's word."""
    path = write(tmp_path / "p.jsonl", [SUM])
    (batch,) = Problems(path, template="{question}\nAnswer: ", separator="").open(encoder(), 1)
    text, answer = shown(batch)
    assert text == "what is 2 plus one?\nAnswer: it is\n#### 3</s>"
    assert answer == " it is\n#### 3</s>"
    assert "1 of 1 prompts" in caplog.text
    caplog.clear()
    Problems(path).open(encoder(), 1)
    assert not caplog.text


def test_chat_wraps_the_prompt_and_labels_the_answer_with_its_end(problems):
    (batch,) = Problems(problems, limit=1).open(encoder(chat=True), 1)
    text, answer = shown(batch)
    assert text == ("<|user|>Question: what is 0?\nAnswer:</s>\n<|assistant|>it is\n#### 3</s>\n")
    assert answer == "it is\n#### 3</s>"


def test_chats_label_all_turns_of_the_assistant(tmp_path):
    path = write(tmp_path / "c.jsonl", [{"messages": TURNS}, {"messages": TURNS[:2]}])
    (batch,) = Chats(path).open(encoder(), 2)
    ids, _, labels = batch
    text, answer = shown(batch)
    assert text == tokenizer().apply_chat_template(TURNS, tokenize=False)
    assert answer == "it is 1</s>it is 2</s>"
    assert shown(batch, 1)[1] == "it is 1</s>"
    assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])


@pytest.mark.meaning("rows of text as they come")
def test_a_template_that_begins_with_bos_gets_no_second_one(tmp_path):
    made = tokenizer(bos=True)
    path = write(tmp_path / "c.jsonl", [{"messages": TURNS}])
    for start, count in (("", 1), ("{{ bos_token }}", 1)):
        other = copy.deepcopy(made)
        other.chat_template = start + made.chat_template
        ((ids, _, _),) = Chats(path).open(Encoder(other, 256), 1)
        assert ids[0].tolist().count(made.bos_token_id) == count


def test_plain_text_is_all_answer(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": "it is one"}, {"text": "what?"}])
    ((ids, mask, labels),) = Plain(path).open(encoder(bos=True), 2)
    assert torch.equal(labels == IGNORED, mask == 0)
    assert ids[0].tolist() == tokenizer(bos=True).encode("it is one")


def test_a_uniform_model_loses_log_vocabulary_a_token(problems):
    module = uniform()
    for source in (Problems(problems), Problems(problems, limit=1), Plain(problems, "question")):
        p = pair(module)
        measured = measure(module, Answers(source, 3).open(p))
        assert measured.mean == pytest.approx(math.log(len(tokenizer())), rel=1e-6)
    tokens = len(tokenizer().encode(" it is\n#### 3")) + 1
    measured = measure(module, Answers(Problems(problems)).open(pair(module)))
    assert measured.weights.tolist() == [tokens] * 7


@pytest.mark.meaning("rows of text as they come")
def test_batch_size_and_padding_change_no_loss(problems, tmp_path):
    rows = [{"question": "a" * n, "answer": "b" * (30 - n)} for n in (9, 2, 5, 20, 1)]
    path, module = write(tmp_path / "p.jsonl", rows), model().double()
    one, other = (
        measure(module, Answers(Problems(path), n).open(pair(module))).losses for n in (1, 5)
    )
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


PREFERENCE = {"prompt": "what is 1?", "chosen": "it is 1", "rejected": "it is one, or two"}


def as_lists(row):
    user = {"role": "user", "content": row["prompt"]}
    return {
        side: [user, {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")
    } | {"prompt": row["prompt"]}


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.meaning("rows of text as they come")
def test_preferences_from_texts_and_from_messages_are_the_same(tmp_path, chat):
    texts = write(tmp_path / "a.jsonl", [PREFERENCE] * 3)
    lists = write(tmp_path / "b.jsonl", [as_lists(PREFERENCE)] * 3)
    one, other = (Preferences(path).open(encoder(chat=chat), 2) for path in (texts, lists))
    assert len(one) == len(other) == 2
    for a, b in zip(one, other, strict=True):
        for x, y in zip((*a[0], *a[1]), (*b[0], *b[1]), strict=True):
            assert torch.equal(x, y)
    chosen, rejected = one[0]
    space = "" if chat else " "
    assert shown(chosen)[1] == f"{space}it is 1</s>"
    assert shown(rejected)[1] == f"{space}it is one, or two</s>"
    assert shown(chosen)[0].split("it is")[0] == shown(rejected)[0].split("it is")[0]


def test_only_the_last_turn_of_a_long_preference_is_judged(tmp_path):
    row = {
        "chosen": TURNS,
        "rejected": [*TURNS[:3], {"role": "assistant", "content": "what?"}],
    }
    path = write(tmp_path / "p.jsonl", [row])
    ((chosen, rejected),) = Preferences(path).open(encoder(chat=True), 1)
    assert shown(chosen)[1] == "it is 2</s>"
    assert shown(rejected)[1] == "what?</s>"
    with pytest.raises(ValueError, match=r"p.jsonl:1: 3 messages before the answer need a chat"):
        Preferences(path).open(encoder(), 1)


def test_dpo_is_log_two_at_the_pre_trained_weights(tmp_path):
    path = write(tmp_path / "p.jsonl", [PREFERENCE, as_lists(PREFERENCE)])
    module = model()
    measured = measure(module, Dpo(Preferences(path), beta=0.7).open(pair(module)))
    assert measured.losses.tolist() == pytest.approx([math.log(2)] * 2)


# --- what the context cuts


def test_long_answers_are_cut_at_the_end_and_counted(problems, tmp_path, caplog):
    whole = Problems(problems).open(encoder(), 7)[0]
    width, answer = whole[0].shape[1], int((whole[2][0] != IGNORED).sum())
    for context in range(width - answer + 1, width + 1):
        caplog.clear()
        ids, _, labels = Problems(problems).open(encoder(context), 7)[0]
        assert torch.equal(ids, whole[0][:, :context])
        assert torch.equal(labels, whole[2][:, :context])
        lost = width - context
        words = f"7 of 7 sequences are longer than the model's context of {context} tokens"
        assert (words in caplog.text) == (lost > 0)
        assert (f" {7 * lost} tokens in all" in caplog.text) == (lost > 0)
    for context in range(2, width - answer + 1):
        words = rf"p.jsonl:1: the prompt alone has {width - answer} tokens and .* is {context}$"
        with pytest.raises(ValueError, match=words):
            Problems(problems).open(encoder(context), 7)


def test_long_preferences_lose_the_prompt_s_beginning_first(tmp_path, caplog):
    row = {"prompt": "abcdefghij" * 3, "chosen": "xyz", "rejected": "uvwxy"}
    path = write(tmp_path / "p.jsonl", [row])
    whole = [shown(side)[0] for side in Preferences(path).open(encoder(), 1)[0]]
    lengths = [side[0].shape[1] for side in Preferences(path).open(encoder(), 1)[0]]
    assert lengths == [30 + 5, 30 + 7]  # a token a character, with separator and end
    assert not caplog.text
    for context in (36, 30, 20, 14):
        chosen, rejected = Preferences(path).open(encoder(context), 1)[0]
        drop = 37 - context
        assert shown(chosen)[0] == whole[0][drop:]
        assert shown(rejected)[0] == whole[1][drop:]
        assert "prompts cut at the beginning" in caplog.text
    chosen, rejected = Preferences(path).open(encoder(8), 1)[0]
    assert shown(chosen)[0] == "ghij xyz"
    assert shown(rejected)[0] == "ghij uvw"
    assert shown(rejected)[1] == " uvw"
    chosen, rejected = Preferences(path).open(encoder(30, bos=True), 1)[0]
    assert shown(chosen)[0] == "<s>" + whole[0][8:]
    assert shown(rejected)[0] == "<s>" + whole[1][8:]
    assert rejected[0].shape[1] == 30


def test_equal_answers_are_warned_of(tmp_path, caplog):
    same = PREFERENCE | {"rejected": PREFERENCE["chosen"]}
    Preferences(write(tmp_path / "p.jsonl", [PREFERENCE, same])).open(encoder(), 1)
    assert "1 of 2 preferences have the same answer on both sides" in caplog.text


def test_an_answer_of_no_predicted_token_is_named(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": "it is"}, {"text": "a"}])
    with pytest.raises(ValueError, match=r"t.jsonl:2: too short: no token of an answer"):
        Plain(path).open(encoder(), 1)
    assert len(Plain(path).open(encoder(bos=True), 1)) == 2


# --- files


@pytest.mark.meaning("rows of text as they come")
def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    rows = [{"question": f"é {i}\n日", "answer": f'"{i}", yes'} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\r\n"))
    (tmp_path / "c.jsonl").write_bytes(lines.rstrip(b"\n"))
    (tmp_path / "d.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (tmp_path / "f.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    with open(tmp_path / "g.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "h.csv.gz").write_bytes(gzip.compress((tmp_path / "g.csv").read_bytes()))
    files = sorted(tmp_path.iterdir())
    try:
        from pyarrow import Table, parquet
    except ModuleNotFoundError:
        pass
    else:
        parquet.write_table(Table.from_pylist(rows), tmp_path / "i.parquet")
        files.append(tmp_path / "i.parquet")
    for file in files:
        assert [row.fields for row in read(str(file))] == rows, file.name
        assert len(read(str(file), limit=2)) == 2
        assert len(read(str(file), limit=9)) == 3
    (tmp_path / "train.jsonl").write_bytes(lines)
    assert [row.fields for row in read(str(tmp_path), split="train")] == rows


def test_only_as_much_is_read_as_is_asked_for(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(SUM) + "\n" + "{broken\n")
    assert len(Problems(str(path), limit=1).open(encoder(), 1)) == 1
    with pytest.raises(ValueError, match=r"p.jsonl:2: not valid JSON"):
        Problems(str(path)).open(encoder(), 1)


def test_a_local_clone_of_a_data_set_opens(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "clone"
    (home / "main").mkdir(parents=True)
    write(home / "main" / "train-00000.jsonl", [SUM] * 3)
    configs = (
        "configs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*"
    )
    (home / "README.md").write_text(f"---\n{configs}\n---\n")
    assert [r.fields for r in read(str(home), "main", "train", 2)] == [SUM] * 2
    with pytest.raises(ValueError, match=r"data.split=null: .* has the splits train"):
        read(str(home), "main")
    with pytest.raises(ValueError, match=r"data.split=test"):
        read(str(home), "main", "test")


def test_packaged_files_are_found_and_none_outside(tmp_path, monkeypatch):
    (tmp_path / "zoo" / "llm").mkdir(parents=True)
    write(tmp_path / "zoo" / "llm" / "a.jsonl", [SUM])
    with monkeypatch.context() as patch:
        patch.setattr("deltalab.data.rows.files", lambda package: tmp_path)
        assert read("package:llm/a.jsonl")[0].fields == SUM
    with pytest.raises(ValueError, match=r"data.path=package:../run.py: leads out"):
        read("package:../run.py")
    with pytest.raises(FileNotFoundError, match=r"data.path=package:nothing.jsonl"):
        read("package:nothing.jsonl")


@pytest.mark.skipif(not GSM8K.is_file(), reason="no ../shared/data/gsm8k")
def test_real_problems(caplog):
    batches = Problems(str(GSM8K), limit=50).open(encoder(4096, bos=True), 8)
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()[:50]]
    seen = [shown(b, i) for b in batches for i in range(len(b[0]))]
    assert [text for text, _ in seen] == [
        f"<s>Question: {r['question']}\nAnswer: {r['answer']}</s>" for r in rows
    ]
    assert [answer for _, answer in seen] == [f" {r['answer']}</s>" for r in rows]
    assert not caplog.text
    assert len(Problems(str(GSM8K.parent), split="train", limit=3).open(encoder(), 1)) == 3


# --- what is refused, each in one line that names the place

GOOD = json.dumps(SUM).encode()
BROKEN = [
    (b"", "data.path=.*p.jsonl: no rows"),
    (b"\n \r\n", "data.path=.*p.jsonl: no rows"),
    (GOOD + b"\n{", r"p.jsonl:2: not valid JSON"),
    (GOOD + b"\n\n" + GOOD[:-5], r"p.jsonl:3: not valid JSON"),
    (b"[" * 100_000, r"p.jsonl:1: not valid JSON \(nested too deeply\)"),
    (b"[1]", r"p.jsonl:1: must be an object with named fields, is \[1\]"),
    (b'{"question": "a"}', r"p.jsonl:1: field 'answer' is missing; the fields are question"),
    (b"{}", r"p.jsonl:1: field 'question' is missing; the fields are none"),
    (b'{"question": "a", "answer": null}', r"p.jsonl:1: field 'answer' is null"),
    (b'{"question": "a", "answer": 4}', r"p.jsonl:1: field 'answer' is 4, must be a text"),
    (b'{"question": ["a"], "answer": "4"}', r"p.jsonl:1: field 'question' is \['a'\]"),
    (b'{"question": "a", "answer": " \\n"}', r"p.jsonl:1: field 'answer' is empty"),
    (b'{"question": "", "answer": "4"}', r"p.jsonl:1: field 'question' is empty"),
    (b'{"question": "a", "answer": "b\\u0000"}', r"p.jsonl:1: field 'answer' holds a NUL .* at 1"),
    (b'{"question": "a", "answer": "b\\ud800"}', r"p.jsonl:1: field 'answer' holds half a surr"),
    (GOOD + b'\n{"question": "\xff"}', r"p.jsonl:2: not UTF-8 \(byte 0xff at 14\)"),
    (GOOD.decode().encode("utf-16"), r"p.jsonl:1: not UTF-8"),
]


@pytest.mark.parametrize(("content", "words"), BROKEN)
def test_broken_lines_are_named(tmp_path, content, words):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        Problems(str(path)).open(encoder(), 1)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b'{"question": "a"}', "a.json: must be a list of objects"),
        ("a.json", b'[{"question": "a"}, 3]', "a.json, item 1: must be an object"),
        ("a.json", b"\n\n\xff", "a.json: not UTF-8 in line 3"),
        ("a.csv", b"question,answer\na,b,c\n", "a.csv:2: more values than the header"),
        ("a.csv", b"question,answer\na\n", "a.csv:2: field 'answer' is null"),
        ("a.csv", b'question,answer\n"a\n', "a.csv:2: not valid CSV"),
        ("a.csv", b"question,answer\n", "a.csv: no rows"),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz: not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(GOOD, mtime=0)[:-9], "a.jsonl.gz: not a whole gzip file"),
        ("a.parquet", b"PAR1 no", "a.parquet: not a readable parquet file"),
        ("a.txt", GOOD, r"a.txt: must end in .jsonl, .json, .csv"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        Problems(str(path)).open(encoder(), 1)
    assert len(str(caught.value).splitlines()) == 1


def test_a_line_or_file_of_any_length_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("deltalab.data.formats.LONGEST_LINE", 99)
    monkeypatch.setattr("deltalab.data.formats.LARGEST_FILE", 99)
    long = json.dumps([SUM | {"answer": "1" * 99}])
    for name, words in (("a.jsonl", "a.jsonl:1: a line of more"), ("a.json", "a.json: more than")):
        (tmp_path / name).write_text(long)
        with pytest.raises(ValueError, match=words):
            read(str(tmp_path / name))


def test_what_is_not_there_is_named(tmp_path):
    here, gone = str(Path(__file__).parents[1]), str(tmp_path / "no.jsonl")
    for path in (gone, "a\0b", "x" * 5000, "../nowhere", str(tmp_path), here, "", "~nobody/a"):
        with pytest.raises(FileNotFoundError, match=r"^data.path="):
            Problems(path).open(encoder(), 1)


def test_a_data_set_that_cannot_be_had_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*arguments, **options):
        raise ConnectionError("Couldn't reach\n the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    words = (
        r"^data.path=openai/gsm8k: no file .*\((Couldn't reach the hub|the hub cannot be reached)\)"
        "; name a local file"
    )
    with pytest.raises(FileNotFoundError, match=words):
        Problems("openai/gsm8k", split="train", config="main").open(encoder(), 1)


CHATS = [
    ({"messages": "hello"}, "must be a list of messages"),
    ({"messages": []}, "must be a list of messages"),
    ({"messages": [{"from": "human"}]}, "message 0 is .*, must have role and content"),
    ({"messages": ["hello"]}, "message 0 is 'hello', must have"),
    ({"messages": [*TURNS[:1], {"role": "assistant", "content": ""}]}, "message 1 is empty"),
    ({"messages": [{"role": 1, "content": "a"}]}, "message 0, role is 1, must be a text"),
    ({"messages": TURNS[:1]}, "no message of the assistant"),
    ({"text": "hello"}, "field 'messages' is missing; the fields are text"),
]


@pytest.mark.parametrize(("row", "words"), CHATS)
def test_broken_chats_are_named(tmp_path, row, words):
    path = write(tmp_path / "c.jsonl", [{"messages": TURNS}, row])
    with pytest.raises(ValueError, match=rf"c.jsonl:2: .*{words}|c.jsonl:2: {words}"):
        Chats(path).open(encoder(), 1)


def test_an_empty_system_message_is_fine(tmp_path):
    system = {"role": "system", "content": ""}
    path = write(tmp_path / "c.jsonl", [{"messages": [system, *TURNS]}])
    assert shown(Chats(path).open(encoder(), 1)[0])[1] == "it is 1</s>it is 2</s>"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": "a", "rejected": "b"}, "field 'prompt' is missing"),
        ({"prompt": "p", "chosen": "a"}, "field 'rejected' is missing"),
        ({"prompt": "p", "chosen": "a", "rejected": TURNS}, "one answer is a list"),
        ({"chosen": TURNS, "rejected": TURNS[2:]}, "differ before their last"),
        ({"chosen": TURNS[:3], "rejected": TURNS[:3]}, "must be the assistant's"),
        ({"prompt": "p", "chosen": "a", "rejected": 3}, "field 'rejected' is 3"),
    ],
)
def test_broken_preferences_are_named(tmp_path, row, words):
    path = write(tmp_path / "p.jsonl", [PREFERENCE, row])
    with pytest.raises(ValueError, match=rf"p.jsonl:2: .*{words}"):
        Preferences(path).open(encoder(chat=True), 1)


def test_templates_that_cannot_be_used(tmp_path):
    path = write(tmp_path / "c.jsonl", [{"messages": TURNS}])
    for template, words in [
        ("{{ raise_exception('no\\n system') }}", r"c.jsonl:1: the chat template refuses it \(no"),
        ("{{ messages[-1]['content'] }}", r"c.jsonl:1: the chat template writes message \d other"),
        ("{{ nothing.at.all }}", r"c.jsonl:1: the chat template refuses it"),
    ]:
        made = copy.deepcopy(tokenizer())
        made.chat_template = template
        with pytest.raises(ValueError, match=words) as caught:
            Chats(path).open(Encoder(made, 256), 1)
        assert len(str(caught.value).splitlines()) == 1
    made.chat_template = None
    with pytest.raises(ValueError, match=r"model.chat=true: .* no chat template"):
        Encoder(made, 256, chat=True)
    with pytest.raises(ValueError, match=r"c.jsonl:1: messages need a chat template"):
        Chats(path).open(Encoder(made, 256), 1)


@pytest.mark.parametrize("source", [Problems, Chats, Plain, Preferences])
def test_settings_out_of_range_are_named(source, problems):
    for limit in (0, -3):
        with pytest.raises(ValueError, match=f"data.limit={limit}: must be at least 1"):
            source(problems, limit=limit)
    with pytest.raises(ValueError, match="data: texts are for language models"):
        source(problems).open(None, 1)
    with pytest.raises(ValueError, match=r"data.template='Q:': must hold \{"):
        (Problems if source is Problems else Preferences)(problems, template="Q:")
    with pytest.raises(ValueError, match="model.context=1: must be at least 2"):
        encoder(1)


def test_a_field_of_a_csv_file_may_have_any_length(tmp_path):
    """On the code before, `csv` refused fields of more than 131,072 characters."""
    path = tmp_path / "long.csv"
    path.write_text(f"question,answer\n{'q' * 400_000},a\n", encoding="utf-8")
    ((_, fields),) = formats.rows(path)
    assert len(fields["question"]) == 400_000
