"""Safe file names from text of data and checkpoints, and checks of paths that never raise."""

import hashlib
import os
import re
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path, PurePath

# Not allowed in names on Windows; surrogates stand for bytes that are not UTF-8.
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f\ud800-\udfff]')
_AT_THE_END = re.compile(r"[ .]+$")
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\.|$)", re.IGNORECASE)
# Bytes: file systems allow 255, and callers add a number and an extension.
_LONGEST = 120


def safe_name(text: str) -> str:
    """Turn text into a valid name of one file or folder on Linux and Windows; valid names stay unchanged.

    A changed name ends in a digest of the text, so that different texts have different names.
    """
    name = _AT_THE_END.sub("_", _FORBIDDEN.sub("_", text))
    if _DEVICES.match(name):
        name = f"_{name}"
    name = name.encode("utf-8")[:_LONGEST].decode("utf-8", "ignore")
    if name == text and name:
        return name
    return f"{name or '_'}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def figure_path(folder: Path, image_path: str, ending: str, taken: set[str]) -> Path:
    """The path of an image's figure: the image's path below `folder`, with another extension.

    Args:
        folder: The folder of all figures; no path leads out of it.
        image_path: The path of the image in its dataset.
        ending: The end of the figure's name, such as ".png".
        taken: The figures so far, to which this one is added. If `a.png` has "a.png" already, `a.jpg` gets "a.jpg.png".
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
    """Whether a path is a regular file; unlike `Path.is_file`, False for a path that is too long or not permitted."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: Path) -> bool:
    """Whether a path is a folder, like `is_file`."""
    return os.path.isdir(path)  # noqa: PTH112


def is_no_file(path: Path) -> bool:
    """Whether a path exists but is not a regular file: a folder, or a pipe or device whose reading may not end."""
    return os.path.exists(path) and not is_file(path)  # noqa: PTH110


def common_folder(folders: Sequence[Path]) -> Path:
    """The folder that contains all of these absolute paths, or the drive of the first if they are on several."""
    try:
        return Path(os.path.commonpath(folders))
    except ValueError:  # on two drives of Windows
        return Path(folders[0].anchor)


def expanded(path: str | Path) -> Path:
    """Replace `~` by the home folder; unlike `Path.expanduser`, an unknown user changes nothing."""
    return Path(os.path.expanduser(path))  # noqa: PTH111
