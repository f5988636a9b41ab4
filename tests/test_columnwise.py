"""The column solver against least squares, and what it must leave alone."""

import numpy as np
import pytest
import torch

from deltalab.linear.columnwise import columnwise, inverse_factor


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def rounded(_: int, column: torch.Tensor) -> torch.Tensor:
    return (4 * column).round() / 4


@pytest.mark.parametrize("scale", [1.0, 0.3, 7e-5, 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gram_of_c_times_the_identity_is_plain_fixing(scale: float, dtype: torch.dtype) -> None:
    weight = drawn(7, 300).to(dtype)
    found = columnwise(weight, scale * torch.eye(300, dtype=dtype), rounded)
    assert torch.equal(found, rounded(0, weight))


@pytest.mark.parametrize("block", [1, 32, 128, 1000])
def test_what_comes_after_is_the_least_squares_answer(block: int) -> None:
    """Columns of S first, all others left as they are: the optimum given the errors on S."""
    inputs, weight, first = drawn(300, 900), drawn(5, 300, seed=1), 100
    inputs[1] += inputs[0]
    gram = inputs @ inputs.T / 900
    found = columnwise(
        weight, gram, lambda j, w: rounded(j, w) if j < first else w, damp=0.0, block=block
    )
    assert torch.equal(found[:, :first], rounded(0, found[:, :first]))
    error = (found - weight)[:, :first] @ inputs[:first]
    wanted = np.linalg.lstsq(inputs[first:].T.numpy(), -error.T.numpy(), rcond=None)[0].T
    assert np.abs((found - weight)[:, first:].numpy() - wanted).max() < 1e-12


def test_an_order_is_a_permutation_of_columns() -> None:
    inputs, weight = drawn(40, 90), drawn(5, 40, seed=1)
    gram, order = inputs @ inputs.T, torch.randperm(40, generator=torch.Generator().manual_seed(2))
    found = columnwise(weight, gram, rounded, order=order)
    apart = columnwise(weight[:, order], gram[order][:, order], rounded)
    assert torch.equal(found[:, order], apart)
    seen: list[int] = []
    columnwise(weight, gram, lambda j, w: seen.append(j) or w, order=order)
    assert seen == order.tolist()


def test_compensation_helps_on_average_and_nothing_changed_is_nothing_moved() -> None:
    inputs, weight = drawn(64, 200), drawn(32, 64, seed=1)
    gram = inputs @ inputs.T / 200 + drawn(64, 64, seed=3).square().mean() * 0.01
    plain, made = rounded(0, weight), columnwise(weight, gram, rounded)
    assert ((made - weight) @ inputs).norm() < 0.95 * ((plain - weight) @ inputs).norm()
    assert torch.equal(columnwise(weight, gram, lambda j, w: w), weight)


def test_an_input_that_is_always_zero_takes_no_part() -> None:
    inputs, weight = drawn(10, 50), drawn(3, 10, seed=1)
    inputs[4] = 0
    found = columnwise(weight, inputs @ inputs.T, rounded)
    assert torch.equal(found[:, 4], rounded(0, weight[:, 4]))
    rest = [j for j in range(10) if j != 4]
    apart = columnwise(weight[:, rest], inputs[rest] @ inputs[rest].T, rounded)
    assert torch.allclose(found[:, rest], apart, atol=1e-12)


def test_mistakes_are_told() -> None:
    weight, few = drawn(3, 10), drawn(10, 4)
    with pytest.raises(ValueError, match=r"a gram of shape \(9, 9\) for a weight \(3, 10\)"):
        columnwise(weight, torch.eye(9), rounded)
    with pytest.raises(ValueError, match="cannot be inverted"):
        columnwise(weight, few @ few.T, rounded, damp=0.0)
    assert columnwise(weight, few @ few.T, rounded).isfinite().all()
    with pytest.raises(ValueError, match="NaN"):
        inverse_factor(torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match="each of the 10 columns once"):
        columnwise(weight, torch.eye(10), rounded, order=torch.zeros(10, dtype=torch.long))
