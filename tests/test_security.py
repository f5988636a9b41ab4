"""Every statement of SECURITY.md names the tests that hold it, and those are there."""

import ast
import re
import socket
import sys
from functools import cache
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "SECURITY.md"
LEFT_TO_YOU = "not held: what is left to you"


def statements():
    """Return all bullets, each with what its comment names."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.split(r"^\* ", text, flags=re.MULTILINE)[1:]
    return [re.split(r"\n(?=\S)", bullet)[0] for bullet in found]


@cache
def functions_of(file):
    tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def held(statement):
    """Return the tests that a statement names, or None where it is left to the reader."""
    comments = re.findall(r"<!--(.*?)-->", statement, flags=re.DOTALL)
    assert len(comments) == 1, f"one comment with tests: {statement[:60]}"
    return None if comments[0].strip() == LEFT_TO_YOU else comments[0].split()


def test_the_page_has_all_its_statements():
    headings = re.findall(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {"A checkpoint", "A config", "A task file of lm-eval", "A record", "A judge"} <= {
        *headings
    }
    assert len(statements()) >= 25


def name(statement):
    return " ".join(re.sub(r"<!--.*?-->|\*", "", statement, flags=re.DOTALL).split())[:60]


@pytest.mark.parametrize("statement", statements(), ids=name)
def test_every_statement_is_held_by_tests_that_exist(statement):
    named = held(statement)
    if named is None:
        return
    assert named
    for one in named:
        file, _, function = one.partition("::")
        assert function in functions_of(file), one


@pytest.mark.parametrize(
    "argument", ["pretrained", "checkpoint_path", "pretrained_cfg_overlay", "cache_dir"]
)
def test_arguments_of_an_architecture_name_no_weights(argument):
    from deltalab.models.timm_vit import TimmPair

    with pytest.raises(ValueError, match=f"model.args.{argument}: weights come from model.pre"):
        TimmPair("vit_tiny_patch16_224", "a", "b", {argument: "x"})


@pytest.mark.parametrize(
    "experiment",
    ["../../etc/passwd", "/etc/passwd", "a/../../b", "~root", "x" * 300, "ü" * 200, ""],
)
def test_names_of_experiments_stay_in_their_directory(experiment, tmp_path):
    from deltalab.store.shown import stem

    file = tmp_path / f"{stem(experiment)}_accuracy.svg"
    assert file.resolve().parent == tmp_path.resolve()
    file.write_text("")


def test_a_local_point_opens_no_connection(tmp_path, monkeypatch):
    from deltalab import cli

    def refuse(*_, **__):
        raise AssertionError("a connection was opened")

    for where, what in ((socket.socket, "connect"), (socket, "create_connection"),
                        (socket, "getaddrinfo")):  # fmt: skip
        monkeypatch.setattr(where, what, refuse)
    point = ["edit=keep", "riemann=off", "data.objective.limit=8", "data.test.limit=8"]
    monkeypatch.setattr(sys, "argv", ["deltalab", *point, f"results={tmp_path}"])
    cli.main()
    assert list((tmp_path / "records").glob("*.json"))
