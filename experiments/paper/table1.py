"""Table 1: three ways to choose which deltas get k, and what the loss says of each."""

from collections.abc import Sequence

from deltalab.drawing import panels
from deltalab.report.tables import signed
from deltalab.statistics.means import Mean
from deltalab.store.fields import number, plain
from deltalab.store.record import Outcome
from experiments.paper.drawing import curve, reference, zero
from experiments.paper.evidence import Documents, Evidence
from experiments.paper.found import (
    NEAR,
    Found,
    Table,
    above,
    average,
    cell,
    end,
    every,
    grouped,
    kept,
    mean,
    metrics,
    one_pair,
    scored,
)

WAYS = {
    "dare": "at random",
    "biased_sign": "by sign of delta",
    "biased_product": "by sign of product",
}
PAPER = {
    0.5: (76.35, 74.15, 0.0), 0.7: (75.89, 75.36, 0.0), 0.9: (76.19, 76.04, 26.76),
    1.1: (75.89, 75.59, 0.15), 1.3: (75.36, 74.91, 0.0), 1.5: (75.59, 74.83, 0.0),
}  # fmt: skip
"""GSM8K, 5-shot, LLaMA-3-8B-Instruct: k -> the three ways in their order (arXiv 2410.13841)."""

ACCOUNTS = {
    "first_order": "first order",
    "left": "paper's term (left, 5)",
    "adaptive": "accurate term",
}
CAPTION = (
    "Left: score against k for three ways to choose the entries that get k. Right: the third way's"
    " measured loss change and three accounts of it; an account has the wrong sign where it falls"
    " on the other side of 0."
)
By = dict[tuple[str, float], list[Outcome]]


def table(points: Sequence[Outcome], documents: Documents | None = None) -> Found:
    """Check that the first two ways keep the score and the third destroys it."""
    by: By = {
        (edit, number(k) or 0.0): same
        for edit in WAYS
        for (k,), same in grouped([p for p in one_pair(points) if p.edit == edit], "k").items()
    }
    ks = sorted({k for _, k in by})
    scores = scored(points)
    metric = next((name for name in scores if "gsm" in name), scores[0])  # the paper's GSM8K
    post = end(points, "post", metric)
    score = {at: metrics(same, metric) for at, same in by.items()}
    evidence = Evidence(points, documents or {})

    def lost(edit: str) -> list[Mean]:
        return [evidence.score(metric, (1, by[edit, k]), (-1, None), least=NEAR) for k in ks]

    checks = [
        every(edit, f"chosen {WAYS[edit]}: less than {100 * NEAR:.0f} points below post",
              [kept(loss, NEAR) for loss in lost(edit)], kept(average(lost(edit)), NEAR))
        for edit in ("dare", "biased_sign")
    ]  # fmt: skip
    halves = [evidence.score(metric, (0.5, None), (-1, by["biased_product", k])) for k in ks]
    checks.append(every("biased_product", "chosen by sign of product: less than half of post",
                        [above(half) for half in halves], above(average(halves))))  # fmt: skip
    worst = {edit: min((mean(score[edit, k]), k) for k in ks) for edit in WAYS}
    sentence = (
        f"Post scores {100 * post:.1f}; "
        + ", ".join(
            f"{WAYS[e]} it is {100 * s:.1f} at the least (k = {k:g})" for e, (s, k) in worst.items()
        )
        + "."
    )
    return Found(
        sentence=sentence,
        checks=checks,
        notes=[*_signs(by, ks), *evidence.notes],
        show=lambda: (
            [_scores(score, ks, metric), *_terms(by, ks)],
            [("", _figure(by, score, ks, metric, points), CAPTION)],
        ),
    )


def _account(same: Sequence[Outcome], name: str) -> float:
    if name == "change":
        return mean([p.change for p in same if p.change is not None])
    return mean([v for p in same if (v := p.terms[name].value) is not None])


def _signs(by: By, ks: Sequence[float]) -> list[str]:
    """Say whether each account has the measured change's sign in the third column, for k > 1."""
    larger = [k for k in ks if k > 1]
    third = {k: by["biased_product", k] for k in larger}
    if not all(name in p.terms for same in third.values() for p in same for name in ACCOUNTS):
        return []
    wrong = {
        title: sum(_account(third[k], name) * _account(third[k], "change") < 0 for k in larger)
        for name, title in ACCOUNTS.items()
    }
    told = ", ".join(f"{title} {count} of {len(larger)}" for title, count in wrong.items())
    changes = ", ".join(f"{_account(third[k], 'change'):+.3g} (k = {k:g})" for k in larger)
    return [
        f"Third column, k > 1: the loss changes by {changes}. Of the wrong sign are: {told}. The"
        " first-order argument predicts an improvement for every k > 1, as (1 - k) times a positive"
        " number."
    ]


def _scores(score: dict[tuple[str, float], list[float]], ks: Sequence[float], metric: str) -> Table:
    ways = list(WAYS.items())
    columns = ["k", *(title for _, title in ways), *(f"paper, {title}" for _, title in ways)]
    rows = [
        [
            plain(k),
            *(cell(score[edit, k]) for edit, _ in ways),
            *(f"{v:.2f}" for v in PAPER.get(k, ())),
        ]
        for k in ks
    ]
    return Table(f"{metric}, %, beside the paper's GSM8K of LLaMA-3-8B-Instruct", columns, rows)


def _terms(by: By, ks: Sequence[float]) -> list[Table]:
    columns = ["k", *ACCOUNTS.values(), "measured change"]
    return [
        Table(
            f"Loss change, chosen {title}",
            columns,
            [
                [plain(k), *(signed(_account(by[edit, k], a)) for a in (*ACCOUNTS, "change"))]
                for k in ks
            ],
        )
        for edit, title in WAYS.items()
    ]


def _figure(by: By, score, ks, metric, points):  # type: ignore[no-untyped-def]
    drawn, ((left, right),) = panels(1, 2, 8.4, 3.3)
    for index, (edit, title) in enumerate(WAYS.items()):
        curve(left, ks, [score[edit, k] for k in ks], index, title)
    reference(left, {name: end(points, name, metric) for name in ("post", "pre")})
    left.set(xlabel="multiplier k", ylabel=metric)
    left.legend()
    for index, (name, title) in enumerate([*ACCOUNTS.items(), ("change", "measured change")], 3):
        values = [[_account(by["biased_product", k], name)] for k in ks]
        curve(right, ks, values, index, title)
    zero(right)
    right.set_yscale("symlog", linthresh=1e-3)
    right.set(xlabel="multiplier k", ylabel="loss change, nats", title="chosen by sign of product")
    right.legend()
    return drawn
