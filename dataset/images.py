"""Reading images and masks of any kind, from files that anybody made."""

from __future__ import annotations

import hashlib
import io
import logging
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from dataset.options import HALF, NONZERO
from dataset.records import Record
from utils.errors import UserError
from utils.paths import is_no_file

logger = logging.getLogger(__name__)

# What Pillow raises for a damaged file, beside the OSError of most formats.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_ORIENTATION_TAG = 0x0112
_TRANSPOSE_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A mask whose largest value is below this holds class indices, not grey levels.
_MOST_CLASS_INDICES = 32


def read_image(
    path: Path, content: bytes | None = None, formats: Sequence[str] | None = None, most_pixels: int | None = None
) -> Image.Image:
    """Read an image of any kind as 8-bit RGB, turned as its EXIF tag says; from the file's `content` where it is given.

    formats: those of Pillow's that are let in, None for all; most_pixels: a larger image is refused undecoded. The
    colours: as for `to_rgb`. Raises UserError, with the path, for what cannot be read.
    """
    return to_rgb(_open(path, content, formats, most_pixels), path)


def to_rgb(image: Image.Image, path: Path | str = "this image") -> Image.Image:
    """An image of any kind as 8-bit RGB; `UserError`, which begins with `path`, for values that mean no colours.

    Values beyond 255 mean the range 0 to 65535 and are divided by 257, the same for every image: stretching each to
    its own range would make its brightness depend on its brightest defect. Floats up to 1 mean the range 0 to 1.
    Transparency is dropped, not blended with a background.
    """
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        return Image.fromarray(_eight_bits(np.asarray(image), path)).convert("RGB")
    try:
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA")
        return image.convert("RGB")
    except ValueError as error:  # a kind of colours that Pillow reads and cannot convert, such as Lab
        raise UserError(f"{path} cannot be read as an image: {error}") from error


def content_digest(image: Image.Image) -> str:
    """A hex digest of an RGB image's size and pixels, the same whatever file they came from."""
    return hashlib.sha256(repr(image.size).encode("ascii") + image.tobytes()).hexdigest()


def read_mask(path: Path, threshold: float | str = HALF, content: bytes | None = None) -> Image.Image:
    """Read a mask as mode "L": 255 where the image is anomalous, 0 elsewhere; turned as its own EXIF tag says.

    threshold: a share of the mask's largest value, or `NONZERO`, as in AA-CLIP's published code. content: the file's,
    where it has been read.

    - Class indices (whole numbers below 32: 0/1 masks, several defect types): all but 0 are anomalous.
    - Palette masks with colours in them: all but black is anomalous.
    - Everything else is a grey level, of the strongest colour channel times opacity: anomalous from `threshold` of the
      mask's largest value on; half of it cuts the noise of lossy compression and the fringe of smoothed outlines.

    Raises UserError, with the path, for what cannot be read.
    """
    image = _open(path, content)
    if image.mode == "P" and _has_colours(image):
        anomalous = np.asarray(image.convert("RGB")).any(axis=2)
    else:
        values = _mask_values(image)
        if not np.isfinite(values).all():
            raise UserError(f"{path} cannot be read as a mask: it holds values that are no numbers")
        anomalous = _above_background(values, threshold)
    return Image.fromarray(anomalous.astype(np.uint8) * 255)


def read_pair(root: Path, record: Record, mask_threshold: float | str = HALF) -> tuple[Image.Image, Image.Image | None]:
    """A record's image and its mask, None for a normal image; raises UserError where the two have different sizes.

    mask_threshold: as for `read_mask`.
    """
    image = read_image(root / record.image_path)
    if record.mask_path is None:
        return image, None
    mask = read_mask(root / record.mask_path, mask_threshold)
    check_sizes(root, record, image.size, mask.size)
    return image, mask


def check_sizes(root: Path, record: Record, image_size: tuple[int, int], mask_size: tuple[int, int]) -> None:
    """Raise UserError where a record's image and mask, as they were read, have different sizes (width, height)."""
    if image_size != mask_size:
        (width, height), (mask_width, mask_height) = image_size, mask_size
        raise UserError(
            f"the image {root / record.image_path} is {width} x {height} but its mask {root / record.mask_path} is "
            f"{mask_width} x {mask_height}: both must have one size"
        )


def find_bad_images(root: Path, records: Sequence[Record]) -> list[tuple[Record, str]]:
    """Read every image and mask once; those that raise a UserError, each with its message, in the records' order."""

    def check(record: Record) -> str | None:
        try:
            read_pair(Path(root), record)
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        messages = pool.map(check, records)
        return [(record, message) for record, message in zip(records, messages, strict=True) if message is not None]


def drop_bad_images(root: Path, records: Sequence[Record]) -> tuple[list[Record], int]:
    """The records that can be read, and how many cannot (`--skip_bad_images`); each of those is logged as a warning."""
    bad = find_bad_images(root, records)
    for _, message in bad:
        logger.warning("skipped: %s", message)
    skipped = {record for record, _ in bad}
    return [record for record in records if record not in skipped], len(bad)


def _open(
    path: Path, content: bytes | None = None, formats: Sequence[str] | None = None, most_pixels: int | None = None
) -> Image.Image:
    # Anything else that can be opened, such as a pipe, may never end.
    if content is None and is_no_file(path):
        raise UserError(f"{path} cannot be read as an image: it is no file")
    try:
        # An open file, not its name: Pillow maps a named TIFF into memory and mixes up the sides of one that is turned.
        opened = Path(path).open("rb") if content is None else io.BytesIO(content)  # noqa: SIM115
        with opened as file, Image.open(file, formats=formats) as image:
            if most_pixels is not None and image.width * image.height > most_pixels:
                raise UserError(f"{path} has {image.width} x {image.height} pixels: {most_pixels:,} are the most")
            image.load()
            turn = _TRANSPOSE_OF_ORIENTATION.get(_orientation(image))
            return image.copy() if turn is None else image.transpose(turn)
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is not there; if the dataset's folder has changed, delete its metadata_test*.jsonl"
        ) from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path} cannot be read as an image: it is of no format that is known") from error
    except _DECODE_ERRORS as error:
        raise UserError(f"{path} cannot be read as an image: {' '.join(str(error).split())}") from error


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_ORIENTATION_TAG)
    except _DECODE_ERRORS:
        # Damaged tags are no damaged image: it is taken as it lies.
        return None


def _eight_bits(values: np.ndarray, path: Path | str) -> np.ndarray:
    """Scale (H, W) values of more than 8 bits, or floats, to uint8."""
    lowest, highest = float(values.min()), float(values.max())
    if not (lowest >= 0 and highest <= 65535):
        raise UserError(f"{path} has values from {lowest:g} to {highest:g}: convert it to 8 or 16 bits")
    if highest > 255:
        scale = 1 / 257
    elif values.dtype.kind == "f" and highest <= 1:
        scale = 255.0
    else:
        scale = 1.0
    return np.rint(values * scale).astype(np.uint8)


def _has_colours(image: Image.Image) -> bool:
    used = np.asarray(image.convert("RGB")).astype(np.int16)
    return bool((used.max(axis=2) != used.min(axis=2)).any())


def _mask_values(image: Image.Image) -> np.ndarray:
    """One number per pixel (H, W) of a mask of any mode, 0 where there is nothing."""
    if image.mode in ("L", "F", "I") or image.mode.startswith("I;"):
        return np.asarray(image)
    if image.mode == "1":
        return np.asarray(image.convert("L"))
    rgba = np.asarray(image.convert("RGBA")).astype(np.float64)
    strongest = rgba[..., :3].max(axis=2)
    return np.rint(strongest * rgba[..., 3] / 255)


def _above_background(values: np.ndarray, threshold: float | str) -> np.ndarray:
    if threshold == NONZERO:
        return values != 0
    largest = values.max()
    if largest < _MOST_CLASS_INDICES and (values == np.rint(values)).all():
        return values > 0
    return values >= largest * float(threshold)
