"""The contract of edits, for the tests of packages that bring their own.

    from deltalab.testing import *

in a test file runs every check on every edit that installed packages name by an entry point of the
group `deltalab`; `CHECKS` are the checks one by one, each a function of an edit's name. (They need
pytest, as any test does.)
"""

import ast
import inspect
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from torch import Tensor

from deltalab.apply import editing
from deltalab.apply.extras import handed
from deltalab.codes import Code
from deltalab.codes.nested import Patched
from deltalab.edits import Edit, Unit
from deltalab.linear.delta import difference
from deltalab.linear.factor import svd
from deltalab.rng import Rng
from deltalab.settings import option_file, packages
from deltalab.weights import select
from deltalab.weights.threshold import ModelThreshold

__all__ = ["test_edit"]
SHAPES = [(24, 40), (40, 24), (7,), (1,), (), (0, 3), (6, 4, 3, 3), (2, 5, 4)]


def settings(name: str) -> dict[str, Any]:
    """Return what an edit's config says."""
    file = option_file("edit", name)
    assert file is not None, f"no conf/edit/{name}.yaml"
    found: dict[str, Any] = yaml.safe_load(file.read_text())
    return found


def built(name: str) -> Any:
    """Return an edit with the defaults of its config."""
    found = settings(name)
    select.check(found.pop("select"))
    module, _, kind = found.pop("_target_").rpartition(".")
    return getattr(import_module(module), kind)(**found)


def tensor(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return normal numbers, the same for the same shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call(edit: Any, delta: Tensor, name: str = "layer.weight", seed: int = 0) -> Tensor:
    """Return the edited delta, given stand-ins for all that the edit asks for."""
    result: Tensor = edit(delta, **handed(needs(edit, delta, name, seed), delta.device))
    return result


def needs(edit: Any, delta: Tensor, name: str = "layer.weight", seed: int = 0) -> dict[str, Any]:
    """Return stand-ins for all that an edit asks for."""
    matrix = delta.ndim > 1 and delta.numel() > 0
    inputs = tensor((delta[0].numel(),), seed=98).abs() if matrix else None
    given = {
        "rng": Rng(seed, name),
        "grad": tensor(tuple(delta.shape), seed=99),
        "fisher": tensor(tuple(delta.shape), seed=97).square(),
        "peers": lambda peer: tensor(tuple(delta.shape), seed=96),
        "gram": gram(delta) if matrix else None,
        "acts": inputs,
        "scale": lambda steps, lr: delta.abs().mean() if matrix else None,
        "svd": lambda: tuple(svd(delta.flatten(1))),
        "quantile": lambda keep: ModelThreshold().of(keep, {name: delta})[name],
    }
    return {need: given[need] for need in edit.needs}


def gram(delta: Tensor) -> Tensor:
    """Return a stand-in for the gram of a layer's inputs, fewer than it has columns."""
    rows = tensor((16, delta[0].numel()), seed=95)
    return rows.T @ rows / 16


def check_says(name: str) -> None:
    """It derives from `Edit`, and its version can be read from the source alone."""
    edit = built(name)
    assert isinstance(edit, Edit)
    assert edit.unit in get_args(Unit)
    assert {type(edit.fuses), type(edit.whole_model)} == {bool}
    source = inspect.getsourcefile(type(edit))
    assert source is not None
    tree = ast.parse(Path(source).read_text())
    (body,) = (
        node.body
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == type(edit).__name__
    )
    said = {
        line.target.id: ast.literal_eval(line.value)
        for line in body
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and line.value is not None
        and "ClassVar" in ast.unparse(line.annotation)
    }
    assert said.get("version", 1) == type(edit).version


def check_fields(name: str) -> None:
    """Its fields are the keys of its config, which also says what it touches."""
    found = settings(name)
    assert set(found) - {"_target_", "select"} == {f.name for f in fields(built(name))}
    assert found["select"] in select.PRESETS


def check_contract(name: str) -> None:
    """Shape, dtype and input are kept; the same seed gives the same bits; zero stays zero."""
    edit = built(name)
    for shape in SHAPES:
        delta = tensor(shape)
        hat = call(edit, delta)
        assert (hat.shape, hat.dtype, hat.device) == (delta.shape, torch.float32, delta.device)
        assert torch.equal(delta, tensor(shape)), "the input was changed"
        assert not hat.numel() or hat.data_ptr() != delta.data_ptr(), "the input itself"
        assert torch.isfinite(hat).all()
        call(edit, tensor(shape, seed=5), name="another")
        assert torch.equal(call(edit, delta), hat), "other bits for the same seed"
        assert torch.equal(call(edit, torch.zeros(shape)), torch.zeros(shape)), "zero must stay"


def check_strides(name: str) -> None:
    """How a tensor lies in memory makes no difference."""
    edit, delta = built(name), tensor((24, 40))
    assert torch.equal(call(edit, delta.T.contiguous().T), call(edit, delta))


def check_moments(name: str) -> None:
    """Its moments are those of its draws, on as many entries as tell 3 % of a variance."""
    edit = built(name)
    if (moments := edit.moments()) is not None:
        x = call(edit, torch.ones(200_000)) - 1
        assert x.mean().item() == pytest.approx(moments.mean, abs=0.01)
        assert x.var().item() == pytest.approx(moments.variance, rel=0.03, abs=1e-9)


def check_stored(name: str) -> None:
    """Edited tensors keep the checkpoint's dtype, and slices and compiled passes the bits."""
    edit = built(name)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        pre = tensor((16, 24)).to(dtype)
        post = (pre.float() + 0.1 * tensor((16, 24), seed=1)).to(dtype)
        given = needs(edit, post.float() - pre.float())
        out = editing.edited_tensor(pre, post, edit, "eager", **given)
        assert (out.dtype, out.shape) == (dtype, post.shape)
        fused = editing.edited_tensor(pre, post, edit, "compiled", **given)
        assert torch.equal(fused, out), "other bits when compiled"
        expected = (pre.float() + edit(post.float() - pre.float(), **given)).to(dtype)
        near = 0.02 if dtype != torch.float32 else 1e-6
        assert torch.allclose(out.float(), expected.float(), atol=near)


def check_code(name: str) -> None:
    """What a file would hold of it, if anything, gives the bits that the edit stores."""
    edit = built(name)
    for shape in SHAPES:
        pre = tensor(shape).bfloat16()
        post = (pre.float() + 0.1 * tensor(shape, seed=1)).bfloat16()
        delta = difference(pre, post)
        given = needs(edit, delta)
        if (code := edit.encode(delta, post=post, **given)) is None:
            continue
        stored, _, bits = editing.audited_tensor(pre, post, edit, "eager", **given)
        assert bits == code.bits, "its size is told otherwise than its code has it"
        exact = Patched.exact(code, pre, stored)
        again = Code.of(exact.kind, exact.shape, exact.arrays, exact.settings)
        assert torch.equal(again.onto(pre, torch.bfloat16), stored)
        arrays = sum(a.numel() * a.element_size() for a in code.arrays.values())
        assert code.bits.payload <= 8 * arrays < code.bits.total <= 8 * arrays + 8000
        assert exact is code or len(exact.arrays["at"]) < 0.1 * delta.numel() + 2, "hardly a code"


CHECKS: tuple[Callable[[str], None], ...] = (
    check_says,
    check_fields,
    check_contract,
    check_strides,
    check_moments,
    check_stored,
    check_code,
)


def names() -> list[str]:
    """Return the edits of installed packages."""
    return sorted(f.stem for p in packages() for f in (p.conf / "edit").glob("*.yaml"))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", names())
def test_edit(name: str, check: Callable[[str], None]) -> None:
    """Every edit of an installed package keeps the contract."""
    check(name)
