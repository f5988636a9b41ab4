"""Merges compared: what is written in parts, refused, learned and kept; sharing rows that agree."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import models, ran

import deltalab.save as save
from deltalab.apply import merge_files
from deltalab.apply.merging import Expert, Family
from deltalab.artifacts import Store
from deltalab.data.images import Packaged
from deltalab.linear.delta import difference
from deltalab.loss.objectives import Classification, change, measure
from deltalab.merges.channel import Channel
from deltalab.models.zoo import EmbeddedVit
from deltalab.store import latest
from deltalab.weights import contents
from deltalab.weights.mapping import loaded
from experiments.paper import evidence


@pytest.fixture(autouse=True)
def closed():
    yield
    latest.forget()


@pytest.mark.parametrize(
    "merge",
    [
        ["merge=ties", "merge.keep=0.3", "merge.scope=tensor"],
        ["merge=ties", "merge.keep=0.3", "merge.scope=model"],
        ["merge=ties", "merge.keep=1", "edit=dare", "edit.p=0.5"],
        ["merge=sum", "merge.weight=0.4"],
    ],
    ids=str,
)
def test_parts_of_tensors_are_merged_as_the_whole_is(tmp_path, merge, monkeypatch) -> None:
    given = [*models(tmp_path)[:-2], *merge]
    save.save([*given, f"out={tmp_path / 'whole'}"])
    monkeypatch.setattr(merge_files, "PART", 13)
    save.save([*given, f"out={tmp_path / 'parts'}"])
    whole, parts = (load_file(tmp_path / n / "base.safetensors") for n in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any(tensor.numel() > 130 for tensor in whole.values())


def test_the_same_expert_twice_is_refused_on_disk(tmp_path) -> None:
    given = models(tmp_path)[:-2]
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())
    with pytest.raises(ValueError, match="a and b are the same model"):
        save.save([*given, "merge=sum", f"out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_an_expert_that_says_it_is_of_another_base_is_refused(tmp_path) -> None:
    given = list(models(tmp_path)[:-2])
    for name in ("base", "a"):
        (tmp_path / f"of_{name}").mkdir()
        (tmp_path / f"of_{name}" / "model.safetensors").write_bytes(
            (tmp_path / "b.safetensors").read_bytes() if name == "base"
            else (tmp_path / "c.safetensors").read_bytes()
        )  # fmt: skip
        digest = contents.of_checkpoint(tmp_path / f"{name}.safetensors")
        told = json.dumps({"pre": {"digest": digest}})
        (tmp_path / f"of_{name}" / contents.MANIFEST).write_text(told)
    right = f"model.experts={{a: {tmp_path / 'a.safetensors'}, b: {tmp_path / 'of_base'}}}"
    wrong = f"model.experts={{a: {tmp_path / 'a.safetensors'}, b: {tmp_path / 'of_a'}}}"
    given = [o for o in given if not o.startswith("model.experts")]
    save.save([*given, right, "merge=sum", f"out={tmp_path / 'out'}"])
    with pytest.raises(ValueError, match="model.experts: b: made from another base than"):
        save.save([*given, wrong, "merge=sum", f"out={tmp_path / 'other'}"])
    for text in ("[]", "{", '{"pre": 3}', '{"pre": {"digest": 3}}'):
        (tmp_path / "of_a" / contents.MANIFEST).write_text(text)
        assert contents.made_from(tmp_path / "of_a") is None


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_learned_weights_are_in_the_record(tmp_path, scope: str) -> None:
    record = ran(tmp_path, "model=vit_family", "merge=adamerging", f"merge.scope={scope}",
                 "merge.steps=2", "merge.lr=0.1", "merge.batch=2", "objective.limit=8",
                 "evaluator=none", "riemann=off")  # fmt: skip
    assert list(record["learned"]) == ["mnist", "fashion"]
    for own in record["learned"].values():
        values = [own] if scope == "model" else list(own.values())
        assert len(values) == 1 if scope == "model" else len(values) > 20
        assert all(0 <= value <= 1 for value in values)
        assert any(value != 0.3 for value in values)


def test_documents_are_kept_beside_points(tmp_path) -> None:
    from deltalab.store.record import Outcome

    point = Outcome("m", "keep", key="0a")
    known = {"0a": {"a/objective/change": [0.25, math.nan], "a/t/accuracy": [1.0, 0.0], "b": [1]}}
    path = tmp_path / "kept.jsonl"
    evidence.keep([point], known, ("objective/change", "/accuracy"), path)
    found = evidence.kept(path)["0a"]
    assert found["a/t/accuracy"] == [1.0, 0.0]
    np.testing.assert_equal(found["a/objective/change"], [0.25, math.nan])
    assert set(found) == {"a/objective/change", "a/t/accuracy"}
    assert evidence.kept(tmp_path / "none.jsonl") == {}


def test_experts_share_the_rows_in_which_they_agree_at_less_cost_than_any_others() -> None:
    """A quarter of every matrix: at most .8 of what as many random rows cost, mean of two."""
    losses, pairs = {}, {}
    for name in ("mnist", "fashion"):
        pairs[name] = EmbeddedVit(name, name).open()
        data = Packaged(name, "objective", limit=512)
        losses[name] = Classification(data, 256).open(pairs[name], Store(None, {}))
    before = {name: measure(pair.module, losses[name]) for name, pair in pairs.items()}
    experts = {name: Expert(dict(p.pre), dict(p.post)) for name, p in pairs.items()}
    channel = Channel(groups=None, budget=0.875, spread="tensor", granularity="channel", head=None,
                      similarity="distance", weight=1.0)  # fmt: skip
    similar = Family(experts, channel).held()
    deltas, chosen = {}, {}
    for name, post in experts["mnist"].post.items():
        deltas[name] = [difference(e.pre[name], e.post[name]) for e in experts.values()]
        if post.dim() > 1:
            chosen[name] = int((similar["mnist"][name] != post).flatten(1).any(1).sum())
            assert chosen[name] == math.ceil(len(post) / 4)

    def drawn(rng: torch.Generator) -> dict:
        found: dict = {name: {} for name in experts}
        for name, own in deltas.items():
            rows = torch.randperm(len(own[0]), generator=rng)[: chosen.get(name, 0)]
            mean = (own[0] + own[1]) / 2
            for expert, delta in zip(experts, own, strict=True):
                mixed = delta.clone()
                mixed[rows] = mean[rows]
                found[expert][name] = experts[expert].pre[name].float() + mixed
        return found

    def cost(merged: dict) -> float:
        total = 0.0
        for name, pair in pairs.items():
            post = {tensor: pair.post[tensor] for tensor in merged[name]}
            with loaded(pair.module, merged[name], restore=post):
                total += change(before[name], measure(pair.module, losses[name]))[0]
        return total

    random = [cost(drawn(torch.Generator().manual_seed(seed))) for seed in range(2)]
    assert 0 < cost(similar) <= 0.8 * sum(random) / 2


@pytest.mark.parametrize("which", ["none", "a", "both"])
def test_an_expert_that_unties_its_head_keeps_it(tmp_path, which) -> None:
    """The base saved embedding and head both, and equal; a head of an expert's own is merged."""
    table, other = torch.randn(12, 4), torch.randn(4, 4)
    embedding, head, layer = (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.q_proj.weight",
    )
    own = {name: 0.1 * torch.randn(12, 4) for name in ("a", "b")}
    heads = {name: 0.1 * torch.randn(12, 4) for name in ("a", "b")}
    held = {"base": {embedding: table, head: table.clone(), layer: other}}
    for name in ("a", "b"):
        unties = which == "both" or which == name
        held[name] = {
            embedding: table + own[name],
            head: table + (heads if unties else own)[name],
            layer: other + 1,
        }
    for name, tensors in held.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text("{}")
    experts = f"{{a: {tmp_path}/a, b: {tmp_path}/b}}"
    given = ["model=hf_llm", f"model.pre={tmp_path}/base", f"model.experts={experts}"]
    given += ["merge=sum", "merge.weight=0.5", "edit=keep"]
    save.save([*given, f"out={tmp_path}/out"])
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in (embedding, head, layer):
        deltas = [held[n][name] - held["base"][name] for n in ("a", "b")]
        assert torch.allclose(found[name], held["base"][name] + 0.5 * sum(deltas), atol=1e-6), name
    if which != "none":
        (tmp_path / "base" / "config.json").write_text('{"tie_word_embeddings": true}')
        with pytest.raises(ValueError, match="lm_head.weight: tied to the embedding by"):
            save.save([*given, f"out={tmp_path}/more"])
        assert not (tmp_path / "more").exists()


def test_the_configuration_that_is_written_decides_whether_a_head_is_lost(tmp_path) -> None:
    for name, text in (("base", "{}"), ("a", "{}"), ("b", '{"tie_word_embeddings": true}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    base, a, b = (tmp_path / name for name in ("base", "a", "b"))
    merge_files._check_ties(["lm_head.weight"], [base])
    merge_files._check_ties([], [a, b])
    with pytest.raises(ValueError, match=f"tied to the embedding by {b}"):
        merge_files._check_ties(["lm_head.weight"], [a, b])
