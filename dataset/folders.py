"""Find folders and images; letter case, separators in names, and clutter of operating systems do not matter."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from utils.errors import UserError
from utils.paths import is_file, is_folder, is_no_file
from utils.text import list_names

IMAGE_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
# Formats of Pillow that are not images, or that need other programs.
_NO_PICTURES = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
# Formats that are recognised by the first bytes of a file without an ending.
KNOWN_BY_CONTENT = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")

# What operating systems and network storage add to folders; names with a leading dot are skipped anyway.
_CLUTTER = frozenset({"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"})


def listing(folder: Path) -> list[Path]:
    """The entries of a folder in order, without hidden ones and clutter; `UserError` if it cannot be read."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read: {error.strerror or error}") from error
    return [entry for entry in entries if not entry.name.startswith(".") and entry.name.casefold() not in _CLUTTER]


def subfolders(folder: Path | None) -> list[Path]:
    """The folders in a folder; none of None."""
    return [] if folder is None else [entry for entry in listing(folder) if is_folder(entry)]


def images_in(folder: Path | None) -> list[Path]:
    """The files in a folder with the endings of images; none of None."""
    if folder is None:
        return []
    return [entry for entry in listing(folder) if entry.suffix.lower() in IMAGE_ENDINGS and is_file(entry)]


class FoundImages(NamedTuple):
    """The content of a folder: images, messages about entries that cannot be read, and the number of other files."""

    images: list[Path]
    problems: list[str]
    others: int


def images_below(folder: Path, leave_out: Collection[Path] = ()) -> FoundImages:
    """Find all images in a folder and below, folder by folder in order of their names.

    Images are recognised by the endings that Pillow reads, or by their content if they have no ending. Links are
    followed; every folder is visited once.

    Args:
        folder: The folder.
        leave_out: Folders to skip.

    Raises:
        UserError: `folder` cannot be read.
    """
    images: list[Path] = []
    problems: list[str] = []
    others, seen = 0, {os.path.realpath(path) for path in leave_out} - {os.path.realpath(folder)}
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        if os.path.realpath(current) in seen:
            continue
        seen.add(os.path.realpath(current))
        try:
            entries = listing(current)
        except UserError as error:
            if current == folder:
                raise
            problems.append(str(error))
            continue
        inside = []
        for entry in entries:
            if is_folder(entry):
                inside.append(entry)
            elif not (is_image_name(entry) or (not entry.suffix and is_file(entry) and _is_image_inside(entry))):
                others += 1
            elif is_file(entry):
                images.append(entry)
            else:
                problems.append(f"{entry} is not a regular file")
        waiting += reversed(inside)
    return FoundImages(images, problems, others)


def find_images(image: Path, flag: str, leave_out: Collection[Path] = ()) -> FoundImages:
    """An image, or those in a folder and below (`images_below`); `UserError` with `flag` if there are none."""
    if is_file(image):
        return FoundImages([image], [], 0)
    if not is_folder(image):
        what = "is neither a file nor a folder" if is_no_file(image) else "no such file or folder"
        raise UserError(f"{flag} {image}: {what}")
    found = images_below(image, leave_out)
    if not found.images:
        problem = f" ({found.problems[0]})" if found.problems else ""
        raise UserError(f"{flag} {image}: no images in this folder or below{problem}")
    return found


def is_image_name(path: Path) -> bool:
    """Whether a path has the ending of an image format that Pillow reads."""
    return path.suffix.lower() in _endings_of_pillow()


@cache
def _endings_of_pillow() -> frozenset[str]:
    known = Image.registered_extensions()
    return IMAGE_ENDINGS | {end for end, name in known.items() if name in Image.OPEN and name not in _NO_PICTURES}


def _is_image_inside(path: Path) -> bool:
    try:
        with Image.open(path, formats=KNOWN_BY_CONTENT):
            return True
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def same_name(one: str, other: str) -> bool:
    """Whether two names differ in letter case, blanks, hyphens and underscores at most."""
    return _folded(one) == _folded(other)


def find_folders(parent: Path, relative: str) -> Iterator[Path]:
    """All folders `relative` (forward slashes) below `parent`: first the exact name, then the same (`same_name`)."""
    first, _, rest = relative.partition("/")
    for match in _children_named(parent, first):
        if rest:
            yield from find_folders(match, rest)
        else:
            yield match


def find_folder(parent: Path | None, relative: str) -> Path | None:
    """The first of `find_folders`, None if there is none."""
    return None if parent is None else next(find_folders(parent, relative), None)


def describe_folder(folder: Path) -> str:
    """The content of a folder in a few words, for error messages."""
    folders = [entry.name for entry in subfolders(folder)]
    files = [entry.name for entry in listing(folder) if not is_folder(entry)]
    parts = [f"{kind} {list_names(names)}" for kind, names in (("the folders", folders), ("the files", files)) if names]
    return " and ".join(parts) or "nothing"


def _folded(name: str) -> str:
    return name.casefold().translate({ord(mark): None for mark in "-_ "})


def _children_named(parent: Path, name: str) -> Iterator[Path]:
    exact = parent / name
    if is_folder(exact):
        yield exact
    if is_folder(parent):
        yield from (child for child in subfolders(parent) if child.name != name and same_name(child.name, name))
