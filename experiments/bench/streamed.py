"""`deltalab-apply` from disk to disk against reading and copying the same files.

Claim: at most 1.8 times `cat pre post > /dev/null; cp post out`, at least 4 times as fast as
`mergekit-yaml`, with at most 1 GiB of memory above the imports. Run: `python -m
experiments.bench.streamed DIR [gigabytes of a model] [repeats] [nomergekit]`, where DIR has room
for four times as much; it is filled with a synthetic Llama pair of two shards each. Measured twice:
with the files in the page cache, and (root, Linux) on the disk alone. Cost: some minutes.
"""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from experiments.bench.timing import alternate, ratio

HIDDEN, INNER, HEADS, KEYS, VOCABULARY = 4096, 14336, 32, 8, 32000
CACHES = Path("/proc/sys/vm/drop_caches")
EDITS = ("dare p=.9", "bitdelta", "ties keep=.2")
APPLY = """
import resource, sys, time
from pathlib import Path
from deltalab.apply import stream
from deltalab.edits.chain import Chain
name, _, setting = sys.argv[1].partition(" ")
key, _, value = setting.partition("=")
edit, = Chain([{name: {key: float(value)} if setting else {}}]).edits
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
stream.stream(*map(Path, sys.argv[2:]), edit, select="all", seed=0)
seconds = time.perf_counter() - start
print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
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


def commands(pre: Path, post: Path, out: Path, recipe: Path) -> dict[str, list[str]]:
    """Return the programs to compare, each of which writes `out`."""
    bin_ = Path(sys.executable).parent
    copy = f"cat {pre}/* {post}/* > /dev/null; cp -r {post} {out}"
    model = ["model=hf_llm", f"model.pre={pre}", f"model.post={post}"]
    found = {
        "deltalab-apply": [str(bin_ / "deltalab-apply"), *model, "edit=dare", "edit.p=.9"],
        "floor": ["sh", "-c", copy],
        "import torch": [sys.executable, "-c", "import torch"],
    }
    found["deltalab-apply"] += ["select=all", f"out={out}"]
    if (bin_ / "mergekit-yaml").exists() and "nomergekit" not in sys.argv:
        merge = {
            "merge_method": "dare_linear",
            "base_model": str(pre),
            "dtype": "bfloat16",
            "models": [{"model": str(post), "parameters": {"weight": 1.0, "density": 0.1}}],
        }
        recipe.write_text(json.dumps(merge))
        found["mergekit-yaml"] = [str(bin_ / "mergekit-yaml"), str(recipe), str(out)]
        found["mergekit-yaml"].append("--no-copy-tokenizer")
    return found


def forget(out: Path, cold: bool) -> None:
    """Leave neither a result nor, if cold, a page of the files in memory but the programs'."""
    shutil.rmtree(out, ignore_errors=True)
    if cold:
        subprocess.run(["sync"], check=True)
        CACHES.write_text("3")
        subprocess.run([sys.executable, "-c", "import torch, hydra, rich.progress"], check=True)


def main() -> None:
    """Print seconds, ratios and memory."""
    numbers = [float(word) for word in sys.argv[2:] if word[0].isdigit()]
    size, repeats = (*numbers, *(2.0, 3)[len(numbers) :])
    where = Path(sys.argv[1])
    pre, post, out = where / "pre", where / "post", where / "out"
    if not pre.exists():
        layers = round(size * 1e9 / 2 / 218e6 - 0.6)
        write(pre, layers, 0)
        write(post, layers, 1)
    programs = commands(pre, post, out, where / "merge.yaml")
    ways = {
        name: partial(subprocess.run, words, check=True, capture_output=True)
        for name, words in programs.items()
    }
    bytes_ = sum(f.stat().st_size for f in post.glob("*.safetensors"))
    for cold in (False, True) if os.access(CACHES, os.W_OK) else (False,):
        times = alternate(ways, int(repeats), partial(forget, out, cold))
        state = "on the disk alone" if cold else "in the page cache"
        print(f"2 models of {bytes_ / 1e9:.2f} GB in two shards each, {state}")
        print("what | seconds | times the floor")
        for name, measured in times.items():
            print(f"{name} | {measured.best:.2f} | {ratio(measured, times['floor'])}")
        if "mergekit-yaml" in times:
            slower = ratio(times["mergekit-yaml"], times["deltalab-apply"])
            print(f"mergekit-yaml takes {slower} times as long as deltalab-apply")
    print("edit | seconds within a process | GiB of memory above the imports")
    for edit in EDITS:
        forget(out, cold=False)
        words = [sys.executable, "-c", APPLY, edit, *map(str, (pre, post, out))]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        print(edit, *(f"| {float(word):.2f}" for word in done.stdout.split()))
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
