"""Naming conventions: which folders hold normal images or masks, which files are images, and the mask of an image.

The one module for these rules (docs/datasets.md, "Names of folders and files"). It looks at names only;
`dataset.folders` reads folders.
"""

import importlib
import importlib.util
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from PIL import Image


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NORMAL_NAMES = _words(
    """good ok normal normals negative negatives neg nondefective nondefect nodefect nodefects defectfree undamaged
    intact healthy nonanomalous noanomaly noanomalies anomalyfree pass passed flawless faultless nofault io
    withoutdefect withoutdefects nodamage"""
)
ANOMALOUS_NAMES = _words(
    """anomalous anomaly anomalies abnormal bad defect defects defective ng nok notok positive positives pos fail
    failed faulty damaged ungood withdefect withdefects nio"""
)
GROUND_TRUTH_NAMES = _words("groundtruth groundtruths gt gts")
# Also words for other things, such as a defective label: folders of these names are judged by their content as well.
MASK_WORDS = _words("mask masks label labels annotation annotations segmentation segmentations seg segs gt groundtruth")
# Folders of the images of one kind, next to its masks or depth maps, as in MVTec 3D-AD and BMAD.
IMAGE_FOLDER_NAMES = _words("rgb img imgs image images color colour")
# The formats that are recognised in files without an extension, and that the page accepts.
KNOWN_BY_CONTENT = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")

# Formats of Pillow that are not images, or that need another program.
_NOT_IMAGES = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
_PLUGINS = {".heic": "pillow-heif", ".heif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}
# Words that say nothing about the images of a folder: "good_images", "OK parts".
_GENERIC = _words("image images img imgs picture pictures photo photos sample samples part parts product products data")
_CAMEL_CASE = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_MASK_WORDS = r"(?:segmentation|ground[\s_-]?truth|annotation|labels?|masks?|seg|gt)"
_MASK_AFFIX = re.compile(rf"[\s._-]+{_MASK_WORDS}$|^{_MASK_WORDS}[\s._-]+", re.IGNORECASE)

if importlib.util.find_spec("pillow_heif"):
    importlib.import_module("pillow_heif").register_heif_opener()


def normalized(text: str) -> str:
    """A name in the Unicode form NFC: macOS and its archives use another one."""
    return unicodedata.normalize("NFC", text)


def same_name(one: str, other: str) -> bool:
    """Whether two names differ in letter case, Unicode form, blanks, hyphens and underscores at most."""
    return without_separators(one) == without_separators(other)


def without_separators(name: str) -> str:
    """A name in small letters without blanks, hyphens and underscores."""
    return re.sub(r"[\s_-]+", "", normalized(name).casefold())


def folder_word(name: str) -> str:
    """The meaning of a folder name: no case, separators, numbers at the ends, and words such as "images".

    "01_Good" and "OKParts" become "good" and "ok".
    """
    words = _split(name)
    return "".join([word for word in words if word not in _GENERIC] or words).strip("0123456789")


def _split(name: str) -> list[str]:
    return re.findall(r"[^\W_]+", _CAMEL_CASE.sub(" ", normalized(name)).casefold())


def is_normal_name(name: str) -> bool:
    """Whether a folder of this name contains normal images."""
    return folder_word(name) in NORMAL_NAMES


def is_anomalous_name(name: str) -> bool:
    """Whether a folder name is a general word for anomalous images, not a type of defect."""
    return folder_word(name) in ANOMALOUS_NAMES


def is_ground_truth_name(name: str) -> bool:
    """Whether a folder of this name contains masks."""
    return folder_word(name) in GROUND_TRUTH_NAMES


def may_be_mask_name(name: str) -> bool:
    """Whether a folder of this name contains masks, at least if its images look like some."""
    return is_ground_truth_name(name) or not MASK_WORDS.isdisjoint(_split(name))


@cache
def image_extensions(formats: tuple[str, ...] | None = None) -> frozenset[str]:
    """The lower-case extensions of image formats, with the dot; without `formats` of all that Pillow can read."""
    known = Image.registered_extensions()  # imports all of Pillow's readers
    # Pillow reads MPO, the format of some cameras, as JPEG.
    readable = {*Image.OPEN, "MPO"} - _NOT_IMAGES if formats is None else set(formats)
    return frozenset(extension for extension, name in known.items() if name in readable)


def is_image_name(path: Path) -> bool:
    """Whether a file has the extension of an image format that Pillow can read."""
    return path.suffix.lower() in image_extensions()


def extension_note(path: Path) -> str:
    """The extension of a skipped file, and the package that reads such files, if there is one."""
    extension = path.suffix.lower() or "no extension"
    package = _PLUGINS.get(extension)
    return f"{extension} (pip install {package})" if package else extension


def image_key(path: Path) -> str:
    """What the names of an image and of its mask have in common: the stem, in NFC, without a second extension."""
    stem = normalized(path.stem if is_image_name(path) else path.name)
    return stem[: -len(Path(stem).suffix)] if is_image_name(Path(stem)) else stem


def mask_key(path: Path) -> str:
    """The key of a mask's image, such as "000" for "000_mask.png", "000-Label.bmp" or "000.png"."""
    key = image_key(path)
    base = _MASK_AFFIX.sub("", key, count=1)
    return image_key(Path(base)) if base and base != key else key


def possible_masks(files: Sequence[Path]) -> dict[Path, Path]:
    """The files that are named like masks of images in their folder, "1_mask.png" or "1.png" next to "1.jpg"."""
    jpeg = image_extensions(("JPEG",))
    images = {image_key(file): file for file in sorted(files, key=lambda file: file.suffix.lower() in jpeg)}
    pairs = {file: images[mask_key(file)] for file in files if mask_key(file) in images}
    return {
        file: image
        for file, image in pairs.items()
        if mask_key(file) != image_key(file) or (image.suffix.lower() in jpeg and file.suffix.lower() not in jpeg)
    }


def pair_masks(images: Iterable[Path], masks: Iterable[Path]) -> dict[Path, Path]:
    """The mask of each image that has one, by their names.

    A mask is named like its image, with any extension and with or without "_mask", "-label", "_gt" and the like; the
    same letter case and a name with such an addition take precedence. An entry of `masks` may also be a folder named
    like the image, with several files.
    """
    images, masks = list(images), sorted(masks)
    keys = {image_key(image) for image in images}
    mask_of: dict[tuple[bool, str], Path] = {}
    for key_of in (mask_key, image_key):
        for mask in masks:
            # "part_seg" is the mask of the image "part", unless there is an image "part_seg".
            key = image_key(mask) if image_key(mask) in keys else key_of(mask)
            if key_of is image_key or key != image_key(mask):
                mask_of.setdefault((True, key), mask)
                mask_of.setdefault((False, key.casefold()), mask)
    pairs = {
        image: mask_of.get((True, image_key(image))) or mask_of.get((False, image_key(image).casefold()))
        for image in images
    }
    return {image: mask for image, mask in pairs.items() if mask is not None}
