"""What training does to an image and its mask: turn, shift and flip both, change the image's colours.

Everything happens on PIL images: 8 bits, one thread, the same bits whatever the number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F


@dataclass(frozen=True)
class Augmentation:
    """Angle in degrees, shift as a fraction of the side, colour factors around 1; what is off has no effect."""

    angle: float
    shift: tuple[float, float]
    flip_horizontal: bool
    flip_vertical: bool
    brightness: float
    contrast: float
    saturation: float


def draw_augmentation(seed: int) -> Augmentation:
    """One sample's augmentation: each part on with its probability, uniform within its range."""
    rng = np.random.default_rng(seed)
    # All numbers are drawn, used or not, so that no part's chance shifts another part's.
    turn, shift, horizontal, vertical = (rng.random(4) < 0.5).tolist()
    angle, right, down = rng.uniform(-1, 1, size=3).tolist()
    jitter = np.where(rng.random(3) < 0.7, rng.uniform(0.5, 1.5, size=3), 1.0).tolist()
    move = (0.15 * right * shift, 0.15 * down * shift)
    return Augmentation(30 * angle * turn, move, horizontal, vertical, *jitter)


def augment_pair(
    image: Image.Image,
    mask: Image.Image,
    parameters: Augmentation,
    colours: bool,
    fill: Sequence[int] = (0, 0, 0),
    resampling: str = "bilinear",
) -> tuple[Image.Image, Image.Image, bool]:
    """Image and mask moved together, with other colours where asked for; and whether the anomaly left the image.

    What comes into the image has the colour `fill` (8-bit RGB) and is normal. A mask that was empty from the start has
    nothing to lose.
    """
    if colours:
        image = _jitter(image, parameters)
    moved = _move(mask, parameters, InterpolationMode.NEAREST)
    # Between nearest neighbours a small anomaly can vanish from the mask and still be seen in the image.
    gone = (
        mask.getbbox() is not None
        and moved.getbbox() is None
        and _move(mask, parameters, InterpolationMode.BILINEAR).getbbox() is None
    )
    return _move(image, parameters, InterpolationMode(resampling), fill), moved, gone


def _jitter(image: Image.Image, parameters: Augmentation) -> Image.Image:
    image = F.adjust_brightness(image, parameters.brightness)
    image = F.adjust_contrast(image, parameters.contrast)
    return F.adjust_saturation(image, parameters.saturation)


def _move(
    image: Image.Image, parameters: Augmentation, interpolation: InterpolationMode, fill: Sequence[int] | None = None
) -> Image.Image:
    """Turn, shift and flip; turn and shift are one resampling."""
    if parameters.angle or any(parameters.shift):
        shift = [fraction * side for fraction, side in zip(parameters.shift, image.size, strict=True)]
        image = F.affine(
            image, parameters.angle, shift, scale=1.0, shear=[0.0, 0.0], interpolation=interpolation, fill=fill
        )
    if parameters.flip_horizontal:
        image = F.horizontal_flip(image)
    return F.vertical_flip(image) if parameters.flip_vertical else image
