"""A few normal images to compare with, without training (docs/method.md, "References")."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import Tensor

from model.adapter import AdaptedCLIP
from model.frozen import UnadaptedCLIP, frozen_patches
from model.references import reference_maps
from model.scoring import Outputs


@dataclass(frozen=True, eq=False)
class References:
    """Patch features of K normal images of a class, and the weight of the distance to them.

    memory: unit features of each level (and branch), (K * N, D); images: digests of the images' content
    (`dataset.images.content_digest`).
    """

    memory: tuple[Tensor, ...]
    weight: float
    features: str
    images: tuple[str, ...]

    @property
    def digest(self) -> str:
        """A hex digest of the set of images, in any order, and of how images are compared with them."""
        content = json.dumps([sorted(self.images), self.weight, self.features])
        return hashlib.sha256(content.encode("ascii")).hexdigest()

    def maps(self, model: AdaptedCLIP | UnadaptedCLIP, outputs: Outputs, pixels: Tensor) -> Tensor:
        """Distances of images (B, 3, S, S) to these, (levels, B, S, S), averaged over branches.

        outputs: the model's for these images.
        """
        features = patch_features(model, outputs, pixels, self.features)
        memory = [level.to(pixels.device) for level in self.memory]
        maps = reference_maps(features, memory, pixels.shape[-1])
        return maps.unflatten(0, (-1, len(outputs.levels))).mean(dim=0)


@torch.no_grad()
def patch_features(model: AdaptedCLIP | UnadaptedCLIP, outputs: Outputs, pixels: Tensor, features: str) -> list[Tensor]:
    """Unit patch features (B, N, D) of images (B, 3, S, S): of each level, and each branch of `features`."""
    # Unadapted CLIP already compares frozen features with prompts.
    if features == "trained" or isinstance(model, UnadaptedCLIP):
        return list(outputs.features)
    frozen = frozen_patches(model.clip, pixels, model.config)
    return frozen if features == "frozen" else [*outputs.features, *frozen]
