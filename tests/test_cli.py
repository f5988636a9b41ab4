"""The command line as a user meets it: exit codes, one-line errors, sweeps, resuming."""

import json
import resource
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save_file

from deltalab import cli
from deltalab.settings import conf_dir
from deltalab.store import latest
from deltalab.weights.mapping import Checkpoint

FAST = ["data.test.limit=64", "data.objective.limit=64", "riemann.rule=gauss", "riemann.points=2"]


@pytest.fixture
def deltalab(monkeypatch, capfd, tmp_path):
    """Run the command in this process; return exit code, stdout and stderr."""

    def run(*arguments, results=tmp_path):
        argv = ["deltalab", *arguments, f"results={results}"]
        monkeypatch.setattr(sys, "argv", argv)
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capfd.readouterr()
        return code, out, err

    return run


def records_in(directory):
    files = sorted((directory / "records").glob("*.json"))
    return [json.loads(path.read_text()) for path in files]


@pytest.fixture
def pair_files(tmp_path):
    """Two small checkpoints that do not fit together."""
    tensors = {n: t.float() for n, t in Checkpoint(cli_zoo() / "pre.safetensors").items()}
    pre, post = tmp_path / "pre.safetensors", tmp_path / "post.safetensors"
    save_file(tensors, pre)
    save_file({**tensors, "head.bias": tensors["head.bias"][:3]}, post)
    return pre, post


def cli_zoo():
    from deltalab.models.zoo import DIRECTORY

    return DIRECTORY


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["edit=dare", "edit.p=1.5"], ["edit.p=1.5", "1"]),
        (["edit=nope"], ["edit/nope", "dare", "ties"]),
        (["edit=dare", "edit.q=1"], ["edit.q"]),
        (["select=everything"], ["select=everything", "matrices", "no_embed"]),
        (["model=nope"], ["model/nope", "mnist_vit"]),
        (["riemann.rule=cubic"], ["cubic", "gauss"]),
        (["objective.batch_size=0"], ["objective.batch_size=0"]),
        (["model=timm_vit", "model.name=vit_tiny_patch16_224", "data.dir=.",
          "model.pre=/nowhere/a.safetensors", "model.post=b"], ["model.pre=/nowhere/"]),
        (["model=timm_vit", "data.dir=."], ["missing", "model.name"]),
        (["evaluator._target_=os.getcwd"], ["evaluator._target_=os.getcwd"]),
        (["-m", "edit=dare,expo"], ["edit=dare,expo", "grid=none"]),
        (["edit=dre"], ["edit/dre", "did you mean edit=dare?"]),
        (["edit=dare", "edit.pp=1"], ["'edit.pp'", "did you mean edit.p?"]),
        (["edit=dare", "+edit.pp=1"], ["edit.pp=1: no such setting", "did you mean edit.p?"]),
        (["+seeed=1"], ["seeed=1: no such setting", "did you mean seed?"]),
        (["experiment=dmo"], ["experiment=dmo: must be one of", "did you mean demo?"]),
        (["seed=abc"], ["seed=abc: must be a whole number"]),
        (["~seed"], ["seed: missing"]),
        (["edit=dare", "edit.p=[]"], ["edit.p=[]: must be a number"]),
        (["data.test.limit=-5"], ["limit=-5: must be at least 1"]),
        (["nonfinite=maybe"], ["nonfinite=maybe: must be one of error, zero"]),
        (["evaluator._target_=deltalab.run.subprocess.run"], ["only targets of deltalab"]),
        (["+hydra.callbacks.x._target_=os.system"], ["hydra.callbacks.x._target_=os.system"]),
        (["-m", "edit=dare", "seed=range(0,1000000000)"], ["more than most_points=10000"]),
        (["artifacts_gb=-1"], ["artifacts_gb=-1: must be 0 or more, or null"]),
        (["artifacts_gb=20GB"], ["artifacts_gb=20GB: must be a number or null"]),
        (["-m", "edit=dare", "seed=range(5,1)"], ["an axis of a sweep without a value"]),
        (["-m", "sweeps=[{edit: dare}, {edit: expo, edit.q: '1'}]"], ["edit.q"]),
        (["-m", "edit=dare", "grid=none", "seed=range(0,2000)", "edit.pp=1"], ["edit.pp"]),
        (["-m", "sweeps=3"], ["sweeps=3: must be a list of grids"]),
        (["edit=dare", "--p", "0.9"], ["--p: no such flag", "did you mean edit.p=0.9?"]),
        (["edit=dare", "--edit.p=0.9"], ["--edit.p: no such flag", "did you mean edit.p=0.9?"]),
        (["edit=dare", "-p", "0.9"], ["--package (-p): chooses what --cfg prints"]),
        (["edit=dare", "--multi"], ["--multi: no such flag", "did you mean --multirun?"]),
        (["--experimental-rerun", "x.pickle"], ["--experimental-rerun: would run what a file"]),
        (["model=tiny_llm", "evaluator/tasks=gsm8kk"],
         ["evaluator/tasks=gsm8kk: must be one of", "did you mean gsm8k?"]),
        (["model=tiny_llm", "evaluator/tasks=[gsm8k,mmluu]"],
         ["evaluator/tasks=mmluu: must be one of", "did you mean mmlu?"]),
        (["-m", "model=tiny_llm", "evaluator/tasks=gsm8k,mmluu"], ["did you mean mmlu?"]),
        (["grid=drae"], ["grid=drae: must be one of", "did you mean dare?"]),
        (["edit=2"], ["Could not find 'edit/2'", "dare"]),
        (["-m", "model=1,2"], ["Could not find 'model/1'", "mnist_vit"]),
        (["experiment=7"], ["experiment=7: must be one of atlas, compression, demo"]),
        (["experiment=true"], ["experiment=true: must be one of atlas, compression, demo"]),
        (["model=timm_vit", "model.name=7", "model.pre=a", "model.post=b", "data.dir=."],
         ["model.name=7: must be a text"]),
        (["artifacts=~nobody-of-this-name/x"], ["artifacts=~nobody-of-this-name/x: no such user"]),
        (["edit=dare", "p=0.5"], ["Could not override 'p'", "did you mean edit.p?"]),
        (["edit.p=.5"], ["Could not override 'edit.p'; edit.p=... needs one of edit=", " dare,"]),
        (["p=.5"], ["Could not override 'p'; edit.p=... needs one of edit=", " dare,"]),
        (["-m", "edit.rank=2,4"], ["'edit.rank'; edit.rank=... needs edit=twin"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(deltalab, arguments, parts, tmp_path):
    code, _, err = deltalab(*arguments)
    assert code == 2, err
    assert err.startswith("deltalab: ")
    assert err.count("\n") == 1, err
    for part in parts:
        assert part in err
    assert not (tmp_path / "records").exists()


def test_pairs_that_differ_name_the_tensor_and_both_shapes(deltalab, pair_files):
    pre, post = pair_files
    code, _, err = deltalab(
        "model=timm_vit", "model.name=vit_tiny_patch16_224", f"model.pre={pre}",
        f"model.post={post}", "data.dir=.",
    )  # fmt: skip
    assert code == 2
    assert "'head.bias'" in err
    assert "(20,)" in err
    assert "(3,)" in err


def test_an_empty_image_folder_is_named(deltalab, pair_files, tmp_path):
    (tmp_path / "images" / "train" / "cat").mkdir(parents=True)
    pre, _ = pair_files
    recipe = json.loads((cli_zoo() / "vit.json").read_text())
    args = ",".join(f"{k}:{v}" for k, v in recipe["args"].items())
    code, _, err = deltalab(
        "model=timm_vit", f"model.name={recipe['architecture']}", f"model.pre={pre}",
        f"model.post={pre}", f"model.args={{{args}}}", f"data.dir={tmp_path / 'images'}",
    )  # fmt: skip
    assert code == 2, err
    assert "images/train: no images" in err


def test_keep_is_post_and_discard_is_pre_exactly(deltalab, tmp_path):
    for edit in ("keep", "discard"):
        assert deltalab(f"edit={edit}", "select=all", *FAST)[0] == 0
    by_edit = {r["edit"]["name"]: r for r in records_in(tmp_path)}
    keep, discard = by_edit["keep"], by_edit["discard"]
    assert keep["loss"]["change"] == 0.0
    assert keep["touched"]["relative_shift"] == 0.0
    assert keep["class"] == "competitive"
    assert keep["loss"]["edited"] == keep["loss"]["post"]
    assert discard["loss"]["edited"] == discard["loss"]["pre"]
    for name, value in keep["reference"]["post"].items():
        assert keep["metrics"][name] == value
    for name, value in discard["reference"]["pre"].items():
        assert discard["metrics"][name] == value


def processor_seconds(code, *arguments, told=""):
    """The least of two runs of a program, with all that it imports."""
    spent = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-c", code, *arguments]
        shown = subprocess.run(command, capture_output=True, text=True)
        assert told in shown.stdout + shown.stderr
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(spent)


def test_a_finished_point_and_a_wrong_value_are_told_soon(deltalab, tmp_path):
    """Against importing torch, 2.7 s where a finished point took .74 and a wrong value 3.5."""
    arguments = ["edit=dare", *FAST]
    assert deltalab(*arguments)[0] == 0
    torch, program = processor_seconds("import torch"), "from deltalab import cli; cli.main()"
    again = [program, *arguments, f"results={tmp_path}"]
    assert processor_seconds(*again, told="done before") < 0.55 * torch
    assert processor_seconds(*again, "edit.p=1.5", told="edit.p=1.5: must be") < 1.45 * torch


def test_a_second_run_skips_and_force_repeats_it_identically(deltalab, tmp_path):
    arguments = ["edit=dare", "edit.p=0.5", *FAST]
    assert deltalab(*arguments)[0] == 0
    (first,) = records_in(tmp_path)
    code, out, _ = deltalab(*arguments)
    assert code == 0
    assert "done before" in out
    assert records_in(tmp_path) == [first]
    assert deltalab(*arguments, "force=true")[0] == 0
    (again,) = records_in(tmp_path)
    volatile = ("seconds", "peak_memory_bytes", "git")
    assert {k: v for k, v in again.items() if k not in volatile} == {
        k: v for k, v in first.items() if k not in volatile
    }


def test_a_sweep_uses_the_grid_of_its_edit_and_axes_replace_it(deltalab, tmp_path):
    code, _, err = deltalab("-m", "edit=expo", "edit.alpha=-1,0,0.3", *FAST)
    assert code == 0, err
    assert sorted(r["edit"]["alpha"] for r in records_in(tmp_path)) == [-1, 0, 0.3]


def test_an_experiment_has_a_name_that_fits_a_file(deltalab, tmp_path):
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    for name in ("x" * 150, "ü" * 60):
        (tmp_path / "own" / "experiment" / f"{name}.yaml").write_text("seed: 41\n")
        code, _, err = deltalab("--config-dir", str(tmp_path / "own"), f"experiment='{name}'")
        assert code == 2
        assert "must be a name of 120 bytes" in err


def test_options_may_be_numbers(deltalab, tmp_path):
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "2024.yaml").write_text("# @package _global_\nseed: 41\n")
    own = ("--config-dir", str(tmp_path / "own"), "experiment=2024", "--cfg", "job")
    code, out, err = deltalab(*own)
    assert code == 0, err
    assert "seed: 41" in out


def test_a_tilde_is_the_home_directory_wherever_output_goes(monkeypatch, tmp_path, capfd):
    """On the code before, results='~/x' made a directory named ~, which no other command found."""
    import deltalab.save as save
    from deltalab import cache
    from deltalab.report import command as report
    from deltalab.sweep import status

    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for given in ("results=~/x", "results='~/x'"):
        arguments = ["edit=keep", "riemann=off", "evaluator=none", "data.objective.limit=8", given]
        monkeypatch.setattr(sys, "argv", ["deltalab", *arguments])
        cli.main()
    assert "done before" in capfd.readouterr().out
    assert report.main(["results=~/x"]) == 0
    assert cache.main(["results=~/x"]) in (0, 2)  # there may be no artefacts, but not there
    assert status.main(["results=~/x"]) == 2
    assert f"no sweep in {tmp_path}/home/x/logs" in capfd.readouterr().err
    save.save(["results=~/x", "out=~/y"])
    assert (tmp_path / "home" / "y" / "deltalab.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home"]
    assert {"records", "logs"} <= {p.name for p in (tmp_path / "home" / "x").iterdir()}


def test_flags_may_stand_anywhere(deltalab, tmp_path):
    code, out, err = deltalab("edit=dare", "-m", "plan=true", "edit.p=0.5", "edit.k=0")
    assert code == 0, err
    assert out.startswith("points       1,")
    code, out, err = deltalab("edit=dare", "--cfg", "job", "--package=edit")
    assert code == 0, err
    assert "k: " in out


def test_plan_prints_the_cost_and_runs_nothing(deltalab, tmp_path):
    code, out, err = deltalab("-m", "edit=dare", "plan=true")
    assert code == 0, err
    assert "45, of which 0 are finished" in out
    assert "1,201,172" in out
    assert "gradient evaluations" in out
    assert "GiB" in out
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (["edit=dare", "sweeps=[{grid: none, edit.p: '0.2,0.4'}]"], 2),
        (["edit=dare", "sweeps=[{edit.p: '0.2,0.4'}]"], 10),
        (["edit=dare", "grid=none", "sweeps=[{grid: dare, edit.p: '0.2,0.4'}]"], 10),
        (["sweeps=[{edit: expo, grid: expo}, {edit: dare, grid: none}]"], 22),
    ],
    ids=str,
)
def test_a_grid_of_sweeps_says_which_axes_it_has(deltalab, arguments, count):
    """On the code before, `grid: none` in `sweeps` was ignored: 10 points instead of 2."""
    code, out, err = deltalab("-m", *arguments, "plan=true")
    assert code == 0, err
    assert out.startswith(f"points       {count},")
    code, out, err = deltalab("-m", "sweeps=[{edit: dare, grid: drae}]", "plan=true")
    assert code == 2
    assert "sweeps=[{grid: drae}]: must be one of" in err


def test_plan_refuses_what_does_not_fit(deltalab, monkeypatch):
    from deltalab.plan import planning

    monkeypatch.setattr(planning, "available", lambda device: 1 << 20)
    code, _, err = deltalab("edit=dare", "plan=true")
    assert code == 2
    assert "needs 0.0 GiB" in err


def test_a_failing_point_is_recorded_and_does_not_stop_the_others(deltalab, tmp_path, monkeypatch):
    from deltalab import run

    real = run.editing.edited

    def picky(pre, post, edit, *others, **more):
        if edit.rank == 3:
            raise ValueError("edit.rank=3: out of luck")
        return real(pre, post, edit, *others, **more)

    monkeypatch.setattr(run.editing, "edited", picky)
    code, out, err = deltalab(
        "-m", "edit=twin", "grid=none", "edit.rate=null", "edit.rank=2,3,4", *FAST
    )
    assert code == 2
    assert "1 of 3 points failed" in err
    assert "edit.rank=3" in err
    assert sum("mnist_vit" in line and "change" in line for line in out.splitlines()) == 2
    found = {r["edit"]["rank"]: r["status"] for r in records_in(tmp_path)}
    assert found == {2: "ok", 3: "error", 4: "ok"}


@pytest.mark.parametrize(
    ("axes", "part"),
    [
        (["edit=dare", "edit.p=0.5,1.5,0.6", "edit.k=0"], "edit.p=1.5"),
        (["edit=dare", "edit.p=0.5", "edit.k=0", "seed=0,1,x"], "seed=x: must be a whole"),
        (["edit=dare", "edit.p=0.5,[]", "edit.k=0"], "edit.p=[]: must be a number"),
        (["edit=keep", "objective.batch_size=250,0"], "objective.batch_size=0"),
        (["edit=keep", "riemann.rule=gauss,cubic"], "cubic"),
        (["edit=keep", "evaluator=accuracy,none", "data.test.limit=8,-1"], "limit=-1"),
        (["edit=keep", "model=timm_vit", "model.name=a", "data.dir=.", "model.pre=a",
          "model.post=b", "model.dtype=float32,int8"], "model.dtype=int8"),
        (["edit=keep", "tracker=none", "select=all,everything"], "select=everything"),
        (["edit=keep", "model.device=cpu,gpu0"], "model.device=gpu0: must be auto, cpu, cuda"),
        (["edit=keep", "seed=0,1", "model.device=cuda:99"], "model.device=cuda:99: "),
        (["edit=keep", "seed=0,1", "hydra/launcher=slurm", "model.device=gpu0"], "device=gpu0"),
        (["sweeps=[{edit: expo, edit.alpha: '0.1'}, {edit: dare, edit.p: '2'}]"], "edit.p=2"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_all_values_of_a_sweep_are_checked_before_its_first_point(deltalab, tmp_path, axes, part):
    """On the code before, the points before the wrong one were run."""
    code, out, err = deltalab("-m", *FAST, *axes)
    assert code == 2
    assert part in err
    assert err.count("\n") == 1
    assert out == ""
    assert not list(tmp_path.iterdir())


LAUNCHERS = {
    "basic": [],
    "workers": ["hydra.launcher.n_jobs=2"],
    "slurm": ["hydra.launcher.cluster=local", "hydra.launcher.tasks=1"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_pair_that_cannot_be_opened_ends_a_sweep_in_one_line(
    deltalab, pair_files, tmp_path, launcher
):
    """On the code before, each of the points opened it again and said so in 400 characters."""
    pre, post = pair_files
    code, out, err = deltalab(
        "-m", "edit=dare", "edit.p=0.1,0.2,0.3,0.4,0.5,0.6", "edit.k=0", "model=timm_vit",
        "model.name=vit_tiny_patch16_224", f"model.pre={pre}", f"model.post={post}", "data.dir=.",
        f"hydra/launcher={launcher}", *LAUNCHERS[launcher],
    )  # fmt: skip
    assert code == 2, err
    assert out == ""
    told = [line for line in err.splitlines() if "points, tasks of job" not in line]
    assert len(told) == 1, err
    assert "'head.bias'" in err
    if launcher != "workers":
        assert err.endswith("; 5 points were not run\n")
        assert [r["status"] for r in records_in(tmp_path)] == ["error"]
    code, out, err = deltalab(
        "-m", "edit=dare", "edit.p=0.1,0.2", "edit.k=0", "model=timm_vit", "data.dir=.",
        "model.name=vit_tiny_patch16_224", "model.pre=nowhere", f"model.post={post}",
    )  # fmt: skip
    assert (code, out) == (2, "")
    assert err.endswith("model.pre=nowhere: no such file or directory; 1 points were not run\n")


def test_an_exception_while_computing_leaves_an_error_record(deltalab, tmp_path, monkeypatch):
    from deltalab.run import point

    def explode(*args, **kwargs):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(point, "measure", explode)
        latest.forget()
        with pytest.raises(RuntimeError, match="out of luck"):
            deltalab("edit=dare", *FAST)
    (record,) = records_in(tmp_path)
    assert record["status"] == "error"
    assert record["error"] == {"type": "RuntimeError", "message": "out of luck"}
    assert deltalab("edit=dare", *FAST)[0] == 0  # an error record does not count as finished
    assert [r["status"] for r in records_in(tmp_path)] == ["ok"]


def test_one_pair_is_opened_once_in_a_sweep(deltalab, monkeypatch):
    from deltalab.models import zoo

    opened = []
    original = zoo.live_pair
    monkeypatch.setattr(zoo, "live_pair", lambda *a: opened.append(1) or original(*a))
    latest.forget()
    code, _, err = deltalab(
        "-m", "edit=keep,discard", "grid=none", "model=mnist_vit,mnist_vit_early", *FAST
    )
    assert code == 0, err
    assert len(opened) == 2


def test_help_and_completion_are_fast(tmp_path):

    def run(*command: str) -> tuple[str, float]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        return shown.stdout, spent

    _, hydra_alone = run(sys.executable, "-c", "import hydra, omegaconf")
    shown, seconds = run(sys.executable, "-m", "deltalab", "--help")
    assert seconds < 4 * hydra_alone, "of the processor; torch alone takes seven times as much"
    assert "deltalab -m experiment=demo" in shown
    for edit in ("dare", "bitdelta", "expo"):
        assert edit in shown
    code = "import sys, deltalab.cli; assert not {'torch', 'timm', 'wandb'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version_lists_and_help_say_what_there_is(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")

    def told(*arguments):
        monkeypatch.setattr(sys, "argv", ["deltalab", *arguments])
        cli.main()
        return capsys.readouterr().out

    from deltalab import __version__

    assert told("--version") == f"deltalab {__version__}\n"
    for group in ("edit", "model", "merge", "experiment", "objective", "budget"):
        lines = told(f"{group}s").splitlines()
        assert [line.split()[0] for line in lines] == conf_options(group)
        assert all(len(line) <= 80 and len(line.split()) > 1 for line in lines), lines
    shown = told("edit=dare", "--help")
    assert shown.startswith("edit=dare")
    assert "p: 0.5  # drop probability" in shown
    assert "force: false         # run a point again although its record exists" in shown


def test_a_word_that_is_no_list_is_told_what_is(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["deltalab", "modelz"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "did you mean models?" in capfd.readouterr().err


def test_all_missing_values_are_named_at_once(deltalab):
    code, _, err = deltalab("model=timm_vit")
    assert code == 2
    assert "data.dir, model.name, model.pre, model.post: missing, a value" in err


def test_a_rank_takes_the_place_of_the_rate(deltalab, tmp_path):
    settings = ["edit=twin", "edit.rank=5", "evaluator=none", "riemann=off", *FAST[1:2]]
    assert deltalab(*settings)[0] == 0
    assert "done before" in deltalab(*settings, "edit.rate=null")[1]
    code, _, err = deltalab(*settings, "edit.rate=0.5")
    assert code == 2
    assert "set one and leave the other null" in err


def conf_options(group):
    return sorted(p.stem for p in (conf_dir() / group).glob("*.yaml"))


@pytest.mark.parametrize("edit", conf_options("edit"))
def test_every_edit_composes(edit):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        compose("config", [f"edit={edit}"])


@pytest.mark.parametrize("scale", conf_options("scale"))
@pytest.mark.parametrize("experiment", conf_options("experiment"))
def test_every_experiment_composes(experiment, scale):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", [f"experiment={experiment}", f"scale={scale}"])
    OmegaConf.to_container(cfg.sweeps, resolve=True)  # every stand-in of the scale exists
