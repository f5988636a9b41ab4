"""Files that lie: whatever the bytes, a checkpoint opens whole or is refused in one line."""

import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile

import pytest
import torch
from fuzzing import times
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from deltalab.weights import headers
from deltalab.weights.contents import of_checkpoint
from deltalab.weights.mapping import Checkpoint

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8,
          torch.bool, torch.float8_e4m3fn]  # fmt: skip
NAMES = st.text(min_size=1, max_size=12).filter(
    lambda n: n != "__metadata__" and not any(0xD800 <= ord(c) < 0xE000 for c in n)
)
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
REFUSED = (ValueError, FileNotFoundError)


@st.composite
def weights(draw):
    """A few small tensors of any dtype and shape, scalars and empty ones too."""
    named = draw(st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=4))
    return {name: torch.ones(shape).to(dtype) for name, (shape, dtype) in named.items()}


NASTY = st.one_of(
    st.none(), st.booleans(), st.text(max_size=5), st.floats(), st.just([]), st.just({}),
    st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 1 << 31, 1 << 40, 1 << 62, 1 << 63, 1 << 64, 10**30]),
)  # fmt: skip


@st.composite
def damaged(draw):
    """The bytes of a valid file after a few flips, cuts, insertions and changed lengths."""
    data = bytearray(save(draw(weights())))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["flip", "cut", "drop", "insert", "length"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + draw(st.integers(1, 9))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=9))
            case "length":
                data[:8] = struct.pack("<Q", draw(st.integers(0, (1 << 64) - 1)))
    return bytes(data)


@st.composite
def invented(draw):
    """A file whose header is made up: dtypes, shapes and offsets of any value."""
    entry = st.fixed_dictionaries(
        {
            "dtype": st.one_of(st.sampled_from([*headers.BITS, "F6_E2M3", "f32"]), NASTY),
            "shape": st.one_of(st.lists(st.one_of(st.integers(0, 4), NASTY), max_size=3), NASTY),
            "data_offsets": st.one_of(
                st.tuples(st.integers(0, 64), st.integers(0, 64)).map(list),
                st.lists(NASTY, max_size=3),
                NASTY,
            ),
        }
    )
    names = st.one_of(NAMES, st.just("__metadata__"))
    header = draw(st.one_of(st.dictionaries(names, st.one_of(entry, NASTY), max_size=3), NASTY))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(draw(st.integers(0, 64)))


def opens_whole_or_is_refused(path, size):
    """Open and read everything; return the checkpoint, or None where it is refused."""
    refusal = None
    try:
        opened = Checkpoint(path)
    except REFUSED as error:
        refusal = str(error)
    if refusal is not None:
        assert len(refusal.splitlines()) == 1
        assert str(path.parent) in refusal, "the message must name the file"
        assert len(refusal) < 1000
        return None
    total = 0
    for name in opened:
        tensor = opened[name]
        assert tuple(tensor.shape) == opened.shape(name) or opened.dtype(name) == "F4"
        total += tensor.numel() * tensor.element_size()
    assert total <= size, "more bytes in the tensors than in the file"
    of_checkpoint(path)
    return opened


@times(4)
@given(weights())
def test_what_the_library_writes_is_read(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    opened, expected = Checkpoint(path), load_file(path)
    assert set(opened) == set(expected)
    for name, tensor in expected.items():
        assert opened[name].dtype == tensor.dtype
        assert opened.shape(name) == tuple(tensor.shape)
        assert opened[name].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))


@times(8)
@given(st.one_of(damaged(), invented(), st.binary(max_size=64)))
def test_no_file_is_half_accepted(tmp_path, data):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    if (opened := opens_whole_or_is_refused(path, len(data))) is not None:
        assert set(load_file(path)) == set(opened)  # the library must agree with what we accept


@times(2)
@given(st.one_of(invented(), damaged()), st.sampled_from([b"[", b'{"":', b"[],", b'"a', b" "]))
def test_memory_is_bounded_by_the_file(tmp_path, data, filler):
    path = tmp_path / "a.safetensors"
    text = b'{"a":' + filler * 3000
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    tracemalloc.start()
    try:
        opens_whole_or_is_refused(path, path.stat().st_size)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (1 << 20) + 64 * path.stat().st_size


FILES = st.one_of(
    st.sampled_from(["a.safetensors", "b.safetensors", "../out.safetensors", "./a.safetensors",
                     "link.safetensors", "sub/../../out.safetensors", "/etc/passwd", "", ".", "..",
                     "missing.safetensors", "c" * 300, "a\0b", "sub\\..\\a", "C:\\a",
                     "m-00001-of-00002.safetensors", "/dev/zero", "fifo"]),
    st.text(max_size=8), NASTY,
)  # fmt: skip


@times(8)
@given(
    st.one_of(
        st.fixed_dictionaries(
            {"weight_map": st.one_of(st.dictionaries(st.sampled_from("wxyz"), FILES), NASTY)}
        ).map(json.dumps),
        NASTY.map(json.dumps),
        st.text(max_size=20),
        st.just('{"weight_map":{"w":"a.safetensors","w":"b.safetensors"}}'),
        st.just("[" * 100_000),
    )
)
def test_an_index_never_leads_out_of_its_directory(tmp_path, text):
    home = tmp_path / "home"
    if not home.exists():
        home.mkdir()
        for file, names in {"a": "wx", "b": "yz", "../out": "w", "m-00001-of-00002": "w"}.items():
            save_file({n: torch.ones(2) for n in names}, home / f"{file}.safetensors")
        (home / "link.safetensors").symlink_to(tmp_path / "out.safetensors")
        os.mkfifo(home / "fifo")
    path = home / "model.safetensors.index.json"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    if (opened := opens_whole_or_is_refused(path, 1 << 20)) is not None:
        assert all(file.resolve().parent == home for file in opened.shards.values())
        assert set(opened) == {n for f in set(opened.shards.values()) for n in load_file(f)}


@st.composite
def damaged_archives(draw):
    """The bytes of a PyTorch file after flips and cuts, kept readable as an archive or not."""
    tensors = {"w": torch.ones(3, 2), "n": torch.ones(()).long()}
    held = io.BytesIO()
    torch.save(tensors, held)
    if draw(st.booleans()):
        data = bytearray(held.getvalue())
        for _ in range(draw(st.integers(1, 4))):
            data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
        return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)
    again = io.BytesIO()
    with zipfile.ZipFile(held) as old, zipfile.ZipFile(again, "w") as new:
        for entry in old.infolist():
            data = bytearray(old.read(entry))
            if entry.filename.endswith("data.pkl"):
                for _ in range(draw(st.integers(1, 3))):
                    data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
            new.writestr(entry.filename, bytes(data))
    return again.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@times(4)
@given(damaged_archives())
def test_no_pytorch_file_is_half_accepted(tmp_path, data):
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    opens_whole_or_is_refused(path, len(data))


class Call:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("where", ["archive", "bare"])
def test_a_pickle_that_wants_to_run_code_is_refused_and_named(tmp_path, protocol, where):
    import subprocess

    canary, path = tmp_path / "canary", tmp_path / "a.bin"
    command = f"touch {canary}"
    calls = [
        (os.system, command),
        (subprocess.run, ["touch", str(canary)]),
        (eval, f"open({str(canary)!r}, 'w')"),
        (open, str(canary), "w"),
        (bytearray, 1 << 40),
        (torch.hub.load, "a/b", "c"),
    ]
    for function, *arguments in calls:
        content = {"w": torch.ones(1), "x": Call(function, *arguments)}
        if where == "archive":
            torch.save(content, path, pickle_protocol=protocol)
        else:
            path.write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(ValueError, match=r"a\.bin: ") as caught:
            Checkpoint(path)
        if where == "archive" and protocol == 2:
            assert function.__name__ in str(caught.value)
        assert not canary.exists()
