"""In which dtype a model is evaluated, and its term taken, and what 16 bits do to it."""

import json

import pytest
import tiny_lm
import torch
from safetensors.torch import load_file, save_file

import deltalab as dl
from deltalab import keys
from deltalab.artifacts import Store
from deltalab.data.tokens import Coded, padded
from deltalab.keys import Choices
from deltalab.loss.answers import AnswerLoss
from deltalab.loss.engine import Engine
from deltalab.loss.objectives import measure
from deltalab.loss.prediction import Predict
from deltalab.loss.riemann import SPOILT, Riemann
from deltalab.models.hf_llm import HfPair
from deltalab.plan.planning import plan
from deltalab.run.point import shift_from
from deltalab.weights import contents

NARROW = torch.bfloat16
NONE = Predict(False, 0)


def loss():
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 300, (4, 16), generator=draw).tolist()
    return AnswerLoss((padded([Coded(each, each, "") for each in ids], 0),))


def written(place, scale):
    """A pair in bfloat16 whose delta has this size."""
    torch.manual_seed(0)
    model = tiny_lm.model("llama").to(NARROW)
    pre = tiny_lm.save(model, place / "pre")
    return pre, tiny_lm.save(tiny_lm.moved(model, scale), place / "post")


def changes(found, settings, edit, store=None):
    edited = dl.edited(found, edit)
    post = {name: found.post[name] for name in edited}
    engine = Engine(found, loss(), store or Store(None, {}))
    return engine.changes(edit, shift_from(post, edited), {}, settings, NONE, post)


@pytest.mark.parametrize("rule", [("adaptive", 1), ("gauss", 3)])
def test_a_term_in_float32_is_that_of_the_same_weights_in_float32(rule, tmp_path):
    """Weights stored in 16 bits and widened, so that the path is not rounded and both ends are."""
    paths = written(tmp_path, 3e-3)
    found, wide = (tiny_lm.opened(paths, dtype=d) for d in ("bfloat16", "float32"))
    edit, before = (
        dl.edit("dare", p=0.5),
        {n: t.clone() for n, t in found.module.state_dict().items()},
    )
    edited = dl.edited(found, edit)
    store = Store(tmp_path / "store", {})
    term = changes(found, Riemann(*rule, dtype="float32"), edit, store).terms[rule[0]]
    shift = {n: edited[n].float() - found.post[n].float() for n in edited}
    right = Engine(wide, loss(), Store(None, {})).changes(
        dl.edit("keep"), shift, {}, Riemann(*rule), NONE
    )
    if rule[0] != "adaptive":  # by Radau's rule, not on a line
        assert term.value == pytest.approx(right.terms[rule[0]].value, rel=1e-4)
    post = measure(wide.module, loss()).mean
    with dl.loaded(wide, {n: t.float() for n, t in edited.items()}) as module:
        change = measure(module, loss()).mean - post
    assert term.value == pytest.approx(change, rel=0.01)
    assert term.rounding is None
    assert "spoiled" not in term.as_record()
    after = found.module.state_dict()
    assert all(t.dtype == before[n].dtype and torch.equal(t, before[n]) for n, t in after.items())
    narrow = changes(found, Riemann(*rule), edit, store).terms[rule[0]]
    assert narrow.gradient_evaluations == term.gradient_evaluations, "no artefact is shared"


@pytest.mark.parametrize(("scale", "spoiled"), [(1e-4, True), (0.3, False)])
def test_a_term_says_when_16_bits_spoil_it(scale, spoiled, tmp_path, caplog):
    """Half a shift of one unit in the last place is none or all of it."""
    found = tiny_lm.opened(written(tmp_path, scale), dtype="bfloat16")
    term = changes(found, Riemann("gauss", 3), dl.edit("discard")).terms["gauss"]
    assert term.spoiled == spoiled == (term.rounding > SPOILT)
    assert term.as_record()["spoiled"] == spoiled
    assert "riemann.dtype=float32" in caplog.text
    exact = tiny_lm.opened((tmp_path / "pre", tmp_path / "post"), dtype="float32")
    assert changes(exact, Riemann("gauss", 3), dl.edit("discard")).terms["gauss"].rounding is None


def test_a_model_is_evaluated_in_its_own_dtype(tmp_path):
    """As its configuration says, else its files; the key is that of the dtype itself."""
    paths, other = written(tmp_path, 0.02), iter(range(60, 90))  # each pair opened anew

    def key(dtype):
        model = {"_target_": "deltalab.models.hf_llm.HfPair", "pre": str(paths[0])}
        model |= {"post": str(paths[1]), **({} if dtype is None else {"dtype": dtype})}
        edit = {"_target_": "deltalab.edits.keep.Keep"}
        settings = {"model": model, "edit": edit, "select": "all"}
        return keys.determinants(settings, Choices("m", "e", "o"))["model"]

    def dtype():
        spec = HfPair(*map(str, paths), device="cpu", context=next(other))
        kinds = {next(each.parameters()).dtype for each in (spec.open().module, spec.skeleton())}
        assert len(kinds) == 1
        return kinds.pop()

    assert key(None) == key("auto") == key("bfloat16") != key("float32")
    assert dtype() == NARROW
    tiny_lm.configure(paths[1], dtype="float16")
    assert dtype() == torch.float16
    assert key("auto")["dtype"] == "float16"
    content = json.loads((paths[1] / "config.json").read_text())
    del content["dtype"]
    (paths[1] / "config.json").write_text(json.dumps(content))
    assert dtype() == NARROW
    held = load_file(paths[1] / "model.safetensors")
    save_file({n: t.float() for n, t in held.items()}, paths[1] / "model.safetensors")
    assert contents.dtype_of(paths[1]) == "float32"
    assert dtype() == torch.float32
    tiny_lm.configure(paths[1], text_config={"torch_dtype": "torch.float64"})
    assert contents.dtype_of(paths[1]) == "float64"


def test_a_plan_shares_no_lines_in_16_bits_and_counts_what_is_widened(tmp_path):
    grid = [dl.edit("dare", p=p, k=k) for p in (0.5, 0.9) for k in (-1.0, 0.0, 0.5)]
    module = tiny_lm.model("llama")
    names = [name for name, _ in module.named_parameters()]
    of = lambda settings: plan(module, names, grid, settings)  # noqa: E731
    wide, asked = of(Riemann("adaptive")), of(Riemann("adaptive", dtype="float32"))
    assert (wide.evaluations, asked.held) == (1 + 2 * 9, wide.held)
    module = module.to(NARROW)
    narrow, asked = of(Riemann("adaptive")), of(Riemann("adaptive", dtype="float32"))
    assert narrow.evaluations == asked.evaluations == 1 + 6 * 7
    size = sum(2 * p.numel() for p in module.parameters())
    assert sum(asked.held.values()) - sum(narrow.held.values()) == pytest.approx(size, rel=0.01)


def test_only_dtypes_that_there_are():
    with pytest.raises(ValueError, match=r"riemann.dtype=float16: must be float32 or null"):
        Riemann("gauss", 3, dtype="float16")
    with pytest.raises(ValueError, match=r"model.dtype=int8: must be one of auto, bfloat16"):
        HfPair("a", "b", dtype="int8")
