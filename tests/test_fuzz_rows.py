"""Files of rows that lie: whatever the bytes, all rows are texts or the fault is named."""

import gzip
import json

import pytest
from fuzzing import times
from hypothesis import given
from hypothesis import strategies as st
from texts import tokenizer

from deltalab.data.rows import read
from deltalab.data.text import Chats, Encoder, Plain, Preferences, Problems
from deltalab.data.tokens import IGNORED

pytest.importorskip("transformers")
REFUSED = (ValueError, FileNotFoundError)
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=9)
TEXTS = WORDS.filter(lambda text: text.strip())
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "a", ""]), inner, max_size=3),
    ),
    max_leaves=6,
)
FIELDS = ["question", "answer", "text", "prompt", "chosen", "rejected", "messages"]
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXTS}),
    min_size=1,
    max_size=4,
)
ROWS = st.one_of(
    st.fixed_dictionaries({f: st.one_of(TEXTS, MESSAGES) for f in FIELDS}),
    st.dictionaries(st.sampled_from(FIELDS), st.one_of(TEXTS, MESSAGES, JSON)),
    JSON,
)
SOURCES = [Problems, Chats, Plain, Preferences]


def refusal(path, call):
    """Return what a call gives, or None where it is refused in one line."""
    try:
        return call()
    except REFUSED as error:
        message = str(error)
    assert len(message.splitlines()) == 1, message
    assert len(message) < 1500
    assert str(path) in message, "the message must name the file"
    return None


@st.composite
def damaged(draw):
    """Valid lines after a few flips, cuts and insertions."""
    lines = draw(st.lists(ROWS, max_size=4))
    data = bytearray("\n".join(json.dumps(x, ensure_ascii=draw(st.booleans())) for x in lines)
                     .encode("utf-8", "surrogatepass"))  # fmt: skip
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["flip", "cut", "insert"])):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = draw(st.sampled_from([b"\0", b"\r", b"\xff", b"\xef\xbb\xbf", b"]"]))
    return bytes(data)


@times(8)
@given(damaged(), st.sampled_from(SOURCES), st.booleans(), st.sampled_from([4, 9, 200]))
def test_batches_are_whole_or_refused(tmp_path, data, kind, chat, context):
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    encoder = Encoder(tokenizer(bos=True), context, chat)
    found = refusal(path, lambda: kind(str(path)).open(encoder, 2))
    if found is None:
        return
    sides = [side for batch in found for side in (batch if len(batch) == 2 else (batch,))]
    rows = [line for line in data.decode("utf-8-sig").split("\n") if line.strip()]
    assert sum(len(ids) for ids, _, _ in sides) == len(rows) * (2 if kind is Preferences else 1)
    for ids, mask, labels in sides:
        assert ids.shape == mask.shape == labels.shape
        assert 2 <= ids.shape[1] <= context
        assert bool(((labels == ids) | (labels == IGNORED)).all())
        assert bool((labels[mask == 0] == IGNORED).all())
        assert bool((labels[:, 1:] != IGNORED).any(1).all()), "an answer in every row"


@times(4)
@given(
    st.lists(st.fixed_dictionaries({"question": WORDS, "answer": WORDS}), min_size=1, max_size=4),
    st.sampled_from(["a.jsonl", "a.json", "a.jsonl.gz"]),
    st.booleans(),
)
def test_what_json_writes_is_read(tmp_path, rows, name, ascii):
    text = json.dumps(rows, ensure_ascii=ascii)
    if "jsonl" in name:
        text = "\r\n".join(json.dumps(row, ensure_ascii=ascii) for row in rows)
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert [row.fields for row in read(str(tmp_path / name))] == rows


@times(4)
@given(
    st.one_of(st.binary(max_size=60), damaged()),
    st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.parquet", "a.csv.gz"]),
    st.booleans(),
)
def test_no_file_crashes(tmp_path, data, name, packed):
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if packed else data)
    for row in refusal(path, lambda: read(str(path))) or []:
        assert isinstance(row.fields, dict)
        assert str(path) in row.where
