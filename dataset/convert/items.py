"""The images of a source."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
from PIL import Image, ImageDraw

from dataset.conventions import is_normal_name
from dataset.folders import existing_path
from dataset.images import exif_transpose, read_image
from utils.errors import UserError
from utils.paths import is_file
from utils.reading import short_repr

logger = logging.getLogger(__name__)

# The kind of a defect without a name.
ANOMALOUS = "anomalous"


@dataclass(frozen=True)
class Region:
    """An annotated region in pixels, and its kind.

    polygons: x, y, x, y, ...; boxes: left, top, width, height; runs: numbers of pixels outside and inside in turn,
    column by column.
    """

    kind: str
    polygons: tuple[tuple[float, ...], ...] = ()
    boxes: tuple[tuple[float, ...], ...] = ()
    runs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outlines:
    """The anomalous regions of an image. size: width and height of the annotated image, if known."""

    regions: tuple[Region, ...]
    size: tuple[int, int] | None = None

    @classmethod
    def of(cls, regions: Iterable[Region], size: tuple[int, int] | None = None) -> Outlines:
        """Without the regions whose kind is called good, ok or the like."""
        return cls(tuple(region for region in regions if not is_normal_name(region.kind)), size)

    @property
    def kind(self) -> str:
        kinds = {region.kind for region in self.regions}
        return kinds.pop() if len(kinds) == 1 else "combined"

    def draw(self, path: Path) -> Image.Image:
        """The mask of the image at `path`, mode "L", in the size that `read_image` gives it.

        The annotations may have been made on the image as it is shown, or on its pixels before the EXIF rotation.
        """
        size = read_image(path).size
        transpose = exif_transpose(path)
        annotated = self.size or size
        quarter_turn = transpose is not None and Image.new("1", (1, 2)).transpose(transpose).size == (2, 1)
        if annotated not in (size, size[::-1] if quarter_turn else size):
            raise UserError(
                f"{path} is {size[0]} x {size[1]}, but its annotations were made on {annotated[0]} x {annotated[1]}"
            )
        mask = Image.new("L", annotated)
        pen = ImageDraw.Draw(mask)
        for region in self.regions:
            for polygon in region.polygons:
                pen.polygon(polygon, fill=255)
            for left, top, width, height in region.boxes:
                pen.rectangle((left, top, max(left, left + width - 1), max(top, top + height - 1)), fill=255)
            if region.runs:
                columns = np.repeat(np.arange(len(region.runs)) % 2 == 1, region.runs).reshape(annotated)
                mask.paste(255, mask=Image.fromarray(columns.T.astype(np.uint8) * 255))
        if mask.getbbox() is None:
            raise UserError(f"the annotations of {path} lie outside of it")
        return mask if annotated == size or transpose is None else mask.transpose(transpose)


@dataclass(frozen=True)
class Item:
    """One image of a source: file, label (0 normal, 1 anomalous), class, kind of defect, mask and split."""

    image: Path
    label: int
    class_name: str
    kind: str = ANOMALOUS
    mask: Path | Outlines | None = None
    split: str = "test"


def without_stray_clicks(polygons: Iterable[Sequence[float]], source: str) -> tuple[tuple[float, ...], ...]:
    """The polygons with at least three points; a warning counts the others."""
    polygons = list(polygons)
    kept = tuple(tuple(polygon) for polygon in polygons if len(polygon) >= 6)
    if len(kept) < len(polygons):
        logger.warning("%s: skipped %d polygons with fewer than three points", source, len(polygons) - len(kept))
    return kept


def existing_file(value: object, source: str, key: str, root: Path) -> Path:
    """The file that a list names, relative to `root`."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise UserError(f"{source}: {key} must be the path of a file, not {short_repr(value)}")
    name = value.strip().replace("\\", "/")
    path = root / existing_path(root, name)
    if is_file(path):
        return path
    if PureWindowsPath(name).drive and not path.drive:
        raise UserError(f"{source}: {key}: {value} is an absolute path of Windows: make it relative to {root}")
    raise UserError(f"{source}: {key}: {path} does not exist (--images sets the folder that paths are relative to)")
