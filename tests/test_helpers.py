"""The comparison of gradients in `tests/helpers.py`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from model.adapter_modules import SimpleAdapter
from tests.helpers import Batch, assert_gradients_agree, gradients_by_sides, random_batch, recorded_sides, same_sides


def adapter_at_a_kink(pre_activation: float) -> SimpleAdapter:
    """An adapter that gives an input of ones this first pre-activation, and others far from 0."""
    torch.manual_seed(0)
    adapter = SimpleAdapter(8)
    with torch.no_grad():
        adapter.fc1.weight.fill_(0.5)
        adapter.fc1.weight[0] = 0.0
        adapter.fc1.weight[0, 0] = pre_activation
    return adapter


def loss_of(model: SimpleAdapter, batch: Batch) -> Tensor:
    return model(torch.ones(1, 8, dtype=batch.images.dtype)).sum()


def off_in_single_precision(model: SimpleAdapter, batch: Batch) -> Tensor:
    return loss_of(model, batch) * (1.0 if batch.images.dtype == torch.float64 else 1.001)


def test_rounding_across_a_kink_is_no_difference() -> None:
    """Single precision falls on the other side, as it can on another CPU; everything else is still compared."""
    batch = random_batch(8)
    double = adapter_at_a_kink(1e-8).double()
    expected, _ = gradients_by_sides(double, lambda: loss_of(double, batch.to(torch.float64)))
    other_side = adapter_at_a_kink(-1e-8)
    single, sides = gradients_by_sides(other_side, lambda: loss_of(other_side, batch))
    assert (single["fc1.weight"].double() - expected["fc1.weight"]).abs().max() > 1e-3
    again, _ = gradients_by_sides(double, lambda: loss_of(double, batch.to(torch.float64)), sides)
    torch.testing.assert_close(single["fc1.weight"].double(), again["fc1.weight"])
    assert_gradients_agree(adapter_at_a_kink(1e-8), batch, loss_of, expected)
    with pytest.raises(AssertionError, match=r"fc1\.weight"):
        assert_gradients_agree(adapter_at_a_kink(1e-8), batch, off_in_single_precision, expected)


def test_a_pre_activation_far_from_the_kink_must_keep_its_side() -> None:
    adapter = adapter_at_a_kink(-0.1)
    with recorded_sides(adapter) as sides:
        adapter(torch.ones(1, 8))
    moved = copy.deepcopy(adapter)
    with torch.no_grad():
        moved.fc1.weight[0, 0] = 0.1
    with same_sides(moved, sides), pytest.raises(AssertionError, match=r"act: .*other side"):
        moved(torch.ones(1, 8))
