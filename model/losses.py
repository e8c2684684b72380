"""Losses of both stages (docs/method.md, "Losses"): focal (Lin et al. 2017), Dice (Milletari et al. 2016), entropy."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.scoring import Outputs, pixel_logits
from utils.processes import WHOLE_STEP, Share

FOCAL_GAMMA = 2.0
DICE_SMOOTH = 1.0


class Segmentation(NamedTuple):
    """The loss terms of one level, and p_abnormal on the pixels (B, S, S), detached, for monitoring."""

    focal: Tensor
    dice_normal: Tensor
    dice_abnormal: Tensor
    abnormal: Tensor

    @property
    def total(self) -> Tensor:
        return self.focal + self.dice_normal + self.dice_abnormal


def focal_loss(logits: Tensor, mask: Tensor, gamma: float = FOCAL_GAMMA, smoothing: float = 0.0) -> Tensor:
    """Focal loss (Lin et al. 2017): mean over pixels of -(1 - p_t)^gamma log p_t.

    Args:
        logits: (B, 2, S, S).
        mask: (B, S, S) in {0, 1}.
        gamma: the focusing exponent.
        smoothing: distance of the targets from 0 and 1, also added to p_t. AA-CLIP's published code uses 1e-5, which
            limits the loss of confident errors to 10.8 and removes their gradient. 0 is the exact loss.

    Returns:
        A scalar.
    """
    anomalous = mask > 0.5
    if smoothing == 0:
        log_p = logits.log_softmax(dim=1)
        log_t = torch.where(anomalous, log_p[:, 1], log_p[:, 0])
        return -((1 - log_t.exp()) ** gamma * log_t).mean()
    p = logits.softmax(dim=1)
    p_true, p_other = torch.where(anomalous, p[:, 1], p[:, 0]), torch.where(anomalous, p[:, 0], p[:, 1])
    p_t = (1 - smoothing) * p_true + smoothing * p_other + smoothing
    return -((1 - p_t) ** gamma * p_t.log()).mean()


def dice_loss(p: Tensor, target: Tensor, smooth: float = DICE_SMOOTH) -> Tensor:
    """Dice loss (Milletari et al. 2016): 1 - Dice of each image, mean over the batch; p and target (B, S, S)."""
    p, target = p.flatten(1), target.flatten(1)
    dice = (2 * (p * target).sum(dim=1) + smooth) / (p.sum(dim=1) + target.sum(dim=1) + smooth)
    return (1 - dice).mean()


def segmentation_loss(similarity: Tensor, mask: Tensor, smoothing: float = 0.0) -> Segmentation:
    """The loss terms of one level.

    Args:
        similarity: (B, N, 2) on the patch grid.
        mask: (B, S, S) in {0, 1}.
        smoothing: as for `focal_loss`.

    Returns:
        Focal loss and the Dice losses of the normal and the abnormal pixels.
    """
    logits = pixel_logits(similarity, mask.shape[-1])
    p = logits.softmax(dim=1)
    focal = focal_loss(logits, mask, smoothing=smoothing)
    return Segmentation(focal, dice_loss(p[:, 0], 1 - mask), dice_loss(p[:, 1], mask), p[:, 1].detach())


def stage1_losses(
    level_similarities: Sequence[Tensor],
    anchors: Tensor,
    mask: Tensor,
    norm_weight: float,
    levels: str = "all",
    smoothing: float = 0.0,
    share: Share = WHOLE_STEP,
) -> tuple[dict[str, Tensor], Tensor]:
    """Losses of Stage 1: mean over levels of the segmentation losses, plus the overlap of the anchors.

    Args:
        level_similarities: (B, N, 2) of each level.
        anchors: (B, D, 2), of each image.
        mask: (B, S, S) in {0, 1}.
        norm_weight: weight of the overlap, the squared mean cosine of the two anchors.
        levels: "all", or "last" for the last level only, as in AA-CLIP's published code.
        smoothing: as for `focal_loss`.
        share: this process's share of a data-parallel step.

    Returns:
        The named losses including "total", and the mean of p_abnormal over levels, (B, S, S).
    """
    counted = level_similarities[-1:] if levels == "last" else level_similarities
    parts = [segmentation_loss(similarity, mask, smoothing) for similarity in counted]
    overlap = share.step_mean((anchors[..., 0] * anchors[..., 1]).sum(dim=-1).mean()) ** 2
    losses, abnormal = _join_levels(parts, 1 / len(parts))
    losses["overlap"] = overlap
    losses["total"] = torch.stack([part.total for part in parts]).mean() + norm_weight * overlap
    return losses, abnormal


def stage2_losses(
    outputs: Outputs, mask: Tensor, label: Tensor, smoothing: float = 0.0
) -> tuple[dict[str, Tensor], Tensor]:
    """Losses of Stage 2: cross-entropy of det . anchors with the image label, plus the sum over levels.

    Args:
        outputs: the model's forward.
        mask: (B, S, S) in {0, 1}.
        label: (B,), 1 for anomalous images.
        smoothing: as for `focal_loss`.

    Returns:
        The named losses including "total", and the mean of p_abnormal over levels, (B, S, S).
    """
    parts = [segmentation_loss(similarity, mask, smoothing) for similarity in outputs.levels]
    losses, abnormal = _join_levels(parts, 1.0)
    losses["classification"] = F.cross_entropy(outputs.det, label)
    losses["total"] = losses["classification"] + torch.stack([part.total for part in parts]).sum()
    return losses, abnormal


def _join_levels(parts: Sequence[Segmentation], factor: float) -> tuple[dict[str, Tensor], Tensor]:
    """Each loss term summed over levels times `factor`, and p_abnormal averaged over levels, (B, S, S)."""
    names = ("focal", "dice_normal", "dice_abnormal")
    losses = {name: factor * torch.stack([getattr(part, name) for part in parts]).sum() for name in names}
    return losses, torch.stack([part.abnormal for part in parts]).mean(dim=0)
