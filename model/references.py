"""Maps of the distance of each patch to the nearest patch of a few normal images (docs/method.md, "References").

Without training, like PatchCore (arXiv:2106.08265) and, combined with text, WinCLIP (arXiv:2303.14814).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.adapter import AdaptedCLIP
from model.blocks import full_precision
from model.config import TILES
from model.frozen import UnadaptedCLIP, frozen_patches
from model.scoring import Outputs, anomaly_map, calibrated_maps, enlarge, to_grid

# Log-odds of an anomaly per unit of distance, which brings distances to the scale of published maps (docs/results.md).
LOG_ODDS = 10.0

# Similarities in memory at once.
MOST_AT_ONCE = 2**24


@dataclass(frozen=True, eq=False)
class References:
    """Patch features of K normal images of a class, and the weight of the distance to them.

    memory: unit features of each level (and branch), (V * N, D) for V views of the K images; images: digests of the
    images' content (`dataset.images.content_digest`); tiles: those of which `memory` contains the features.
    """

    memory: tuple[Tensor, ...]
    weight: float
    features: str
    images: tuple[str, ...]
    tiles: str = TILES[0]

    @property
    def digest(self) -> str:
        """A hex digest of the set of images, in any order, and of how images are compared with them."""
        content = json.dumps([sorted(self.images), self.weight, self.features])
        return hashlib.sha256(content.encode("ascii")).hexdigest()

    def maps(
        self, model: AdaptedCLIP | UnadaptedCLIP, outputs: Outputs, pixels: Tensor, most: int | None = MOST_AT_ONCE
    ) -> Tensor:
        """Distances of images (B, 3, S, S) to these, (levels, B, S, S), averaged over branches.

        outputs: the model's for these images; most: as for `nearest_distances`.
        """
        features = patch_features(model, outputs, pixels, self.features)
        memory = [level.to(pixels.device) for level in self.memory]
        maps = reference_maps(features, memory, pixels.shape[-1], most)
        return maps.unflatten(0, (-1, len(outputs.levels))).mean(dim=0)


def patch_features(model: AdaptedCLIP | UnadaptedCLIP, outputs: Outputs, pixels: Tensor, features: str) -> list[Tensor]:
    """Unit patch features (B, N, D) of images (B, 3, S, S): of each level, and each branch of `features`."""
    # Unadapted CLIP already compares frozen features with prompts.
    if features == "trained" or isinstance(model, UnadaptedCLIP):
        return list(outputs.features)
    frozen = frozen_patches(model.clip, pixels, model.config)
    return frozen if features == "frozen" else [*outputs.features, *frozen]


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
