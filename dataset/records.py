"""The record of one image of a dataset, the order of records, and their digest."""

import hashlib
import json
import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath, PurePosixPath

from utils.errors import UserError
from utils.reading import short_repr

# Values of `--mask_threshold`: anomalous pixels have at least this share of a mask's largest value, or any but 0.
HALF, NONZERO = 0.5, "nonzero"
_LABELS = {0: 0, 1: 1, "0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}


@dataclass(frozen=True)
class Record:
    """One image: paths relative to the dataset's folder with forward slashes, label 0 (normal) or 1 (anomalous)."""

    image_path: str
    label: int
    class_name: str
    mask_path: str | None = None

    @property
    def lacks_mask(self) -> bool:
        """Whether the image is anomalous and has no mask."""
        return bool(self.label) and self.mask_path is None


def natural_key(path: str) -> tuple:
    """A key that sorts paths folder by folder and numbers by value: "a/2.png" before "a/10.png"."""
    return tuple(tuple(map(_piece_key, re.split(r"([0-9]+)", part))) for part in path.split("/")), path


def _piece_key(piece: str) -> tuple[int, str]:
    """Digits are compared by length, then by value, so that numbers of any length can be compared."""
    digits = piece.lstrip("0")
    return (len(digits), digits) if piece[:1].isdecimal() and piece.isascii() else (0, piece)


def random_rank(*key: int | str) -> bytes:
    """The place of something in a random order that depends on its key alone, such as seed and path."""
    return hashlib.sha256(json.dumps(key).encode("ascii")).digest()


def metadata_digest(records: Sequence[Record]) -> str:
    """SHA-256 (hexadecimal) of the records in their order; the file they came from does not matter."""
    canonical = "\n".join(json.dumps([r.image_path, r.label, r.class_name, r.mask_path]) for r in records)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def path_within(path: str, source: str, key: str) -> str:
    """Return a path of a list if it stays in the dataset's folder; otherwise `UserError` with `source` and `key`.

    Symbolic links in the folder may lead out of it.
    """
    if re.match(r"[A-Za-z]:[\\/]", path):
        raise UserError(
            f"{source}: {key} is an absolute Windows path: make it relative to the dataset's folder ({path})"
        )
    outermost = PurePosixPath(posixpath.normpath(path)).parts[:1]
    if outermost in ((), ("..",)) or PurePosixPath(path).anchor or PurePath(path).anchor or not _is_file_name(path):
        raise UserError(
            f"{source}: {key} must be the path of a file below the dataset's folder, not {short_repr(path)} "
            "(a symbolic link in that folder may lead elsewhere)"
        )
    return path


def _is_file_name(path: str) -> bool:
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def parse_label(value: object, source: str) -> int:
    """A label as lists have it, 0 (normal) or 1 (anomalous); otherwise `UserError`, which begins with `source`."""
    key = value.strip().lower() if isinstance(value, str) else value
    # True and 1.0 equal 1; lists and objects cannot be looked up.
    if not isinstance(key, str | int | float) or key not in _LABELS:
        raise UserError(f"{source}: label must be 0 (normal) or 1 (anomalous), not {short_repr(value)}")
    return _LABELS[key]
