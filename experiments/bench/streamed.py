"""`deltalab-apply` from disk to disk against reading and copying the same files.

Claim: at most 1.8 times `cat pre post > /dev/null; cp post out`, at least 4 times as fast as
`mergekit-yaml`, with at most 1 GiB of memory above the imports. Run: `python -m
experiments.bench.streamed DIR [gigabytes] [repeats]`, where DIR has room for five times as much;
it is filled with a synthetic Llama pair of two shards each. Cost: some minutes.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from experiments.bench.timing import Times, alternate, ratio

HIDDEN, INNER, HEADS, KEYS, VOCABULARY = 4096, 14336, 32, 8, 32000
APPLY = """
import resource, shutil, sys
from pathlib import Path
import torch
from deltalab import apply, stream
from deltalab.edits.dare import Dare
stream.fingerprint  # everything is imported
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import time
pre, post, out = map(Path, sys.argv[1:4])
seconds = []
for run in range(int(sys.argv[4])):
    start = time.perf_counter()
    stream.stream(pre, post, Path(f"{out}{run or ''}"), Dare(p=0.9, k=0.0), select="all", seed=0)
    seconds.append(time.perf_counter() - start)
    if run:
        shutil.rmtree(f"{out}{run}")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((peak - before) / 2**20, *seconds)
"""


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a Llama of this many layers with tied embeddings."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    keys = HIDDEN // HEADS * KEYS
    for layer in range(layers):
        at = f"model.layers.{layer}."
        found |= {at + f"self_attn.{n}_proj.weight": (HIDDEN, HIDDEN) for n in "qo"}
        found |= {at + f"self_attn.{n}_proj.weight": (keys, HIDDEN) for n in "kv"}
        found |= {at + f"mlp.{n}_proj.weight": (INNER, HIDDEN) for n in ("gate", "up")}
        found[at + "mlp.down_proj.weight"] = (HIDDEN, INNER)
        found |= {at + f"{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    return {**found, "model.norm.weight": (HIDDEN,)}


def write(directory: Path, layers: int, seed: int) -> None:
    """Write a checkpoint of two shards."""
    directory.mkdir(parents=True)
    found = shapes(layers)
    place = {
        n: f"model-0000{1 + (2 * i >= len(found))}-of-00002.safetensors"
        for i, n in enumerate(found)
    }
    generator = torch.Generator().manual_seed(0)
    noise = torch.Generator().manual_seed(seed)
    for file in sorted(set(place.values())):
        shard = {}
        for name in (n for n in found if place[n] == file):
            base = torch.randn(found[name], generator=generator) * 0.02
            shard[name] = (
                base + seed * 5e-4 * torch.randn(found[name], generator=noise)
            ).bfloat16()
        save_file(shard, directory / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": place}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEYS,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
    (directory / "config.json").write_text(json.dumps(config))


def _warm(pre: Path, post: Path, out: Path, repeats: int) -> list[float]:
    """Return the seconds of runs in a process that has compiled the edit, as for a large model."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", APPLY, *map(str, (pre, post, out, repeats + 1))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(word) for word in done.stdout.split()[2:]]


def main() -> None:
    """Print seconds, ratios and memory."""
    where = Path(sys.argv[1])
    layers = round((float(sys.argv[2]) if len(sys.argv) > 2 else 2.0) * 1e9 / 2 / 218e6 - 0.6)
    repeats = int(sys.argv[3]) if len(sys.argv) > 3 else 3
    pre, post, out = where / "pre", where / "post", where / "out"
    if not pre.exists():
        write(pre, layers, 0)
        write(post, layers, 1)
    said: list[list[float]] = []

    def ours() -> None:
        shutil.rmtree(out, ignore_errors=True)
        done = subprocess.run(
            [sys.executable, "-c", APPLY, *map(str, (pre, post, out, 1))],
            check=True,
            capture_output=True,
            text=True,
        )
        said.append(list(map(float, done.stdout.split())))

    def floor() -> None:
        shutil.rmtree(out, ignore_errors=True)
        subprocess.run(
            f"cat {pre}/* {post}/* > /dev/null; cp -r {post} {out}", shell=True, check=True
        )

    def imports() -> None:
        subprocess.run([sys.executable, "-c", "from deltalab import stream"], check=True)

    ways = {"ours": ours, "floor": floor, "imports": imports}
    recipe = where / "merge.yaml"
    merge = Path(sys.executable).parent / "mergekit-yaml"
    if merge.exists() and "nomergekit" not in sys.argv:
        recipe.write_text(
            json.dumps(
                {
                    "merge_method": "dare_linear",
                    "base_model": str(pre),
                    "dtype": "bfloat16",
                    "models": [{"model": str(post), "parameters": {"weight": 1.0, "density": 0.1}}],
                }
            )
        )

        def mergekit() -> None:
            shutil.rmtree(out, ignore_errors=True)
            subprocess.run(
                [str(merge), str(recipe), str(out), "--no-copy-tokenizer"],
                check=True,
                capture_output=True,
            )

        ways["mergekit"] = mergekit
    start = time.perf_counter()
    times = alternate(ways, repeats)
    bytes_ = sum(f.stat().st_size for f in post.glob("*.safetensors"))
    print(f"2 x {bytes_ / 1e9:.2f} GB in 2 x 2 shards, {time.perf_counter() - start:.0f} s of runs")
    for name, measured in times.items():
        print(f"{name} | {measured.best:.2f} s | times the floor {ratio(measured, times['floor'])}")
    if "mergekit" in times:
        print(f"mergekit, times ours | {ratio(times['mergekit'], times['ours'])}")
    print(f"within the process | {min(s for _, s in said):.2f} s without start and imports")
    warm = Times(tuple(_warm(pre, post, out, repeats)))
    print(f"compiled already | {warm.best:.2f} s | times the floor {ratio(warm, times['floor'])}")
    print(f"memory above the imports | {max(m for m, _ in said):.2f} GiB")


if __name__ == "__main__":
    main()
