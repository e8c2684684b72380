"""The images of a source."""

from __future__ import annotations

from collections.abc import Iterable
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

# The kind of a defect without a name.
ANOMALOUS = "anomalous"
_QUARTER_TURNS = {Image.Transpose[name] for name in ("TRANSPOSE", "TRANSVERSE", "ROTATE_90", "ROTATE_270")}


@dataclass(frozen=True)
class Region:
    """An annotated region in pixels, and its kind.

    polygons: x, y, x, y, ...; runs: numbers of pixels outside and inside in turn, column by column.
    """

    kind: str
    polygons: tuple[tuple[float, ...], ...] = ()
    runs: tuple[int, ...] = ()

    @property
    def has_area(self) -> bool:
        return bool(self.polygons) or any(self.runs[1::2])


@dataclass(frozen=True)
class Outlines:
    """The anomalous regions of an image. size: width and height of the annotated image, if known."""

    regions: tuple[Region, ...] = ()
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
        annotated = self.size or size
        transpose = None if annotated == size else exif_transpose(path)
        if annotated != size and (annotated != size[::-1] or transpose not in _QUARTER_TURNS):
            raise UserError(
                f"{path} is {size[0]} x {size[1]}, but its annotations were made on {annotated[0]} x {annotated[1]}"
            )
        mask = Image.new("L", size if transpose is None else size[::-1])
        for region in self.regions:
            for polygon in region.polygons:
                ImageDraw.Draw(mask).polygon(polygon, fill=255)
            if region.runs:
                columns = np.repeat(np.arange(len(region.runs)) % 2 == 1, region.runs).reshape(mask.size)
                mask.paste(255, mask=Image.fromarray(columns.T.astype(np.uint8) * 255))
        if mask.getbbox() is None:
            raise UserError(f"the annotations of {path} lie outside of it")
        return mask if transpose is None else mask.transpose(transpose)


@dataclass(frozen=True)
class Item:
    """One image of a source: file, label (0 normal, 1 anomalous), class, kind of defect, mask and split."""

    image: Path
    label: int
    class_name: str
    kind: str = ANOMALOUS
    mask: Path | Outlines | None = None
    split: str = "test"


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
