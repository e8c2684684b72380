"""Find folders and images; letter case, separators in names, and clutter of operating systems do not matter."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath

from PIL import Image

from dataset.conventions import (
    KNOWN_BY_CONTENT,
    extension_note,
    image_key,
    is_anomalous_name,
    is_ground_truth_name,
    is_image_name,
    is_normal_name,
    mask_key,
    may_be_mask_name,
    normalized,
    possible_masks,
    same_name,
)
from utils.errors import UserError
from utils.paths import is_file, is_folder, is_no_file
from utils.text import list_names

logger = logging.getLogger(__name__)

# What operating systems and network storage add to folders; names with a leading dot are skipped anyway.
_CLUTTER = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
_CLUTTER |= {"thumbs.db", "desktop.ini"}


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


def files_below(folder: Path) -> Iterator[Path]:
    """The files in a folder and below; links to folders are not followed."""
    for entry in listing(folder):
        if is_folder(entry) and not entry.is_symlink():
            yield from files_below(entry)
        elif not is_folder(entry):
            yield entry


def images_in(folder: Path | None) -> list[Path]:
    """The image files in a folder; none of None."""
    return [] if folder is None else [entry for entry in listing(folder) if is_image(entry)]


def is_image(path: Path) -> bool:
    """Whether a file has the extension of an image, or the content of one and no extension."""
    return is_file(path) and (is_image_name(path) or (not path.suffix and _is_image_inside(path)))


def images_and_masks_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images in a folder, and the masks next to them ("1.jpg" and "1_mask.png")."""
    files = images_in(folder)
    pairs = possible_masks(files).items()
    masks = {file: image for file, image in pairs if looks_like_mask(file) and not looks_like_mask(image)}
    return [file for file in files if file not in masks], list(masks)


@dataclass
class FoundImages:
    """The images of a folder, messages about entries that cannot be read, and why other files are skipped.

    Masks are not among the images; they are in `mask_folders`, or in `masks` if they are next to their images.
    """

    images: list[Path] = field(default_factory=list)
    mask_folders: list[Path] = field(default_factory=list)
    masks: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def skipped_note(skipped: Counter[str]) -> str:
    """The number of skipped files for each reason, such as "skipped: 3 .json, 2 dangling links"; empty if none."""
    counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items() if count)
    return f"skipped: {counts}" if counts else ""


def skip_reason(path: Path) -> str:
    """Why a file that is no image is skipped, in a few words."""
    if os.path.lexists(path) and not os.path.exists(path):  # noqa: PTH110
        return "dangling links"
    return extension_note(path) if is_file(path) else "other than regular files"


def images_below(folder: Path, masks_named: str | None = None) -> FoundImages:
    """Find all images in a folder and below, folder by folder in order of their names.

    Images are recognised by the extensions that Pillow reads, or by their content if they have none. Links are
    followed; every folder is visited once. Masks and the heatmaps of earlier runs are skipped. `masks_named` is the
    name, or the path below `folder`, of the only folders that contain masks.

    Raises:
        UserError: `folder` cannot be read.
    """
    found = FoundImages()
    seen: set[str] = set()
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
            found.problems.append(str(error))
            continue
        folders = [entry for entry in entries if is_folder(entry)]
        images, masks = images_and_masks_in(current)
        mask_folders = find_mask_folders(folders)
        if masks_named is not None:
            images, masks = images_in(current), []
            mask_folders = [entry for entry in folders if is_called(entry, masks_named, folder)]
        skipped = {entry: f"in the mask folder {entry.name}" for entry in mask_folders}
        skipped |= {entry: f"in the output folder {entry.name}" for entry in folders if _is_output(entry, entries)}
        for entry, reason in skipped.items():
            found.skipped[reason] += sum(map(is_image_name, files_below(entry)))
        waiting += reversed([entry for entry in folders if entry not in skipped])
        found.images += images
        found.masks += masks
        found.mask_folders += mask_folders
        found.skipped["masks next to their images"] += len(masks)
        found.skipped.update(map(skip_reason, sorted(set(entries).difference(folders, images, masks))))
    return found


def is_called(folder: Path, name: str, root: Path) -> bool:
    """Whether a folder below `root` has this name, or this path below `root`."""
    return same_name(folder.name, name) or folder == root / name


def _is_output(folder: Path, entries: Iterable[Path]) -> bool:
    """Whether a folder among `entries` holds the heatmaps or evaluated images of an earlier run."""
    if folder.name.startswith("heatmaps"):
        return next(folder.rglob("*_heatmap.png"), None) is not None
    return "pictures_" in folder.name and any("evaluation_" in entry.name for entry in entries)


def is_named_like_masks(folder: Path) -> bool:
    """Whether a folder holds masks by its name; for names such as "label", two of its images are looked at as well."""
    if is_ground_truth_name(folder.name) or not may_be_mask_name(folder.name):
        return is_ground_truth_name(folder.name)
    # The last one too: a class may have such a name, and masks of its own.
    images = [file for file in files_below(folder) if is_image(file)]
    return bool(images) and looks_like_mask(images[0]) and looks_like_mask(images[-1])


def find_mask_folders(folders: Sequence[Path], candidates: Sequence[Path] | None = None) -> list[Path]:
    """Which of several folders next to each other hold masks, instead of images.

    These are named like masks, or their files look like masks and are named like the images in the other folders.
    `candidates` are the folders to judge, by default all.
    """
    keys = {folder: {image_key(image) for image in images_in(folder)} for folder in folders}
    counts = Counter(chain.from_iterable(keys.values()))

    def repeats_others(folder: Path) -> bool:
        images = images_in(folder)
        if not images or any(counts[key] <= (key in keys[folder]) for key in map(mask_key, images)):
            return False
        # Drawings in black and white are no masks of each other.
        others = [other for other in folders if other != folder and keys[other]]
        return looks_like_mask(images[0]) and not all(looks_like_mask(images_in(other)[0]) for other in others)

    return [
        folder
        for folder in (folders if candidates is None else candidates)
        if is_named_like_masks(folder)
        or not (is_normal_name(folder.name) or is_anomalous_name(folder.name) or not repeats_others(folder))
    ]


def looks_like_mask(path: Path) -> bool:
    """Whether at most two exact colours make up 90% of an image; even flat photographs have more, because of noise."""
    try:
        with Image.open(path) as image:
            colours = image.convert("RGB").resize((64, 64), Image.Resampling.NEAREST).getcolors(64 * 64) or []
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return sum(sorted(count for count, _ in colours)[-2:]) >= 0.9 * 64 * 64


def find_images(image: Path, flag: str) -> FoundImages:
    """An image, or those in a folder and below (`images_below`); `UserError` with `flag` if there are none."""
    if is_file(image):
        return FoundImages([image])
    if not is_folder(image):
        reason = "is neither a file nor a folder" if is_no_file(image) else "no such file or folder"
        raise UserError(f"{flag} {image}: {reason}")
    found = images_below(image)
    if not found.images:
        notes = "; ".join(filter(None, (*found.problems[:1], skipped_note(found.skipped))))
        raise UserError(f"{flag} {image}: no images in this folder or below{notes and f' ({notes})'}")
    for problem in found.problems:
        logger.warning("skipped: %s", problem)
    if note := skipped_note(found.skipped):
        logger.info("%s %s: %d images; %s", flag, image, len(found.images), note)
    return found


def _is_image_inside(path: Path) -> bool:
    try:
        with Image.open(path, formats=KNOWN_BY_CONTENT):
            return True
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def find_folders(parent: Path, relative: str) -> Iterator[Path]:
    """All folders `relative` (forward slashes) below `parent`: first the exact name, then the same (`same_name`)."""
    first, _, rest = relative.partition("/")
    matches = [child for child in subfolders(parent) if same_name(child.name, first)] if is_folder(parent) else []
    for match in sorted(matches, key=lambda child: child.name != first):
        yield from find_folders(match, rest) if rest else (match,)


def find_folder(parent: Path | None, relative: str) -> Path | None:
    """The first of `find_folders`, None if there is none."""
    return None if parent is None else next(find_folders(parent, relative), None)


def describe_folder(folder: Path) -> str:
    """The content of a folder in a few words, for error messages."""
    folders = [entry.name for entry in subfolders(folder)]
    files = [entry.name for entry in listing(folder) if not is_folder(entry)]
    parts = [f"{kind} {list_names(names)}" for kind, names in (("the folders", folders), ("the files", files)) if names]
    return " and ".join(parts) or "nothing"


def existing_path(root: Path, path: str) -> str:
    """The path of a list in the Unicode form that the files in `root` have; unchanged if there is none."""
    if path.isascii() or Path(path).is_absolute() or is_file(root / path):
        return path
    folder = root
    for part in PurePosixPath(path).parts:
        entries = listing(folder) if is_folder(folder) else []
        folder /= next((entry.name for entry in entries if normalized(entry.name) == normalized(part)), part)
    return folder.relative_to(root).as_posix()
