"""The front door: what the README shows runs, in memory, and agrees with the pieces beneath."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import texts
import torch
from torch import nn

import deltalab as dl
from deltalab.edits.dare import Dare

README = Path(__file__).parents[1] / "README.md"


def batches(count=3):
    torch.manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(0, 30, (2, 7))
        labels = ids.clone()
        labels[:, :3] = -100
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def test_what_the_readme_shows_runs_on_a_pair_in_memory(tmp_path, monkeypatch, capsys):
    section = README.read_text().split("### In Python")[1]
    (code,) = re.findall(r"```python\n(.*?)```", section.split("### ")[0], re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    base, tuned = texts.model(0), texts.model(1)
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    exec(code, {"base": base, "tuned": tuned, "batches": batches()})
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.state_dict().items())
    term, predicted, change = capsys.readouterr().out.splitlines()
    assert float(term) == pytest.approx(eval(change)[0], rel=0.5)
    assert "first" in predicted
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    pair = dl.pair(base, tuned)
    weights = dl.edited(pair, dl.edit("dare", p=0.9), select="proj")
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    assert not torch.equal(next(iter(weights.values())), before[next(iter(weights))])


def linear(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def examples():
    torch.manual_seed(5)
    return [(torch.randn(6, 4), torch.randint(0, 3, (6,))) for _ in range(2)]


def test_modules_state_dicts_and_paths_are_one_pair(tmp_path):
    from safetensors.torch import save_file

    base, tuned = linear(0), linear(1)
    for name, module in (("base", base), ("tuned", tuned)):
        save_file(module.state_dict(), tmp_path / f"{name}.safetensors")
    pairs = [
        dl.pair(base, linear(1)),
        dl.pair(base.state_dict(), tuned.state_dict(), linear(7)),
        dl.pair(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", linear(7)),
    ]
    found = [dl.edited(pair, Dare(0.5, 0.0), seed=3) for pair in pairs]
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])
    loss = dl.objective(examples())
    changes = {dl.change(pair, weights, loss) for pair, weights in zip(pairs, found, strict=True)}
    assert len(changes) == 1


def test_the_term_of_many_nodes_is_the_measured_change():
    pair, loss = dl.pair(linear(0), linear(1)), dl.objective(examples())
    weights = dl.edited(pair, dl.edit("expo", alpha=0.3))
    term = dl.term(pair, weights, loss, rule="gauss", points=6)
    assert term.value == pytest.approx(dl.change(pair, weights, loss)[0], rel=1e-4)
    assert dl.term(pair, {}, loss).value == 0
    second = dl.predict(pair, weights, loss, dl.edit("expo", alpha=0.3))
    assert second["second_order"] == pytest.approx(term.value, rel=0.5)


def test_an_edit_that_needs_a_loss_says_so():
    pair = dl.pair(linear(0), linear(1))
    with pytest.raises(ValueError, match="needs 'grad', which is not available here"):
        dl.edited(pair, dl.edit("biased_product"))
    assert dl.edited(pair, dl.edit("biased_product"), loss=dl.objective(examples()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dl.edit("dre"), "edit=dre: must be one of .*; did you mean dare"),
        (lambda: dl.edit("dare", q=1), "edit.q: dare has no such setting; .*it has p, k"),
        (lambda: dl.edit("dare", p=2), r"edit.p=2: must be in \[0, 1\)"),
        (lambda: dl.objective([]), "objective: no batches"),
        (lambda: dl.pair({}, {}), "give the architecture as module="),
        (lambda: dl.pair(nn.Linear(2, 2), nn.Linear(2, 3)), "shape"),
        (lambda: dl.save(dl.pair(linear(0), linear(1)), {}, "/"), "exists already"),
    ],
)
def test_mistakes_are_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_package_itself_is_light():
    program = """
import sys, time
before = time.process_time()
import deltalab
assert time.process_time() - before < 0.2
assert not {"torch", "hydra", "omegaconf", "numpy"} & set(sys.modules)
assert sorted(dir(deltalab)) == sorted([*deltalab.__all__, "__version__"])
deltalab.edited
assert "torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_save_can_be_called_whoever_imports_the_module_of_that_name():
    """`python -m deltalab.save` is deltalab-apply; a module would shadow the function."""
    tried = "deltalab.save(None, {}, '.')"
    for first in ("import deltalab", "import deltalab.save", "from deltalab.save import main"):
        lines = f"{first}; import deltalab; {tried}"
        found = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
        assert "in save" in found.stderr, found.stderr
    command = [sys.executable, "-m", "deltalab.save", "--help"]
    assert "out=DIR" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
