"""Anomaly maps as files: write, find, match with a dataset's images, read and resize."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dataset.images import read_pair, resize_mask
from dataset.records import Record
from engine.data.task import TaskData
from engine.evaluation.results import ImageScore
from utils.errors import UserError
from utils.files import write_text
from utils.paths import figure_path
from utils.text import csv_table, list_names

logger = logging.getLogger(__name__)

# Endings of maps; Pillow's modes of grey images with more than 8 bits.
MAP_ENDINGS = (".npy", ".npz", ".tif", ".tiff", ".png")
DEEP_MODES = ("F", "I")
MOST_LISTED = 5
SCORES_FILE, SCORES_COLUMNS = "scores.csv", ("path", "score", "det_score")


def write_map(folder: Path, image_path: str, anomaly_map: NDArray) -> None:
    """Write a map (H, W) as float32, at the image's path below `folder`, such as `cup/test/good/000.png.npy`."""
    path = figure_path(folder, f"{image_path}.npy", ".npy", set())
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, anomaly_map.astype(np.float32))


def write_scores(scores: Iterable[ImageScore], folder: Path) -> None:
    """Write `scores.csv` next to maps: image scores and det scores, exact as float32."""
    rows = [(image.path, f"{image.score:.9g}", f"{image.det:.9g}") for image in scores]
    write_text(folder / SCORES_FILE, csv_table([SCORES_COLUMNS, *rows]))


def find_maps(folder: Path, records: Sequence[Record]) -> dict[str, Path]:
    """The maps in a folder and below, by the path of the image they belong to; logs which images have none.

    Raises:
        UserError: There are no maps, or `match_paths` refuses their names.
    """
    files = (file for file in sorted(folder.rglob("*")) if file.suffix.lower() in MAP_ENDINGS and file.is_file())
    matches = match_paths([file.relative_to(folder).as_posix() for file in files], records, str(folder))
    if not matches:
        endings, example = " ".join(MAP_ENDINGS), records[0].image_path
        raise UserError(f"{folder}: no map ({endings}) has the path of an image, such as {example}")
    image, name = next(iter(matches.items()))
    logger.info("%d of %d images have a map, such as %s: %s", len(matches), len(records), image, name)
    if missing := [record.image_path for record in records if record.image_path not in matches]:
        logger.warning("%d images without a map are left out: %s", len(missing), list_names(missing, MOST_LISTED))
    return {image: folder / name for image, name in matches.items()}


def match_paths(names: Iterable[str], records: Sequence[Record], source: str) -> dict[str, str]:
    """The name that belongs to each image, by the image's path.

    A name, without its ending, must end in the image's path without its ending below the folder that all images share,
    or be the end of such a path. Names that match no image are logged.

    Raises:
        UserError: A name fits several images, or an image several names; `source` says what the names are.
    """
    parts = [PurePosixPath(record.image_path).parts for record in records]
    # Paths may differ in depth: folders are compared as far as all paths have them.
    shared = next((depth for depth, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), 0)
    endings: dict[tuple[str, ...], dict[str, int]] = defaultdict(dict)
    for record, (*folders, name) in zip(records, parts, strict=True):
        for own in (name, PurePosixPath(name).stem):
            for start in range(len(folders) + 1):
                endings[(*folders[start:], own)][record.image_path] = len(folders) + 1 - shared
    matches: dict[str, str] = {}
    unmatched = []
    for name in names:
        path = PurePosixPath(name)
        tails = [(*path.parts[start:-1], own) for start in range(len(path.parts)) for own in (path.name, path.stem)]
        tail = next((tail for tail in tails if tail in endings), ())
        images = [image for image, least in endings.get(tail, {}).items() if len(tail) >= min(least, len(path.parts))]
        if len(images) > 1:
            raise UserError(f"{source}: {name} fits several images, such as {images[0]} and {images[1]}: name folders")
        if not images:
            unmatched.append(name)
        elif images[0] in matches:
            raise UserError(f"{source}: {matches[images[0]]} and {name} are both of {images[0]}: remove one of them")
        else:
            matches[images[0]] = name
    if unmatched:
        logger.warning("%s: %d match no image: %s", source, len(unmatched), list_names(unmatched, MOST_LISTED))
    return matches


def read_map(path: Path) -> NDArray[np.float32]:
    """Read a map (H, W): an array (axes of length 1 are dropped), or a grey image of more than 8 bits.

    Raises:
        UserError: The file cannot be read, or is no such map.
    """
    try:
        if path.suffix.lower() == ".npy":
            values = np.load(path, allow_pickle=False)
        elif path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                (name,) = arrays.files
                values = arrays[name]
        else:
            with path.open("rb") as file, Image.open(file) as image:
                if not image.mode.startswith(DEEP_MODES):
                    raise UserError(
                        f"{path}: is a picture of mode {image.mode}; a map has one channel of 16 or 32 bits"
                    )
                values = np.asarray(image)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        hint = "an .npz file must contain one array, and float16 TIFF files must be converted to .npy"
        raise UserError(f"{path}: cannot be read as a map ({' '.join(str(error).split())}); {hint}") from error
    values = values.squeeze()
    if values.ndim != 2 or values.dtype.kind not in "fui":
        raise UserError(f"{path}: is an array {values.shape} of {values.dtype}; a map is (H, W) of numbers")
    return values.astype(np.float32)


def read_truth(data: TaskData, record: Record, size: int | str | Sequence[int]) -> Tensor:
    """A record's mask, (1, H, W) bool: `ORIGINAL`, or resized to a square or to (H, W)."""
    _, mask = read_pair(data.located.root, record, data.mask_threshold)
    if not isinstance(size, str):
        height, width = (size, size) if isinstance(size, int) else size
        mask = resize_mask(mask, (width, height))
    return torch.from_numpy(np.asarray(mask) > 0)[None]


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, H, W), bilinear in another size, smoothed if it is smaller; unchanged if they have it."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps[:, None], tuple(size), mode="bilinear", antialias=True)[:, 0]
