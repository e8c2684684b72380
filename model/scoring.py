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
    """`levels`: similarities s = 100 f . anchors on the patch grid, (B, N, 2) each; `det`: det . anchors, (B, 2).

    `features`: the unit patch features f that were compared, (B, N, D) of each level, for what else looks at them.
    """

    levels: list[Tensor]
    det: Tensor
    features: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Domain:
    """How a kind of images is scored: blur on the patch grid, and whether the det score takes part."""

    kernel: int
    sigma: float
    uses_det: bool


DOMAINS = {"industrial": Domain(7, 1.0, True), "medical": Domain(9, 1.5, False)}


def similarities(levels: Sequence[Tensor], anchors: Tensor) -> list[Tensor]:
    """s = 100 f . anchors: levels (B, N, D) and anchors (B, D, 2) -> (B, N, 2) each, in float32 or better."""
    return [full_product(TEMPERATURE * full_precision(level), anchors) for level in levels]


def compare(levels: Sequence[Tensor], det: Tensor, anchors: Tensor) -> Outputs:
    """Features of B images against each image's own anchors (B, D, 2)."""
    return Outputs(similarities(levels, anchors), full_product(det[:, None], anchors)[:, 0], levels)


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
    """Anomaly map of each level, (levels, B, size, size): (s_abnormal + 1 - s_normal) / 2, blurred, enlarged."""
    rule = DOMAINS[domain]
    maps = []
    for similarity in outputs.levels:
        normal, abnormal = to_grid(similarity).split(1, dim=1)
        grid = (abnormal + 1 - normal) / 2
        # Reflection needs a border narrower than the grid; only grids below 5 x 5 patches come to this.
        kernel = min(rule.kernel, 2 * grid.shape[-1] - 1)
        with torch.autocast(grid.device.type, enabled=False):
            maps.append(enlarge(gaussian_blur(grid, [kernel, kernel], [rule.sigma, rule.sigma]), size)[:, 0])
    return torch.stack(maps)


def anomaly_map(outputs: Outputs, size: int, domain: str) -> Tensor:
    """The anomaly map of each image, (B, size, size): the levels' maps summed, as published."""
    return level_maps(outputs, size, domain).sum(dim=0)


def det_scores(outputs: Outputs, kind: str = DET_SCORES[0]) -> Tensor:
    """The det score of each image, (B,), in [0, 1].

    kind: "abnormal", as published, (det . abnormal + 1) / 2; "difference", (det . (abnormal - normal) + 2) / 4, which
    is the same where the two anchors are opposite.
    """
    normal, abnormal = outputs.det.unbind(dim=1)
    return (abnormal - normal + 2) / 4 if kind == "difference" else (abnormal + 1) / 2


def min_max(values: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Normalise to [0, 1] by the given extremes; where they are equal, to 0."""
    span = high - low
    return (values - low) / span if span > 0 else torch.zeros_like(values)


def class_image_scores(map_maxima: Tensor, map_minima: Tensor, det: Tensor, domain: str) -> Tensor:
    """Image scores of all images of one class, (n,), as published.

    map_maxima, map_minima: (n,), extremes of each image's anomaly map: the maps themselves are not needed, because
    min-max normalisation per class keeps their order. det: (n,), as `det_scores` gives it.
    """
    maps = min_max(map_maxima, map_minima.min(), map_maxima.max())
    if not DOMAINS[domain].uses_det:
        return maps
    return 0.5 * maps + 0.5 * min_max(det, det.min(), det.max())


def calibrated_maps(outputs: Outputs, size: int) -> Tensor:
    """p_abnormal of each level on the pixels, (levels, B, size, size), in [0, 1]: needs no statistics of a class."""
    return torch.stack([pixel_logits(similarity, size).softmax(dim=1)[:, 1] for similarity in outputs.levels])


def calibrated_scores(maps: Tensor, outputs: Outputs, domain: str, kind: str = DET_SCORES[0]) -> Tensor:
    """Image scores (B,) in [0, 1] from calibrated maps averaged over levels (B, S, S); kind: as in `det_scores`."""
    peaks = maps.flatten(1).amax(dim=1)
    return 0.5 * peaks + 0.5 * det_scores(outputs, kind) if DOMAINS[domain].uses_det else peaks


def decisions(
    scores: Tensor, maps: Tensor, image_threshold: float | Tensor, pixel_threshold: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Which images and which pixels lie above calibrated thresholds (docs/method.md, "Calibration").

    scores (B,) and maps (B, S, S) of single images, as `calibrated_scores` takes and gives them; thresholds as
    `engine.detector.calibration.Entry` holds them, which were found on the same scores and maps. Returns bool (B,), the
    decision, and bool (B, S, S), the mask; an image with any pixel in its mask is a pixel alarm.
    """
    return scores > image_threshold, maps > pixel_threshold


def ranks(scores: Tensor, normal: Tensor) -> Tensor:
    """The share of normal images that score below each of `scores` (B,), in [0, n / (n + 1)].

    Raw scores of two classes do not compare, these do.
    normal (n,): the scores of a calibration's images. 1 - rank is the conformal p-value of "this image is normal".
    """
    return (normal < scores[:, None]).sum(dim=1) / (len(normal) + 1)
