"""The images of a source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from dataset.images import exif_transpose, read_image
from utils.errors import UserError
from utils.paths import is_file
from utils.reading import short_repr

# The kind of a defect without a name.
ANOMALOUS = "anomalous"


@dataclass(frozen=True)
class Outlines:
    """Anomalous regions of an image in pixels.

    polygons: x, y, x, y, ...; boxes: left, top, width, height. size: width and height of the annotated image, if known.
    """

    polygons: tuple[tuple[float, ...], ...]
    boxes: tuple[tuple[float, ...], ...]
    size: tuple[int, int] | None

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
        for polygon in self.polygons:
            pen.polygon(polygon, fill=255)
        for left, top, width, height in self.boxes:
            pen.rectangle((left, top, max(left, left + width - 1), max(top, top + height - 1)), fill=255)
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


def existing_file(value: object, source: str, key: str, root: Path) -> Path:
    """The file that a list names, relative to `root`."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise UserError(f"{source}: {key} must be the path of a file, not {short_repr(value)}")
    path = root / value.strip().replace("\\", "/")
    if not is_file(path):
        raise UserError(f"{source}: {key}: {path} does not exist (--images sets the folder that paths are relative to)")
    return path
