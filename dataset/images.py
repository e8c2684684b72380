"""Read and resize images and masks of any format (docs/datasets.md)."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, UnidentifiedImageError

from dataset.records import HALF, NONZERO, Record
from utils.errors import UserError
from utils.paths import is_folder, is_no_file
from utils.reading import wrong_content

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

# With the limit of `--max_megapixels`, for worker processes too.
MAX_MEGAPIXELS_VARIABLE = "ANOMALY_MAX_MEGAPIXELS"
_ORIENTATION_TAG = 0x0112
# For the orientations from 2 on.
_TRANSPOSES = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
_TRANSPOSE_OF_ORIENTATION = dict(enumerate((Image.Transpose[name] for name in _TRANSPOSES), start=2))
# A mask whose largest value is below this holds class indices, not grey levels.
_CLASS_INDICES = 32


def allow_megapixels(megapixels: str) -> None:
    """Read images of up to so many megapixels in this process and its workers, instead of Pillow's 179."""
    os.environ[MAX_MEGAPIXELS_VARIABLE] = megapixels
    Image.MAX_IMAGE_PIXELS = int(megapixels) * 500_000  # where Pillow warns; it refuses twice as many


# Pillow warns from half of the limit on; only an image above the limit is refused. Filtered once: a filter around each
# read would make Python repeat all warnings that it has shown already.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
if MAX_MEGAPIXELS_VARIABLE in os.environ:
    allow_megapixels(os.environ[MAX_MEGAPIXELS_VARIABLE])


def read_image(
    path: Path, content: bytes | None = None, formats: tuple[str, ...] | None = None, max_pixels: int | None = None
) -> Image.Image:
    """Read an image of any kind as 8-bit RGB (`to_rgb`), rotated as its EXIF tag says.

    Args:
        path: The file; error messages name it.
        content: The bytes of the file, if they were read already.
        formats: Names of the Pillow formats to accept. Default: all.
        max_pixels: Images with more pixels are rejected before they are decoded. Default: no limit.

    Returns:
        The image, mode "RGB".

    Raises:
        UserError: The image cannot be read.
    """
    image = to_rgb(_open(path, content, formats, max_pixels), path)
    image.info.clear()  # its orientation has been applied
    return image


def to_rgb(image: Image.Image, path: Path | str = "this image") -> Image.Image:
    """Convert an image of any mode to 8-bit RGB.

    Values above 255 are divided by 257, whatever the image's own range: stretching each image to its range would make
    its brightness depend on its brightest defect. Floats up to 1 are multiplied by 255. Transparency is dropped, not
    blended with a background.

    Args:
        image: An image of any mode.
        path: What error messages begin with.

    Returns:
        The image, mode "RGB".

    Raises:
        UserError: The values are outside of 0 to 65535, or the mode has no conversion to RGB.
    """
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        return Image.fromarray(_eight_bits(np.asarray(image), path)).convert("RGB")
    try:
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA")
        return image.convert("RGB")
    except ValueError as error:  # a colour space that Pillow reads and cannot convert, such as Lab
        raise UserError(f"{path} cannot be read as an image: {error}") from error


def content_digest(image: Image.Image) -> str:
    """SHA-256 (hexadecimal) of an RGB image's size and pixels; the file format does not matter."""
    return hashlib.sha256(repr(image.size).encode("ascii") + image.tobytes()).hexdigest()


def read_mask(path: Path, threshold: float | str = HALF) -> Image.Image:
    """Read a mask, rotated as its own EXIF tag says.

    - Class indices (whole numbers below 32: 0/1 masks, several defect types): every index but 0 is anomalous.
    - Palette masks with colours: every colour but black is anomalous.
    - Everything else is a grey level, the strongest colour channel times opacity: anomalous if it is at least
      `threshold` of the mask's largest value. The default removes the noise of lossy compression and the fringe of
      smoothed outlines.

    Args:
        path: The file, or a folder of several masks of one image, which are combined.
        threshold: A share of the mask's largest value, or `NONZERO` as in AA-CLIP's published code.

    Returns:
        The mask, mode "L": 255 where the image is anomalous, 0 elsewhere.

    Raises:
        UserError: The mask cannot be read.
    """
    from dataset.folders import images_in  # not needed to load a model and predict

    if is_folder(path):
        masks = [read_mask(file, threshold) for file in images_in(path)]
        if len({mask.size for mask in masks}) != 1:
            raise UserError(f"{path} cannot be read as a mask: expected images of one size in this folder")
        return reduce(ImageChops.lighter, masks)
    image = _open(path)
    anomalous: NDArray[np.bool_]
    if image.mode == "P" and _has_colours(image):
        anomalous = np.asarray(image.convert("RGB")).max(axis=2) > 0
    else:
        values = _mask_values(image)
        if not np.isfinite(values).all():
            raise UserError(f"{path} cannot be read as a mask: some of its values are not finite")
        anomalous = _above_threshold(values, threshold)
    return Image.fromarray(anomalous.astype(np.uint8) * 255)


def read_pair(root: Path, record: Record, mask_threshold: float | str = HALF) -> tuple[Image.Image, Image.Image]:
    """Read the image and the mask of a record.

    Args:
        root: The folder that the record's paths are relative to.
        record: The record; without a mask path, the mask is empty.
        mask_threshold: As for `read_mask`.

    Returns:
        The image (mode "RGB") and the mask (mode "L", 255 where anomalous), of the same size.

    Raises:
        UserError: One of them cannot be read, or their sizes differ.
    """
    image = read_image(root / record.image_path)
    if record.mask_path is None:
        return image, Image.new("L", image.size)
    mask = read_mask(root / record.mask_path, mask_threshold)
    if mask.size != image.size:
        raise UserError(
            f"the image {root / record.image_path} is {image.width} x {image.height} but its mask "
            f"{root / record.mask_path} is {mask.width} x {mask.height}: resize the mask to the size of the image"
        )
    return image, mask


def resize_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an image to (width, height), bicubic as CLIP's own preprocessing."""
    return image.resize(size, Image.Resampling.BICUBIC)


def resize_mask(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize a mask to (width, height), nearest neighbour."""
    return mask.resize(size, Image.Resampling.NEAREST)


def image_tensor(image: Image.Image, img_size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn an RGB image into a model's input: resized to a square (bicubic), normalised, float32 (3, S, S)."""
    return normalised(resize_image(image, (img_size, img_size)), per_channel(mean), per_channel(std))


def per_channel(values: Sequence[float]) -> Tensor:
    import torch  # slow to import, and most functions here do not need it

    return torch.tensor(values, dtype=torch.float32).view(3, 1, 1)


def normalised(image: Image.Image, mean: Tensor, std: Tensor) -> Tensor:
    from torchvision.transforms.v2 import functional as F

    return (F.pil_to_tensor(image).float() / 255 - mean) / std


def without_black_masks(root: Path, records: Sequence[Record]) -> list[Record]:
    """The records, in which a mask without an anomalous pixel counts as missing; a warning says how many there are."""

    def is_black(record: Record) -> bool:
        try:
            return record.mask_path is not None and read_mask(root / record.mask_path).getbbox() is None
        except UserError:  # raised again where the mask is needed
            return False

    with ThreadPoolExecutor() as pool:
        black = {record for record, is_empty in zip(records, pool.map(is_black, records), strict=True) if is_empty}
    if black:
        logger.warning(
            "%d of %d masks have no anomalous pixel and count as missing, such as %s",
            len(black),
            sum(record.mask_path is not None for record in records),
            min(str(record.mask_path) for record in black),
        )
    return [replace(record, mask_path=None) if record in black else record for record in records]


def find_bad_images(root: Path, records: Sequence[Record]) -> list[tuple[Record, str]]:
    """Read every image and mask once; return the records that cannot be read, each with its error message."""

    def problem(record: Record) -> str | None:
        try:
            read_pair(root, record)
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        messages = pool.map(problem, records)
        return [(record, message) for record, message in zip(records, messages, strict=True) if message is not None]


def drop_bad_images(root: Path, records: Sequence[Record]) -> list[Record]:
    """Return the records that can be read, and log a warning for each of the others (`--skip_bad_images`)."""
    bad = dict(find_bad_images(root, records))
    for message in bad.values():
        logger.warning("skipped: %s", message)
    return [record for record in records if record not in bad]


def exif_transpose(path: Path) -> Image.Transpose | None:
    """The transposition that the EXIF tag of an image asks for; `read_image` has applied it."""
    with Image.open(path) as image:
        return _transpose(image)


def _open(
    path: Path, content: bytes | None = None, formats: tuple[str, ...] | None = None, max_pixels: int | None = None
) -> Image.Image:
    # Reading from a pipe or a device may never end.
    if content is None and is_no_file(path):
        raise UserError(f"{path} cannot be read as an image: it is not a regular file")
    try:
        # An open file, not its name: Pillow maps a named TIFF into memory and swaps the sides of a rotated one.
        opened = path.open("rb") if content is None else io.BytesIO(content)
        with opened as file, Image.open(file, formats=formats) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise UserError(f"{path} has {image.width} x {image.height} pixels; the limit is {max_pixels:,}")
            return upright(image)
    except (UserError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"{path} {wrong_content(path, error) or 'cannot be read as an image: unknown format'}"
        ) from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise UserError(
            f"{path} has more than {limit:.0f} megapixels: resize it, or allow more with --max_megapixels"
        ) from error
    except Exception as error:  # Pillow raises errors of many classes for damaged files
        raise UserError(f"{path} cannot be read as an image: {' '.join(str(error).split())}") from error


def upright(image: Image.Image) -> Image.Image:
    """A copy of an image, rotated as its EXIF tag says."""
    image.load()  # rotates a TIFF
    transpose = _transpose(image)
    return image.copy() if transpose is None else image.transpose(transpose)


def _transpose(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TRANSPOSE_OF_ORIENTATION.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged tags do not make the image unusable
        return None


def _eight_bits(values: NDArray, path: Path | str) -> NDArray[np.uint8]:
    """Scale (H, W) values of more than 8 bits, or floats, to uint8."""
    lowest, highest = float(values.min()), float(values.max())
    if not (lowest >= 0 and highest <= 65535):
        raise UserError(f"{path} has values from {lowest:g} to {highest:g}: convert it to 8 or 16 bits")
    scale = 1 / 257 if highest > 255 else 1.0
    if values.dtype.kind == "f" and highest <= 1:
        scale = 255.0
    return np.rint(values * scale).astype(np.uint8)


def _has_colours(image: Image.Image) -> bool:
    rgb = np.asarray(image.convert("RGB")).astype(np.int16)
    return bool((rgb.max(axis=2) != rgb.min(axis=2)).any())


def _mask_values(image: Image.Image) -> NDArray:
    """The grey level of each pixel (H, W) of a mask of any mode."""
    if image.mode in ("L", "F", "I") or image.mode.startswith("I;"):
        return np.asarray(image)
    rgba = np.asarray(image.convert("RGBA")).astype(np.float64)
    strongest = rgba[..., :3].max(axis=2)
    return np.rint(strongest * rgba[..., 3] / 255)


def _above_threshold(values: NDArray, threshold: float | str) -> NDArray[np.bool_]:
    if threshold == NONZERO:
        return values != 0
    largest = values.max()
    if largest < _CLASS_INDICES and (values == np.rint(values)).all():
        return values > 0
    return values >= largest * float(threshold)
