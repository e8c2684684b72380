"""Images that a visitor uploads: limited in size and number, and named by names that are never used as paths."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dataset.conventions import KNOWN_BY_CONTENT, image_extensions
from dataset.images import read_image
from utils.errors import UserError

ENDINGS = sorted(image_extensions(KNOWN_BY_CONTENT))
# Of one file.
MAX_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000
# At once: images to analyze, references, and normal images for thresholds.
MAX_IMAGES, MAX_REFERENCES, MAX_NORMAL = 32, 16, 400


@dataclass(frozen=True)
class Upload:
    """An image, or the server's file that contains it; `name` is only displayed."""

    name: str
    source: Path | Image.Image

    def read(self) -> Image.Image:
        """The image as RGB; `UserError` with the name of the upload if it is too large, damaged, or not an image."""
        if isinstance(self.source, Image.Image):
            return self.source
        try:
            if self.source.stat().st_size > MAX_BYTES:
                raise UserError(f"{self.name} is larger than {MAX_BYTES // 2**20} MiB, which is the limit")
            content = self.source.read_bytes()
        except OSError:
            raise UserError(f"{self.name} was deleted from the server: upload it again") from None
        return read_image(Path(self.name), content, KNOWN_BY_CONTENT, MAX_PIXELS)


def make_uploads(files: Sequence[str] | None, limit: int) -> list[Upload]:
    """The uploads in the files that the server received; `UserError` if there are more than `limit`."""
    files = files or []
    if len(files) > limit:
        raise UserError(f"{len(files)} images at once: the limit is {limit}")
    return [Upload(Path(file).name, Path(file)) for file in files]
