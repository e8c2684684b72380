"""From features and anchors to similarities, anomaly maps and image scores (docs/method.md, "Scores")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from model.blocks import full_precision, full_product
from model.config import DET_SCORES

TEMPERATURE = 100.0


class Outputs(NamedTuple):
    """The forward of B images.

    levels: similarities s = 100 f . anchors on the patch grid, (B, N, 2) of each level; det: det . anchors, (B, 2);
    features: the unit patch features f, (B, N, D) of each level, for normal references.
    """

    levels: list[Tensor]
    det: Tensor
    features: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Domain:
    """Scoring of a kind of images: blur on the patch grid, and whether image scores include the det score."""

    kernel: int
    sigma: float
    uses_det: bool


DOMAINS = {"industrial": Domain(7, 1.0, True), "medical": Domain(9, 1.5, False)}


def similarities(levels: Sequence[Tensor], anchors: Tensor) -> list[Tensor]:
    """s = 100 f . anchors: levels (B, N, D) and anchors (B, D, 2) -> (B, N, 2) each, in float32 or better."""
    return [full_product(TEMPERATURE * full_precision(level), anchors) for level in levels]


def compare(levels: Sequence[Tensor], det: Tensor, anchors: Tensor) -> Outputs:
    """Similarities of features to the anchors of each image, (B, D, 2)."""
    return Outputs(similarities(levels, anchors), full_product(det[:, None], anchors)[:, 0], levels)


def compare_class_token(embedding: Tensor, anchors: Tensor) -> Tensor:
    """Similarities (B, 2) of CLIP's class token, (B, D), to anchors (B, D, 2), as differences of probabilities.

    Cosines with CLIP's own token are close to each other, so they are scaled as CLIP does: p = softmax(100 cos). The
    result is 2 p - 1 for both anchors, so that each of `det_scores` is p(abnormal).
    """
    return 2 * similarities([embedding[:, None]], anchors)[0][:, 0].softmax(dim=1) - 1


def to_grid(tokens: Tensor) -> Tensor:
    """Patch tokens (B, N, C) -> (B, C, side, side)."""
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], side, side)


def enlarge(grid: Tensor, size: int) -> Tensor:
    """Bilinear with aligned corners: (B, C, side, side) -> (B, C, size, size)."""
    return F.interpolate(grid, size=(size, size), mode="bilinear", align_corners=True)


def pixel_logits(similarity: Tensor, size: int) -> Tensor:
    """s on the patch grid (B, N, 2) -> s on the pixels (B, 2, size, size); softmax over axis 1 gives p."""
    return enlarge(to_grid(similarity), size)


def level_maps(outputs: Outputs, size: int, domain: str) -> Tensor:
    """Published anomaly map of each level: (s_abnormal + 1 - s_normal) / 2, blurred on the grid, enlarged.

    Args:
        outputs: the forward of B images.
        size: side of the maps, pixels.
        domain: "industrial" or "medical", which differ in the blur.

    Returns:
        Maps without fixed range, (levels, B, size, size).
    """
    rule = DOMAINS[domain]
    maps = []
    for similarity in outputs.levels:
        normal, abnormal = to_grid(similarity).split(1, dim=1)
        grid = (abnormal + 1 - normal) / 2
        # Reflection needs a border narrower than the grid, which matters for grids below 5 x 5 patches.
        kernel = min(rule.kernel, 2 * grid.shape[-1] - 1)
        with torch.autocast(grid.device.type, enabled=False):
            maps.append(enlarge(gaussian_blur(grid, [kernel, kernel], [rule.sigma, rule.sigma]), size)[:, 0])
    return torch.stack(maps)


def anomaly_map(outputs: Outputs, size: int, domain: str) -> Tensor:
    """Published anomaly map of each image, (B, size, size): the sum of `level_maps`."""
    return level_maps(outputs, size, domain).sum(dim=0)


def det_scores(outputs: Outputs, kind: str = DET_SCORES[0]) -> Tensor:
    """Scores of the whole images.

    Args:
        outputs: the forward of B images.
        kind: "abnormal", (det . abnormal + 1) / 2, as published; or "difference", (det . (abnormal - normal) + 2) / 4,
            which is equal for opposite anchors.

    Returns:
        Scores in [0, 1], (B,).
    """
    normal, abnormal = outputs.det.unbind(dim=1)
    return (abnormal - normal + 2) / 4 if kind == "difference" else (abnormal + 1) / 2


def min_max(values: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Normalise to [0, 1] by the extremes `low` and `high`; zeros if they are equal."""
    span = high - low
    return (values - low) / span if span > 0 else torch.zeros_like(values)


def class_image_scores(map_maxima: Tensor, map_minima: Tensor, det: Tensor, domain: str) -> Tensor:
    """Published image scores of all n images of a class.

    Args:
        map_maxima: maximum of each image's anomaly map, (n,).
        map_minima: minimum of each image's anomaly map, (n,).
        det: `det_scores`, (n,).
        domain: "industrial" or "medical"; medical scores are without `det`.

    Returns:
        Scores in [0, 1], normalised over the class, (n,).
    """
    maps = min_max(map_maxima, map_minima.min(), map_maxima.max())
    if not DOMAINS[domain].uses_det:
        return maps
    return 0.5 * maps + 0.5 * min_max(det, det.min(), det.max())


def calibrated_maps(outputs: Outputs, size: int) -> Tensor:
    """p_abnormal of each level on the pixels, (levels, B, size, size), in [0, 1], without statistics of a class."""
    return torch.stack([pixel_logits(similarity, size).softmax(dim=1)[:, 1] for similarity in outputs.levels])


def calibrated_scores(maps: Tensor, det: Tensor, domain: str) -> Tensor:
    """Image scores without statistics of a class.

    Args:
        maps: calibrated maps, mean over levels, (B, H, W).
        det: `det_scores` of the same images, (B,).
        domain: "industrial": half the map's maximum plus half the det score; "medical": the maximum.

    Returns:
        Scores in [0, 1], (B,).
    """
    peaks = maps.flatten(1).amax(dim=1)
    return 0.5 * peaks + 0.5 * det if DOMAINS[domain].uses_det else peaks


def decisions(
    scores: Tensor, maps: Tensor, image_threshold: float | Tensor, pixel_threshold: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Compare scores and maps with calibrated thresholds (docs/method.md, "Calibration").

    Args:
        scores: `calibrated_scores`, (B,).
        maps: calibrated maps, mean over levels, (B, S, S).
        image_threshold: of the scores.
        pixel_threshold: of the maps.

    Returns:
        Anomalous images, bool (B,), and anomalous pixels, bool (B, S, S).
    """
    return scores > image_threshold, maps > pixel_threshold


def ranks(scores: Tensor, normal: Tensor) -> Tensor:
    """Ranks among normal images, which are comparable between classes.

    Args:
        scores: (B,).
        normal: scores of the n normal images of a calibration, (n,).

    Returns:
        Ranks in [0, n / (n + 1)], (B,); 1 - rank is the conformal p-value of a normal image.
    """
    return (normal < scores[:, None]).sum(dim=1) / (len(normal) + 1)
