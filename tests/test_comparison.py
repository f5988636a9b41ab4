import json

import pytest
import torch
from scipy import stats

from deltalab.evaluators.scores import Scores
from deltalab.report import command
from deltalab.report.comparison import compare, sign_test
from deltalab.run.point import paired
from deltalab.store import records

POST = [1.0, 1.0, 0.0, 1.0, 0.0, 1.0]
EDITED = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]


def point(key, p):
    return {
        "schema": records.SCHEMA,
        "key": key,
        "status": "ok",
        "error": None,
        "experiment": "mine",
        "model": "tiny",
        "edit": {"name": "dare", "p": p},
        "seed": 0,
        "metrics": {},
    }


@pytest.fixture
def results(tmp_path):
    for key, p, scores in (("a" * 16, 0.1, POST), ("b" * 16, 0.9, EDITED), ("c" * 16, 0.5, None)):
        records.write(tmp_path, point(key, p))
        if scores:
            records.write_documents(tmp_path, key, {"gsm/exact_match": scores})
    return tmp_path


@pytest.mark.parametrize(("up", "down"), [(0, 0), (1, 0), (7, 2), (3, 3), (40, 11)])
def test_the_sign_test_is_the_binomial_test(up, down):
    wanted = stats.binomtest(up, up + down).pvalue if up + down else 1.0
    assert sign_test(up, down) == pytest.approx(wanted, rel=1e-12)


def test_a_comparison_is_that_of_the_differences():
    found = compare({"gsm/exact_match": POST}, {"gsm/exact_match": EDITED})[0]
    differences = [y - x for x, y in zip(POST, EDITED, strict=True)]
    assert found.second - found.first == pytest.approx(sum(differences) / 6)
    assert found.error == pytest.approx(stats.sem(differences))
    assert found.better == (1, 3)


def test_metrics_of_other_documents_are_left_out():
    assert compare({"a/acc": [1.0], "b/acc": [0.0]}, {"a/acc": [1.0, 0.0]}) == []


def test_the_record_has_the_paired_change_of_every_score():
    scores = [Scores({}, {}, {"gsm/exact_match": torch.tensor(s).double()}) for s in (POST, EDITED)]
    found = paired(*scores)
    assert found["gsm/exact_match_change"] == pytest.approx(-2 / 6)
    wanted = compare({"m": POST}, {"m": EDITED})[0].error
    assert found["gsm/exact_match_change_error"] == pytest.approx(wanted)


def test_two_edits_are_compared_by_name_or_key(results, capsys):
    assert command.main([f"results={results}", "compare=dare p=0.1; dare p=0.9"]) == 0
    by_name = capsys.readouterr().out
    assert "| gsm/exact_match | 6 | 0.6667 | 0.3333 | -0.3333 ± 0.3333 | 1 : 3 | 0.62 |" in by_name
    assert command.main([f"results={results}", f"compare={'a' * 16};{'b' * 16}"]) == 0
    assert capsys.readouterr().out == by_name


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("dare p=0.1", "must name two points"),
        ("dare p=0.1;dare p=0.2", "no such point; there are 'dare p=0.1'"),
        ("dare p=0.1;dare p=0.5", "no scores of single documents for 'dare p=0.5'"),
    ],
)
def test_a_mistake_is_one_line(results, capsys, names, said):
    assert command.main([f"results={results}", f"compare={names}"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_several_points_of_one_name_are_told_by_key(results, capsys):
    records.write(results, point("d" * 16, 0.1))
    assert command.main([f"results={results}", "compare=dare p=0.1;dare p=0.9"]) == 2
    err = capsys.readouterr().err
    assert err.count("a" * 16) == err.count("d" * 16) == 1


def test_broken_documents_are_one_line(results, capsys):
    (results / "documents" / f"{'a' * 16}.json").write_text(json.dumps({"gsm/acc": ["x"]}))
    assert command.main([f"results={results}", "compare=dare p=0.1;dare p=0.9"]) == 2
    assert "not readable" in capsys.readouterr().err


def test_a_missing_score_leaves_the_others_paired():
    nan = float("nan")
    before, after = ([1.0, nan, 0.0], [0.0, 1.0, 1.0])
    scores = [Scores({}, {}, {"judge/m": torch.tensor(s).double()}) for s in (before, after)]
    assert paired(*scores)["judge/m_change"] == 0
    nothing = Scores({}, {}, {"judge/m": torch.full((3,), nan).double()})
    assert paired(scores[0], nothing) == {}
