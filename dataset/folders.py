"""Looking into folders as people and archives leave them: letter case, separators and clutter do not matter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from utils.errors import UserError
from utils.paths import is_file, is_folder

IMAGE_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})

# What operating systems and storage boxes leave beside data; names with a leading dot are left out anyway.
_CLUTTER = frozenset({"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"})


def listing(folder: Path) -> list[Path]:
    """What is in a folder, in order, without hidden entries and clutter; UserError where it cannot be read."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read: {error.strerror or error}") from error
    return [entry for entry in entries if not entry.name.startswith(".") and entry.name.casefold() not in _CLUTTER]


def subfolders(folder: Path | None) -> list[Path]:
    """The folders in a folder; none of None."""
    return [] if folder is None else [entry for entry in listing(folder) if is_folder(entry)]


def images_in(folder: Path | None) -> list[Path]:
    """The image files in a folder, known by their endings; none of None."""
    if folder is None:
        return []
    return [entry for entry in listing(folder) if entry.suffix.lower() in IMAGE_ENDINGS and is_file(entry)]


def same_name(one: str, other: str) -> bool:
    """Whether two names differ in letter case, blanks, hyphens and underscores at most."""
    return _folded(one) == _folded(other)


def find_folders(parent: Path, relative: str) -> Iterator[Path]:
    """All folders `relative` (forward slashes) below `parent`: the one of exactly that name first, then others that
    are the same name (`same_name`), in order."""
    first, _, rest = relative.partition("/")
    for match in _children_named(parent, first):
        if rest:
            yield from find_folders(match, rest)
        else:
            yield match


def find_folder(parent: Path | None, relative: str) -> Path | None:
    """The first of `find_folders`, None where there is none."""
    return None if parent is None else next(find_folders(parent, relative), None)


def describe_folder(folder: Path) -> str:
    """What a folder holds, in a few words for an error message."""
    folders = [entry.name for entry in subfolders(folder)]
    files = [entry.name for entry in listing(folder) if not is_folder(entry)]
    found = [f"{kind} {_some(names)}" for kind, names in (("the folders", folders), ("the files", files)) if names]
    return " and ".join(found) or "nothing"


def _some(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _folded(name: str) -> str:
    return name.casefold().translate({ord(mark): None for mark in "-_ "})


def _children_named(parent: Path, name: str) -> Iterator[Path]:
    exact = parent / name
    if is_folder(exact):
        yield exact
    if is_folder(parent):
        yield from (child for child in subfolders(parent) if child.name != name and same_name(child.name, name))
