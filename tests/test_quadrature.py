import numpy as np
import pytest

from deltalab.loss.quadrature import RULES, Rule, integral_weights

DEGREE = {  # exact up to this degree, with C nodes
    "left": lambda c: 0,
    "midpoint": lambda c: 1,
    "trapezoid": lambda c: 1,
    "simpson": lambda c: 3,
    "gauss": lambda c: 2 * c - 1,
    "radau": lambda c: 2 * c - 2,
}
CASES = [(n, c) for n in RULES for c in (1, 2, 3, 5, 8, 13) if n != "trapezoid" or c > 1]
CASES = [(n, c) for n, c in CASES if n != "simpson" or (c > 1 and c % 2)]


def integral(rule, function):
    return sum(w * function(t) for t, w in zip(rule.nodes, rule.weights, strict=True))


@pytest.mark.parametrize(("name", "points"), CASES)
def test_weights_sum_to_one_and_nodes_lie_on_the_path(name, points):
    rule = Rule(name, points)
    assert len(rule.nodes) == len(rule.weights) == points
    assert sum(rule.weights) == pytest.approx(1, abs=1e-14)
    assert list(rule.nodes) == sorted(set(rule.nodes))
    assert 0 <= rule.nodes[0] <= rule.nodes[-1] <= 1


@pytest.mark.parametrize(("name", "points"), CASES)
def test_exact_up_to_its_degree_and_not_beyond(name, points):
    rule, degree = Rule(name, points), DEGREE[name](points)
    for power in range(degree + 1):
        assert integral(rule, lambda t, n=power: t**n) == pytest.approx(1 / (power + 1), abs=1e-13)
    # The error on t^(degree+1) of a Gauss rule falls like 16^-points: below rounding from 8 on.
    # A rule on equal distances may be exact by symmetry where its degree is even.
    beyond = degree + 1
    if points < 8 or name not in ("gauss", "radau"):
        assert abs(integral(rule, lambda t: t**beyond) - 1 / (beyond + 1)) > 1e-8


def test_the_papers_rule_and_the_shared_node():
    assert Rule("left", 5).nodes == (0.0, 0.2, 0.4, 0.6, 0.8)
    assert Rule("left", 5).weights == (0.2,) * 5
    for points in range(1, 9):
        assert Rule("radau", points).nodes[0] == 0.0
    assert Rule("radau", 2).nodes[1] == pytest.approx(2 / 3, abs=1e-15)


@pytest.mark.parametrize(
    ("name", "points", "words"),
    [
        ("euler", 5, "riemann.rule=euler"),
        ("left", 0, "riemann.points=0"),
        ("trapezoid", 1, "at least 2"),
        ("simpson", 4, "odd number"),
    ],
)
def test_bad_rules_are_named(name, points, words):
    with pytest.raises(ValueError, match=words):
        Rule(name, points)


def test_interpolatory_weights_integrate_any_interval():
    rng = np.random.default_rng(0)
    nodes = np.sort(rng.uniform(-1, 2, 9))
    coefficients = rng.normal(size=9)
    primitive = np.polynomial.Polynomial(coefficients).integ()
    values = np.polynomial.Polynomial(coefficients)(nodes)
    for low, high in [(0, 2), (0, -1), (0.3, 0.4), (-2, 3)]:
        expected = primitive(high) - primitive(low)
        assert integral_weights(nodes, low, high) @ values == pytest.approx(expected, rel=1e-9)
