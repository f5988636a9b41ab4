import json

import numpy as np
import pytest
import torch
from PIL import Image

from deltalab.data.images import Folder, HubImages, Packaged


@pytest.fixture
def folder(tmp_path):
    """Two classes of three images each; the value of the red channel tells class and number."""
    for c, name in enumerate(("cat", "dog")):
        (tmp_path / "val" / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.zeros((4, 5, 3), dtype=np.uint8)
            pixels[..., 0] = 100 * c + 10 * i
            Image.fromarray(pixels).save(tmp_path / "val" / name / f"{i}.png")
    return tmp_path


def collect(batches):
    batches = list(batches)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


@pytest.mark.parametrize("task", ["mnist", "fashion"])
def test_packaged_splits(task):
    x, y = collect(Packaged(task, "test").open(None, 300))
    assert x.shape[1:] == (1, 28, 28)
    assert len(x) >= 1000
    assert 0 <= x.min() < x.max() <= 1
    assert y.unique().numel() == 10
    objective, _ = collect(Packaged(task, "objective").open(None, 300))
    seen = {image.numpy().tobytes() for image in x}
    assert not any(image.numpy().tobytes() in seen for image in objective)


def test_packaged_mistakes():
    with pytest.raises(ValueError, match=r"data.task=letters: must be one of mnist, fashion"):
        Packaged("letters", "test")
    with pytest.raises(ValueError, match="data.split=train"):
        Packaged("mnist", "train")


def test_packaged_images_are_for_the_embedded_models():
    def transform(images):
        raise TypeError("a float tensor is wanted")

    with pytest.raises(ValueError, match="data.task=mnist: .* embedded models.*float tensor"):
        Packaged("mnist", "test").open(transform, 8)


def test_folder_reads_every_image_in_order_at_every_pass(folder):
    batches = Folder(str(folder), "val").open(None, 4)
    assert len(batches) == 2
    x, y = collect(batches)
    assert x.shape == (6, 3, 4, 5)
    assert (x[:, 0, 0, 0] * 255).round().tolist() == [0, 10, 20, 100, 110, 120]
    assert y.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(collect(batches)[0], x)


def test_folder_limit_keeps_all_classes(folder):
    _, y = collect(Folder(str(folder), "val", limit=2).open(None, 4))
    assert y.tolist() == [0, 1]


def test_folder_class_map(folder, tmp_path):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"cat": 281, "dog": 207}))
    _, y = collect(Folder(str(folder), "val", class_map=str(path)).open(None, 6))
    assert y.tolist() == [281] * 3 + [207] * 3
    path.write_text(json.dumps({"cat": 281}))
    with pytest.raises(ValueError, match="class 'dog' is not in it"):
        Folder(str(folder), "val", class_map=str(path)).open(None, 6)


def test_folder_mistakes_name_the_directory(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.dir=.*nowhere"):
        Folder(str(tmp_path / "nowhere")).open(None, 1)
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="empty: no images"):
        Folder(str(tmp_path / "empty")).open(None, 1)
    (folder / "val" / "cat" / "9.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"9\.png: not a readable image"):
        collect(Folder(str(folder), "val").open(None, 10))


@pytest.mark.parametrize("limit", [0, -5])
def test_limits_below_one_are_refused(limit):
    for source in (Packaged, Folder, HubImages):
        names = ("mnist", "test") if source is Packaged else ("a", "b")
        with pytest.raises(ValueError, match=f"data.limit={limit}: must be at least 1"):
            source(*names, limit=limit)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must map class names"),
        ('{"cat": -1, "dog": 0}', "class 'cat' is -1, must be the number"),
        ('{"cat": "1", "dog": 0}', "class 'cat' is '1', must be the number"),
        ('{"cat": 0.5, "dog": 0}', "class 'cat' is 0.5"),
    ],
)
def test_class_maps_are_checked(folder, tmp_path, text, message):
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        Folder(str(folder), "val", class_map=str(tmp_path / "map.json")).open(None, 6)
    assert "map.json" in str(caught.value)


def test_broken_images_are_named_whatever_the_decoder_raises(folder):
    path = folder / "val" / "cat" / "9.png"
    good = (folder / "val" / "cat" / "0.png").read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        data = bytearray(good)
        for _ in range(3):
            data[generator.integers(8, len(data))] = generator.integers(256)
        path.write_bytes(data[: generator.integers(8, len(data) + 1)])
        try:
            x, _ = collect(Folder(str(folder), "val").open(None, 1))
            assert x.isfinite().all()
        except ValueError as error:
            refused += 1
            assert "9.png: not a readable image" in str(error) or "shape" in str(error)  # noqa: PT017
    assert refused > 150


def test_a_picture_that_claims_billions_of_pixels_is_refused(folder):
    import struct
    import zlib

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    size = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(99)))
    (folder / "val" / "cat" / "9.png").write_bytes(bomb + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match=r"9\.png: not a readable image .*pixels"):
        collect(Folder(str(folder), "val").open(None, 1))


def test_images_of_unequal_shapes_are_named(folder):
    Image.fromarray(np.zeros((9, 9, 3), dtype=np.uint8)).save(folder / "val" / "cat" / "9.png")
    with pytest.raises(ValueError, match=r"image 3 has shape \(3, 9, 9\) and image 0 \(3, 4, 5\)"):
        collect(Folder(str(folder), "val").open(None, 6))


def test_one_class_is_warned_of(folder, caplog):
    for path in (folder / "val" / "dog").iterdir():
        path.unlink()
    Folder(str(folder), "val").open(None, 6)
    assert "all images are of one class" in caplog.text


def test_imagefolder_agrees_with_folder(folder, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    images = HubImages("imagefolder", "validation", dir=str(folder))
    x, y = collect(images.open(None, 4))
    expected_x, expected_y = collect(Folder(str(folder), "val").open(None, 4))
    assert torch.equal(x, expected_x)
    assert torch.equal(y, expected_y)
    with pytest.raises(ValueError, match=r"data.label=kind: the columns of imagefolder are"):
        HubImages("imagefolder", "validation", dir=str(folder), label="kind").open(None, 4)
