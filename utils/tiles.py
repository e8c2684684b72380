"""Overlapping square tiles over an image, and the blending of their maps (docs/method.md, "Tiles").

Positions and maps are in pixels of the image after it was resized for its tiles (`Tiling.size`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Share of a tile that its neighbour covers too, at least.
OVERLAP = 0.25
# Weight of the map of the whole image; the tiles have the rest.
WHOLE_WEIGHT = 0.5
# Longest resized image, in sides of a tile; longer ones are squeezed, which limits memory.
LONGEST = 32


class Tiling:
    """Tiles of side x side pixels that cover an image and keep its aspect ratio.

    Args:
        size: width and height of the image.
        count: tiles along its shorter side, at least 1.
        side: of the tiles.

    Attributes:
        size: width and height to which the image is resized.
        corners: left and top of each tile, row by row.
    """

    def __init__(self, size: tuple[int, int], count: int, side: int) -> None:
        self.side = side
        stride = round(side * (1 - OVERLAP))
        shorter = side + (count - 1) * stride
        scale = shorter / min(size)
        width, height = (min(max(shorter, round(scale * length)), LONGEST * side) for length in size)
        self.size = (width, height)
        lefts, tops = (self._starts(length, stride) for length in self.size)
        self.corners = [(left, top) for top in tops for left in lefts]

    def _starts(self, length: int, stride: int) -> list[int]:
        """Where tiles begin along an axis: at both ends, and evenly in between, at most `stride` apart."""
        gaps = math.ceil((length - self.side) / stride)
        return [0] if gaps == 0 else [round(index * (length - self.side) / gaps) for index in range(gaps + 1)]


class Blend:
    """The mean of the maps of a tiling, whose weights fall to almost 0 at the edges of each tile."""

    def __init__(self, tiling: Tiling) -> None:
        self.tiling = tiling
        steps = torch.arange(tiling.side) + 0.5
        ramp = (torch.minimum(steps, tiling.side - steps) / (OVERLAP * tiling.side)).clamp(max=1)
        self.window = torch.outer(ramp, ramp)
        self.weights = torch.zeros(tiling.size[::-1])
        self.sums = torch.zeros(0)

    def add(self, corner: tuple[int, int], maps: Tensor) -> None:
        """Add the maps (K, side, side) of the tile at a corner."""
        left, top = corner
        place = (..., slice(top, top + self.tiling.side), slice(left, left + self.tiling.side))
        if not len(self.sums):
            self.sums = torch.zeros(len(maps), *self.weights.shape)
        self.sums[place] += self.window * maps
        self.weights[place] += self.window

    def result(self, whole: Tensor) -> Tensor:
        """The blended maps (K, height, width), after all tiles were added; whole: maps of the image (K, side, side)."""
        enlarged = F.interpolate(whole[None], size=self.weights.shape, mode="bilinear")[0]
        return WHOLE_WEIGHT * enlarged + (1 - WHOLE_WEIGHT) * self.sums / self.weights
