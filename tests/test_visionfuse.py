"""Fused models: tokens add, one model alone is itself bit by bit, merges are those of families."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_families import ran

from deltalab.apply.merging import Expert, Family
from deltalab.data.scenes import Scenes
from deltalab.merges.sum import Sum
from deltalab.settings import conf_dir
from deltalab.store import eviction, latest
from deltalab.visionfuse import FusedLm, Look, Seer, seen
from experiments.visionfuse import __main__ as recipe
from experiments.visionfuse import world
from experiments.zoo import llm

ROOT = Path(__file__).parents[1]
NAMES = ("digits", "clothes")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A family that has hardly been trained: what is tested here holds for any weights."""
    with pytest.MonkeyPatch.context() as patch:
        for settings in (recipe.TEXT, recipe.SIGHT):
            patch.setitem(settings, "steps", 3)
        found = tmp_path_factory.mktemp("fused") / "0"
        recipe.make(found, 0)
    return found


@pytest.fixture
def pairs(place):
    found = {name: FusedLm(str(place), name).open() for name in NAMES}
    yield found
    latest.forget()


def test_what_is_trained_lies_where_it_is_looked_for_and_not_in_the_store(tmp_path) -> None:
    """A store holds its own files alone: models in it would be refused as somebody else's."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        one = compose("config", ["model=visionfuse", "data=scenes", "edit=keep"])
        sweeps = compose("config", ["experiment=visionfuse"]).sweeps
    seeds = [f"{recipe.PLACE}/{seed}" for seed in range(5)]
    assert one.model.dir == seeds[0]
    assert [part["model.dir"].split(",") for part in OmegaConf.to_container(sweeps)] == [
        seeds
    ] * len(sweeps)
    assert f"\nvisionfuse: {seeds[-1]}\n{seeds[-1]}: " in (ROOT / "Makefile").read_text()
    work = llm.arguments([]).work.relative_to(ROOT)
    for place in (recipe.PLACE, work):
        assert f"\n{place.parent}/\n" in (ROOT / ".gitignore").read_text()
        (tmp_path / place).mkdir(parents=True)
    eviction.claim(tmp_path / one.artifacts)
    assert eviction.check(tmp_path / one.artifacts)


def logits(pair, weights, x):
    with torch.no_grad():
        state = pair.module.state_dict()
        for name, tensor in weights.items():
            state[name].copy_(tensor)
        return pair.module(x)


def merged(pairs, names=NAMES, **shares):
    experts = {name: Expert(pairs[name].pre, pairs[name].post) for name in names}
    return dict(Family(experts, Sum(1.0, shares or None)).merged())


def scenes(look, encoders, **more):
    return next(iter(Scenes("total", encoders, "test", limit=6, **more).open(look, 6)))


def test_token_counts_add_and_stand_one_after_the_other(place) -> None:
    look = Look(place)
    one, other, both = (scenes(look, e)[0] for e in (["digits"], ["clothes"], NAMES))
    assert (one.shape[1], other.shape[1], both.shape[1]) == (6, 6, 11)
    assert torch.equal(both[:, 1:6], one[:, 1:])
    assert torch.equal(both[:, 6:], other[:, 1:])
    assert torch.equal(both[:, 1:6, 1:], seen("mnist", "mnist", "test")[:6])


def test_pruned_tokens_are_the_longest_in_their_order(place) -> None:
    look = Look(place)
    whole, few = (scenes(look, ["digits"], keep=keep)[0][:, 1:, 1:] for keep in (None, 2))
    norms = look.projected("digits", whole).norm(dim=2)
    for picture, kept, lengths in zip(whole, few, norms, strict=True):
        wanted = sorted(lengths.topk(2).indices.tolist())
        assert torch.equal(kept, picture[wanted])


def test_answers_are_those_of_the_world(place) -> None:
    look = Look(place)
    _, y = scenes(look, ["digits"])
    words = {token: word for word, token in look.words.items()}
    from deltalab.data.images import packaged

    digits, clothes = (packaged(task, "test")[1][:6].tolist() for task in ("mnist", "fashion"))
    wanted = [world.answer("total", d, g - 10) for d, g in zip(digits, clothes, strict=True)]
    assert [words[token] for token in y.tolist()] == wanted


def test_one_model_alone_is_itself_bit_by_bit(pairs) -> None:
    pair = pairs["digits"]
    x, _ = scenes(pair.transform, ["digits"])
    own = logits(pair, dict(pair.post), x)
    alone = merged(pairs, ("digits",))
    assert all(torch.equal(alone[name], pair.post[name]) for name in pair.post)
    hot = merged(pairs, digits=1, clothes=0)
    assert all(torch.equal(hot[name], pair.post[name]) for name in pair.post)
    assert torch.equal(logits(pair, hot, x), own)


def test_merging_is_task_arithmetic_and_equal_models_stay_what_they_are(pairs) -> None:
    half = merged(pairs, digits=0.5, clothes=0.5)
    pre, posts = pairs["digits"].pre, [pairs[name].post for name in NAMES]
    for name, tensor in half.items():
        wanted = pre[name].double() + sum(0.5 * (p[name].double() - pre[name]) for p in posts)
        assert torch.allclose(tensor.double(), wanted, atol=1e-6)
    pair = pairs["digits"]
    twice = {n: Expert(pair.pre, pair.post) for n in ("a", "b")}
    same = dict(Family(twice, Sum(0.5, None)).merged())
    assert all(torch.equal(same[name], pair.post[name]) for name in same)


def test_what_is_read_alone_is_the_language_models_own(pairs) -> None:
    """Without tokens of an encoder the answer is the language model's; positions go on by one."""
    pair = pairs["digits"]
    seer, look = pair.module, pair.transform
    assert isinstance(seer, Seer)
    x = look.prepared("match", [], "test", range(3), None)
    ids = look.prompts["match"].expand(3, -1)
    with torch.no_grad():
        assert torch.allclose(seer(x), seer.lm(ids).logits[:, -1], atol=1e-6)
        x, _ = scenes(look, NAMES)
        seen_ = [look.projected(n, x[:, a : a + 5, 1:]) for n, a in zip(NAMES, (1, 6), strict=True)]
        words = seer.lm.get_input_embeddings()(look.prompts["total"].expand(6, -1))
        whole = torch.cat([*seen_, words], 1)
        place = torch.arange(whole.shape[1]).expand(6, -1)
        wanted = seer.lm(inputs_embeds=whole, position_ids=place).logits[:, -1]
        assert torch.allclose(seer(x), wanted, atol=1e-6)


def test_what_does_not_fit_is_told(place, pairs) -> None:
    look = pairs["digits"].transform
    for field, value, text in (("question", "price", "must be one of digit"),
                               ("encoders", ("clip",), "must be one of digits")):  # fmt: skip
        given = {"question": "total", "encoders": NAMES, "split": "test", field: value}
        with pytest.raises(ValueError, match=text):
            Scenes(**given).open(look, 4)
    with pytest.raises(ValueError, match="is for models of visionfuse alone"):
        Scenes("total", NAMES, "test").open(None, 4)
    with pytest.raises(FileNotFoundError, match=r"model.dir=.*python -m experiments.visionfuse"):
        FusedLm(str(place / "none"), "digits").open()
    with pytest.raises(FileNotFoundError, match="model.post=clip: not in"):
        FusedLm(str(place), "clip").open()


def test_a_point_tells_of_every_expert_and_of_how_their_deltas_lie(place, tmp_path) -> None:
    few = "data.limit=16", "objective.limit=8", "riemann=paper"
    hot = "merge.weights={digits: 1, clothes: 0}"
    record = ran(tmp_path, "model=visionfuse", f"model.dir={place}", "merge=sum", hot, *few)
    one, other = (record["experts"][name] for name in NAMES)
    assert one["loss"]["change"] == 0
    assert one["metrics"]["scenes/accuracy"] == one["reference"]["post"]["scenes/accuracy"]
    assert other["loss"]["edited"] == pytest.approx(one["loss"]["post"])
    assert -1 < record["overlap"]["cosine"]["digits clothes"] < 1
    assert set(record["overlap"]["size"]) == set(NAMES)
