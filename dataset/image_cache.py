"""Images and masks as squares of one size, kept in files so that each is decoded and resized once.

A file is named after the content that the square was made from. Finding that digest takes a twentieth of decoding, so
neither paths nor times need be trusted: a copied, renamed or replaced image has the square that is its own.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
import socket
import struct
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import PIL
from PIL import Image, features

from dataset.images import check_sizes, read_image, read_mask
from dataset.options import HALF
from dataset.records import Record
from utils.errors import UserError
from utils.files import check_folder, reason, remove_leftovers
from utils.paths import is_file, is_folder, is_no_file, safe_name

logger = logging.getLogger(__name__)

CACHE_FOLDER = ".image_cache"
# To be raised whenever reading, turning or resizing of images or masks changes: older squares are then made anew.
VERSION = 1
# Checksum of all that follows, then width and height of the picture that the square was made from.
_HEADER = struct.Struct("<III")
_GIB = 2**30


class Kind(NamedTuple):
    """What a square shows: its name in files, how it is kept (a Pillow mode), and how it is read and resized."""

    name: str
    mode: str
    read: Callable[[Path, bytes | None], Image.Image]
    resampling: Image.Resampling


class Square(NamedTuple):
    """A picture resized to a square, and the size (width, height) that it had."""

    picture: Image.Image
    source_size: tuple[int, int]


IMAGE = Kind("image", "RGB", read_image, Image.Resampling.BICUBIC)


def mask_kind(threshold: float | str = HALF) -> Kind:
    """Masks cut at a threshold (`dataset.images.read_mask`): a bit for each pixel."""
    name = threshold if isinstance(threshold, str) else repr(float(threshold))
    return Kind(
        f"mask-{name}", "1", lambda path, content: read_mask(path, threshold, content), Image.Resampling.NEAREST
    )


@dataclass(frozen=True)
class ImageCache:
    """The squares of one size in a folder that any number of processes may read and add to.

    A file appears whole or not at all, and one that is damaged is not believed: whatever goes wrong costs decoding,
    and nothing else. `writable`: whether squares may be added.
    """

    folder: Path
    img_size: int
    writable: bool = True

    def get(self, digest: str, kind: Kind) -> Square | None:
        """The square made from the content of this digest; None where there is none that is whole."""
        try:
            data = self._file(digest, kind).read_bytes()
        except OSError:
            return None
        if len(data) != _HEADER.size + square_bytes(kind, self.img_size):
            return None
        checksum, *source_size = _HEADER.unpack_from(data)
        if _checksum(data) != checksum:
            return None
        size = (self.img_size, self.img_size)
        picture = Image.frombytes(kind.mode, size, memoryview(data)[_HEADER.size :])
        return Square(picture.convert("L") if kind.mode == "1" else picture, tuple(source_size))

    def put(self, digest: str, kind: Kind, square: Square) -> None:
        """Keep a square; where that fails, this process keeps no more, and a line says why."""
        if not self.writable or self in _given_up:
            return
        pixels = square.picture.convert(kind.mode, dither=Image.Dither.NONE).tobytes()
        data = _HEADER.pack(0, *square.source_size) + pixels
        file = self._file(digest, kind)
        # A name that no other process can choose at the same time, in a form that `remove_leftovers` knows.
        temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.{os.getpid()}@{socket.gethostname()}.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(_HEADER.pack(_checksum(data), *square.source_size) + pixels)
            temporary.replace(file)
        except OSError as error:
            # Another process may have written the same square, which Windows does not replace while it is read.
            if not is_file(file):
                _given_up.add(self)
                logger.warning("%s: no more resized images are kept there: %s", self.folder, reason(error))
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _file(self, digest: str, kind: Kind) -> Path:
        return self.folder / f"{digest}.{kind.name}"


# Caches that this process could not write to.
_given_up: set[ImageCache] = set()


def _checksum(data: bytes) -> int:
    """Of a file's content behind the checksum itself."""
    return zlib.crc32(memoryview(data)[4:])


def square_bytes(kind: Kind, img_size: int) -> int:
    """Bytes of a square's pixels: three a pixel for images, rows of bits for masks."""
    return img_size * (3 * img_size if kind.mode == "RGB" else -(-img_size // 8))


def square_pair(
    root: Path, record: Record, img_size: int, mask_threshold: float | str = HALF, kept: ImageCache | None = None
) -> tuple[Image.Image, Image.Image]:
    """A record's image and its mask, all 0 for a normal image, as squares: the same with `kept` ones and without.

    mask_threshold, and the errors that are raised: as of `dataset.images.read_pair`.
    """
    image = _square(root / record.image_path, IMAGE, img_size, kept)
    if record.mask_path is None:
        return image.picture, empty_mask(img_size)
    mask = _square(root / record.mask_path, mask_kind(mask_threshold), img_size, kept)
    check_sizes(root, record, image.source_size, mask.source_size)
    return image.picture, mask.picture


def empty_mask(img_size: int) -> Image.Image:
    """The mask of a normal image."""
    return Image.new("L", (img_size, img_size))


def _square(path: Path, kind: Kind, img_size: int, kept: ImageCache | None) -> Square:
    content = None if kept is None else _content(path)
    if content is None:
        return _made(kind.read(path, None), kind, img_size)
    digest = hashlib.blake2b(content, digest_size=20).hexdigest()
    square = kept.get(digest, kind)
    if square is None:
        square = _made(kind.read(path, content), kind, img_size)
        kept.put(digest, kind, square)
    return square


def _content(path: Path) -> bytes | None:
    """A file's bytes; None for what cannot be read, of which decoding says why."""
    try:
        return None if is_no_file(path) else path.read_bytes()
    except (OSError, ValueError):
        return None


def _made(picture: Image.Image, kind: Kind, img_size: int) -> Square:
    return Square(picture.resize((img_size, img_size), kind.resampling), picture.size)


def open_cache(root: Path, records: Sequence[Record], img_size: int, gib: float) -> ImageCache | None:
    """The cache below a dataset's folder; None where the squares of `records` do not fit or cannot be kept there.

    gib: the most that squares of all sizes below this folder may take. They may fill half of what is free on the disk.
    A line in the log says, once, whether images are kept, and why not.
    """
    masks = sum(record.mask_path is not None for record in records)
    return _open_cache(root / CACHE_FOLDER, len(records), masks, img_size, gib) if gib > 0 else None


@cache
def _open_cache(folder: Path, images: int, masks: int, img_size: int, gib: float) -> ImageCache | None:
    kept = ImageCache(folder / f"{img_size}_{made_by()}", img_size)
    refusal = None
    try:
        held, others = _held(kept.folder), sum(map(_held, folder.iterdir())) if is_folder(folder) else 0
        needed = max(held, images * square_bytes(IMAGE, img_size) + masks * square_bytes(mask_kind(), img_size))
        free = shutil.disk_usage(folder.parent).free
        if others - held + needed > gib * _GIB:
            refusal = f"{(others - held + needed) / _GIB:.3g} GiB would be needed, --cache_images allows {gib:g}"
        elif needed - held > free / 2:
            refusal = f"{(needed - held) / _GIB:.3g} GiB more would be needed, half of the disk's free space is less"
        else:
            check_folder(kept.folder, "--cache_images")
            remove_leftovers(kept.folder)
    except OSError as error:
        refusal = f"{folder}: {reason(error)}"
    except UserError as error:
        # Squares of somebody else, who may write there, are of use all the same.
        kept = replace(kept, writable=False)
        refusal = None if is_folder(kept.folder) else str(error)
    if refusal:
        logger.info("Images are decoded and resized each time they are needed: %s", refusal)
        return None
    logger.info("Resized images are kept in %s, %.3g GiB (--cache_images 0 keeps none)", kept.folder, needed / _GIB)
    return kept


def made_by() -> str:
    """What squares depend on beside a picture's content: this code, and the libraries that decode and resize."""
    jpeg = features.version("libjpeg_turbo") or features.version("jpg")
    return safe_name(f"v{VERSION}_pillow{PIL.__version__}_jpeg{jpeg}")


def _held(folder: Path) -> int:
    """Bytes of the squares in a folder, of the size in its name, by their number: looking at each takes long."""
    size = folder.name.partition("_")[0]
    if not size.isdecimal() or not is_folder(folder):
        return 0
    names = [entry.name for entry in folder.iterdir()]
    images = sum(name.endswith(f".{IMAGE.name}") for name in names)
    masks = len(names) - images
    return images * square_bytes(IMAGE, int(size)) + masks * square_bytes(mask_kind(), int(size))
