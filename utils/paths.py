"""Paths that others name: file names made from text of data and checkpoints, and looking without being tripped up."""

from __future__ import annotations

import hashlib
import os
import re
from itertools import chain, count
from pathlib import Path, PurePath

# Not allowed in names on Windows, or not text at all: the halves of surrogate pairs stand for bytes that are no UTF-8.
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f\ud800-\udfff]')
_AT_THE_END = re.compile(r"[ .]+$")
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\.|$)", re.IGNORECASE)
# Bytes: file systems take 255, and callers add a number and an ending.
_LONGEST = 120


def safe_name(text: str) -> str:
    """`text` as the name of one file or folder, on Linux and Windows alike; unchanged where it is one already.

    A name that had to be changed ends in a digest of what it was, so that different texts keep different names.
    """
    name = _AT_THE_END.sub("_", _FORBIDDEN.sub("_", text))
    if _DEVICES.match(name):
        name = f"_{name}"
    name = name.encode("utf-8")[:_LONGEST].decode("utf-8", "ignore")
    if name == text and name:
        return name
    return f"{name or '_'}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def figure_path(folder: Path, image_path: str, ending: str, taken: set[str]) -> Path:
    """Where the figure of an image goes: below `folder` to the image's path, with `ending` for the image's own.

    `taken` holds the places given so far, and gets this one: where `a.png` has taken "a" + ending, `a.jpg` gets
    "a.jpg" + ending. Whatever the path, the figure stays in the folder.
    """
    *parents, name = map(safe_name, PurePath(image_path).parts)
    place = folder.joinpath(*parents)
    numbered = (f"{name}_{number}" for number in count(2))
    figures = (place / f"{stem}{ending}" for stem in chain((PurePath(name).stem, name), numbered))
    # Some file systems see no difference between upper and lower case.
    figure = next(figure for figure in figures if figure.as_posix().casefold() not in taken)
    taken.add(figure.as_posix().casefold())
    return figure


def is_file(path: Path) -> bool:
    """Whether a path leads to a regular file; a path that cannot even be looked at (too long, not permitted) does not,
    where `Path.is_file` raises."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: Path) -> bool:
    """Whether a path leads to a folder, as `is_file`."""
    return os.path.isdir(path)  # noqa: PTH112


def is_no_file(path: Path) -> bool:
    """Whether something other than a regular file is there: a folder, or a pipe or device whose reading may not end."""
    return os.path.exists(path) and not is_file(path)  # noqa: PTH110


def expanded(path: str | Path) -> Path:
    """The path with `~` for its home folder, and as it is where there is no such user, where `Path` raises."""
    return Path(os.path.expanduser(path))  # noqa: PTH111
