"""From a record to tensors: reading, augmentation, and an order that depends on nothing but the run's position.

Everything up to the last step happens on PIL images: 8 bits, one thread, the same bits whatever the number of workers.
"""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from dataset.metadata import METADATA_FILE, Record
from utils.errors import UserError
from utils.seeding import derive_seed

logger = logging.getLogger(__name__)

AUGMENTATIONS = ("none", "geometric", "full")

# What Pillow raises for a damaged file, beside the OSError of most formats.
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
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


def read_image(path: Path) -> Image.Image:
    """Read a picture of any kind as 8-bit RGB, turned as its EXIF tag says.

    Values beyond 255 mean the range 0 to 65535 and are divided by 257, the same for every image: stretching each to
    its own range would make its brightness depend on its brightest defect. Floats up to 1 mean the range 0 to 1.
    Transparency is dropped, not blended with a background. Raises UserError, with the path, for what cannot be read.
    """
    image = _open(path)
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        return Image.fromarray(_eight_bits(np.asarray(image), path)).convert("RGB")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    return image.convert("RGB")


def read_mask(path: Path) -> Image.Image:
    """Read a mask as mode "L": 255 where the image is anomalous, 0 elsewhere; turned as its own EXIF tag says.

    - Class indices (whole numbers below 32: 0/1 masks, several defect types): all but 0 are anomalous.
    - Palette masks with colours in them: all but black is anomalous.
    - Everything else is a grey level, of the strongest colour channel times opacity: anomalous from half of the mask's
      largest value on, which cuts the noise of lossy compression and the fringe of smoothed outlines.

    Raises UserError, with the path, for what cannot be read.
    """
    image = _open(path)
    if image.mode == "P" and _has_colours(image):
        anomalous = np.asarray(image.convert("RGB")).any(axis=2)
    else:
        values = _mask_values(image)
        if not np.isfinite(values).all():
            raise UserError(f"{path} cannot be read as a mask: it holds values that are no numbers")
        anomalous = _above_background(values)
    return Image.fromarray(anomalous.astype(np.uint8) * 255)


def image_tensor(image: Image.Image, img_size: int, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """An RGB picture as a model takes it: square (bicubic), normalised, float32 (3, S, S)."""
    return _normalised(_square(image, img_size), _per_channel(mean), _per_channel(std))


def _square(image: Image.Image, img_size: int) -> Image.Image:
    return image.resize((img_size, img_size), Image.Resampling.BICUBIC)


def _per_channel(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(3, 1, 1)


def _normalised(image: Image.Image, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    return (F.pil_to_tensor(image).float() / 255 - mean) / std


@dataclass(frozen=True)
class SampleKey:
    """Which record to load, and the seed of its augmentation."""

    index: int
    seed: int


class AnomalyDataset(Dataset):
    """Records as samples: a dict with

    - `image`: float32 (3, S, S), resized to a square (bicubic) and normalised with `mean` and `std`;
    - `mask`: float32 (1, S, S), 1 where anomalous (nearest neighbour), all 0 for normal images;
    - `label`: 0 normal, 1 anomalous; `class_name`; `image_path`; `index`: the record's position.

    `augment`: "geometric" turns, shifts and flips image and mask together, "full" also changes brightness,
    contrast and saturation. The parameters come from `SampleKey.seed` alone; a plain index is for `augment="none"`,
    with anything else it raises ValueError. What augmentation uncovers is black in the image (as in the published code)
    and normal in the mask. An anomaly that was moved out of the picture entirely leaves a normal image, label 0; an
    anomalous image whose mask is empty from the start keeps its label.

    Raises UserError for a file that cannot be read and for a mask of another size than its image.
    """

    def __init__(
        self,
        root: Path,
        records: Sequence[Record],
        img_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: str = "none",
    ) -> None:
        if augment not in AUGMENTATIONS:
            raise ValueError(f"augment must be one of {', '.join(AUGMENTATIONS)}, not {augment!r}")
        self.root = Path(root)
        self.records = list(records)
        self.img_size = img_size
        self.augment = augment
        self.mean, self.std = _per_channel(mean), _per_channel(std)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        index = key.index if isinstance(key, SampleKey) else key
        record = self.records[index]
        image, mask = read_pair(self.root, record)
        size = (self.img_size, self.img_size)
        image = _square(image, self.img_size)
        mask = Image.new("L", size) if mask is None else mask.resize(size, Image.Resampling.NEAREST)
        label = record.label
        if self.augment != "none":
            if not isinstance(key, SampleKey):
                raise ValueError("augmentation needs a SampleKey: give the loader a SeededSampler")
            parameters = draw_augmentation(key.seed)
            if self.augment == "full":
                image = _jitter(image, parameters)
            moved = _move(mask, parameters, InterpolationMode.NEAREST)
            if label and mask.getbbox() and not moved.getbbox() and _is_out_of_sight(mask, parameters):
                label = 0
            image, mask = _move(image, parameters, InterpolationMode.BILINEAR), moved
        return {
            "image": _normalised(image, self.mean, self.std),
            "mask": (F.pil_to_tensor(mask) > 0).float(),
            "label": label,
            "class_name": record.class_name,
            "image_path": record.image_path,
            "index": index,
        }


class SeededSampler(Sampler[SampleKey]):
    """Every index once, as SampleKeys, in an order and with seeds that follow from (seed, stage, loop, epoch).

    `set_position` before each epoch; iterating twice at one position gives the same keys.
    """

    def __init__(self, length: int, seed: int, stage: int, shuffle: bool = True) -> None:
        self.length = length
        self.seed = seed
        self.stage = stage
        self.shuffle = shuffle
        self.set_position(loop=1, epoch=1)

    def set_position(self, loop: int, epoch: int) -> None:
        self.position = (self.seed, self.stage, loop, epoch)

    def __iter__(self) -> Iterator[SampleKey]:
        order = range(self.length)
        if self.shuffle:
            order = np.random.default_rng(derive_seed(*self.position)).permutation(self.length).tolist()
        for index in order:
            yield SampleKey(index, derive_seed(*self.position, index))

    def __len__(self) -> int:
        return self.length


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


def _jitter(image: Image.Image, parameters: Augmentation) -> Image.Image:
    image = F.adjust_brightness(image, parameters.brightness)
    image = F.adjust_contrast(image, parameters.contrast)
    return F.adjust_saturation(image, parameters.saturation)


def _move(image: Image.Image, parameters: Augmentation, interpolation: InterpolationMode) -> Image.Image:
    """Turn, shift and flip; turn and shift are one resampling. What comes into the picture is 0."""
    if parameters.angle or any(parameters.shift):
        shift = [fraction * side for fraction, side in zip(parameters.shift, image.size, strict=True)]
        image = F.affine(image, parameters.angle, shift, scale=1.0, shear=[0.0, 0.0], interpolation=interpolation)
    if parameters.flip_horizontal:
        image = F.horizontal_flip(image)
    return F.vertical_flip(image) if parameters.flip_vertical else image


def _is_out_of_sight(mask: Image.Image, parameters: Augmentation) -> bool:
    """Whether nothing of the anomaly is left: between nearest neighbours a small one can vanish and still be seen."""
    return _move(mask, parameters, InterpolationMode.BILINEAR).getbbox() is None


def read_pair(root: Path, record: Record) -> tuple[Image.Image, Image.Image | None]:
    """A record's image and its mask, None for a normal image; raises UserError where the two have different sizes."""
    image = read_image(root / record.image_path)
    if record.mask_path is None:
        return image, None
    mask = read_mask(root / record.mask_path)
    if image.size != mask.size:
        (width, height), (mask_width, mask_height) = image.size, mask.size
        raise UserError(
            f"the image {root / record.image_path} is {width} x {height} but its mask {root / record.mask_path} is "
            f"{mask_width} x {mask_height}: both must have one size"
        )
    return image, mask


def _open(path: Path) -> Image.Image:
    try:
        # An open file, not its name: Pillow maps a named TIFF into memory and mixes up the sides of one that is turned.
        with Path(path).open("rb") as file, Image.open(file) as image:
            image.load()
            turn = _TRANSPOSE_OF_ORIENTATION.get(_orientation(image))
            return image.copy() if turn is None else image.transpose(turn)
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is not there; if the dataset's folder has changed, delete its {METADATA_FILE}"
        ) from error
    except _DECODE_ERRORS as error:
        raise UserError(f"{path} cannot be read as an image: {' '.join(str(error).split())}") from error


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_ORIENTATION_TAG)
    except _DECODE_ERRORS:
        # Damaged tags are no damaged picture: it is taken as it lies.
        return None


def _eight_bits(values: np.ndarray, path: Path) -> np.ndarray:
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


def _above_background(values: np.ndarray) -> np.ndarray:
    largest = values.max()
    if largest < _MOST_CLASS_INDICES and (values == np.rint(values)).all():
        return values > 0
    return values >= largest / 2
