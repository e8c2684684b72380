"""Finding a dataset on disk: a name of the catalog below a data root, or the path of a folder in MVTec's layout."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from dataset.catalog import CATALOG, DatasetSpec, mvtec_spec, readable_name
from dataset.folders import describe_folder, find_folder, find_folders, subfolders
from dataset.layouts import LAYOUTS
from dataset.toy.classes import TOY_DATASETS
from utils.errors import UserError
from utils.paths import expanded, is_folder

logger = logging.getLogger(__name__)

DATA_ROOT_VARIABLE = "ANOMALY_DATA_ROOT"
DEFAULT_DATA_ROOT = "data"

# VisA's other splits, which train on anomalies, have the same classes: they are never meant.
_OTHER_SPLITS = ("2cls_fewshot", "2cls_highshot")


@dataclass(frozen=True)
class LocatedDataset:
    """A dataset and the folder that it was found in; the paths of its records are relative to `root`."""

    spec: DatasetSpec
    root: Path

    def layout(self) -> tuple[str, list[str]]:
        """The layout that the folder is in, by its name, and the classes of which there are images."""
        return _layout_in(self.spec, self.root)


def known_dataset(name: str) -> DatasetSpec | None:
    """The catalog's dataset of this name, letter case aside; None for any other."""
    return {known.lower(): spec for known, spec in CATALOG.items()}.get(name.lower())


def locate_dataset(name_or_path: str, data_root: Path | None = None) -> LocatedDataset:
    """Find a dataset by its name in the catalog (letter case aside), or by the path of its own folder.

    A named one is looked for under `data_root`, up to two folders below its own where archives were unpacked into one
    another, or is `data_root` itself; of several folders the one with most of its classes counts. Without `data_root`
    the environment variable ANOMALY_DATA_ROOT counts, then "data". A toy dataset that is not there yet is drawn. Of an
    own folder only the classes are read here: whether its images are complete shows when its metadata is built.

    Raises UserError for an unknown name, and for a folder that is missing, with the layout expected.
    """
    spec = known_dataset(name_or_path)
    if spec is None:
        return _locate_own_folder(name_or_path)
    data_root = expanded(data_root or os.environ.get(DATA_ROOT_VARIABLE) or DEFAULT_DATA_ROOT)
    root = _find(spec, data_root) if is_folder(data_root) else None
    if root is None and spec.name in TOY_DATASETS:
        root = _draw_toy_dataset(spec, data_root)
    if root is None:
        raise UserError(_missing_folder_message(spec, data_root))
    return LocatedDataset(spec, root)


def _locate_own_folder(path: str) -> LocatedDataset:
    root = expanded(path)
    if not path.strip() or not is_folder(root):
        raise UserError(
            f"unknown dataset {path!r}: it is neither a folder nor one of the known datasets ({', '.join(CATALOG)})"
        )
    name = root.resolve().name
    if find_folder(root, "test"):
        classes = [name]
    else:
        classes = [child.name for child in subfolders(root) if find_folder(child, "test")]
    return LocatedDataset(mvtec_spec(name, {name: readable_name(name) for name in classes}), root)


def _layout_in(spec: DatasetSpec, folder: Path) -> tuple[str, list[str]]:
    found = ((name, LAYOUTS[name].classes(folder, list(spec.class_names))) for name in spec.layouts)
    return max(found, key=lambda layout: len(layout[1]))


def _find(spec: DatasetSpec, data_root: Path) -> Path | None:
    """The folder with most of the dataset's classes; else the first of the dataset's name, so that an error tells of
    it; else None."""
    named = [
        folder
        for name in dict.fromkeys((spec.folder, *spec.folders, spec.name))
        for folder in find_folders(data_root, name)
    ]
    if spec.is_own_name(data_root.resolve().name):
        named.append(data_root)
    fullest, most = _fullest(spec, chain(named, _below(named)))
    # A folder of another name must hold most of a dataset to be taken for it: datasets share single classes. Medical
    # ones have one class and one layout, so that only the name tells them apart.
    if len(spec.class_names) > 1:
        here = len(_layout_in(spec, data_root)[1])
        if here > most and 2 * here > len(spec.class_names):
            return data_root
    return fullest or next(iter(named), None)


def _below(folders: Iterable[Path]) -> Iterator[Path]:
    """The folders one and two levels below, level by level."""
    for _ in range(2):
        folders = [child for folder in folders for child in subfolders(folder) if child.name not in _OTHER_SPLITS]
        yield from folders


def _fullest(spec: DatasetSpec, folders: Iterable[Path]) -> tuple[Path | None, int]:
    """The first of the folders with most classes of a dataset, and how many these are; None where there are none."""
    fullest, most = None, 0
    for folder in folders:
        count = len(_layout_in(spec, folder)[1])
        if count > most:
            fullest, most = folder, count
        if most == len(spec.class_names):
            break
    return fullest, most


def _missing_folder_message(spec: DatasetSpec, data_root: Path) -> str:
    layouts = ", or ".join(LAYOUTS[layout].expected for layout in spec.layouts)
    expected = f"{data_root / spec.folder} with {layouts}"
    if not is_folder(data_root):
        return (
            f"the data root {data_root} is not there: give the folder that holds the datasets with --data_root or "
            f"{DATA_ROOT_VARIABLE}; expected for {spec.name}: {expected}"
        )
    others = f" (or named {', '.join(spec.folders)})" if spec.folders else ""
    return (
        f"{spec.name} is not under the data root {data_root}, which holds {describe_folder(data_root)}: expected "
        f"{expected}{others}; give another --data_root, or move the dataset's files into that folder, where in any "
        "other layout --metadata FILE lists them"
    )


def _draw_toy_dataset(spec: DatasetSpec, data_root: Path) -> Path:
    from dataset.toy_world import write_toy_dataset  # scipy takes long to import, and is rarely needed here

    root = data_root / spec.folder
    logger.info("drawing the toy dataset %s into %s (once)", spec.name, root)
    try:
        write_toy_dataset(spec.name, root, seed=0)
    except OSError as error:
        raise UserError(f"the toy dataset cannot be drawn into {root}: {error}; give another --data_root") from error
    return root
