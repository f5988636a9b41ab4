"""Families from the command line's settings to the record, and what is refused on the way."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

import deltalab.save as save
from deltalab import keys, options, run
from deltalab.apply.extras import Extras
from deltalab.apply.merging import Expert, Family
from deltalab.models import embedded, families
from deltalab.models.zoo import EmbeddedVit
from deltalab.run import building
from deltalab.settings import conf_dir, tidy
from deltalab.store import latest
from deltalab.weights.mapping import ModelPair

FEW = ("objective.limit=24", "evaluator=none", "riemann=paper")
FAMILY = ("model=vit_family", *FEW)


def settings_of(*overrides: str) -> dict:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return tidy(options.plain(compose("config", list(overrides))))


def ran(results, *overrides: str) -> dict:
    named = dict(o.split("=", 1) for o in overrides if "=" in o)
    choices = keys.Choices(named["model"], named.get("edit", "keep"), "classification")
    return run.run(settings_of(f"results={results}", *overrides), choices)[0]


@pytest.fixture(autouse=True)
def closed():
    yield
    latest.forget()


def test_every_expert_has_what_its_own_pairs_record_holds(tmp_path) -> None:
    """A merge that gives one expert alone back: no change for it, and for the other all of it."""
    record = ran(tmp_path, *FAMILY, "merge=sum", "merge.weights={mnist: 1, fashion: 0}",
                 "prediction=on")  # fmt: skip
    one, other = record["experts"]["mnist"], record["experts"]["fashion"]
    assert list(record["experts"]) == ["mnist", "fashion"]
    assert one["loss"]["change"] == 0
    assert one["touched"]["relative_shift"] == 0
    assert one["class"] == "competitive"
    assert other["loss"]["change"] > 1
    pair = ran(tmp_path, "model=mnist_vit", "edit=keep", *FEW)
    for name in ("pre", "post", "gap"):
        assert one["loss"][name] == pytest.approx(pair["loss"][name], abs=1e-9)
    assert one["loss"]["unit"] == pair["loss"]["unit"]
    assert set(one["terms"]) == set(pair["terms"])
    assert other["prediction"]["second_order"] != other["prediction"]["first_order"]
    mean = (one["loss"]["change"] + other["loss"]["change"]) / 2
    assert record["loss"]["change"] == pytest.approx(mean)
    assert record["loss"]["error"] == pytest.approx(
        (one["loss"]["error"] ** 2 + other["loss"]["error"] ** 2) ** 0.5 / 2
    )
    rule = record["term"]["rule"]
    values = [record["experts"][n]["terms"][rule]["value"] for n in record["experts"]]
    assert record["term"]["value"] == pytest.approx(sum(values) / 2)
    assert record["merge"] == {"name": "sum", "weight": 1.0, "weights": {"mnist": 1, "fashion": 0}}
    kept = json.loads((tmp_path / "records" / f"{record['key']}.json").read_text())
    assert kept["experts"]["fashion"]["loss"] == other["loss"]


def test_a_pair_is_a_family_of_one(tmp_path) -> None:
    for edit in (("edit=expo", "edit.alpha=0.5"), ("edit=ties", "edit.keep=0.3")):
        own = ran(tmp_path, *FAMILY, "~model.experts.fashion", "merge=sum", *edit)
        pair = ran(tmp_path, "model=mnist_vit", *FEW, *edit)
        assert own["loss"]["change"] == pytest.approx(pair["loss"]["change"], abs=1e-6)
        rule = pair["term"]["rule"]
        assert own["terms"][rule]["value"] == pytest.approx(pair["terms"][rule]["value"], rel=1e-4)
        assert own["touched"]["relative_shift"] == pytest.approx(
            pair["touched"]["relative_shift"], rel=1e-5
        )


@pytest.mark.parametrize("merge", ["ties", "emr", "average", "tsv", "iso", "slerp", "regmean"])
def test_every_merge_is_a_point(tmp_path, merge: str) -> None:
    given = ["merge.weight=0.5"] if merge == "ties" else []
    given += ["merge.select=linear"] if merge == "regmean" else []
    record = ran(tmp_path, *FAMILY, f"merge={merge}", *given, "riemann=off")
    for own in record["experts"].values():
        assert 0 < own["touched"]["relative_shift"] < 2
        assert own["loss"]["half"] == ("B" if merge == "regmean" else None)
    again = ran(tmp_path, *FAMILY, f"merge={merge}", *given, "riemann=off", "force=true")
    assert again["loss"] == record["loss"]
    assert again["key"] == record["key"]


def test_random_edits_have_numbers_of_their_own_and_experts_stay_open(
    tmp_path, monkeypatch
) -> None:
    opened = []
    original = EmbeddedVit.open
    monkeypatch.setattr(EmbeddedVit, "open", lambda self: opened.append(self) or original(self))
    seen = {}
    for seed in (0, 1):
        record = ran(tmp_path, *FAMILY, "merge=average", "edit=dare", "edit.p=0.9", f"seed={seed}",
                     "riemann=off")  # fmt: skip
        seen[seed] = record["loss"]["change"]
    assert seen[0] != seen[1]
    assert len(opened) == 2, "both experts, once for the sweep"
    point = building.prepare(
        settings_of(*FAMILY, "merge=sum"), keys.Choices("vit_family", "keep", "c")
    )
    assert [p.salt for p in point.experts.values()] == ["expert mnist", "expert fashion"]


def test_subsets_merge_and_their_base_has_seen_no_class_of_theirs() -> None:
    from experiments.zoo import subsets

    values = settings_of("model=subset_family", "merge=sum")
    experts = values["model"]["experts"]
    classes = [experts[name]["model"]["classes"] for name in experts]
    assert [tuple(each) for each in classes] == list(subsets.CLASSES)
    assert [experts[n]["objective"]["data"]["classes"] for n in experts] == classes
    assert [experts[n]["evaluator"]["data"]["classes"] for n in experts] == classes
    assert sorted(c for each in classes for c in each) == list(range(10, 20)), "digits are 0 to 9"
    size = sum(f.stat().st_size for f in embedded.ZOO.glob("subset*"))
    assert size < 6e6
    base = load_file(embedded.ZOO / "subset_pre.safetensors")
    deltas = []
    for name in embedded.SUBSETS:
        post = load_file(embedded.ZOO / f"{name}.safetensors")
        assert all(t.dtype == torch.float16 for t in post.values())
        deltas.append(torch.cat([(post[n].float() - base[n].float()).flatten() for n in base]))
    cosines = torch.corrcoef(torch.stack(deltas)).triu(1)
    assert cosines.abs().max() < 0.3, "nearly orthogonal"
    mean = sum(deltas) / 5
    assert all(float(d.norm()) > float(mean.norm()) > 0 for d in deltas)


def test_subsets_as_a_family(tmp_path) -> None:
    """On every expert's way the accurate term is the measured change, or says that it is not."""
    record = ran(tmp_path, "model=subset_family", *FEW[:2], "merge=sum", "merge.weight=0.3",
                 "riemann=accurate")  # fmt: skip
    right = 0
    for own in record["experts"].values():
        assert own["loss"]["post"] < own["loss"]["edited"] < own["loss"]["pre"] + 0.1
        term = own["terms"]["adaptive"]
        close = term["value"] == pytest.approx(own["loss"]["change"], rel=0.02, abs=1e-4)
        assert close or not term["converged"], (term, own["loss"])
        right += close
    assert right >= 4
    assert record["loss"]["edited"] < record["loss"]["pre"] - 0.1


def test_options_by_name_become_the_settings_of_a_pair() -> None:
    experts = (
        "model.experts={a: DIR, b: {post: org/b, post_revision: v1,"
        " data: {questions: {path: q.jsonl}},"
        " objective: {answers: {limit: 5}}, evaluator: null}}"
    )
    values = settings_of("model=hf_llm", "model.pre=BASE", experts, "merge=ties", "evaluator=none")
    one, other = values["model"]["experts"]["a"], values["model"]["experts"]["b"]
    assert (one["model"]["post"], one["model"]["pre"]) == ("DIR", "BASE")
    assert one["objective"]["data"]["path"] == "openai/gsm8k"
    assert other["model"]["post_revision"] == "v1"
    assert other["objective"]["data"]["path"] == "q.jsonl"
    assert other["objective"]["limit"] == 5
    assert other["evaluator"] is None
    assert values["objective"] is None
    assert "experts" not in other["model"]
    assert options.member(values, "b")["merge"] is None
    pair = settings_of("model=hf_llm", "model.pre=BASE", "model.post=DIR", "evaluator=none")
    assert "experts" not in pair["model"]
    assert pair["model"] == one["model"]


def test_data_to_calibrate_on_is_named_by_option() -> None:
    plain = settings_of("model=mnist_vit")
    assert plain["calibration"]["objective"] is None
    given = "calibration.data={packaged: {classes: [3]}}"
    values = settings_of("model=mnist_vit", "calibration.model=pre", given)
    made = values["calibration"]
    assert made["objective"]["data"]["classes"] == [3]
    assert made["objective"]["data"]["task"] == "mnist"
    choices = keys.Choices("mnist_vit", "keep", "classification")
    found = [keys.determinants(v, choices) for v in (plain, values)]
    assert "calibration" not in found[0]
    assert found[1]["calibration"]["objective"]["data"]["classes"] == [3]


BAD = {
    "merge= is missing": (FAMILY, r"merge=: model.experts names 2, say how they are merged"),
    "a pair": (("model=mnist_vit", "merge=ties"), "merge=ties: a pair has nothing to merge"),
    "slerp of five": (("model=subset_family", "merge=slerp"), "is of two experts, .* has 5"),
    "weights": ((*FAMILY, "merge=sum", "merge.weights={mnist: 1}"), "none for expert fashion"),
    "twice": (("model=vit_family", "model.experts.fashion.post=mnist", "merge=sum"),
              "mnist and fashion are the same model"),
    "two bases": (("model=vit_family", "model.experts.fashion.post=digits", "merge=sum"),
                  "mnist is of base pre, fashion of digits_pre"),
    "no such data": (("model=vit_family", "+model.experts.mnist.data=nope", "merge=sum"),
                     "model.experts.mnist.data=nope: must be one of chat"),
    "no such setting": (("model=vit_family", "+model.experts.mnist.tusk=x", "merge=sum"),
                        "model.experts.mnist.tusk: no such setting; did you mean task"),
    "no such expert": (("model=vit_family", "model.experts.mnist.post=nope", "merge=sum"),
                       "model.experts.mnist: model.post=nope: must be one of"),
    "both": (("model=vit_family", "model.post=mnist", "merge=sum"), "give one of the two"),
    "no experts": (("model=hf_llm", "model.pre=X", "model.experts={}", "merge=sum"),
                   "must name experts"),
    "keep": ((*FAMILY, "merge=ties", "merge.keep=3"), r"merge.keep=3: must be in \[0, 1\]"),
    "calibration": (("model=mnist_vit", "calibration.model=base"), "must be one of post, pre"),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "text"), BAD.values(), ids=BAD)
def test_mistakes_are_told_before_anything_is_opened(overrides, text: str, monkeypatch) -> None:
    monkeypatch.setattr(EmbeddedVit, "open", lambda self: pytest.fail("opened"))
    with pytest.raises(ValueError, match=text):
        building.prepare(
            settings_of(*overrides), keys.Choices("vit_family", "keep", "classification")
        )


def models(tmp_path, **changes) -> str:
    """Write a base and experts of a small timm model; return the overrides that name them."""
    import timm

    torch.manual_seed(0)
    small = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 8, "depth": 1,
             "num_heads": 2, "num_classes": 4}  # fmt: skip
    base = timm.create_model("vit_tiny_patch16_224", **small).state_dict()
    save_file(base, tmp_path / "base.safetensors")
    for name in ("a", "b", "c"):
        post = {n: t + 0.01 * torch.randn_like(t) for n, t in base.items()}
        if change := changes.get(name):
            change(post)
        save_file(post, tmp_path / f"{name}.safetensors")
    where = {n: str(tmp_path / f"{n}.safetensors") for n in ("a", "b", "c")}
    experts = ", ".join(f"{n}: {path}" for n, path in where.items())
    args = ", ".join(f"{k}: {v}" for k, v in small.items() if k != "num_classes")
    return (
        "model=timm_vit", "model.name=vit_tiny_patch16_224", f"model.args={{{args}}}",
        f"model.pre={tmp_path / 'base.safetensors'}", f"model.experts={{{experts}}}",
        "data=packaged", "+model.task=mnist",
    )  # fmt: skip


def narrower(post: dict) -> None:
    post["head.weight"], post["head.bias"] = post["head.weight"][:3].clone(), post["head.bias"][:3].clone()  # fmt: skip  # noqa: E501


def spoilt(post: dict) -> None:
    post["head.weight"][0, 0] = torch.nan


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"b": narrower, "c": narrower}, r"model.experts: b, c: tensor 'head.*shape \(4"),
        ({"b": spoilt}, r"model.experts: b: tensor 'head.weight': NaN or infinite entries, 1 in"),
    ],
)
def test_experts_that_do_not_fit_are_all_named(tmp_path, changes, text: str, monkeypatch) -> None:
    given = models(tmp_path, **changes)
    values = settings_of(f"results={tmp_path / 'out'}", "merge=sum", "evaluator=none", *given[:-1],
                         "data=folder", f"data.dir={tmp_path}")  # fmt: skip
    choices = keys.Choices("timm_vit", "keep", "classification")
    with pytest.raises(ValueError, match=text):
        run.run(values, choices)


def test_an_expert_of_another_base_is_warned_of(caplog) -> None:
    torch.manual_seed(0)
    base = {"w": torch.randn(30, 30)}
    module = torch.nn.Module()
    near, far = {"w": base["w"] + 0.1}, {"w": torch.randn(30, 30)}
    families.check_family({n: ModelPair(base, p, module) for n, p in (("a", near), ("b", far))})
    assert "model.experts.b: |delta| is 1." in caplog.text
    assert "model.experts.a" not in caplog.text
    other = ModelPair({"w": torch.zeros(2)}, {"w": torch.zeros(2)}, module)
    with pytest.raises(ValueError, match=r"c cannot be merged with a: tensor 'w' has shape"):
        families.check_family({"a": ModelPair(base, near, module), "c": other})


def written(tmp_path, *overrides: str) -> tuple[dict, dict]:
    """Write a merge by `deltalab-apply`; return its manifest and what is there, by file."""
    out = tmp_path / "merged"
    manifest = save.save([*models(tmp_path)[:-2], f"out={out}", *overrides])
    return manifest, {str(f.relative_to(out)): load_file(f) for f in out.rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("merge", "edit"),
    [
        (["merge=sum", "merge.weights={a: 0.5, b: -1, c: 2}"], []),
        (["merge=ties"], ["edit=dare", "edit.p=0.9"]),
        (["merge=ties", "merge.scope=tensor", "merge.select=matrices"], []),
        (["merge=emr"], ["edit=bitdelta"]),
    ],
    ids=str,
)
def test_on_disk_it_is_what_it_is_in_memory(tmp_path, merge: list, edit: list) -> None:
    manifest, found = written(tmp_path, *merge, *edit, "seed=3")
    choices = keys.Choices("timm_vit", "keep", "classification")
    values = settings_of(*models(tmp_path)[:-2], f"data.dir={tmp_path}", *merge, *edit, "seed=3")
    point = building.prepare(values, choices)
    experts = {}
    for name, own in point.experts.items():
        pair = own.model.open()
        extras = Extras.of(point.edit, pair, seed=3, salt=own.salt)
        experts[name] = Expert(pair.pre, pair.post, point.edit, point.select, extras)
    family = Family(experts, point.merge, point.merged)
    each = [*experts] if point.merge.each else [None]
    assert len(found) == len(each)
    for name in each:
        place = f"{name}/{name}.safetensors" if name else "base.safetensors"
        wanted = dict(family.merged(name))
        base = load_file(tmp_path / "base.safetensors")
        assert list(found[place]) == list(base)
        for tensor, value in found[place].items():
            assert torch.equal(value, wanted.get(tensor, base[tensor])), tensor
    assert manifest["merge"]["name"] in ("sum", "ties", "emr")
    assert manifest["edited"]["tensors"] == len(family.names)
    assert set(manifest["experts"]) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["merge=regmean"], "needs 'gram'"),
        ([], "say how they are merged"),
        (["merge=sum", "mismatch=truncate"], "mismatch=truncate: is for a pair"),
    ],
)
def test_what_cannot_be_merged_on_disk_is_told(tmp_path, overrides: list, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        written(tmp_path, *overrides)
    assert not (tmp_path / "merged").exists()


def test_experts_that_do_not_fit_on_disk_are_all_named(tmp_path) -> None:
    given = models(tmp_path, b=narrower, c=narrower)[:-2]
    with pytest.raises(ValueError, match=r"model.experts: b, c: tensor 'head.*shape \(4"):
        save.save([*given, f"out={tmp_path / 'out'}", "merge=sum"])
    given = models(tmp_path, b=spoilt)[:-2]
    with pytest.raises(ValueError, match=r"model.experts.b: tensor 'head.weight': NaN or infinite"):
        save.save([*given, f"out={tmp_path / 'out'}", "merge=sum"])
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == []
