"""The result for one image, and what may be given as an image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from dataset.images import read_image, to_rgb, upright
from engine.detector.calibration import ANOMALOUS, NORMAL, Entry
from model.adapter_cross_attention import Attention
from model.scoring import decisions, ranks
from utils.errors import UserError

if TYPE_CHECKING:
    from utils.regions import Region

ImageInput = Image.Image | np.ndarray | str | Path


@dataclass(frozen=True)
class Prediction:
    """The result of `Detector.predict` for one image. It unpacks into `anomaly_map, score, level_maps`.

    S is the model's image size; with tiles, maps are larger and keep the image's aspect ratio. The fields from
    `decision` to `regions` need a calibration for the class (docs/testing.md, "A decision"); without one they are None.

    Attributes:
        anomaly_map: (S, S) float32 in [0, 1], p(abnormal) averaged over levels, and joined with the distances to
            references if the class has any.
        score: image score in [0, 1], higher is more anomalous.
        level_maps: (levels, S, S) float32, the maps that `anomaly_map` averages.
        decision: "anomalous" or "normal".
        rank: share of the normal calibration images with a lower score, in [0, 1).
        mask: (S, S) bool, the pixels above the pixel threshold.
        regions: connected regions of `mask` in pixels of the original image, the most anomalous first.
        attention: weights of both cross-attentions per head, for a batch of one, if requested.
    """

    anomaly_map: np.ndarray
    score: float
    level_maps: np.ndarray
    decision: str | None = None
    rank: float | None = None
    mask: np.ndarray | None = None
    regions: tuple[Region, ...] | None = None
    attention: Attention | None = None

    def to_dict(self) -> dict[str, Any]:
        """Score, decision, rank and regions as plain values for JSON, without the maps."""
        regions = None if self.regions is None else [region._asdict() for region in self.regions]
        return {"score": self.score, "decision": self.decision, "rank": self.rank, "regions": regions}

    def __iter__(self) -> Iterator[Any]:
        return iter((self.anomaly_map, self.score, self.level_maps))


def as_image(image: ImageInput) -> Image.Image:
    """RGB from a path, a PIL image, or uint8 RGB (H, W, 3); files and PIL images are rotated by their EXIF tag.

    Raises `UserError` for a file that cannot be read, and for anything else.
    """
    if isinstance(image, (str, Path)):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        try:
            return to_rgb(upright(image))
        except OSError as error:  # opened, and damaged further on
            raise UserError(f"this image cannot be read: {error}") from error
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return Image.fromarray(image)
    kind = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
    raise UserError(f"an image cannot be {kind}: give a path, a PIL image, or a uint8 RGB array (H, W, 3)")


def decide(prediction: Prediction, image: float, pixel: float, size: tuple[int, int]) -> Prediction:
    """A prediction with the decision of an image and a pixel threshold; size: the original image's (width, height)."""
    from utils.regions import regions_of  # scipy is slow to import, and few predictions need it

    score, anomaly_map = torch.tensor([prediction.score]), torch.from_numpy(prediction.anomaly_map)[None]
    anomalous, masks = decisions(score, anomaly_map, image, pixel)
    mask = masks[0].numpy()
    regions = regions_of(mask, prediction.anomaly_map, size)
    return replace(prediction, decision=ANOMALOUS if anomalous else NORMAL, mask=mask, regions=regions)


def apply_thresholds(prediction: Prediction, entry: Entry, size: tuple[int, int]) -> Prediction:
    """A prediction with the decision and rank of a calibration; size: the original image's (width, height)."""
    rank = float(ranks(torch.tensor([prediction.score]), torch.tensor(entry.scores)))
    return replace(decide(prediction, entry.image_threshold, entry.pixel_threshold, size), rank=rank)
