"""`model.base`: a pair's delta put onto another base, in memory and on disk."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import settings_of
from test_hf_llm import IDS, write

from deltalab import keys, save
from deltalab.models.hf_llm import HfPair
from deltalab.models.timm_vit import TimmPair
from deltalab.store import latest

ARGS = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 8, "depth": 1,
        "num_heads": 2}  # fmt: skip


@pytest.fixture(autouse=True)
def closed():
    yield
    latest.forget()


@pytest.fixture
def files(tmp_path):
    """A base, an expert of it, and another base, all of one small architecture."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **ARGS, num_classes=4)
    base = model.state_dict()
    post = {n: t + 0.01 * torch.randn_like(t) for n, t in base.items()}
    post["norm.bias"] = base["norm.bias"].clone()
    other = {n: t + 0.3 * torch.randn_like(t) for n, t in base.items()}
    for name, weights in {"pre": base, "post": post, "base": other}.items():
        save_file(weights, tmp_path / f"{name}.safetensors")
    return tmp_path


def spec(files, **more) -> TimmPair:
    places = {n: str(files / f"{n}.safetensors") for n in ("pre", "post", "base")}
    return TimmPair("vit_tiny_patch16_224", **{**places, **more}, args=ARGS, device="cpu")


def test_the_sum_is_rounded_once_and_the_module_holds_it(files) -> None:
    pair = spec(files).open()
    pre, post, base = (load_file(files / f"{n}.safetensors") for n in ("pre", "post", "base"))
    for name, tensor in pair.module.state_dict().items():
        wanted = (base[name].double() + (post[name] - pre[name]).double()).float()
        assert torch.equal(tensor, pair.post[name]), name
        assert torch.allclose(tensor, wanted, atol=0, rtol=3e-7), name
        assert torch.equal(pair.pre[name], base[name]), name
    assert torch.equal(pair.post["norm.bias"], base["norm.bias"]), "no delta, no change"


def test_on_its_own_base_a_pair_is_what_it_is(files) -> None:
    own, plain = spec(files, base=str(files / "pre.safetensors")).open(), spec(files, base=None)
    latest.forget()
    plain = plain.open()
    for name in plain.post:
        assert torch.allclose(own.post[name], plain.post[name], atol=0, rtol=3e-7)
        assert torch.equal(own.pre[name], plain.pre[name])


def overrides(files, *more: str) -> list[str]:
    args = ", ".join(f"{k}: {v}" for k, v in ARGS.items())
    sides = [f"model.{n}={files / f'{n}.safetensors'}" for n in ("pre", "post", "base")]
    return ["model=timm_vit", "model.name=vit_tiny_patch16_224", f"model.args={{{args}}}", *sides,
            *more]  # fmt: skip


@pytest.mark.parametrize(("alpha", "times"), [(0, 1), (-1, 0), (-2, -1), (0.5, 1.5)])
def test_on_disk_the_delta_is_scaled_and_put_onto_the_base(files, alpha, times) -> None:
    """alpha = -1 is the base itself, alpha = -2 takes away what was learned: negation."""
    save.save([*overrides(files), "edit=expo", f"edit.alpha={alpha}", f"out={files / 'out'}"])
    found = load_file(files / "out" / "base.safetensors")
    pre, post, base = (load_file(files / f"{n}.safetensors") for n in ("pre", "post", "base"))
    assert list(found) == list(base)
    for name, tensor in found.items():
        wanted = base[name].double() + times * (post[name] - pre[name]).double()
        assert torch.allclose(tensor.double(), wanted, atol=1e-7), name
        if not times:
            assert torch.equal(tensor, base[name])


def test_random_edits_draw_on_disk_what_they_draw_in_memory(files) -> None:
    from deltalab.apply import editing
    from deltalab.apply.extras import Extras
    from deltalab.edits.dare import Dare

    save.save([*overrides(files), "edit=dare", "edit.p=0.5", "seed=3", f"out={files / 'out'}"])
    found, pair = load_file(files / "out" / "base.safetensors"), spec(files).open()
    edit = Dare(0.5, 0.0)
    wanted = editing.edited(pair.pre, pair.post, edit, "all", Extras.of(edit, pair, seed=3))
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], atol=1e-6), name
        dropped = found[name] == pair.pre[name]
        assert torch.equal(dropped, wanted[name] == pair.pre[name]), name


def test_a_language_model_takes_another_bases_place(tmp_path) -> None:
    for seed, name in enumerate(("pre", "post", "base")):
        write(tmp_path / name, seed=seed, dtype=torch.float32)
    places = {n: str(tmp_path / n) for n in ("pre", "post", "base")}
    pair = HfPair(**places, device="cpu").open()
    with torch.no_grad():
        logits = pair.module(IDS).logits
    latest.forget()
    sides = {n: HfPair(pre=p, post=p, device="cpu").open().post for n, p in places.items()}
    import transformers

    plain = transformers.AutoModelForCausalLM.from_pretrained(places["base"])
    own = {n: sides["base"][n] + (sides["post"][n] - sides["pre"][n]) for n in sides["base"]}
    plain.load_state_dict(own, strict=False)
    with torch.no_grad():
        assert torch.allclose(logits, plain(IDS).logits, atol=1e-4)


def narrower(weights):
    weights["head.weight"] = weights["head.weight"][:3].clone()
    weights["head.bias"] = weights["head.bias"][:3].clone()


def test_a_base_that_does_not_fit_is_told(files) -> None:
    other = load_file(files / "base.safetensors")
    narrower(other)
    save_file(other, files / "base.safetensors")
    with pytest.raises(ValueError, match=r"model.base: tensor 'head.*has shape \(3"):
        spec(files).open()
    with pytest.raises(ValueError, match=r"model.base: .*tensor 'head.*shape \(4"):
        save.save([*overrides(files), f"out={files / 'out'}"])
    with pytest.raises(ValueError, match=r"kernel=eager: is for a pair, not with model.base"):
        save.save([*overrides(files), f"out={files / 'out'}", "kernel=eager"])
    with pytest.raises(ValueError, match="goes with model.mismatch=error"):
        HfPair("a", "b", mismatch="keep_post", base="c")


def test_what_has_no_other_base_keeps_its_key_and_what_has_one_its_contents(files) -> None:
    choices = keys.Choices("timm_vit", "keep", "classification")

    def told(*more: str):
        own = [o for o in overrides(files, f"data.dir={files}") if not o.startswith("model.base")]
        return keys.determinants(settings_of(*own, *more), choices)["model"]

    plain = told()
    assert "base" not in plain
    moved = told(f"model.base={files / 'base.safetensors'}")
    assert {n: v for n, v in moved.items() if n != "base"} == plain
    assert moved["base"] != told(f"model.base={files / 'post.safetensors'}")["base"]
    assert not keys._neutral("model.experts.a.model.dequantize", False), "as before"
    assert keys._neutral("model.experts.a.model.base", None)
