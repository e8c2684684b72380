"""Images that somebody drops on the page: within limits, of known formats, and called by names that are never paths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dataset.folders import IMAGE_ENDINGS, KNOWN_BY_CONTENT
from dataset.images import read_image
from utils.errors import UserError

ENDINGS = sorted({*IMAGE_ENDINGS, ".gif"})
# Of one file, in bytes and in pixels.
MOST_BYTES = 20 * 2**20
MOST_PIXELS = 50_000_000
# Of files at once: to be looked at, to compare with, to find thresholds by.
MOST_IMAGES, MOST_REFERENCES, MOST_NORMAL = 32, 16, 400


@dataclass(frozen=True)
class Dropped:
    """An image, or the file that the server has put it in; `name` is what the browser calls it, for people to read."""

    name: str
    source: Path | Image.Image

    def read(self) -> Image.Image:
        """The image as RGB; `UserError`, by the image's name, for what is too large, damaged, or no image."""
        if isinstance(self.source, Image.Image):
            return self.source
        try:
            if self.source.stat().st_size > MOST_BYTES:
                raise UserError(f"{self.name} is larger than {MOST_BYTES // 2**20} MiB, which is the most")
            content = self.source.read_bytes()
        except OSError:
            raise UserError(f"{self.name} is no longer kept here: drop it again") from None
        return read_image(Path(self.name), content, KNOWN_BY_CONTENT, MOST_PIXELS)


def dropped(files: Sequence[str] | None, most: int) -> list[Dropped]:
    """The files that the page has received, by the paths that the server gave them; `UserError` for too many."""
    files = files or []
    if len(files) > most:
        raise UserError(f"{len(files)} images at once: {most} are the most")
    return [Dropped(Path(file).name, Path(file)) for file in files]
