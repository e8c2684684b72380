"""The published recipe, `--preset published` (docs/method.md, "Deviations from the published code").

tests/data/published_loss_reference.npz was computed by the published code's own segmentation loss, in float64; what its
arrays are stands in it, under `about`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model.losses import focal_loss, segmentation_loss
from model.scoring import similarities
from tests.helpers import assert_agrees

REFERENCE = Path(__file__).parent / "data" / "published_loss_reference.npz"


@pytest.mark.parametrize("case", ["small", "large"])
@pytest.mark.parametrize(("dtype", "loss", "gradient"), [(torch.float64, 1e-7, 1e-6), (torch.float32, 1e-5, 1e-3)])
def test_the_segmentation_loss_is_the_published_one(
    case: str, dtype: torch.dtype, loss: float, gradient: float
) -> None:
    with np.load(REFERENCE) as file:
        known = {
            name: torch.from_numpy(file[f"{case}_{name}"])
            for name in ("features", "anchors", "mask", "loss", "gradient", "p_abnormal_mean")
        }
    features = known["features"].to(dtype).requires_grad_()
    (similarity,) = similarities([features], known["anchors"].to(dtype))
    found = segmentation_loss(similarity, known["mask"].to(dtype), smoothing=1e-5)
    found.total.backward()
    assert_agrees(found.total, known["loss"], loss)
    assert_agrees(features.grad, known["gradient"], gradient)
    assert_agrees(found.abnormal.mean(), known["p_abnormal_mean"], loss)
    if case == "large":
        # Confident errors are what the smoothing is about: an exact loss is another one.
        assert abs(segmentation_loss(similarity, known["mask"].to(dtype)).total.item() - known["loss"].item()) > 0.01


def test_smoothing_caps_the_loss_of_a_confident_error_and_takes_its_gradient() -> None:
    def loss_and_gradient(margin: float, smoothing: float) -> tuple[float, float]:
        logits = torch.tensor([margin, 0.0], dtype=torch.float64).reshape(1, 2, 1, 1).requires_grad_()
        loss = focal_loss(logits, torch.ones(1, 1, 1), smoothing=smoothing)
        loss.backward()
        return loss.item(), logits.grad.abs().max().item()

    assert loss_and_gradient(30.0, 1e-5)[0] == pytest.approx(10.8, abs=0.05)
    assert loss_and_gradient(30.0, 1e-5)[1] < 1e-6
    assert loss_and_gradient(30.0, 0.0) == pytest.approx((30.0, 1.0), abs=1e-6)
    assert loss_and_gradient(0.1, 1e-5)[0] == pytest.approx(loss_and_gradient(0.1, 0.0)[0], rel=1e-4)
