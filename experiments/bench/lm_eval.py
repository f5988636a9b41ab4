"""lm-eval on the live module against lm-eval's own model, bare passes and a loop of command lines.

Few-shot tasks of the embedded problems, all prompts of a task with the same examples or each with
its own, asked of `tiny_llm` with two shots and of a pair of random weights with 2,048 positions
and five. Claim: a sweep of ten points, start-up included, takes at most an eighth of a loop of
`deltalab-apply` and `lm_eval` commands, both with as many threads.

    python -m experiments.bench.lm_eval scoring [repeats] [documents]  # evaluations, interleaved
    python -m experiments.bench.lm_eval start [repeats]                # commands of one document
    python -m experiments.bench.lm_eval bare [repeats]                 # tokens a second

Times are processor time. A loop of ten points starts ten commands of either kind and evaluates ten
models; a sweep starts once and evaluates twelve, both ends of the pair among them.
"""

import copy
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from deltalab.data.text import Encoder
from deltalab.evaluators.lm import hflm, requests
from deltalab.evaluators.lm import tasks as lm_tasks
from deltalab.evaluators.lm_eval import LmEval
from deltalab.models.zoo_llm import AROUND, DIRECTORY, EmbeddedLlm
from deltalab.weights.mapping import ModelPair
from experiments.bench.timing import alternate, ratio

TASKS = ("tiny_gsm", "tiny_choice", "tiny_likelihood")
BATCH = 32


def few_shot(directory: Path, shots: int, alike: bool) -> tuple[str, ...]:
    """Write the embedded tasks with examples; return their names.

    Args:
        directory: where to.
        shots: examples a prompt.
        alike: whether all prompts of a task have the same.
    """
    for task in TASKS:
        text = (lm_tasks.EMBEDDED / f"{task}.yaml").read_text()
        text = text.replace(f"task: {task}", f"task: {task}_shots")
        text = text.replace("num_fewshot: 0", f"num_fewshot: {shots}\nfewshot_split: test")
        if alike:
            text += "fewshot_config: {sampler: first_n}\n"
        (directory / f"{task}_shots.yaml").write_text(text)
    return tuple(f"{task}_shots" for task in TASKS)


def random_pair() -> ModelPair:
    """Return a pair of random weights of the embedded pair's shapes, with 2,048 positions."""
    from transformers import AutoModelForCausalLM

    known = EmbeddedLlm("sft").open()
    config: Any = copy.deepcopy(known.module.config)
    config.max_position_embeddings = 2048
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config).float().eval()
    post = dict(module.state_dict())
    encoder = Encoder(known.transform.tokenizer, 2048)
    return ModelPair({n: 0.9 * t for n, t in post.items()}, post, module, encoder)


def stock(pair: ModelPair) -> Any:
    """Return lm-eval's own model of a pair's module."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = copy.deepcopy(pair.transform.tokenizer)
    with hflm.quiet(), hflm.untied(pair.module):
        return HFLM(
            pretrained=pair.module,
            tokenizer=tokenizer,
            batch_size=BATCH,
            max_length=pair.transform.context,
        )


def evaluations(pair: ModelPair, spec: LmEval) -> dict[str, Callable[[], Any]]:
    """Return ways to evaluate: ours, without sharing, and lm-eval's own."""
    (run,) = lm_tasks.load(spec)
    asked = requests.prepare(run, None, False, spec.seed)
    lm = stock(pair)

    def ours(share: bool) -> Callable[[], Any]:
        live = hflm.wrapper(
            pair.module,
            copy.deepcopy(pair.transform.tokenizer),
            pair.transform.context,
            BATCH,
            share,
        )

        def evaluated() -> Any:
            with live(pair.module) as model, lm_tasks.seeded(spec.seed):
                return asked.evaluate(model), model.work

        return evaluated

    def own() -> Any:
        with hflm.quiet(), lm_tasks.seeded(spec.seed):
            return asked.evaluate(lm), None

    return {"shared": ours(True), "not shared": ours(False), "lm-eval": own}


def responses(results: Any) -> dict[str, list[Any]]:
    """Return what the model said, by task and in the documents' order, once for all filters."""
    return {
        task: [
            sample["resps"]
            for sample in sorted(samples, key=lambda s: s["doc_id"])
            if sample["filter"] == samples[0]["filter"]
        ]
        for task, samples in results["samples"].items()
    }


def agreement(a: Any, b: Any) -> tuple[float, int, int]:
    """Return the largest relative difference of likelihoods, other texts, and all texts."""
    worst, other, texts = 0.0, 0, 0
    pairs = zip(_flat(responses(a)), _flat(responses(b)), strict=True)
    for x, y in pairs:
        if isinstance(x, str):
            texts, other = texts + 1, other + (x != y)
        else:
            worst = max(worst, abs(float(x) - float(y)) / max(abs(float(y)), 1e-9))
    return worst, other, texts


def _flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        return [value]
    return [one for each in value for one in _flat(each)]


def scoring(repeats: int = 5, documents: int = 32) -> None:
    """Print what an evaluation takes, task by task and of all three."""
    print("| pair | examples | task | shared, s | not shared | lm-eval | tokens | agreement |")
    print("|---|---|---|---|---|---|---|---|")
    pairs = {
        "tiny_llm, 2 shots": (EmbeddedLlm("sft").open(), 2),
        "2,048, 5 shots": (random_pair(), 5),
    }
    for name, (pair, shots) in pairs.items():
        for alike in (True, False):
            with tempfile.TemporaryDirectory() as place:
                names = few_shot(Path(place), shots, alike)
                for chosen in (*[(one,) for one in names if alike], names):
                    spec = LmEval(
                        chosen,
                        include=(place,),
                        run_task_code=True,
                        limit=documents,
                        max_new_tokens=48,
                    )
                    _compared(f"{name} | {'one set' if alike else 'drawn'}", pair, spec, repeats)


def _compared(label: str, pair: ModelPair, spec: LmEval, repeats: int) -> None:
    ways = evaluations(pair, spec)
    (first, work), (reference, _) = ways["shared"](), ways["lm-eval"]()
    worst, other, texts = agreement(first, reference)
    times = alternate(ways, repeats, clock=time.process_time)
    cells = [f"{times['shared'].best:.2f}"]
    cells += [ratio(times[way], times["shared"]) for way in ("not shared", "lm-eval")]
    task = spec.tasks[0].name.removesuffix("_shots") if len(spec.tasks) == 1 else "all three"
    cells += [f"{work.computed} of {work.asked}", f"{worst:.0e}, {other} of {texts} texts"]
    print(f"| {label} | {task} | {' | '.join(cells)} |", flush=True)


def spent(*command: str) -> float:
    """Run a command of this environment; return its processor seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def start(repeats: int = 3) -> None:
    """Print what the commands take that evaluate a single document."""
    found: dict[str, list[float]] = {}
    task = "tiny_choice"
    for n in range(repeats):
        with tempfile.TemporaryDirectory() as name:
            place = Path(name)
            for model, weights in (("pre", "base"), ("post", "sft")):
                (place / model).mkdir()
                text = (DIRECTORY / f"{weights}.safetensors").read_bytes()
                (place / model / "model.safetensors").write_bytes(text)
                for file in AROUND:
                    (place / model / file).write_bytes((DIRECTORY / file).read_bytes())
            commands = {
                "sweep": (
                    *("deltalab", "-m", "model=tiny_llm", "edit=dare", f"edit.p=0.{n + 1}"),
                    *("grid=none", "riemann=off", "objective.limit=8", "evaluator.limit=1"),
                    *("evaluator/tasks=none", f"+evaluator.tasks.{task}.shots=null"),
                    f"results={place / 'results'}",
                ),
                "deltalab-apply": (
                    *("deltalab.save", "model=hf_llm", "edit=dare", "edit.p=0.5"),
                    *(f"model.{each}={place / each}" for each in ("pre", "post")),
                    f"out={place / 'out'}",
                ),
                "lm_eval": (
                    *("lm_eval", "run", "--model", "hf", "--device", "cpu", "--tasks", task),
                    *("--model_args", f"pretrained={place / 'out'},dtype=float32", "--limit", "1"),
                    *("--include_path", str(lm_tasks.EMBEDDED), "--output_path", str(place / "s")),
                ),
            }
            for command, words in commands.items():
                found.setdefault(command, []).append(spent(*words))
    for command, seconds in found.items():
        print(
            f"| `{command}` | {min(seconds):.1f} | {statistics.median(seconds):.1f} |"
            f" {max(seconds):.1f} |",
            flush=True,
        )


def generate(pair: ModelPair, prompts: Sequence[str], tokens: int) -> int:
    """Generate greedily by transformers alone, in batches of prompts of like length."""
    tokenizer, module = pair.transform.tokenizer, cast(Any, pair.module)
    ordered = sorted(prompts, key=lambda text: -len(tokenizer.encode(text)))
    tokenizer.padding_side = "left"
    for first in range(0, len(ordered), BATCH):
        batch = tokenizer(ordered[first : first + BATCH], padding=True, return_tensors="pt")
        module.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    tokenizer.padding_side = "right"
    return sum(len(tokenizer.encode(prompt)) for prompt in prompts)


def score(pair: ModelPair, texts: Sequence[str]) -> int:
    """Pass texts through the module in batches of like length; return their tokens."""
    coded = sorted((pair.transform.tokenizer.encode(text) for text in texts), key=len)
    with torch.no_grad():
        for first in range(0, len(coded), BATCH):
            rows = coded[first : first + BATCH]
            ids = torch.zeros(len(rows), len(rows[-1]), dtype=torch.long)
            for row, tokens in enumerate(rows):
                ids[row, : len(tokens)] = torch.tensor(tokens)
            pair.module(ids[:, :-1], use_cache=False)
    return sum(map(len, coded))


def bare(repeats: int = 5) -> None:
    """Print how many tokens a second are answered for, over the bare passes of the same prompts."""
    print("| task | tokens asked for | a second, evaluated | a second, bare | bare, times ours |")
    print("|---|---|---|---|---|")
    pair = EmbeddedLlm("sft").open()
    for task in TASKS:
        spec = LmEval((task,), batch_size=BATCH)
        (run,) = lm_tasks.load(spec)
        asked = requests.prepare(run, None, False, spec.seed).requests[task]
        texts = [request.args[0] for request in asked]
        ours = evaluations(pair, spec)["shared"]
        if asked[0].request_type == "generate_until":
            floor = lambda t=texts: generate(pair, t, 64)  # noqa: E731
        else:
            whole = ["".join(request.args) for request in asked]
            floor = lambda t=whole: score(pair, t)  # noqa: E731
        _, work = ours()
        times = alternate({"ours": ours, "bare": floor}, repeats, clock=time.process_time)
        rates = [work.asked / times[way].best for way in ("ours", "bare")]
        print(
            f"| {task} | {work.asked} | {rates[0]:.0f} | {rates[1]:.0f} |"
            f" {ratio(times['bare'], times['ours'])} |",
            flush=True,
        )


def main() -> None:
    """Print one of the comparisons."""
    which, *numbers = sys.argv[1:]
    {"scoring": scoring, "start": start, "bare": bare}[which](*map(int, numbers))


if __name__ == "__main__":
    main()
