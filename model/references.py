"""Maps from a few normal images: how far each patch is from the nearest of theirs (docs/method.md, "References").

Without training, as PatchCore (arXiv:2106.08265) and, beside text, WinCLIP (arXiv:2303.14814) do. Tensors in, tensors
out: whoever computes these maps elsewhere, such as in an exported graph, can take these functions as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.blocks import full_precision
from model.scoring import Outputs, anomaly_map, calibrated_maps, enlarge, to_grid

# Log-odds of an anomaly for each 1 - cos: what puts distances on the scale of published maps (docs/results.md).
LOG_ODDS = 10.0

# Similarities that are held at once, which bounds memory however many references there are.
MOST_AT_ONCE = 2**24


def nearest_distances(features: Tensor, memory: Tensor, most: int | None = MOST_AT_ONCE) -> Tensor:
    """1 - cos from each patch to the nearest one in memory, in [0, 2].

    features (B, N, D) and memory (M, D), both unit -> (B, N). most: similarities that are held at once; None for all
    of them, in one product without a loop.
    """
    with torch.autocast(features.device.type, enabled=False):
        patches, memory = full_precision(features).flatten(0, 1), full_precision(memory)
        pieces = [patches] if most is None else patches.split(max(1, most // len(memory)))
        nearest = torch.cat([(piece @ memory.T).amax(dim=1) for piece in pieces])
    return (1 - nearest).clamp(0, 2).unflatten(0, features.shape[:2])


def reference_maps(
    features: Sequence[Tensor], memory: Sequence[Tensor], size: int, most: int | None = MOST_AT_ONCE
) -> Tensor:
    """1 - cos to the references on the pixels, (levels, B, size, size), in [0, 2].

    features: unit patch features (B, N, D) of each level; memory: those of the references, (M, D), in the same order.
    """
    distances = [nearest_distances(*pair, most) for pair in zip(features, memory, strict=True)]
    return torch.stack([enlarge(to_grid(found[..., None]), size)[:, 0] for found in distances])


def joined_calibrated_maps(outputs: Outputs, references: Tensor, weight: float) -> Tensor:
    """`model.scoring.calibrated_maps` joined with references, (levels, B, S, S), both in [0, 1].

    references: (levels, B, S, S), as `reference_maps` gives them; weight: their share.
    """
    words = calibrated_maps(outputs, references.shape[-1])
    return (1 - weight) * words + weight * references / 2


def joined_anomaly_map(outputs: Outputs, references: Tensor, weight: float, domain: str) -> Tensor:
    """`model.scoring.anomaly_map`, the published one, joined with references as log-odds, (B, S, S).

    references, weight: as above.
    """
    words = anomaly_map(outputs, references.shape[-1], domain)
    return (1 - weight) * words + weight * LOG_ODDS * references.sum(dim=0) / 2
