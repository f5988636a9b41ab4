import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from deltalab.loss.objectives import Classification, Measured, change, interval, measure
from deltalab.weights.mapping import ModelPair


@dataclass(frozen=True)
class Points:
    """Random points with labels 0..classes-1, served like an image source."""

    count: int = 50
    classes: int = 3
    first: int = 0
    nan_at: int | None = None

    def open(self, transform, batch_size):
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(self.count, 4, generator=draw)
        y = self.first + torch.randint(self.classes, (self.count,), generator=draw)
        if self.nan_at is not None:
            x[self.nan_at] = math.nan
        return [
            (x[i : i + batch_size], y[i : i + batch_size]) for i in range(0, len(y), batch_size)
        ]


def pair(outputs=3, dtype=torch.float64):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, outputs)).to(dtype)
    weights = {k: v.clone() for k, v in module.state_dict().items()}
    return ModelPair(pre=weights, post=weights, module=module)


def test_mean_is_the_dense_cross_entropy_however_it_is_batched():
    p = pair()
    x, y = Points().open(None, 50)[0]
    with torch.no_grad():
        expected = nn.functional.cross_entropy(p.module[1](x.double()), y).item()
    for batch_size in (1, 7, 50, 256):
        measured = measure(p.module, Classification(Points(), batch_size).open(p))
        assert measured.mean == pytest.approx(expected, abs=1e-14)
        assert measured.losses.dtype == torch.float64
        assert len(measured.losses) == 50


def test_measuring_uses_eval_mode_and_leaves_the_modes_alone():
    p = pair()
    p.module.train()
    p.module[0].eval()
    loss = Classification(Points(), 16).open(p)
    assert torch.equal(measure(p.module, loss).losses, measure(p.module, loss).losses)
    assert (p.module.training, p.module[0].training, p.module[1].training) == (True, False, True)
    p.module[0].train()
    assert torch.equal(measure(p.module, loss).losses, measure(p.module.eval(), loss).losses)


def test_limit_takes_the_first_examples_across_batches():
    p = pair()
    whole = measure(p.module, Classification(Points(), 16).open(p)).losses
    for limit in (1, 16, 20, 50, 99):
        part = measure(p.module, Classification(Points(), 16, limit).open(p)).losses
        assert torch.equal(part, whole[:limit])


def test_low_precision_modules_give_float32_losses():
    p = pair(dtype=torch.bfloat16)
    loss = Classification(Points(), 16).open(p)
    values, _ = loss(p.module.eval(), loss.batches[0])
    assert values.dtype == torch.float32


def test_consecutive_opens_share_the_batches():
    p = pair()
    assert Classification(Points(), 16).open(p) is Classification(Points(), 16).open(p)


@pytest.mark.parametrize(
    ("data", "outputs", "words"),
    [
        (Points(count=0), 3, "no images"),
        (Points(nan_at=21), 3, "loss of example 21 is nan"),
        (Points(classes=5), 3, "label 4 .* outputs 0 to 2"),
        (Points(first=-1), 3, "label -1"),
    ],
)
def test_bad_data_is_one_clear_error(data, outputs, words):
    p = pair(outputs)
    with pytest.raises(ValueError, match=words):
        measure(p.module, Classification(data, 16).open(p))


@pytest.mark.parametrize("setting", [{"batch_size": 0}, {"limit": 0}])
def test_bad_settings_are_named(setting):
    with pytest.raises(ValueError, match=f"objective.{next(iter(setting))}=0"):
        Classification(Points(), **setting)


def test_the_error_is_the_paired_one_for_equal_weights():
    torch.manual_seed(1)
    base, step, ones = torch.randn(40).double() * 100, torch.randn(40).double(), torch.ones(40)
    value, error = change(
        Measured(base, ones.double()), Measured(base + step, ones.double())
    )  # the examples' own spread, 100 times larger, cancels
    assert value == pytest.approx(step.mean().item(), abs=1e-12)
    assert error == pytest.approx(step.std().item() / math.sqrt(40), rel=1e-10)


def test_the_error_of_a_ratio_of_sums_matches_resampling():
    torch.manual_seed(2)
    weights = torch.randint(1, 30, (400,)).double()
    step = 0.1 * weights + torch.randn(400).double() * weights.sqrt()
    value, error = change(Measured(0 * step, weights), Measured(step, weights))
    assert value == pytest.approx((step.sum() / weights.sum()).item())
    picks = torch.randint(400, (4000, 400))
    resampled = step[picks].sum(1) / weights[picks].sum(1)
    assert error == pytest.approx(resampled.std().item(), rel=0.06)


def test_the_bootstrap_interval_is_two_errors_wide_for_many_normal_examples():
    torch.manual_seed(3)
    ones = torch.ones(500).double()
    post, edited = Measured(0 * ones, ones), Measured(torch.randn(500).double() + 0.3, ones)
    value, error = change(post, edited)
    low, high = interval(post, edited)
    assert (low + high) / 2 == pytest.approx(value, abs=0.2 * error)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.08)
    assert interval(post, edited) == (low, high)
    narrow = interval(post, edited, level=0.5)
    assert narrow[1] - narrow[0] == pytest.approx(2 * 0.674 * error, rel=0.12)


def test_change_needs_the_same_examples_and_more_than_one():
    one = torch.ones(3).double()
    with pytest.raises(ValueError, match="same examples"):
        change(Measured(one, one), Measured(one, 2 * one))
    assert change(Measured(one[:1], one[:1]), Measured(2 * one[:1], one[:1])) == (1.0, math.inf)
