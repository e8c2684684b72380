"""The views of images that a model sees: the whole image and, with tiles, overlapping squares of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from PIL import Image
from torch import Tensor

from dataset.images import resize_image
from model.config import MOST_TILES, TILES
from utils.tiles import Blend, Tiling

# Model input (B, 3, S, S) -> maps (K, B, S, S) and det scores (B,).
Score = Callable[[Tensor], tuple[Tensor, Tensor]]


def tiling_of(image: Image.Image, tiles: str, side: int) -> Tiling | None:
    """The tiles of an image for a model of input size `side`; None if it is seen as a whole only."""
    off, auto = TILES
    # auto: tiles of at least the model's input size, if there are two or more along the shorter side.
    count = min(MOST_TILES, min(image.size) // side) if tiles == auto else 0 if tiles == off else int(tiles)
    if count < (2 if tiles == auto else 1):
        return None
    tiling = Tiling(image.size, count, side)
    return tiling if len(tiling.corners) > 1 else None


def views_of(image: Image.Image, tiles: str, side: int) -> Iterator[tuple[tuple[int, int] | None, Image.Image]]:
    """The whole image, without a corner, then each of its tiles with its corner."""
    yield None, image
    tiling = tiling_of(image, tiles, side)
    if tiling is not None:
        resized = resize_image(image, tiling.size)
        for left, top in tiling.corners:
            yield (left, top), resized.crop((left, top, left + side, top + side))


def score_views(
    images: Sequence[Image.Image],
    as_input: Callable[[Image.Image], Tensor],
    score: Score,
    grid: tuple[str, int],
    batch_size: int,
) -> list[tuple[Tensor, Tensor]]:
    """Blended maps (K, h, w) and highest det score of each image, on the CPU, from at most `batch_size` views at once.

    as_input: a view as model input, (1, 3, S, S); grid: the tiles of `Detector.predict`, and S.
    """
    tilings = (tiling_of(image, *grid) for image in images)
    blends = [None if tiling is None else Blend(tiling) for tiling in tilings]
    wholes: list[Tensor] = []
    highest = torch.zeros(len(images))
    views = ((index, *view) for index, image in enumerate(images) for view in views_of(image, *grid))
    while batch := list(islice(views, batch_size)):
        maps, det = (result.cpu() for result in score(torch.cat([as_input(view) for *_, view in batch])))
        for row, (index, corner, _) in enumerate(batch):
            blend = blends[index]
            highest[index] = torch.maximum(highest[index], det[row])
            if blend is None or corner is None:
                wholes.append(maps[:, row])
            else:
                blend.add(corner, maps[:, row])
    joined = (maps if blend is None else blend.result(maps) for blend, maps in zip(blends, wholes, strict=True))
    return list(zip(joined, highest, strict=True))
