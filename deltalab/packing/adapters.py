"""A packed delta of low rank as a LoRA adapter, in the layout of the PEFT library.

`adapter_model.safetensors` holds `base_model.model.<module>.lora_A.weight` (r, in) and
`lora_B.weight` (out, r), of an embedding `lora_embedding_A` (r, entries) and `lora_embedding_B`
(width, r); W + B A is the edited weight, for alpha is the rank everywhere. Tensors that changed
otherwise are held in full, as PEFT's `modules_to_save`, or left out, since several servers refuse
adapters that have any; how much of the delta that loses is told.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from deltalab.apply import layout
from deltalab.codes import Code
from deltalab.codes.lowrank import LowRank
from deltalab.codes.nested import Patched
from deltalab.linear.delta import difference
from deltalab.packing import packs
from deltalab.packing.files import Packed
from deltalab.store import files
from deltalab.weights.mapping import part_of
from deltalab.weights.shards import DTYPES, Entry, read

EXTRAS = ("keep", "drop")


def export(file: Path, base: Path, out: Path, extras: str = "keep") -> dict[str, Any]:
    """Write a LoRA adapter and return what it holds.

    Args:
        file: from `packs.pack`, of an edit of low rank, such as `twin`.
        base: the checkpoint that it goes with.
        out: directory to write, which must not exist.
        extras: what becomes of tensors that changed otherwise: "keep" them in full, or "drop" them.

    Returns:
        `ranks` by module, the names of `extras`, and `lost`, the share of the edited delta's
        squared norm that was left out.

    Raises:
        ValueError: nothing in it is of low rank, another base, or tensors that no adapter can hold.
    """
    if extras not in EXTRAS:
        raise ValueError(f"extras={extras}: must be one of {', '.join(EXTRAS)}")
    if out.exists():
        raise ValueError(f"out={out}: exists already; name another directory or remove it")
    packed = Packed(file)
    packs.verify(file, base)
    old = layout.read(base, "onto", packed.about.get("dequantize") or None).entries
    arrays: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    saved: list[str] = []
    kept = lost = 0.0
    for name in packed.codes:
        factors = _factors(packed, name)
        module = name.removesuffix(".weight")
        if factors is not None and module != name:
            b, a = (factor.contiguous() for factor in factors)
            ranks[module] = a.shape[0]
            kept += float((b.double() @ a.double()).square().sum())
            lead = f"base_model.model.{module}"
            if part_of(name) == "embedding":
                arrays[f"{lead}.lora_embedding_A"] = b.mT.contiguous()
                arrays[f"{lead}.lora_embedding_B"] = a.mT.contiguous()
            else:
                arrays[f"{lead}.lora_A.weight"], arrays[f"{lead}.lora_B.weight"] = a, b
        elif (full := _full(packed, old, name)) is not None:
            weight, energy = full
            saved.append(name)
            kept += energy
            lost += energy
            if extras == "keep":
                arrays[f"base_model.model.{name}"] = weight
    if not ranks:
        raise ValueError(
            f"{file}: no tensor of low rank; an adapter holds those of edit=twin alone"
        )
    share = lost / kept if extras == "drop" and kept else 0.0
    in_full = saved if extras == "keep" else []
    with files.building(out) as made:
        save_file(arrays, made / "adapter_model.safetensors", {"format": "pt"})
        text = json.dumps(_config(ranks, in_full, base), indent=2)
        files.write(made / "adapter_config.json", text + "\n")
    return {"ranks": ranks, "extras": in_full, "lost": share}


def _factors(packed: Packed, name: str) -> tuple[Tensor, Tensor] | None:
    """Return B and A of a matrix of low rank; entries put right for rounding are no part of it."""
    parts = packed.codes[name]["parts"]
    if len(parts) != 1 or parts[0]["code"]["kind"] not in ("lowrank", "patched"):
        return None
    code: Code = packed.code(name)
    if isinstance(code, Patched):
        code = code.inner()[0]
    return code.factors() if isinstance(code, LowRank) and len(code.shape) == 2 else None


def _full(packed: Packed, old: dict[str, Entry], name: str) -> tuple[Tensor, float] | None:
    """Return a tensor that changed, and the squared norm of its change; None where none did.

    Raises:
        ValueError: a tensor that the base does not have so.
    """
    said = packed.codes[name]
    parts = [part["code"]["kind"] for part in said["parts"]]
    base = old.get(said.get("base", name))
    if all(kind in ("same", "zero") for kind in parts):
        return None
    dtype = DTYPES.get(said["dtype"])
    if base is None or base.dtype is None or dtype is None or list(base.shape) != said["shape"]:
        raise ValueError(
            f"{packed.path}: tensor {name!r} is not in the base so: no adapter holds it"
        )
    pre = read(base)
    whole = pre.to(dtype, copy=True).reshape(-1).contiguous()
    for number, part in enumerate(said["parts"]):
        start = part["start"] // dtype.itemsize
        if part["code"]["kind"] == "bytes":
            held = packed.arrays(name, number)["bytes"].view(dtype)
        elif part["code"]["kind"] == "same":
            continue
        else:
            code = packed.code(name, number)
            own = pre.reshape(-1)[start : start + code.count].reshape(code.shape)
            held = code.onto(own, dtype).reshape(-1)
        whole[start : start + held.numel()] = held
    made = whole.reshape(pre.shape)
    energy = float(difference(pre, made).double().square().sum())
    return (made, energy) if energy else None


def _config(ranks: dict[str, int], extras: list[str], base: Path) -> dict[str, Any]:
    """Return `adapter_config.json`: the commonest rank, and a pattern for the other modules."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != common}
    modules = [name.rpartition(".")[0] for name in extras]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base.name,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(set(modules)) or None,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
