"""The paper's artefacts: their checks judge as they should, and what is committed is theirs."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deltalab.settings import conf_dir
from deltalab.store import reading
from deltalab.store.record import Outcome
from deltalab.store.terms import Term
from experiments.paper import (
    alpha,
    bits,
    committed,
    curves,
    expo,
    intensity,
    log,
    parts,
    recompute,
    rules,
    table1,
)
from experiments.paper.artefacts import ARTEFACTS
from experiments.paper.found import Check, deciding, told, verdict

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
RUN = [name for name, artefact in ARTEFACTS.items() if not artefact.sources]
"""Those with points of their own."""
GSM = "gsm/exact_match_strict"
ENDS = {"post": {GSM: 0.9}, "pre": {GSM: 0.1}}
COUNT = 3000


def point(edit, score=0.9, seed=0, change=0.1, terms=(), **settings):
    found = {name: Term(name, 5, value, {"mlp": value}) for name, value in dict(terms).items()}
    metrics = {GSM: score, f"{GSM}_error": 0.005}
    return Outcome("m", edit, settings, experiment="fig", key=f"{edit}{settings}{seed}", seed=seed,
                   metrics=metrics,
                   reference=ENDS, change=change, error=0.001, terms=found, unit="nats per token",
                   gradient_evaluations=3)  # fmt: skip


def documents(points):
    """So many documents of every point, the first of them right: what is lost are post's last."""

    def right(score):
        return np.arange(COUNT) < round(score * COUNT)

    return {p.key: {GSM: right(p.metrics[GSM]), f"{GSM}@post": right(0.9)} for p in points}


def judged(find, points):
    return find(points, documents(points)).verdict


def grid(score):
    return [
        point("dare", score(p, k), seed, p=p, k=k)
        for p in (0.1, 0.3, 0.5, 0.9)
        for k in (-1, 0, 0.8)
        for seed in (0, 1, 2)
    ]


@pytest.mark.parametrize(
    ("score", "wanted"),
    [
        (lambda p, k: 0.9, "agrees"),
        (lambda p, k: 0.95, "agrees"),  # a gain is no loss
        (lambda p, k: 0.9 if p <= 0.3 else 0.0, "agrees"),  # only small p is claimed
        (lambda p, k: 0.9 if k >= 0 else 0.0, "disagrees"),
        (lambda p, k: 0.85 if (p, k) == (0.1, 0) else 0.9, "partly"),
        (lambda p, k: 0.88, "undecided"),  # the margin itself
        (lambda p, k: 0.5, "disagrees"),
    ],
)
def test_curves_of_text_are_judged_at_small_p(score, wanted):
    points = grid(score)
    assert judged(curves.text, points) == wanted
    assert len(curves.text(points).tables[0].rows) == 4


def test_curves_of_images_are_judged_everywhere():
    assert judged(curves.images, grid(lambda p, k: 0.9)) == "agrees"
    assert judged(curves.images, grid(lambda p, k: 0.9 if p < 0.9 else 0.5)) == "disagrees"


def test_notes_say_what_the_table_says():
    """A score above post's by more than the margin is not "never near" it."""
    found = curves.text(grid(lambda p, k: 0.95 if p < 0.5 else 0.8))
    assert "has lost no more than 2 points in the mean up to p = 0.3" in found.notes[0]
    found = curves.text(grid(lambda p, k: 0.8))
    assert "not even at p = 0.1" in found.notes[0]


def table1_points(product):
    for k in (0.5, 1.5):
        for edit, score, change in (("dare", 0.9, 0.0), ("biased_sign", 0.9, 0.01),
                                    ("biased_product", product, 2.0)):  # fmt: skip
            terms = {"first_order": 1 - k, "left": 1.0, "adaptive": 1.9}
            yield point(edit, score, 0, change, terms, k=k)


def test_table1_sees_the_sign_of_the_first_order_account():
    points = list(table1_points(0.0))
    found = table1.table(points, documents(points))
    assert found.verdict == "agrees"
    assert "first order 1 of 1" in found.notes[0]
    assert "paper's term (left, 5) 0 of 1" in found.notes[0]
    assert found.tables[0].rows[0][1:] == ["90.0", "90.0", "0.0", "76.35", "74.15", "0.00"]


def test_a_claim_of_which_one_part_never_holds_is_not_partly_so():
    """Table 1 here: two columns as claimed, the third in none of its cells."""
    points = list(table1_points(0.7))
    found = table1.table(points, documents(points))
    assert [c.verdict for c in found.checks] == ["agrees", "agrees", "disagrees"]
    assert found.verdict == "disagrees"
    assert "shown in 0 of 2, not so in 2" in told(deciding(found.checks))


def terms_of(small):
    points = []
    for p in (0.1, 0.5, 0.9):
        points.append(point("dare", terms={"left": small * p, "gauss": small * p}, p=p, k=0))
        points.append(point("drop_only", terms={"left": p, "gauss": p}, p=p))
        points.append(point("ties", terms={"left": p / 2, "gauss": p / 2}, keep=round(1 - p, 6)))
    points += [point(edit, terms={"left": 0.2, "gauss": 0.2}) for edit in ("bitdelta", "twin")]
    return points


def test_the_order_of_terms():
    assert parts.terms(terms_of(0.01)).verdict == "agrees"
    assert parts.terms(terms_of(0.5)).verdict == "disagrees"
    assert "DARE's +0.4500 at p = 0.9 is not below Twin" in parts.terms(terms_of(0.5)).notes[0]


def test_a_fifth_of_an_error_is_no_fall():
    """Fig. 3's TIES: +3.0e-06 to -1.3e-05 nats at an error of 3.3e-05, then up to .4."""
    points = terms_of(0.01)
    keep = next(i for i, p in enumerate(points) if p.edit == "ties")
    points[keep] = replace(points[keep], terms={r: Term(r, 5, 0.2503) for r in ("left", "gauss")})
    assert parts.terms(points).verdict == "agrees"
    points[keep] = replace(points[keep], terms={r: Term(r, 5, 0.27) for r in ("left", "gauss")})
    grows = next(c for c in parts.terms(points).checks if c.name == "grows")
    assert grows.verdict == "disagrees"


def test_bits_and_statistics():
    back = [point("multibit", 0.5 if b < 4 else 0.9, bits=b) for b in range(6)]
    assert judged(bits.blocks, back) == "agrees"
    assert judged(bits.blocks, [point("multibit", 0.5, bits=b) for b in range(6)]) == "disagrees"
    same = [point("multibit", 0.9, bits=b) for b in range(6)]
    assert judged(bits.blocks, same) == "disagrees", "bits that change nothing bring nothing back"
    peak = [
        point("bitdelta", 0.9 - abs(c - 1) / 2, multiple=c, magnitudes=kind)
        for c in (0.5, 1.0, 2.0)
        for kind in ("mean", "normal", "uniform")
    ]
    assert judged(bits.statistic, peak) == "agrees"


def test_expo_falls_and_rises():
    def along(curve):
        return [
            point("expo", 0.9, 0, curve(a / 10), {"left": curve(a / 10), "gauss": curve(a / 10)},
                  alpha=a / 10)
            for a in (*range(7), 10, 20)
        ]  # fmt: skip

    assert expo.expo_term(along(lambda a: a * (a - 0.5))).verdict == "agrees"
    assert expo.expo_term(along(lambda a: a * (a - 1.5))).verdict == "disagrees"
    assert expo.expo_term(along(lambda a: a + 0.1)).verdict == "disagrees"


def test_the_better_direction():
    up = [point("expo", 0.9 + 0.05 * a, alpha=a) for a in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    found = alpha.gains(up, documents(up))
    assert "extrapolation +5.0" in found.sentence
    assert found.tables[0].rows[0][4:] == ["-2.5 at -0.5", "+5.0 at 1"]
    assert [c.verdict for c in found.checks] == ["agrees", "disagrees"], "one task cannot depend"


def test_a_loss_alone_is_no_gain():
    losses = [
        replace(point("expo", alpha=a), metrics={GSM: 0.9, "gsm/nats": 1 - (a == -0.5)},
                reference={n: {GSM: 0.9, "gsm/nats": 1.0} for n in ("pre", "post")})
        for a in (-1.0, -0.5, 0.0, 0.5, 1.0)
    ]  # fmt: skip
    assert not alpha.gains(losses).checks[0].held


def test_intensity_compares_what_has_the_same():
    points = [point("noise", change=s**2, sigma=s) for s in (0.5, 1.0, 2.0)]
    points += [point("dare", change=2.0 * p / (1 - p), p=p, k=0) for p in (0.3, 0.5, 0.7)]
    points += [point("sign_flip", change=4.0 * f, fraction=f, balanced=False) for f in (0.1, 0.2)]
    row = intensity.intensity(points).tables[0].rows[0]
    assert row[3] == "2.00"  # DARE was made twice as harmful as noise of its intensity


def test_rules_are_compared_on_the_same_points():
    nodes = [("left", 5, 0.12), ("gauss", 2, 0.11), ("gauss", 3, 0.1), ("radau", 3, 0.1)]
    points = [
        replace(point("twin", change=0.1), terms={rule: Term(rule, count, value)})
        for rule, count, value in nodes
    ]
    found = rules.rules([*points, point("twin", change=0.1, terms={"adaptive": 0.1001})])
    assert "(left, 5) 20 %" in found.sentence
    assert "Gauss nodes 10 %" in found.sentence


def test_verdicts():
    checks = [Check(v, "", v, 0, 0, 1) for v in ("agrees", "undecided", "partly", "disagrees")]
    for count, wanted in enumerate(checks, 1):
        assert verdict(checks[:count]) == wanted.verdict
    assert deciding([checks[0], checks[3], checks[2]]) is checks[3]


def test_evidence_says_what_it_rests_on():
    points = grid(lambda p, k: 0.9)
    paired = [
        replace(p, metrics={**p.metrics, f"{GSM}_change": 0.0, f"{GSM}_change_error": 0.001})
        for p in points
    ]
    for own, known, words in (
        (points, documents(points), "document by document"),
        (paired, None, "the records' paired ones"),
        (points, None, "scores on documents of their own"),
    ):
        notes = curves.text(own, known).notes
        assert sum(words in note for note in notes) == 1
        assert (
            sum(("ocument" in note and "rrors" in note) or "paired," in note for note in notes) == 1
        )


def test_every_artefact_has_an_experiment_that_says_what_it_is():
    for name in RUN:
        artefact = ARTEFACTS[name]
        head = (conf_dir() / "experiment" / f"{name}.yaml").read_text()
        scale = ["SCALE=paper"] if artefact.paper_scale else []
        for word in ("Claim: |Question: ", f"make {name} ", *scale, "Cost: ", "Expected: "):
            assert re.search(word, head), (name, word)


@pytest.mark.parametrize("name", RUN)
def test_every_artefact_is_committed_with_its_numbers(name):
    folder = RESULTS / ARTEFACTS[name].folder
    card = json.loads((folder / f"{name}.json").read_text())
    points = reading.lines(folder / card["lines"])
    assert card["points"] == len(points) > 5
    assert {point.experiment for point in points} == {name}
    head = (conf_dir() / "experiment" / f"{name}.yaml").read_text()
    terms = 'riemann: "off"' not in head
    assert all(p.change is not None and (p.data or p.merge) for p in points)
    assert not terms or all(p.terms for p in points)
    for figure in card["figures"]:
        for kind in ("file", "png"):
            assert (folder / figure[kind]).stat().st_size > 1000
    assert card["verdict"] in ("agrees", "undecided", "partly", "disagrees", "finding")
    assert ARTEFACTS[name].claim == card["claim"]


@pytest.mark.parametrize("name", [n for n in ARTEFACTS if n != "rules"])
def test_every_verdict_is_what_the_checks_say_of_the_committed_points(name, tmp_path):
    """Without a model: `python -m experiments.paper NAME from=committed` writes the same cards."""
    folder = ARTEFACTS[name].folder
    (tmp_path / folder).mkdir()
    for each in (name, *ARTEFACTS[name].sources):
        for kept in (RESULTS / folder).glob(f"{each}*.json*"):
            (tmp_path / folder / kept.name).write_bytes(kept.read_bytes())
    path, _ = committed.judge(name, tmp_path)
    assert json.loads(path.read_text()) == json.loads(
        (RESULTS / folder / f"{name}.json").read_text()
    )


@pytest.mark.parametrize("name", [n for n in ARTEFACTS if n not in RUN])
def test_a_study_of_others_points_counts_each_once_and_knows_posts_scores(name):
    card = json.loads((RESULTS / ARTEFACTS[name].folder / f"{name}.json").read_text())
    points = committed.gather(name, RESULTS)
    assert card["points"] == len(points) == len({p.key for p in points})
    assert card["lines"] is None
    assert all(p.reference["post"] for p in points if p.metrics)


LACKS = {
    "fig3": "scores of pre or parts of the model",
    "fig7": "3 numbers of tables",
    "fig13": "6 numbers of tables",
    "rules": "rules: the points do not tell how many nodes their terms have",
}
"""What was committed before points told it: standard errors of post's scores, parts, nodes."""


@pytest.mark.parametrize("name", ARTEFACTS)
def test_every_number_of_a_card_comes_from_committed_points(name):
    """As `make recompute` says: no other artefact lacks anything, and none differs."""
    found = recompute.recomputed(name, RESULTS)
    assert found.differs == ()
    assert found.lacks == LACKS.get(name, "")
    assert found.numbers > 10 or name in ("fig3", "rules")


def test_the_pages_tables_are_those_of_cards_and_reports():
    assert recompute.pages(RESULTS) == []


def test_a_changed_number_or_word_is_found(tmp_path):
    """Of a table by a few units of its last place; of what judging writes by any letter."""
    for kind in ("json", "jsonl"):
        (tmp_path / "paper").mkdir(exist_ok=True)
        kept = (RESULTS / "paper" / f"fig2.{kind}").read_text()
        (tmp_path / "paper" / f"fig2.{kind}").write_text(kept)
    card = tmp_path / "paper" / "fig2.json"
    told = card.read_text()
    assert not recompute.recomputed("fig2", tmp_path).differs
    card.write_text(told.replace("points below post", "points under post", 1))
    assert "verdict, sentence" in recompute.recomputed("fig2", tmp_path).differs[0]
    held = json.loads(told)
    row = held["tables"][1]["rows"][0]
    row[1] = re.sub(r"[\d.]+", lambda m: f"{float(m[0]) - 0.3:.1f}", row[1], count=1)
    card.write_text(json.dumps(held, indent=1, ensure_ascii=False) + "\n")
    assert row[1] in recompute.recomputed("fig2", tmp_path).differs[0]


def test_all_cards_lie_where_the_page_looks():
    assert {artefact.folder for artefact in ARTEFACTS.values()} == set(reading.CARDS)


def test_points_that_lack_what_a_check_needs_are_left_as_they_are():
    with pytest.raises(ValueError, match="how many nodes"):
        committed.judge("rules", RESULTS)


def test_the_page_claims_no_order_that_the_terms_do_not_have():
    """Fig. 3: DARE's term at p = .9 lies above Twin's; a sentence once said otherwise."""
    notes = " ".join(json.loads((RESULTS / "paper" / "fig3.json").read_text())["notes"])
    page = " ".join((RESULTS / "README.md").read_text().split())
    assert "is not below Twin" in notes
    assert "does not order all methods so" in page
    assert "orders the methods as the paper says" not in page


def test_the_log_is_what_the_cards_say():
    page = (RESULTS / "README.md").read_text()
    assert log.with_table(page, log.cards(RESULTS)) == page


def test_fig4_comes_out_as_committed(tmp_path):
    """The whole way of one artefact, on one of its models: sweep, records, verdict, numbers."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in (
        ["-m", "deltalab", "-m", "experiment=fig4", "model=tiny_llm", f"results={tmp_path}"],
        ["-m", "experiments.paper", "fig4", f"results={tmp_path}"],
    ):
        subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)
    made, kept = (json.loads((d / "paper" / "fig4.json").read_text()) for d in (tmp_path, RESULTS))
    assert [t["columns"] for t in made["tables"][:2]] == [t["columns"] for t in kept["tables"][:2]]
    all_points = committed.points(RESULTS / "paper" / "fig4.jsonl", committed.ends(kept))
    of_model = [p for p in all_points if p.pair == "tiny_llm"]
    assert made["verdict"] == ARTEFACTS["fig4"].find(of_model, None).verdict
    made, kept = (numbers(d / "paper" / "fig4.jsonl") for d in (tmp_path, RESULTS))
    kept = {at: values for at, values in kept.items() if at[0] == "tiny_llm"}
    assert len(kept) == 6
    assert made.keys() == kept.keys()
    for at, (changes, score) in kept.items():
        assert made[at][0] == pytest.approx(changes, rel=1e-2, abs=1e-5), at
        assert made[at][1] == pytest.approx(score, abs=0.02), at  # another processor, another digit


def numbers(path):
    """Return change, term and score of every point of a summary, by what the point is."""
    return {
        (p.pair, p.label): (
            [p.change, p.terms["adaptive"].value],
            p.metrics["tiny_gsm/exact_match_strict"],
        )
        for p in reading.lines(path)
    }
