"""Maps of the distance of each patch to the nearest patch of a few normal images (docs/method.md, "References").

Without training, like PatchCore (arXiv:2106.08265) and, combined with text, WinCLIP (arXiv:2303.14814).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.blocks import full_precision
from model.scoring import Outputs, anomaly_map, calibrated_maps, enlarge, to_grid

# Log-odds of an anomaly per unit of distance, which brings distances to the scale of published maps (docs/results.md).
LOG_ODDS = 10.0

# Similarities in memory at once.
MOST_AT_ONCE = 2**24


def nearest_distances(features: Tensor, memory: Tensor, most: int | None = MOST_AT_ONCE) -> Tensor:
    """Cosine distance of each patch to its nearest reference patch.

    Args:
        features: unit patch features, (B, N, D).
        memory: unit patch features of the references, (M, D).
        most: similarities in memory at once; None computes one product without a loop.

    Returns:
        1 - cos, in [0, 2], (B, N).
    """
    with torch.autocast(features.device.type, enabled=False):
        patches, memory = full_precision(features).flatten(0, 1), full_precision(memory)
        chunks = [patches] if most is None else patches.split(max(1, most // len(memory)))
        nearest = torch.cat([(chunk @ memory.T).amax(dim=1) for chunk in chunks])
    return (1 - nearest).clamp(0, 2).unflatten(0, features.shape[:2])


def reference_maps(
    features: Sequence[Tensor], memory: Sequence[Tensor], size: int, most: int | None = MOST_AT_ONCE
) -> Tensor:
    """Distances of all levels on the pixels, (levels, B, size, size), in [0, 2].

    Args:
        features: unit patch features of each level, (B, N, D).
        memory: unit patch features of the references for the same levels, (M, D).
        size: side of the maps, pixels.
        most: as for `nearest_distances`.
    """
    distances = [nearest_distances(*pair, most) for pair in zip(features, memory, strict=True)]
    return torch.stack([enlarge(to_grid(distance[..., None]), size)[:, 0] for distance in distances])


def joined_calibrated_maps(outputs: Outputs, references: Tensor, weight: float) -> Tensor:
    """Weighted mean of `calibrated_maps` and references (levels, B, S, S), in [0, 1]; weight: of the references."""
    words = calibrated_maps(outputs, references.shape[-1])
    return (1 - weight) * words + weight * references / 2


def joined_anomaly_map(outputs: Outputs, references: Tensor, weight: float, domain: str) -> Tensor:
    """Weighted mean of `anomaly_map` and the log-odds of references (levels, B, S, S); (B, S, S)."""
    words = anomaly_map(outputs, references.shape[-1], domain)
    return (1 - weight) * words + weight * LOG_ODDS * references.sum(dim=0) / 2
