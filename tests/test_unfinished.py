"""A point that is killed goes on where it was, and leaves nothing when it is done."""

import os
import signal
from pathlib import Path

import pytest
import torch

from deltalab.store import latest, unfinished

pytest.importorskip("lm_eval")


@pytest.fixture
def settings():
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from deltalab.settings import conf_dir

    chosen = ["model=tiny_llm", "edit=drop_only", "edit.p=0.5", "riemann=off", "objective.limit=2"]
    chosen += ["evaluator.limit=12", "evaluator.batch_size=2"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return OmegaConf.to_container(compose("config", chosen), resolve=True)


def ran(settings, place, most=None):
    """Run a point, which kills this process after so many tokens of its own evaluation.

    Returns:
        Its metrics, and the tokens of its own evaluation.
    """
    from deltalab.evaluators import lm_eval
    from deltalab.inference.passes import Passes
    from deltalab.keys import Choices
    from deltalab.run import run

    latest.forget()
    once, opened = Passes.__call__, lm_eval.LmEval.open
    tokens, scored = [0], [0]

    def counted(self, ids, *more):
        tokens[0] += ids.numel()
        if most is not None and scored[0] == 3 and tokens[0] > most:
            os.kill(os.getpid(), signal.SIGKILL)
        return once(self, ids, *more)

    def opens(self, pair):
        score = opened(self, pair)

        def told(module):
            scored[0] += 1
            tokens[0] = 0
            return score(module)

        return told

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Passes, "__call__", counted)
        patch.setattr(lm_eval.LmEval, "open", opens)
        where = {"results": str(place), "artifacts": str(place / "artifacts")}
        record, _ = run({**settings, **where}, Choices("tiny_llm", "drop_only", "answers"))
    assert scored[0] == 3  # post, pre and the point
    return record["metrics"], tokens[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_point_killed_at_ninety_percent_costs_one_batch(settings, tmp_path):
    metrics, whole = ran(settings, tmp_path / "whole")
    assert not (tmp_path / "whole" / "unfinished").exists()
    place, stop = tmp_path / "killed", int(0.9 * whole)
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)  # the threads of before are not in this process
            ran(settings, place, stop)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    kept = list((place / "unfinished").rglob("*.jsonl"))
    assert len(kept) == 3
    own = max(kept, key=lambda path: path.stat().st_mtime_ns)
    with open(own, "ab") as file:
        file.write(b'["cut sho')  # as a kill within a write leaves it
    again, rest = ran(settings, place)
    assert again == pytest.approx(metrics, rel=1e-5)
    batch = 2 * 150  # of the longest rows
    assert 0 < rest <= whole - stop + batch
    assert not (place / "unfinished").exists()


def test_lines_cut_short_are_none_and_those_after_them_whole(tmp_path):
    path = tmp_path / "a.jsonl"
    unfinished.Lines(path).add({"x": [1.25, True], "y": "text"})
    path.write_bytes(path.read_bytes()[:-3])
    lines = unfinished.Lines(path)
    assert lines.found == {"x": [1.25, True]}
    lines.add({"z": 3})
    assert unfinished.Lines(path).found == {"x": [1.25, True], "z": 3}


def test_lines_belong_to_a_point_and_go_when_it_is_done(tmp_path):
    assert unfinished.lines(lambda: pytest.fail("nobody keeps anything")) is None

    def fails():
        with unfinished.point(tmp_path, "k"):
            unfinished.lines(lambda: "w").add({"x": 1})
            raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        fails()
    with unfinished.point(tmp_path, "other"):
        assert unfinished.lines(lambda: "w").get("x") is None
    with unfinished.point(tmp_path, "k"):
        assert unfinished.lines(lambda: "v").get("x") is None
        assert unfinished.lines(lambda: "w").get("x") == 1
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_known_all_the_same(tmp_path):
    Path(tmp_path / "file").write_text("")
    lines = unfinished.Lines(tmp_path / "file" / "a.jsonl")
    lines.add({"x": 1})
    assert lines.get("x") == 1
