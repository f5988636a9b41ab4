"""lm-eval on the live module against bare generation, and a sweep against a loop of command lines.

Claim: an evaluation takes at most 1.15 times as long as the module's bare generation or scoring of
the same prompts in the same batches; a sweep of ten points with lm-eval takes at most an eighth of
`deltalab-apply` and the `lm_eval` command line for every point. Of that loop only a few points are
run, and the time of ten is worked out from them. Their scores are printed beside the sweep's: the
checkpoints are in float16, as the embedded ones, and a sweep edits and evaluates in float32.

    python -m experiments.bench.lm_eval bare [repeats]   # two minutes on one core
    python -m experiments.bench.lm_eval loop [points]    # two, of the generated task alone
    python -m experiments.bench.lm_eval loop-all [points]  # five, of all three tasks

The loop measures no loss, so that the sweep measures its own on eight answers only.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from deltalab.evaluators.lm import requests
from deltalab.evaluators.lm import tasks as lm_tasks
from deltalab.evaluators.lm_eval import LmEval
from deltalab.models.zoo_llm import AROUND, DIRECTORY, EmbeddedLlm
from deltalab.weights.mapping import ModelPair
from experiments.bench.timing import alternate, ratio

TASKS = ("tiny_gsm", "tiny_choice", "tiny_likelihood")
BATCH = 64
NEW_TOKENS = 64
RATES = [i / 10 for i in range(10)]


def generate(pair: ModelPair, prompts: Sequence[str]) -> None:
    """Generate greedily, in batches of prompts of like length."""
    tokenizer, module = pair.transform.tokenizer, pair.module
    tokenizer.padding_side = "left"
    ordered = sorted(prompts, key=lambda text: -len(tokenizer.encode(text)))
    for start in range(0, len(ordered), BATCH):
        batch = tokenizer(ordered[start : start + BATCH], padding=True, return_tensors="pt")
        module.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    tokenizer.padding_side = "right"


def score(pair: ModelPair, asked: Sequence[tuple[str, str]]) -> list[float]:
    """Return log p(answer | prompt) of every pair of texts, in batches of like length."""
    tokenizer, module = pair.transform.tokenizer, pair.module
    coded = [(len(tokenizer.encode(p)), tokenizer.encode(p + a)) for p, a in asked]
    ordered = sorted(range(len(coded)), key=lambda i: -len(coded[i][1]))
    found = [0.0] * len(coded)
    with torch.no_grad():
        for start in range(0, len(ordered), BATCH):
            rows = ordered[start : start + BATCH]
            ids = torch.zeros(len(rows), len(coded[rows[0]][1]), dtype=torch.long)
            for row, i in enumerate(rows):
                ids[row, : len(coded[i][1])] = torch.tensor(coded[i][1])
            logits = torch.log_softmax(module(ids[:, :-1]).logits, -1)
            for row, i in enumerate(rows):
                first, last = coded[i][0], len(coded[i][1])
                answer = ids[row, first:last, None]
                found[i] = float(logits[row, first - 1 : last - 1].gather(1, answer).sum())
    return found


def bare(pair: ModelPair, spec: LmEval, task: str) -> Callable[[], object]:
    """Return what asks the module for a task's answers without lm-eval."""
    (run,) = lm_tasks.load(spec)
    asked = requests.prepare(run, None, False, spec.seed).requests[task]
    if asked[0].request_type == "generate_until":
        return lambda: generate(pair, [request.args[0] for request in asked])
    return lambda: score(pair, [request.args for request in asked])


def adapter(repeats: int) -> None:
    """Print how long an evaluation takes, over the bare work."""
    pair = EmbeddedLlm("sft").open()
    print(f"{'task':<18}{'lm-eval s':>10}{'bare s':>10}  ratio (quartiles of {repeats})")
    for task in TASKS:
        spec = LmEval((task,), batch_size=BATCH)
        opened = spec.open(pair)
        ways = {"lm-eval": lambda f=opened: f(pair.module), "bare": bare(pair, spec, task)}
        times = alternate(ways, repeats)
        ours, floor = times["lm-eval"], times["bare"]
        print(f"{task:<18}{ours.best:>10.2f}{floor.best:>10.2f}  {ratio(ours, floor)}", flush=True)


def timed(*command: str) -> float:
    """Run a command of this environment and return the seconds it took."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return time.perf_counter() - start


def sweep(directory: Path, tasks: Sequence[str]) -> tuple[float, dict[float, float]]:
    """Run ten points in one process; return the seconds and each rate's exact match."""
    chosen = [f"+evaluator.tasks.{task}.shots=null" for task in tasks]
    rates = ",".join(str(rate) for rate in RATES)
    seconds = timed(
        *("deltalab", "-m", "model=tiny_llm", "edit=dare", f"edit.p={rates}", "grid=none"),
        *("riemann=off", "objective.limit=8", "evaluator/tasks=none", *chosen),
        *(f"evaluator.batch_size={BATCH}", f"results={directory}"),
    )
    records = [json.loads(p.read_text()) for p in (directory / "records").glob("*.json")]
    name = "tiny_gsm/exact_match_strict"
    return seconds, {record["edit"]["p"]: record["metrics"][name] for record in records}


def loop(
    directory: Path, rates: Sequence[float], tasks: Sequence[str]
) -> tuple[list[float], dict[float, float]]:
    """Write and score one checkpoint a rate; return the seconds and exact match of each."""
    for name, weights in (("pre", "base"), ("post", "sft")):
        (directory / name).mkdir(parents=True)
        shutil.copy(DIRECTORY / f"{weights}.safetensors", directory / name / "model.safetensors")
        for file in AROUND:
            shutil.copy(DIRECTORY / file, directory / name / file)
    seconds, found = [], {}
    for rate in rates:
        out = directory / str(rate)
        spent = timed(
            *("deltalab.save", "model=hf_llm", "edit=dare", f"edit.p={rate}", f"out={out}"),
            *(f"model.{name}={directory / name}" for name in ("pre", "post")),
        )
        spent += timed(
            *("lm_eval", "run", "--model", "hf", "--device", "cpu", "--tasks", ",".join(tasks)),
            *("--model_args", f"pretrained={out},dtype=float32", "--batch_size", str(BATCH)),
            *("--include_path", str(lm_tasks.EMBEDDED), "--output_path", f"{out}/scores"),
        )
        seconds.append(spent)
        (file,) = Path(f"{out}/scores").rglob("results_*.json")
        results = json.loads(file.read_text())["results"]["tiny_gsm"]
        found[rate] = results["exact_match,strict-match"]
        print(f"loop: dare p={rate} {spent:.1f} s, exact match {found[rate]:.3f}", flush=True)
    return seconds, found


def compared(points: int, tasks: Sequence[str] = TASKS) -> None:
    """Print how long a sweep of ten points takes, over a loop of command lines."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        ours, scores = sweep(directory / "sweep", tasks)
        print(f"sweep: {len(scores)} points in {ours:.1f} s", flush=True)
        seconds, theirs = loop(directory / "loop", RATES[1 : 1 + points], tasks)
    each = sum(seconds) / len(seconds)
    print(
        f"a loop of {len(RATES)} points, from {len(seconds)} of them: {each * len(RATES):.0f} s,"
        f" {each * len(RATES) / ours:.1f} times as long"
    )
    for rate, value in theirs.items():
        print(f"exact match at p={rate}: {scores[rate]:.3f} in the sweep, {value:.3f} in the loop")


def main() -> None:
    """Print one of the comparisons."""
    which, number = [*sys.argv[1:], "5" if "bare" in sys.argv else "2"][:2]
    ways = {"bare": adapter, "loop": partial(compared, tasks=TASKS[:1]), "loop-all": compared}
    ways[which](int(number))


if __name__ == "__main__":
    main()
