"""`deltalab-apply merge=` from disk to disk against reading the same files, and against mergekit.

Claim: at least 4 times as fast as `mergekit-yaml`; after the imports at most 1.5 times the floor
for task arithmetic and DARE, at most 1.2 times its threshold passes plus that for TIES and
DARE-TIES. The floor reads the base and three experts, takes one digest of each, and writes one
model. Run: `python -m experiments.bench.merged DIR [gigabytes of an expert] [repeats]
[nomergekit]`, where DIR has room for six times as much. Whole commands are timed by the clock and
in processor time of all their threads. Cost: some minutes.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from experiments.bench.streamed import write
from experiments.bench.timing import Times, alternate, ratio

EXPERTS = ("a", "b", "c")
MERGES = {
    "task arithmetic": (["merge=sum", "merge.weight=0.4"], "task_arithmetic", {"weight": 0.4}),
    "TIES": (
        ["merge=ties", "merge.keep=0.2", "merge.scope=tensor", "merge.weight=1"],
        "ties",
        {"weight": 1.0, "density": 0.2},
    ),
    "DARE-TIES": (
        ["merge=ties", "merge.keep=1", "merge.weight=1", "edit=dare", "edit.p=.5"],
        "dare_ties",
        {"weight": 1.0, "density": 0.5},
    ),
}  # fmt: skip
"""By title: ours, mergekit's method, and its settings of every expert."""

WITHIN = """
import resource, sys, time
import hydra, omegaconf, deltalab.run.building, deltalab.run.experts, deltalab.sweep.composing
import deltalab.apply.merge_files, deltalab.models.hf_llm, deltalab.merges.ties, deltalab.edits.dare
from deltalab.save import save
start, cpu = time.perf_counter(), time.process_time()
save(sys.argv[1:])
print(time.perf_counter() - start, time.process_time() - cpu,
      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
FLOOR = """
import hashlib, sys, time
from pathlib import Path
start, cpu = time.perf_counter(), time.process_time()
block, *rest = bytearray(1 << 22), Path(sys.argv[1]), *map(Path, sys.argv[2:])
out, inputs = rest[0], rest[1:]
out.mkdir()
for directory in inputs:
    for file in sorted(directory.glob("*.safetensors")):
        digest, view = hashlib.sha256(), memoryview(block)
        with open(file, "rb", buffering=0) as source:
            target = open(out / file.name, "wb", buffering=0) if directory == inputs[0] else None
            while size := source.readinto(block):
                digest.update(view[:size])
                if target:
                    target.write(view[:size])
print(time.perf_counter() - start, time.process_time() - cpu)
"""
THRESHOLDS = """
import sys, time
from pathlib import Path
from deltalab.apply import layout
from deltalab.linear.delta import difference
from deltalab.weights.shards import read
from deltalab.weights.threshold import kept_count, tensor_threshold
start, cpu = time.perf_counter(), time.process_time()
base, *experts = (layout.read(Path(a), a, None).entries for a in sys.argv[1:])
for entries in experts:
    for name, entry in entries.items():
        delta = difference(read(base[name]), read(entry))
        tensor_threshold(delta, kept_count(0.2, delta.numel()))
print(time.perf_counter() - start, time.process_time() - cpu)
"""


def programs(where: Path, title: str) -> dict[str, list[str]]:
    """Return the commands to compare, each of which writes `out` but for the thresholds."""
    pre, out, bin_ = where / "pre", where / "out", Path(sys.executable).parent
    ours, method, settings = MERGES[title]
    experts = ", ".join(f"{name}: {where / name}" for name in EXPERTS)
    model = ["model=hf_llm", f"model.pre={pre}", f"model.experts={{{experts}}}", *ours]
    models = [str(where / name) for name in EXPERTS]
    found = {
        "deltalab-apply": [str(bin_ / "deltalab-apply"), *model, f"out={out}"],
        "after the imports": [sys.executable, "-c", WITHIN, *model, f"out={out}"],
        "floor": [sys.executable, "-c", FLOOR, str(out), str(pre), *models],
    }
    if title == "TIES":
        found["thresholds"] = [sys.executable, "-c", THRESHOLDS, str(pre), *models]
    if (bin_ / "mergekit-yaml").exists() and "nomergekit" not in sys.argv:
        recipe = where / "merge.yaml"
        listed = [{"model": each, "parameters": settings} for each in models]
        about = {"merge_method": method, "base_model": str(pre), "dtype": "bfloat16"}
        recipe.write_text(
            json.dumps({**about, "models": listed, "parameters": {"normalize": True}})
        )
        found["mergekit-yaml"] = [str(bin_ / "mergekit-yaml"), str(recipe), str(out)]
        found["mergekit-yaml"].append("--no-copy-tokenizer")
    return found


def main() -> None:
    """Print seconds, ratios and memory of every merge."""
    numbers = [float(word) for word in sys.argv[2:] if word[0].isdigit()]
    size, repeats = (*numbers, *(2.0, 3)[len(numbers) :])
    where = Path(sys.argv[1])
    if not (where / "pre").exists():
        layers = max(1, round(size * 1e9 / 2 / 218e6 - 0.6))
        for seed, name in enumerate(("pre", *EXPERTS)):
            write(where / name, layers, seed)
    stored = sum(f.stat().st_size for f in (where / "a").glob("*.safetensors"))
    print(f"a base and {len(EXPERTS)} experts of {stored / 1e9:.2f} GB, in the page cache")
    for title in MERGES:
        _print(title, where, int(repeats))


def _print(title: str, where: Path, repeats: int) -> None:
    """Measure one merge and print a line for each program."""
    inner: dict[str, list[tuple[float, ...]]] = {}
    spent: dict[str, list[float]] = {}

    def ran(name: str, words: list[str]) -> None:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        apart = {**os.environ, "XDG_CACHE_HOME": str(where / "cache")}
        done = subprocess.run(words, check=True, capture_output=True, text=True, env=apart)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        spent.setdefault(name, []).append(seconds)
        if name in ("after the imports", "floor", "thresholds"):
            inner.setdefault(name, []).append(tuple(map(float, done.stdout.split())))

    ways = {name: partial(ran, name, words) for name, words in programs(where, title).items()}

    def forget() -> None:
        for name in ("out", "cache"):  # digests that are remembered would not be taken
            shutil.rmtree(where / name, ignore_errors=True)

    times = alternate(ways, repeats, forget)
    print(f"{title}: what | seconds by the clock | processor seconds")
    for name, measured in times.items():
        print(f"{name} | {measured.best:.2f} | {min(spent[name]):.2f}")
    for place, clock in ((0, "clock"), (1, "processor")):
        alone = {
            n: Times(tuple(row[place] for row in rows[-repeats:])) for n, rows in inner.items()
        }
        told = ratio(alone["after the imports"], alone["floor"])
        print(f"after the imports, times the floor by the {clock} | {told}", end="")
        print(*(f"| {n} {t.best:.2f} s" for n, t in alone.items()))
    print(f"memory | {max(row[2] for row in inner['after the imports']):.2f} GiB")
    if "mergekit-yaml" in times:
        told = ratio(times["mergekit-yaml"], times["deltalab-apply"])
        used = (Times(tuple(spent[n][-repeats:])) for n in ("mergekit-yaml", "deltalab-apply"))
        print(f"mergekit-yaml, times deltalab-apply: clock {told}, processor {ratio(*used)}")


if __name__ == "__main__":
    main()
