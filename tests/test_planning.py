import re
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from deltalab import cli
from deltalab.data.images import HubImages
from deltalab.data.text import Problems
from deltalab.edits.bitdelta import BitDelta
from deltalab.edits.dare import Dare
from deltalab.edits.ties import Ties
from deltalab.evaluators.accuracy import Accuracy
from deltalab.evaluators.lm_eval import LmEval
from deltalab.loss.answers import Answers
from deltalab.loss.objectives import Classification
from deltalab.loss.riemann import Riemann
from deltalab.models import facts
from deltalab.plan import hours
from deltalab.plan.planning import GIB, Plan, available, most_evaluations, plan, stored
from deltalab.settings import conf_dir


class Layer(nn.Module):
    """The weights of one decoder layer with grouped queries."""

    def __init__(self, width, inner, keys):
        super().__init__()
        self.q_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(width, keys, bias=False) for _ in range(2))
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.norms = nn.ParameterList([torch.ones(width), torch.ones(width)])

    def forward(self, x):
        y = x * self.norms[0]
        keys = self.k_proj(y) * self.v_proj(y)
        y = x + self.o_proj(self.q_proj(y) * keys.repeat(1, 1, x.shape[-1] // keys.shape[-1]))
        z = y * self.norms[1]
        return y + self.down_proj(torch.nn.functional.silu(self.gate_proj(z)) * self.up_proj(z))


class Decoder(nn.Module):
    def __init__(self, vocabulary, width, inner, keys, depth):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, inner, keys) for _ in range(depth))
        self.norm = nn.Parameter(torch.ones(width))
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x * self.norm)


def eight_billion():
    """The shapes of an 8B decoder: 128256 tokens, 4096 wide, 32 layers, nothing allocated."""
    with torch.device("meta"):
        return Decoder(128256, 4096, 14336, 1024, 32).to(torch.bfloat16)


def test_an_8b_model_is_planned_on_the_meta_device_and_refused_where_it_does_not_fit():
    module = eight_billion()
    names = [n for n, p in module.named_parameters() if "proj" in n]
    ids = torch.zeros(1, 512, dtype=torch.int64, device="meta")
    activations = stored(module, lambda: module(ids))
    edits = [Dare(p / 10, k) for p in range(1, 10) for k in (-1.0, -0.5, 0.0, 0.5, 0.8)]
    found = plan(module, names, edits, Riemann("adaptive"), activations)
    assert found.of_parameters == 8_030_261_248
    assert found.parameters == 6_979_321_856  # 32 layers of 218 million
    assert found.tensors == 7 * 32
    assert found.evaluations == 1 + 45 * 7  # in 16 bits no point shares its line
    assert found.held["model"] == 2 * found.of_parameters
    assert found.held["shift in float32"] == 4 * found.parameters
    # At least every linear layer's input, in bf16, and no more than a few times that.
    inputs = 2 * 512 * 32 * (4096 * 3 + 14336)
    assert inputs < activations < 6 * inputs
    largest = 2 * 4096 * 14336
    assert found.engines["reverse"] == largest + 16 * (1 << 22) + activations
    assert found.engines["reverse, checkpoint"] < found.engines["reverse"]
    found.check("reverse", 200 * GIB, "a large machine")
    with pytest.raises(ValueError, match=r"reverse needs \d+\.\d GiB, cpu has 16.0 GiB; no engine"):
        found.check("reverse", 16 * GIB, "cpu")
    assert "224 tensors, 6,979,321,856 of 8,030,261,248" in found.table()


def test_a_refusal_names_the_engines_that_fit():
    found = Plan(1, 1, 1, 1, {"model": GIB}, {"reverse": 3 * GIB, "forward": GIB}, True)
    found.check("forward", 2 * GIB, "cpu")
    with pytest.raises(ValueError, match="4.0 GiB, cpu has 2.0 GiB; these fit: forward"):
        found.check("reverse", 2 * GIB, "cpu")


def test_stored_activations_are_those_of_the_real_pass():
    with torch.device("meta"):
        shape = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    # Input of both layers; tanh keeps its output, which is the second one's input.
    x = torch.zeros(5, 8, device="meta")
    assert stored(shape, lambda: shape(x).sum()) == 4 * 5 * (8 + 16)
    real = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    assert stored(real, lambda: real(torch.zeros(5, 8)).sum()) == 4 * 5 * (8 + 16)


def test_tied_tensors_are_counted_once():
    module = Decoder(10, 8, 16, 4, 1)
    module.lm_head.weight = module.embed_tokens.weight
    found = plan(module, ["embed_tokens.weight", "lm_head.weight"], [], Riemann("left", 5))
    assert (found.tensors, found.parameters) == (1, 80)
    assert not found.activations
    assert "without activations" in found.table()
    assert plan(module, [], [], Riemann(None)).evaluations == 0


def test_evaluations_are_shared_along_lines_and_at_the_start():
    grid = [Dare(0.5, k) for k in (0.0, 0.5)] + [Ties(0.5, "model")]
    assert most_evaluations(grid, Riemann("left", 5)) == 1 + 3 * 4
    assert most_evaluations(grid, Riemann("gauss", 3)) == 9
    assert most_evaluations(grid, Riemann("gauss", 3, also={"left": 5})) == 1 + 3 * (3 + 4)
    assert most_evaluations(grid, Riemann("adaptive")) == 1 + 9 + 7
    bits = [BitDelta(c, "mean", 0.5, "tensor") for c in (0.5, 1.0, 2.0)]
    assert most_evaluations(bits, Riemann("adaptive")) == 1 + 3 * 7


def test_some_memory_is_available():
    assert GIB // 16 < available("cpu") < 1 << 50


def test_plans_of_one_model_are_joined():
    one = Plan(1, 1, 1, 10, {"model": 5, "shift": 4}, {"reverse": 3}, True)
    other = Plan(1, 1, 1, 7, {"model": 5, "gradient": 2}, {"reverse": 2, "curvature": 9}, True)
    found = one.joined(other)
    assert found.evaluations == 17
    assert found.held == {"model": 5, "shift": 4, "gradient": 2}
    assert found.engines == {"reverse": 3, "curvature": 9}


def test_the_facts_of_the_presets_are_those_of_their_shapes():
    """Parameters as published, against the modules that transformers and timm build."""
    from deltalab.models.hf_llm import HfPair

    sizes = {
        "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
        "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
        "mistralai/Mistral-7B-v0.3": 7_248_023_552,
        "Qwen/Qwen2-7B": 7_615_616_512,
        "alignment-handbook/zephyr-7b-sft-full": 7_241_732_096,
    }
    for source, size in sizes.items():
        module = HfPair(pre=source, post=source).skeleton()
        assert sum(p.numel() for p in module.parameters()) == size == facts.known(source).parameters
        assert {p.device.type for p in module.parameters()} == {"meta"}
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        assert facts.known(source).bytes == 2 * size
    with torch.device("meta"):
        from transformers import CLIPConfig, CLIPModel

        whole = CLIPModel(CLIPConfig())
    clip = facts.known("openai/clip-vit-base-patch32")
    assert clip.parameters == sum(p.numel() for p in whole.parameters())
    tower = facts.known("tanganke/clip-vit-base-patch32_dtd")
    assert tower.parameters == sum(p.numel() for p in whole.vision_model.parameters())


def test_every_preset_is_known():
    """What the configs of models name on the hub can be planned with, and so can their data."""
    for file in conf_dir().glob("model/*.yaml"):
        settings = OmegaConf.load(file)
        for side in ("pre", "post"):
            source = OmegaConf.to_container(settings).get(side)
            if isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
                assert facts.known(source) is not None, (file.name, source)
    known = OmegaConf.load(Path(hours.__file__).parent / "estimates.yaml")
    for task in (conf_dir() / "evaluator" / "tasks").glob("*.yaml"):
        for name in OmegaConf.load(task):
            if name != "defaults" and not name.startswith("tiny_"):
                assert name in known.tasks
    for path, _ in OmegaConf.load(conf_dir() / "data" / "clip.yaml").sets.values():
        assert {"train", "test"} <= known.data[path].keys()


GPU = hours.Device(tflops=100.0, gbps=1000.0)


def test_hours_of_a_language_model_by_hand():
    """Two objectives' worth of passes and one task, all worked out on paper."""
    model = hours.Model(matrices=10**9, stored=2 * 10**9)
    problems = Problems("openai/gsm8k", split="train")
    objective = Answers(problems, limit=100)
    evaluator = LmEval({"gsm8k": {"shots": 5, "limit": 64}}, batch_size=32)
    points = [(objective, evaluator)] * 8
    found = hours.of_points(points, {objective: (20, 3)}, model, GPU)
    tokens = 100 * 191
    assert found.parts["losses"] == pytest.approx(10 * 2e9 * tokens / 1e14 / 3600)
    assert found.parts["terms"] == pytest.approx((20 * 6e9 + 3 * 12e9) * tokens / 1e14 / 3600)
    # 64 prompts of five examples and a question; two batches of 256 steps, each reading 2 GB.
    read = 2e9 * 64 * (5 * 191 + 66) / 1e14
    assert found.parts["gsm8k"] == pytest.approx(10 * (read + 2 * 256 * 2e9 / 1e12) / 3600)
    assert found.total == pytest.approx(sum(found.parts.values()))
    assert found.unknown == ()
    # Generation in batches so large that the steps wait for arithmetic.
    large = hours.passes(hours.Work(steps=1, batch=10**6), model, GPU)
    assert large == pytest.approx(2e9 * 10**6 / 1e14 / 3600)


def test_hours_of_an_image_model_by_hand():
    model = hours.Model(matrices=10**8, stored=4 * 10**8, wide=True, patches=50)
    objective = Classification(HubImages("tanganke/dtd", "train", limit=512))
    evaluator = Accuracy(HubImages("tanganke/dtd", "test"), "dtd")
    found = hours.of_points([(objective, evaluator)] * 3, {objective: (7, 0)}, model, GPU)
    rate = 1e13  # float32: a tenth
    assert found.parts["terms"] == pytest.approx(7 * 6e8 * 512 * 50 / rate / 3600)
    assert found.parts["accuracy"] == pytest.approx(5 * 2e8 * 1880 * 50 / rate / 3600)
    assert found.parts["decoding"] == pytest.approx(5 * 1880 / 200 / 3600)


def test_what_is_not_known_is_named():
    model = hours.Model(matrices=1, stored=1)
    objective = Answers(Problems("my/problems.jsonl"))
    evaluator = LmEval({"my_task": {}})
    found = hours.of_points([(objective, evaluator)], {objective: (1, 0)}, model, GPU)
    assert found.unknown == ("my/problems.jsonl", "my_task")
    assert found.total == 0
    with pytest.raises(ValueError, match="device_tflops=0: must be above 0"):
        hours.Device(tflops=0)


@pytest.fixture
def planned(monkeypatch, capfd, tmp_path):
    """Run the command with plan=true, without a hub, and return what it prints."""

    def run(*arguments):
        monkeypatch.setattr(
            sys, "argv", ["deltalab", *arguments, "plan=true", f"results={tmp_path}"]
        )
        cli.main()
        return capfd.readouterr().out

    return run


def test_an_8b_preset_is_planned_without_a_hub(planned):
    out = planned("-m", "model=llama3_8b", "edit=dare", "evaluator/tasks=gsm8k")
    assert "45, of which 0 are finished" in out
    assert "meta-llama/Meta-Llama-3-8B (16.1 GB), meta-llama/Meta-Llama-3-8B-Instruct (16.1" in out
    assert "8,030,261,248 of 8,030,261,248 parameters" in out
    assert "at most 316 gradient evaluations" in out
    rest = re.search(r"about ([\d.]+) on one GPU at device_tflops=400 \(terms ([\d.]+)", out)
    per = 7_504_924_672 * 7473 * 191 / 4e14 / 3600  # all but the table of tokens
    assert float(rest[2]) == pytest.approx(316 * 6 * per, rel=0.05)
    assert float(rest[1]) > float(rest[2])


def test_a_plan_of_humaneval_runs_nothing_and_says_what_the_run_asks_for(planned):
    out = planned("model=mistral_7b", "edit=dare", "evaluator/tasks=humaneval")
    assert "humaneval" in out.split("hours")[1]
    assert "the run itself needs evaluator.run_code=true" in out
    arguments = ("evaluator/tasks=humaneval", "evaluator.run_code=true")
    assert "run_code=true:" not in planned("model=mistral_7b", "edit=dare", *arguments)


def test_the_clip_pairs_are_planned_without_a_hub(planned):
    out = planned("-m", "model=clip_dtd,clip_svhn", "edit=dare", "edit.p=0.5", "edit.k=0")
    assert "2, of which 0 are finished" in out
    assert (
        "openai/clip-vit-base-patch32 (0.6 GB), tanganke/clip-vit-base-patch32_dtd (0.3 GB)" in out
    )
    assert out.count("87,456,000 parameters") == 2
    assert "in all       1.3 GB of 3 repositories" in out
    assert out.count("hours ") == 3


def test_a_family_is_planned_with_all_its_experts(planned):
    """Every expert has its own module, gradient and passes; rules of 3, 6, 12 nodes compared."""
    sweep = ("-m", "merge=sum", "merge.weight=0.2,0.3")
    out = planned(*sweep, "model=clip_two", "prediction=on", "prediction.probes=0")
    alone = planned("model=clip_svhn", "edit=keep")
    assert f"at most {2 * (2 * (2 + 5 + 11) + 1)} gradient evaluations" in out
    sizes = [re.findall(r"held +([\d.]+) GiB +(model|gradient)", text) for text in (out, alone)]
    for (two, _), (one, _) in zip(*sizes, strict=True):
        assert float(two) == pytest.approx(2 * float(one), abs=0.011)
    assert all(f"patch32_{name} (0.3 GB)" in out for name in ("sun397", "svhn"))


def test_points_that_share_a_config_are_those_that_hydra_composes(planned, monkeypatch):
    """The plan sets plain values in one composed config; every point must be as composed alone."""
    seen = []
    original = cli._plain

    def noted(cfg, chosen):
        seen.append(original(cfg, chosen))
        return seen[-1]

    monkeypatch.setattr(cli, "_plain", noted)
    arguments = [
        "edit=dare,expo", "grid=none", "seed=0,1", "objective.limit=8,null", "select=all,null",
        "riemann.also={left: 2},{midpoint: 3}",
    ]  # fmt: skip
    planned("-m", *arguments)
    assert len(seen) == 32
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for values, choices in seen[::5]:
            also = ", ".join(f"{k}: {v}" for k, v in values["riemann"]["also"].items())
            limit = values["objective"]["limit"]
            alone = compose("config", [
                f"edit={choices.edit}", "grid=none", f"seed={values['seed']}", "plan=true",
                f"objective.limit={'null' if limit is None else limit}",
                f"select={'null' if values['select'] is None else values['select']}",
                f"riemann.also={{{also}}}", f"results={values['results']}",
            ])  # fmt: skip
            assert OmegaConf.to_container(alone, resolve=True) == values
    assert len({repr(point) for point in seen}) == 32


def test_a_point_without_a_plan_still_needs_its_models(planned, monkeypatch, capfd, tmp_path):
    arguments = ["model=llama3_8b", "edit=dare", "evaluator=none", f"results={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["deltalab", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "model.pre=meta-llama/Meta-Llama-3-8B: no such path" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        planned("model=hf_llm", "model.pre=org/unknown", "model.post=org/unknown", "evaluator=none")
    assert "model.post=org/unknown: no such path here" in capfd.readouterr().err
