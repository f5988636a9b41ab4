"""The embedded family of language models: what its files hold, and what its options say."""

import json

import torch
from safetensors.torch import load_file
from test_families import settings_of

from deltalab.models import embedded
from experiments.zoo import llm_family
from experiments.zoo.llm_data import problem_row
from experiments.zoo.llm_problems import is_held_pair, split_of

ZOO = embedded.ZOO / "llm"


def test_every_expert_has_its_own_kind_of_problem_for_loss_and_score() -> None:
    experts = settings_of("model=tiny_llm_family", "merge=sum")["model"]["experts"]
    assert [*experts] == [*llm_family.GROUPS]
    for name, own in experts.items():
        assert own["model"]["post"] == f"small_{name}"
        assert own["objective"]["data"]["path"] == f"package:llm/{name}.jsonl"
        assert [*own["evaluator"]["tasks"]] == [f"tiny_{name}"]
    kinds = [kind for kinds in llm_family.GROUPS.values() for kind in kinds]
    assert sorted(kinds) == sorted(llm_family.KINDS), "every kind is one expert's"


def test_the_shipped_problems_are_held_out_and_of_one_kind() -> None:
    for name in llm_family.GROUPS:
        for split, end in (("objective", ""), ("test", "_test")):
            problems = llm_family.held_out(name, split, seed=0)
            for problem in problems:
                assert llm_family.kind_of(problem) == name
                assert split_of(problem.template, problem.numbers) == split
                assert is_held_pair(problem.name, problem.thing)
            lines = (ZOO / f"{name}{end}.jsonl").read_text().splitlines()
            assert [json.loads(line) for line in lines] == [problem_row(p) for p in problems]


def test_experts_are_small_and_of_one_base() -> None:
    base = load_file(ZOO / "small_base.safetensors")
    files = [ZOO / f"small_{name}.safetensors" for name in llm_family.GROUPS]
    assert sum(file.stat().st_size for file in files) < 8e6
    for file in files:
        post = load_file(file)
        assert [*post] == [*base]
        assert all(tensor.dtype == torch.float16 for tensor in post.values())
        moved = sum(float((post[n].float() - base[n].float()).square().sum()) for n in base)
        whole = sum(float(base[n].float().square().sum()) for n in base)
        assert 0 < (moved / whole) ** 0.5 < 0.1


def test_the_recipes_figures_are_those_that_are_told() -> None:
    found = json.loads((embedded.ZOO.parents[1] / "results/zoo/llm_family.json").read_text())
    scores = {(row["model"], row["kind"]): row["strict"] for row in found["test"]}
    for name in llm_family.GROUPS:
        assert scores["small_base", name] == 0
        assert scores[f"small_{name}", name] >= 0.9
