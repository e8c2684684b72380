"""Augmentation of images and masks: rotation, shift and flips of both, colours of the image.

It works on PIL images: 8 bits, one thread, the same bits for any number of workers. Only separate moves, as in
AA-CLIP's published code, work on the normalised image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from dataset.options import DEFAULT_AUGMENTATION, AugmentationConfig

Picture = TypeVar("Picture", Image.Image, Tensor)


@dataclass(frozen=True)
class Augmentation:
    """Angle in degrees, shift as a fraction of the side, and factors around 1 for the colours."""

    angle: float
    shift: tuple[float, float]
    flip_horizontal: bool
    flip_vertical: bool
    brightness: float
    contrast: float
    saturation: float


def draw_augmentation(seed: int) -> Augmentation:
    """Draw the augmentation of a sample: each part is applied with its probability, uniform in its range."""
    rng = np.random.default_rng(seed)
    # All numbers are drawn, used or not, so that no part depends on another.
    rotate, shift, horizontal, vertical = (rng.random(4) < 0.5).tolist()
    angle, right, down = rng.uniform(-1, 1, size=3).tolist()
    jitter = np.where(rng.random(3) < 0.7, rng.uniform(0.5, 1.5, size=3), 1.0).tolist()
    return Augmentation(30 * angle * rotate, (0.15 * right * shift, 0.15 * down * shift), horizontal, vertical, *jitter)


def move_pair(
    image: Picture,
    mask: Picture,
    parameters: Augmentation,
    choices: AugmentationConfig = DEFAULT_AUGMENTATION,
    fill: Sequence[float] = (0, 0, 0),
) -> tuple[Picture, Picture, bool]:
    """Rotate, shift and flip an image and its mask together.

    Args:
        image: A PIL image; for separate moves the normalised image, (3, S, S).
        mask: A PIL image; for separate moves (1, S, S).
        parameters: The augmentation.
        choices: Its details.
        fill: The colour of uncovered pixels, in the image's own values; they are normal in the mask.

    Returns:
        The image, the mask, and whether the anomaly was moved out of the image. A mask that was empty before has no
        anomaly to lose.
    """
    separate = choices.augment_moves == "separate"
    moved = _move(mask, parameters, InterpolationMode.NEAREST, separate)
    # With nearest neighbours, a small anomaly can vanish from the mask although it is still visible in the image.
    lost = (
        _is_anomalous(mask)
        and not _is_anomalous(moved)
        and not _is_anomalous(_move(mask, parameters, InterpolationMode.BILINEAR, separate))
    )
    return _move(image, parameters, InterpolationMode(choices.augment_resampling), separate, fill), moved, lost


def _is_anomalous(mask: Image.Image | Tensor) -> bool:
    return bool(np.asarray(mask).any())


def change_colours(image: Image.Image, parameters: Augmentation) -> Image.Image:
    """Change brightness, contrast and saturation by their factors."""
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
    """Rotate, shift and flip, in one resampling; or `separate`, with a shift by whole pixels."""
    height, width = F.get_size(image)
    angle, shift = parameters.angle, [parameters.shift[0] * width, parameters.shift[1] * height]
    options: dict[str, Any] = {"scale": 1.0, "shear": [0.0, 0.0], "interpolation": interpolation, "fill": fill}
    if separate:
        if angle:
            image = F.affine(image, angle, [0, 0], **options)
        angle, shift = 0.0, [round(pixels) for pixels in shift]
        options["interpolation"] = InterpolationMode.NEAREST
    if angle or any(shift):
        image = F.affine(image, angle, shift, **options)
    if parameters.flip_horizontal:
        image = F.horizontal_flip(image)
    return F.vertical_flip(image) if parameters.flip_vertical else image
