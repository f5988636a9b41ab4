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


@pytest.mark.meaning("pictures and classes")
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


def picture(place, pixels=None, mode=None, **how):
    place.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((4, 4, 3), 90, np.uint8) if pixels is None else pixels
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(place, **how)


def both(folder, monkeypatch):
    """Images and labels of the split `train` as both readers give them."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder.parent / f"cache of {folder.name}"))
    hub = collect(HubImages("imagefolder", "train", dir=str(folder)).open(None, 4))
    return collect(Folder(str(folder), "train").open(None, 4)), hub


@pytest.mark.meaning("pictures and classes")
def test_hidden_directories_are_no_classes(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            picture(tmp_path / split / name / "a.png")
    for hidden in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        picture(tmp_path / "train" / hidden / "a.png")
        picture(tmp_path / "val" / "cat" / hidden / "deep" / "a.png")
    picture(tmp_path / "val" / "dog" / "._a.png")
    for split in ("train", "val"):
        assert collect(Folder(str(tmp_path), split).open(None, 8))[1].tolist() == [0, 1]
    assert collect(Folder(str(tmp_path / "train")).open(None, 8))[1].tolist() == [0, 1]


@pytest.mark.meaning("pictures and classes")
def test_classes_are_numbered_once_for_all_splits(tmp_path, monkeypatch, caplog):
    """By hand: of a, b, c, d the splits have those named; each keeps its place among all."""
    classes = {"train": "bd", "val": "abc", "test": "a", "plots": "xy"}
    for split, names in classes.items():
        for name in names:
            picture(tmp_path / split / name / "0.png")
    expected = {"train": [1, 3], "val": [0, 1, 2], "test": [0], "plots": [0, 1]}
    for split, labels in expected.items():
        assert collect(Folder(str(tmp_path), split).open(None, 8))[1].tolist() == labels
    assert "no images of 2 of 4 classes, such as a" in caplog.text
    assert "all images are of one class, a" in caplog.text
    for name in "xy":
        (tmp_path / "plots" / name / "0.png").unlink()
    assert both(tmp_path, monkeypatch)[1][1].tolist() == [1, 3]


@pytest.mark.meaning("pictures and classes")
def test_shades_beyond_8_bits_are_kept_or_refused(tmp_path, monkeypatch):
    deep = np.linspace(0, 65535, 16).reshape(4, 4).astype(np.uint16)
    exact = torch.from_numpy(deep / 65535).float()
    Image.fromarray(deep).save(tmp_path / "a.ppm")
    for name in "xy":
        picture(tmp_path / "d" / "train" / name / "a.png", deep)
        picture(tmp_path / "d" / "train" / name / "b.tiff", (deep / 65535).astype(np.float32))
        picture(tmp_path / "d" / "train" / name / "c.tiff", deep)
        (tmp_path / "d" / "train" / name / "d.pgm").write_bytes((tmp_path / "a.ppm").read_bytes())
    for x, _ in both(tmp_path / "d", monkeypatch):
        assert len(x) == 8
        assert (x - exact).abs().max() <= 0.5 / 255 + 1e-6
    bad = {
        "floating-point shades from 0 to 255": 255.0 * deep / 65535,
        "floating-point shades from -1 to 1": deep / 32767.5 - 1,
        "floating-point shades from nan to nan": np.full((4, 4), np.nan),
        "32-bit integers from 0 to 65535": deep.astype(np.int32),
    }
    for message, pixels in bad.items():
        kind = np.float32 if "float" in message else np.int32
        picture(tmp_path / "e" / "x" / "a.tiff", pixels.astype(kind))
        with pytest.raises(ValueError, match=rf"a\.tiff: {message}"):
            collect(Folder(str(tmp_path / "e")).open(None, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tiff"])
@pytest.mark.meaning("pictures and classes")
def test_both_readers_turn_pictures_as_exif_says(orientation, ending, tmp_path, monkeypatch):
    """The pixel that the orientation puts into the upper left corner, by the standard's table."""
    pixels = np.zeros((4, 6), np.uint8 if ending == "jpg" else np.uint16)
    pixels = np.repeat(np.repeat(pixels, 8, 0), 8, 1)
    top, left = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (1, 0), 7: (1, 1),
                 8: (0, 1)}[orientation]  # fmt: skip
    pixels[24 * top : 24 * top + 8, 40 * left : 40 * left + 8] = np.iinfo(pixels.dtype).max
    exif = Image.Exif()
    exif[0x0112] = orientation
    how = {"exif": exif} | ({"compression": "tiff_lzw"} if ending == "tiff" else {})
    for name in "xy":  # Pillow scrambles rotated TIFFs that are not compressed
        picture(tmp_path / "d" / "train" / name / f"a.{ending}", pixels, **how)
    for x, _ in both(tmp_path / "d", monkeypatch):
        assert x.shape[2:] == ((32, 48) if orientation < 5 else (48, 32))
        assert x[0, :, :8, :8].min() > 0.9
        assert x[0, :, 8:, 8:].max() < 0.1


@pytest.mark.meaning("pictures and classes")
def test_what_rgb_has_not_is_told_once_and_dropped(tmp_path, monkeypatch, caplog):
    """Colours as stored: red; transparent where the alpha is 0."""
    red = np.zeros((4, 4, 4), np.uint8)
    red[..., 0], red[:2, :, 3] = 255, 255
    palette = Image.new("P", (4, 4))
    palette.putpalette([255, 0, 0])
    root = tmp_path / "train"
    for name in ("x", "y"):
        picture(root / name / "rgba.png", red)
        picture(root / name / "opaque.png", red | np.uint8([0, 0, 0, 255]))
        picture(root / name / "cmyk.jpg", red[..., :3], mode="CMYK", quality=100)
        palette.save(root / name / "palette.png", transparency=b"\0")
        palette.save(
            root / name / "moving.gif", save_all=True, append_images=[Image.new("L", (4, 4))]
        )
        grey = np.stack([red[..., 0], red[..., 3]], 2)
        Image.fromarray(grey, "LA").save(root / name / "z.png")
    for x, _ in both(tmp_path, monkeypatch):
        assert len(x) == 12
        colours = x.reshape(2, 6, 3, 16)
        assert (colours[:, :5] - torch.tensor([1.0, 0, 0])[None, None, :, None]).abs().max() < 0.02
        assert (colours[:, 5] == 1).all()
    for kind in ("transparent in part", "CMYK", "several frames"):
        assert caplog.text.count(kind) == 2  # once for each reader
    assert "rgba.png: transparent" in caplog.text or "palette.png: transparent" in caplog.text


def test_an_empty_file_is_called_that(tmp_path):
    picture(tmp_path / "x" / "a.png")
    (tmp_path / "x" / "b.png").touch()
    with pytest.raises(ValueError, match=r"b\.png: not a readable image \(the file is empty\)"):
        collect(Folder(str(tmp_path)).open(None, 1))


@pytest.mark.meaning("pictures and classes")
def test_spare_outputs_are_told(tmp_path, caplog):
    from deltalab.evaluators.accuracy import Accuracy
    from deltalab.weights.mapping import ModelPair

    for name in "xy":
        picture(tmp_path / name / "a.png")
    (tmp_path / "map.json").write_text('{"x": 1, "y": 4}')
    head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5))
    state = head.state_dict()
    pair = ModelPair(state, state, head, None)
    for class_map, told in ((str(tmp_path / "map.json"), 0), (None, 1)):
        data = Folder(str(tmp_path), class_map=class_map)
        score = Accuracy(data, "images").open(pair)
        score(head)
        score(head)
        assert caplog.text.count("2 classes in the data, the model has 5 outputs") == told
