"""What training does to an image and its mask: turn, shift and flip both, change the image's colours.

It happens on PIL images: 8 bits, one thread, the same bits whatever the number of workers. Only separate moves, as in
AA-CLIP's published code, are made on the normalised image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from dataset.options import DEFAULT_AUGMENTATION, AugmentationConfig

Picture = TypeVar("Picture", Image.Image, Tensor)


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


def move_pair(
    image: Picture,
    mask: Picture,
    parameters: Augmentation,
    choices: AugmentationConfig = DEFAULT_AUGMENTATION,
    fill: Sequence[float] = (0, 0, 0),
) -> tuple[Picture, Picture, bool]:
    """Image and mask moved together, as `choices` says; and whether the anomaly left the image.

    PIL images; for separate moves tensors, the normalised image (3, S, S) and the mask (1, S, S).
    What comes into the image has the colour `fill`, in its own values, and is normal. A mask that was empty from the
    start has nothing to lose.
    """
    separate = choices.augment_moves == "separate"
    moved = _move(mask, parameters, InterpolationMode.NEAREST, separate)
    # Between nearest neighbours a small anomaly can vanish from the mask and still be seen in the image.
    gone = (
        _shows(mask) and not _shows(moved) and not _shows(_move(mask, parameters, InterpolationMode.BILINEAR, separate))
    )
    return _move(image, parameters, InterpolationMode(choices.augment_resampling), separate, fill), moved, gone


def _shows(mask: Image.Image | Tensor) -> bool:
    return bool(np.asarray(mask).any())


def change_colours(image: Image.Image, parameters: Augmentation) -> Image.Image:
    """Brightness, contrast and saturation changed by their factors."""
    image = F.adjust_brightness(image, parameters.brightness)
    image = F.adjust_contrast(image, parameters.contrast)
    return F.adjust_saturation(image, parameters.saturation)


def _move(
    image: Picture,
    parameters: Augmentation,
    interpolation: InterpolationMode,
    separate: bool,
    fill: Sequence[float] | None = None,
) -> Picture:
    """Turn, shift and flip; turn and shift are one resampling, or separate ones, with a shift of whole pixels."""
    height, width = F.get_size(image)
    angle, shift = parameters.angle, [parameters.shift[0] * width, parameters.shift[1] * height]
    how = {"scale": 1.0, "shear": [0.0, 0.0], "interpolation": interpolation, "fill": fill}
    if separate:
        if angle:
            image = F.affine(image, angle, [0, 0], **how)
        angle, shift, how["interpolation"] = 0.0, [round(pixels) for pixels in shift], InterpolationMode.NEAREST
    if angle or any(shift):
        image = F.affine(image, angle, shift, **how)
    if parameters.flip_horizontal:
        image = F.horizontal_flip(image)
    return F.vertical_flip(image) if parameters.flip_vertical else image
