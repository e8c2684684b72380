"""Find the mask of each image, in mask folders and next to the images."""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

from dataset.conventions import IMAGE_FOLDER_NAMES, folder_word, may_be_mask_name, pair_masks, without_separators
from dataset.folders import files_below, is_image, subfolders
from utils.errors import UserError
from utils.paths import is_file
from utils.text import list_names

logger = logging.getLogger(__name__)

# Files by the names of the folders that the image of each must lie in.
Groups = Mapping[frozenset[str], Sequence[Path]]


def grouped(root: Path, files: Iterable[Path], ignored: Iterable[str] = ()) -> dict[frozenset[str], list[Path]]:
    """Masks or other files of images by their folders below `root`, but for `ignored` and those like "masks"."""
    groups: dict[frozenset[str], list[Path]] = defaultdict(list)
    for file in files:
        names = (
            without_separators(name)
            for name in file.relative_to(root).parts[:-1]
            if folder_word(name) not in IMAGE_FOLDER_NAMES and not may_be_mask_name(name)
        )
        groups[frozenset(names).difference(map(without_separators, ignored))].append(file)
    return groups


def group_masks(root: Path, mask_folders: Iterable[Path], masks: Iterable[Path]) -> dict[frozenset[str], list[Path]]:
    """Masks in folders and next to images; a folder in a mask folder may also hold several masks of one image."""
    folders = list(mask_folders)
    inside = [file for folder in folders for file in files_below(folder) if is_image(file)]
    children = [child for folder in folders for child in subfolders(folder)]
    several = chain(children, *map(subfolders, children))
    return grouped(root, [*inside, *several, *masks], [folder.name for folder in folders])


def pair_in_folders(root: Path, images: Iterable[Path], groups: Groups) -> dict[Path, Path]:
    """The file of each image that has one, by its folders and its name (`pair_masks`).

    A warning names the files of a folder if none of them is named like an image. Raises `UserError` if a file belongs
    to several images.
    """
    folders: dict[Path, list[Path]] = defaultdict(list)
    for image in images:
        folders[image.parent].append(image)
    names = {folder: set(map(without_separators, folder.relative_to(root).parts)) for folder in folders}
    pairs: dict[Path, Path] = {}
    for required in sorted(groups, key=len, reverse=True):
        # A folder named like one of images holds their masks, not several masks of one image.
        files = [file for file in groups[required] if without_separators(file.name) not in set().union(*names.values())]
        rest = [
            [image for image in folders[folder] if image not in pairs]
            for folder in folders
            if required <= names[folder]
        ]
        matches = [pair_masks(images, files) for images in rest if images]
        if matches and not any(matches) and any(map(is_file, files)):
            image = next(filter(None, rest))[0]
            logger.warning(
                "%s: none of the %d masks in %s is named like an image, such as %s: expected %s_mask.png or %s.png "
                "(also -mask, _gt, _label, _seg), or several masks in a folder %s",
                *(image.parent, len(files), files[0].parent, list_names([file.name for file in files], 3)),
                *[image.stem] * 3,
            )
        for match in matches:
            pairs.update(match)
    for file, count in Counter(pairs.values()).items():
        if count > 1:
            raise UserError(f"{file} belongs to {count} images by its name: put it in a folder named like theirs")
    return pairs
