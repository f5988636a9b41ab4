"""`deltalab-delta pack` and `unpack` against reading, one digest and writing, after imports.

Claim sought: at most 1.5 times the floor. Run: `python -m experiments.bench.packed [gigabytes of a
pair] [repeats]`. The floor of packing reads both checkpoints, takes the SHA-256 of the base and
writes a file of the packed one's size; that of unpacking reads base and file, takes the same digest
and writes the checkpoint. Processor time of one thread, in turn; and nanoseconds a weight of
encoding and decoding one matrix by every edit that has a code. Cost: some minutes.
"""

import hashlib
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import deltalab
from deltalab.linear.delta import difference
from deltalab.packing import packs
from deltalab.store import digests, files
from deltalab.weights.threshold import ModelThreshold
from experiments.bench.timing import alternate, ratio

SIDE, BLOCK = 4096, 1 << 22
EDITS: tuple[tuple[str, dict[str, Any]], ...] = (("dare", {"p": 0.9}), ("bitdelta", {}))
CODED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dare", {"p": 0.9}), ("dare", {"p": 0.5}), ("ties", {"scope": "tensor"}), ("breadcrumbs", {}),
    ("della", {}), ("bitdelta", {}), ("bitdelta", {"axis": "row"}), ("multibit", {"bits": 3}),
    ("twin", {"rate": None, "rank": 16}), ("keep", {}),
)  # fmt: skip


def write(place: Path, layers: int, seed: int) -> None:
    """Write a checkpoint of square matrices."""
    base, noise = (torch.Generator().manual_seed(s) for s in (0, seed))
    found = {}
    for layer in range(layers):
        weight = 0.02 * torch.randn(SIDE, SIDE, generator=base)
        weight += seed * 5e-4 * torch.randn(SIDE, SIDE, generator=noise)
        found[f"model.layers.{layer}.mlp.up_proj.weight"] = weight.bfloat16()
    place.mkdir()
    save_file(found, place / "model.safetensors", {"format": "pt"})


def floor(hashed: Path, read: Path, size: int, out: Path) -> None:
    """Read two files, take the digest of the first, and write so many bytes."""
    digest, block = hashlib.sha256(), bytes(BLOCK)
    with open(hashed, "rb", 0) as one, open(read, "rb", 0) as other, open(out, "wb", 0) as target:
        while data := one.read(BLOCK):
            digest.update(data)
        while other.read(BLOCK):
            pass
        for start in range(0, size, BLOCK):
            target.write(block[: size - start])
    files.sync(out)


def whole_files(root: Path, repeats: int) -> None:
    """Print processor seconds of packing and unpacking, and times their floors."""
    base, tuned = root / "base", root / "tuned"
    one, other = (place / "model.safetensors" for place in (base, tuned))
    weights = one.stat().st_size // 2
    for name, settings in EDITS:
        file, number = root / f"{name}.safetensors", iter(range(1 << 20))
        edit, about = deltalab.edit(name, **settings), {"edit": {"name": name, **settings}}

        def pack(edit: Any = edit, about: Any = about, number: Any = number) -> None:
            made = root / f"pack{next(number)}.safetensors"
            packs.pack(base, tuned, made, edit, select="all", seed=0, about=about)

        packs.pack(base, tuned, file, edit, select="all", seed=0, about=about)
        size = file.stat().st_size

        def unpack(file: Path = file, number: Any = number) -> None:
            packs.unpack(file, base, root / f"unpack{next(number)}")

        ways = {
            "pack": pack,
            "floor of packing": partial(floor, one, other, size, root / "floor"),
            "unpack": unpack,
            "floor of unpacking": partial(floor, one, file, one.stat().st_size, root / "floor"),
        }
        times = alternate(ways, repeats, partial(forget, root), time.process_time)
        for way in ("pack", "unpack"):
            best = times[way].best
            print(
                f"{way} {name} | {best:.2f} s | {1e9 * best / weights:.1f} ns a weight"
                f" | {ratio(times[way], times[f'floor of {way}ing'])} times the floor"
                f" | {8 * size / weights:.3f} bits a weight"
            )


def forget(root: Path) -> None:
    """Leave neither results nor remembered digests."""
    digests._tables.clear()
    shutil.rmtree(digests.place(), ignore_errors=True)
    for made in (*root.glob("pack*"), *root.glob("unpack*")):
        shutil.rmtree(made) if made.is_dir() else made.unlink()


def matrices(repeats: int) -> None:
    """Print nanoseconds a weight of encoding and decoding."""
    generator = torch.Generator().manual_seed(0)
    pre = (0.02 * torch.randn(2048, 2048, generator=generator)).bfloat16()
    post = (pre.float() + 5e-4 * torch.randn(2048, 2048, generator=generator)).bfloat16()
    delta = difference(pre, post)
    quantile = lambda keep: ModelThreshold().of(keep, {"": delta})[""]  # noqa: E731
    for name, settings in CODED:
        edit = deltalab.edit(name, **settings)
        encode = partial(deltalab.encode, edit, delta, post=post, quantile=quantile)
        code = encode()
        assert code is not None
        ways = {"encode": encode, "decode": partial(code.onto, pre, torch.bfloat16)}
        times = alternate(ways, repeats, clock=time.process_time)
        each = (f"{way} {1e9 * t.best / delta.numel():.1f}" for way, t in times.items())
        print(
            f"{name} {settings} | {' | '.join(each)} | {code.bits.total / delta.numel():.3f} bits"
        )


def main() -> None:
    """Print both tables."""
    gigabytes, repeats = (*map(float, sys.argv[1:]), *(2.0, 5)[len(sys.argv) - 1 :])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        layers = max(1, round(gigabytes * 1e9 / 4 / SIDE**2))
        for place, seed in (("base", 0), ("tuned", 1)):
            write(root / place, layers, seed)
        time.sleep(digests.SETTLED)
        whole_files(root, int(repeats))
    matrices(int(repeats))


if __name__ == "__main__":
    main()
