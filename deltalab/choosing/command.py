"""The `deltalab-choose` command: which edit to use, what it costs, and how to make the file.

    deltalab-choose model=hf_llm model.pre=BASE model.post=DIR bits=2
    deltalab-choose model=mnist_vit loss=1%
    deltalab-choose model=tiny_llm size=1MB n=6

Ranks all candidates (`conf/candidates.yaml`) by a prediction that takes no pass over examples for
any of them, measures the best few, and prints those that lose least for their size, with the
command that makes the file. Takes the settings of `deltalab` that choose a pair, its data and
evaluator, and

    bits=2 | size=500MB | loss=1%    the goal: at most so many bits for each weight that is edited,
                                     so large a file, or so much of the change from pre to post
    n=4                              how many candidates are measured
    candidates=FILE                  a list of your own, as conf/candidates.yaml
    plan=true                        what it would cost, and stop

Half A of the objective's examples predicts and chooses, half B is what is told. Measured points
are ordinary records: the same command continues where it stopped, and deltalab-report shows them.
"""

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltalab.choosing.candidates import Candidate
    from deltalab.choosing.goals import Goal
    from deltalab.choosing.prediction import Curves, Expected
    from deltalab.choosing.search import Measured

OWN = ("bits", "size", "loss", "n", "candidates", "plan")
DEFAULTS = {"values": "float16", "select": "proj", "riemann": "off", "grid": "none"}
"""Settings of `deltalab` that are these where nothing else is said."""


def main() -> None:
    """Entry point of the `deltalab-choose` command. Exit code 0 on success, 2 for a mistake."""
    from deltalab.sweep.jobs import writing
    from deltalab.terminal import console

    console.ready()
    if {"-h", "--help"} & set(sys.argv[1:]) or not sys.argv[1:]:
        print(__doc__)
        return
    with writing():
        choose(sys.argv[1:])


def choose(arguments: Sequence[str]) -> dict[str, Any]:
    """Choose among candidates; print what is found, draw it, and return it.

    Args:
        arguments: `name=value` settings, as on the command line.

    Returns:
        `best` and `measured`, by the labels of candidates; `command`, which makes the file.

    Raises:
        ValueError: a mistake in the settings, or a goal that no candidate meets.
    """
    from deltalab.choosing.candidates import candidates
    from deltalab.choosing.goals import goal

    own, overrides = _taken(arguments)
    wanted, count = goal(own), _count(own.get("n", "4"))
    every = candidates(own.get("candidates"))
    settings, choices = composed(overrides)
    if own.get("plan", "false") == "true":
        from deltalab.choosing.prediction import PASSES

        print(
            f"{len(every)} candidates; {PASSES:g} passes over the objective's examples and some"
            f" tensors of each candidate to rank them\n{count} points to measure, as"
            " `deltalab plan=true` tells each"
        )
        return {}
    points = [pointed(settings, choices, each) for each in every]
    curves, found = ranked(points)
    known = [i for i, each in enumerate(found) if each is not None]
    kept: list[Any] = [found[i] for i in known]
    measured = _search(wanted, count, kept, [points[i] for i in known], curves)
    names = [every[i] for i in known]
    return _told(wanted, names, kept, measured, curves, settings["results"], overrides)


def _taken(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    own: dict[str, str] = {}
    overrides = []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in OWN:
            own[name] = value
        elif name in ("edit", "merge", "budget", "grid") or name.startswith("edit."):
            raise ValueError(f"{argument}: edits are what is chosen; candidates=FILE names others")
        else:
            overrides.append(argument)
    return own, overrides


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise ValueError(f"n={text}: must be how many candidates to measure, at least 1")
    return int(text)


def composed(overrides: Sequence[str]) -> tuple[dict[str, Any], Any]:
    """Compose the settings that all candidates share, as `deltalab` does.

    Raises:
        ValueError: a mistake in them, or a family of experts.
    """
    from hydra import compose, initialize_config_dir
    from omegaconf import open_dict

    from deltalab import options
    from deltalab import settings as checks
    from deltalab.keys import Choices
    from deltalab.sweep import composing
    from deltalab.terminal.mistakes import top_level

    given = {override.partition("=")[0] for override in overrides}
    more = [f"{name}='{value}'" for name, value in DEFAULTS.items() if name not in given]
    where = initialize_config_dir(version_base="1.3", config_dir=str(checks.conf_dir()))
    with composing.guarded(), where:
        cfg = compose("config", [*overrides, *more], return_hydra_config=True)
    chosen, sources = cfg.hydra.runtime.choices, cfg.hydra.runtime.config_sources
    named = {g: checks.option(g, chosen[g], sources) for g in ("model", "edit", "objective")}
    with open_dict(cfg):
        del cfg["hydra"]
    values: dict[str, Any] = checks.tidy(options.plain(cfg))
    checks.check_top(values, top_level())
    if options.experts_of(values):
        raise ValueError(f"model={named['model']}: a family; deltalab-choose is for a pair")
    return values, Choices(**named, experiment=None)


def pointed(
    settings: Mapping[str, Any], choices: Any, candidate: "Candidate"
) -> tuple[dict[str, Any], Any]:
    """Return the settings and choices of one candidate's point.

    Raises:
        ValueError: a setting that the edit does not have.
    """
    from dataclasses import replace

    from omegaconf import OmegaConf

    from deltalab.settings import near, option_file, tidy

    name = candidate[0].partition("=")[2]
    file = option_file("edit", name)
    assert file is not None, "candidates are checked"
    node: Any = OmegaConf.to_container(OmegaConf.load(file))
    for override in candidate[1:]:
        key, _, value = override.removeprefix("edit.").partition("=")
        if key not in node:
            raise ValueError(f"candidates: {name} has no setting {key}{near(key, node)}")
        node[key] = OmegaConf.to_container(OmegaConf.create([_yaml(value)]))[0]  # type: ignore[index]
    return {**settings, "edit": tidy(node)}, replace(choices, edit=name)


def _yaml(value: str) -> Any:
    import yaml

    return yaml.safe_load(value)


def ranked(
    points: Sequence[tuple[dict[str, Any], Any]],
) -> tuple["Curves", list["Expected | None"]]:
    """Return the curves of a pair, and what is expected of every point; None where nothing is.

    Raises:
        ValueError: nothing can be said of any.
    """
    from deltalab.choosing.prediction import Expected, expected
    from deltalab.run.building import prepare
    from deltalab.terminal import console

    with console.steps("candidates", len(points)) as step:
        curves, found = expected([prepare(*each) for each in points], step)
    kept = [each if isinstance(each, Expected) else None for each in found]
    if not any(kept):
        raise ValueError(f"no candidate can be used: {found[0]}")
    return curves, kept


def _search(
    goal: "Goal",
    count: int,
    expected: Sequence["Expected"],
    points: Sequence[tuple[dict[str, Any], Any]],
    curves: "Curves",
) -> dict[int, "Measured"]:
    """Measure so many candidates, each chosen after the one before.

    Raises:
        ValueError: a goal that no candidate is expected to meet; the nearest is told.
    """
    from deltalab.choosing.search import following
    from deltalab.terminal import console

    measured: dict[int, Measured] = {}
    with console.steps("measured", count) as step:
        while len(measured) < count:
            place = following(goal, expected, measured, curves.gap)
            if place is None:
                break
            measured[place] = measure(*points[place], curves)
            step()
    if not measured:
        least = min(goal.size(each.bits, each.size) for each in expected)
        told = f"{least / 1e6:.3g}MB" if goal.name == "size" else f"{least:.3g}"
        raise ValueError(f"{goal.text}: no candidate is so small; the smallest takes about {told}")
    return measured


def measure(settings: dict[str, Any], choices: Any, curves: "Curves") -> "Measured":
    """Run a candidate's point, or read its record, and return what half A and half B say."""
    from deltalab.choosing.search import Measured
    from deltalab.data import splits
    from deltalab.run import run
    from deltalab.run.point import CHANGE

    record, _ = run(settings, choices, group="choose")
    file = Path(settings["results"]) / "documents" / f"{record['key']}.json"
    values = json.loads(file.read_text("utf-8"))[CHANGE]
    halves = []
    for half in splits.HALVES:
        own = [values[i] for i in splits.places(len(values), half) if values[i] is not None]
        mean = math.fsum(own) / len(own) if own else math.nan
        square = math.fsum((v - mean) ** 2 for v in own) / max(1, len(own) - 1)
        halves.append((mean, math.sqrt(square / len(own)) if own else math.nan))
    (tuned, spread), (change, error) = halves
    told = record["touched"]["bits_per_weight"]
    bits = told["payload"] + told["metadata"]
    size = record["touched"]["parameters"] * bits / 8 + curves.rest
    # A candidate that is fitted to half A has no change there, and is judged alone.
    tuned = change + error if math.isnan(tuned) else tuned + spread
    return Measured(tuned, change, error, bits, size)


def _told(
    goal: "Goal",
    names: Sequence["Candidate"],
    expected: Sequence["Expected"],
    measured: Mapping[int, "Measured"],
    curves: "Curves",
    results: str,
    overrides: Sequence[str],
) -> dict[str, Any]:
    """Print and draw what was found."""
    from deltalab.choosing.candidates import label
    from deltalab.choosing.search import chosen, front

    best, edge = chosen(goal, measured, curves.gap), front(measured)
    print(f"{len(expected)} candidates, {len(measured)} measured; {goal.text}\n")
    print(f"  {'bits':>6} {'file, MB':>9} {'loss change, half B':>21} {'of gap':>8}  edit")
    for i in sorted(measured, key=lambda i: measured[i].bits):
        one, mark = measured[i], "*" if i == best else "|" if i in edge else " "
        share = f"{100 * one.change / curves.gap:.2g} %" if curves.gap else "-"
        change = f"{one.change:+.2g} ± {one.error:.1g}"
        print(
            f"{mark} {one.bits:6.3g} {one.size / 1e6:9.4g} {change:>21} {share:>8}"
            f"  {label(names[i])}"
        )
    print("\n* recommended  | lose least for their size")
    if best is not None and goal.name == "loss" and measured[best].change > goal.most * curves.gap:
        print(
            f"half A keeps {goal.text}, half B does not: take a smaller loss to be on the safe side"
        )
    drawn = _drawn(goal, expected, measured, best, curves, results)
    if drawn:
        print(f"figure: {drawn}")
    found: dict[str, Any] = {"measured": {label(names[i]): m for i, m in measured.items()}}
    if best is None:
        print(
            f"\n{goal.text}: none of those measured keeps it on half A; a larger n= looks further"
        )
        return {**found, "best": None, "command": None}
    given = {override.partition("=")[0] for override in overrides}
    more = [f"{k}={v}" for k, v in DEFAULTS.items() if k in ("values", "select") and k not in given]
    out = "out=" + names[best][0].removeprefix("edit=") + ".safetensors"
    line = shlex.join(["deltalab-delta", "pack", *overrides, *names[best], *more, out])
    print(f"\nThe file is made by\n  {line}")
    return {**found, "best": label(names[best]), "command": line}


def _drawn(
    goal: "Goal",
    expected: Sequence["Expected"],
    measured: Mapping[int, "Measured"],
    best: int | None,
    curves: "Curves",
    results: str,
) -> Path | None:
    """Draw loss change over bits, predicted and measured; None without matplotlib."""
    from deltalab.choosing.search import front

    try:
        import matplotlib
    except ImportError:
        return None
    from deltalab import drawing

    with matplotlib.rc_context(drawing.STYLE):
        figure, axes = drawing.panels(1, 1, 5.5, 3.6)
        panel, blue, red = axes[0, 0], drawing.COLOURS[0], drawing.COLOURS[1]
        panel.plot(
            [e.bits for e in expected], [e.change for e in expected], ".", color="#999999",
            label="predicted, half A",
        )  # fmt: skip
        ones = [*measured.values()]
        panel.errorbar(
            [m.bits for m in ones], [m.change for m in ones], [2 * m.error for m in ones],
            fmt="o", color=blue, label="measured, half B, two errors",
        )  # fmt: skip
        edge = [measured[i] for i in front(measured)]
        panel.step([m.bits for m in edge], [m.change for m in edge], where="post", color="black",
                   lw=1.0, label="front")  # fmt: skip
        if best is not None:
            panel.plot(measured[best].bits, measured[best].change, "*", ms=12, color=red,
                       label="recommended")  # fmt: skip
        if goal.name == "loss":
            panel.axhline(goal.most * curves.gap, color="black", lw=0.8, ls=":")
        elif goal.name == "bits":
            panel.axvline(goal.most, color="black", lw=0.8, ls=":")
        panel.set_xscale("log", base=2)
        panel.set_yscale("symlog", linthresh=max(1e-12, 0.01 * abs(curves.gap)))
        panel.set(xlabel="bits a weight", ylabel="loss change")
        panel.legend()
        name = "".join(c if c.isalnum() or c in ".=" else "_" for c in goal.text)
        file = Path(results) / "choosing" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
    return file


if __name__ == "__main__":
    main()
