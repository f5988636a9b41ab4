"""An artefact on disk: its card as JSON, its figures, and its points as JSON lines."""

import json
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltalab import drawing
from deltalab.settings import conf_dir
from deltalab.store import exporting
from deltalab.store.record import Outcome
from experiments.paper.artefacts import ARTEFACTS, Artefact
from experiments.paper.evidence import Stored, keep
from experiments.paper.found import Found, deciding, told

FIGURES = 6
"""Significant figures of the numbers in the file of an artefact's points."""
ROLES = {
    "llama3": "LLaMA-3-8B",
    "mistral": "Mistral-7B",
    "qwen2": "Qwen2-7B",
    "zephyr": "Zephyr-7B-DPO",
    "safety": "Llama-2-7B-chat and its fine-tunes",
}


def write(name: str, points: Sequence[Outcome], results: Path, scale: str) -> tuple[Path, Found]:
    """Make one artefact from its points and write it below `results/`, into its folder."""
    artefact = ARTEFACTS[name]
    folder = results / artefact.folder
    folder.mkdir(parents=True, exist_ok=True)
    documents = Stored(results)
    found = artefact.find(points, documents)
    exporting.write([*map(artefact.lighter, points)], folder / f"{name}.jsonl", FIGURES)
    if artefact.documents:
        keep(points, documents, artefact.documents, folder / f"{name}_documents.jsonl")
    card = {
        **_made(name, found, folder),
        "command": f"make {name}" + ("" if scale == "demo" else f" SCALE={scale}"),
        "paper_command": f"make {name} SCALE=paper" if artefact.paper_scale else None,
        "paper_hours": _paper_hours(name),
        "stand_ins": _stand_ins(scale, list(dict.fromkeys(p.model for p in points)), artefact),
        "points": len(points),
        "seeds": sorted({p.seed for p in points if p.seed is not None}),
        **_origin(points, results),
        "lines": f"{name}.jsonl",
    }
    return save(folder / f"{name}.json", card), found


def gathered(name: str, points: Sequence[Outcome], results: Path) -> tuple[Path, Found]:
    """Make a study of the committed points of others: its card has no points of its own."""
    found = ARTEFACTS[name].find(points, None)
    folder = results / ARTEFACTS[name].folder
    card = {
        **_made(name, found, folder),
        "command": f"make {name}",
        "paper_command": None,
        "paper_hours": None,
        "stand_ins": "",
        "points": len(points),
        "seeds": sorted({p.seed for p in points if p.seed is not None}),
        "minutes": 0.0,
        "hardware": "",
        "versions": {},
        "date": "",
        "commit": "",
        "lines": None,
    }
    return save(folder / f"{name}.json", card), found


def _made(name: str, found: Found, folder: Path) -> dict[str, Any]:
    """Draw an artefact's figures and return what its card says of the claim, with its tables."""
    import matplotlib

    artefact, figures = ARTEFACTS[name], []
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **drawing.STYLE}):
        shown, drawn = found.show()
        for suffix, figure, caption in drawn:
            path = folder / f"{name}{suffix}.png"
            drawing.save(figure, path, dpi=160)
            svg = path.with_suffix(".svg").name
            figures.append({"file": svg, "png": path.name, "caption": caption})
    tables = [{"title": t.title, "columns": [*t.columns], "rows": [*t.rows]} for t in shown]
    return {
        "name": name,
        "title": artefact.title,
        "kind": artefact.kind,
        "claim": artefact.claim,
        **judged(name, found, tables),
        "figures": figures,
    }


def judged(name: str, found: Found, tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the part of a card that judging decides, the table of its checks first.

    A study asks a question and has no verdict; its checks have.
    """
    study = ARTEFACTS[name].kind != "artefact"
    worst = deciding(found.checks)
    rows = [[c.claim, c.verdict, c.held, c.failed, c.cases] for c in found.checks]
    columns = ["check", "verdict", "shown in", "shown not to be so in", "of"]
    checks = {"title": "What was checked", "columns": columns, "rows": rows}
    return {
        "verdict": "finding" if study else found.verdict,
        "deciding": None if study or worst.verdict == "agrees" else told(worst),
        "sentence": found.sentence,
        "notes": [*found.notes],
        "tables": [checks, *tables],
    }


def save(path: Path, card: Mapping[str, Any]) -> Path:
    """Write a card."""
    path.write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _paper_hours(name: str) -> str | None:
    """Return the GPU hours that the head of an experiment tells for the paper's scale."""
    head = (conf_dir() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    found = re.search(r"SCALE=paper about ([\d.]+) GPU hours", head)
    return found and f"about {found[1]} (estimated by plan=true, not measured)"


def _origin(points: Sequence[Outcome], results: Path) -> dict[str, Any]:
    """Return where the points were computed, when, by what, and how long it took in all."""
    paths = [results / "records" / f"{p.key}.json" for p in points]
    latest = max(paths, key=lambda path: path.stat().st_mtime)
    record: Mapping[str, Any] = json.loads(latest.read_text(encoding="utf-8"))
    minutes = sum(p.seconds or 0.0 for p in points) / 60
    return {
        "minutes": round(minutes, 1),
        "hardware": hardware(str(record["device"])),
        "versions": record["versions"],
        "date": time.strftime("%Y-%m-%d", time.gmtime(latest.stat().st_mtime)),
        "commit": str(record["git"] or "")[:7],
    }


def hardware(device: str) -> str:
    """Name the machine: its processor and cores, and the device that computed.

    >>> hardware("NVIDIA H100, driver 1")
    'NVIDIA H100, driver 1'
    """
    if not device.startswith("cpu"):
        return device
    names = [platform.machine()]
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        ] or names
    return f"{os.cpu_count()} cores, {names[0]}"


def _stand_ins(scale: str, names: Sequence[str], artefact: Artefact) -> str:
    """Say which models stand for which of the paper's."""
    from omegaconf import OmegaConf

    if scale == "paper" and artefact.paper_scale:
        return "the paper's own models"
    roles = OmegaConf.load(conf_dir() / "scale" / f"{scale}.yaml")
    told = [f"{title} -> {roles[role]}" for role, title in ROLES.items() if roles[role] in names]
    rest = [n for n in names if n not in {roles[role] for role in ROLES}]
    if rest:
        told.append(f"{artefact.original} -> {', '.join(rest)}")
    return "; ".join(told)
