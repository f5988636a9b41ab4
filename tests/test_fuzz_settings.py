"""Every setting of every option replaced by something wrong: a clear refusal or a valid value."""

import copy
import json
from functools import lru_cache

from fuzzing import times
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from deltalab import cli, settings
from deltalab.run import building
from deltalab.store import reading
from deltalab.terminal import console

DECLARED = (ValueError, FileNotFoundError)
TARGETS = ["os.system", "subprocess.run", "builtins.eval", "deltalab.run.subprocess.run",
           "deltalab.run.building.build", "deltalab", "", "deltalab.edits.keep.Keep",
           "deltalab.zoo.os.system"]  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just([]),
    st.just({}), st.lists(st.integers(-2, 2), max_size=2), st.just({"a": 1}),
    st.sampled_from(["-1", "nan", "1e999", "../..", "a\0b", "os.system", [[]], [{}], [None]]),
    st.sampled_from(TARGETS).map(lambda target: {"_target_": target}),
)  # fmt: skip
GROUPS = ("edit", "riemann", "objective", "evaluator", "tracker", "model", "data")


@lru_cache
def primary():
    with initialize_config_dir(str(cli.conf_dir()), version_base="1.3"):
        return compose("config")


@lru_cache
def composed(group, option):
    """Return the settings of one option, as text, with what it refers to filled in."""
    cfg = copy.deepcopy(primary())
    OmegaConf.set_struct(cfg, False)
    node = OmegaConf.load(cli.conf_dir() / group / f"{option}.yaml")
    node.pop("defaults", None)
    text = OmegaConf.to_yaml(node).replace("???", "given")
    cfg[group] = OmegaConf.create(text)
    chosen = cfg["data"].get("test") or cfg["data"]["objective"] if group == "data" else cfg[group]
    return json.dumps(OmegaConf.to_container(chosen, resolve=True))


OPTIONS = [
    (group, path.stem)
    for group in GROUPS
    if (cli.conf_dir() / group).is_dir()
    for path in sorted((cli.conf_dir() / group).glob("*.yaml"))
]


def leaves(node, where=()):
    """Yield the place of every value in nested containers."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, (*where, key))
    elif where:
        yield where


@times(16)
@given(chosen=st.sampled_from(OPTIONS), data=st.data())
def test_no_setting_crashes(chosen, data):
    group, option = chosen
    node = json.loads(composed(group, option))
    node.pop("select", None)
    places = list(leaves(node))
    if not places:
        return
    for _ in range(data.draw(st.integers(1, 2))):
        *way, last = data.draw(st.sampled_from(places))
        at = node
        for key in way:
            at = at.get(key) if isinstance(at, dict) else None
        if isinstance(at, dict):
            if data.draw(st.integers(0, 9)) == 0:
                last = data.draw(st.sampled_from(["_partial_", "_args_", "pp", last]))
            at[last] = data.draw(LEAVES)
    refusal = None
    try:
        built = building.build(node, group)
    except DECLARED as error:
        refusal = console.one_line(error)
    if refusal is None:
        assert built is None or type(built).__module__.startswith("deltalab.")
    else:
        assert "\n" not in refusal
        assert "Traceback" not in refusal
        assert "__init__" not in refusal, "a user knows settings, not constructors"


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["schema", "status", "edit", "model", "name", "term", "terms", "loss",
                             "metrics", "reference", "pre", "by_part", "points", "seed", "x"]),
            inner, max_size=5,
        ),
    ),
    max_leaves=20,
)  # fmt: skip


@times(8)
@given(record=JSON, status=st.sampled_from(["ok", "error", "?"]))
def test_no_record_crashes_the_reader(record, status):
    if isinstance(record, dict):
        record = {"status": status, "model": "m", **record}
        record["edit"] = {"name": "e"} if status == "ok" else record.get("edit")
    try:
        reading.parse(record)
    except ValueError as error:
        assert str(error)  # noqa: PT017


@times(8)
@given(message=st.text(max_size=200), known=st.lists(st.text(max_size=9), max_size=4))
def test_suggestions_never_fail(message, known):
    assert isinstance(settings.suggestion(message, known), str)
    settings.suggestion(f"Could not find 'edit/{message}'. Available options in 'edit': x", known)
    settings.suggestion(f"Could not override '{message}'.", known)
