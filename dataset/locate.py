"""Find a dataset on disk: by its name in the catalog, or by the path of a folder in MVTec's layout."""

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from dataset.catalog import CATALOG, GROUPS, DatasetSpec, known_dataset, mvtec_spec
from dataset.folders import describe_folder, find_folders, subfolders
from dataset.layouts import LAYOUTS, test_folder
from dataset.prompts import readable_name
from dataset.toy.classes import TOY_DATASETS
from utils.errors import UserError
from utils.paths import expanded, is_folder

logger = logging.getLogger(__name__)

DATA_ROOT_VARIABLE = "ANOMALY_DATA_ROOT"
DEFAULT_DATA_ROOT = "data"

# VisA's other splits have the same classes, but train on anomalies.
_OTHER_SPLITS = ("2cls_fewshot", "2cls_highshot")


class MissingDatasetError(UserError):
    """A dataset of the catalog is not under the data root."""


@dataclass(frozen=True)
class LocatedDataset:
    """A dataset and its folder, which the paths of its records are relative to."""

    spec: DatasetSpec
    root: Path

    def layout(self) -> tuple[str, list[str]]:
        """The name of the folder's layout, and the classes that have images."""
        return _layout_in(self.spec, self.root)


def locate_dataset(name_or_path: str, data_root: Path | None = None) -> LocatedDataset:
    """Find a dataset.

    A named dataset is the folder with most of its classes: `data_root` itself, a folder of its name below it, or up to
    two folders deeper, since archives often contain their own folder. A toy dataset is drawn if it does not exist. The
    images of the folder are not checked here.

    Args:
        name_or_path: A name in the catalog (`known_dataset`), or the path of a folder in MVTec's layout.
        data_root: The folder of the datasets. Default: the environment variable ANOMALY_DATA_ROOT, then "data".

    Returns:
        The dataset and its folder.

    Raises:
        MissingDatasetError: The folder is missing; the message describes the expected layout.
        UserError: The name is unknown, or the data root is another dataset that goes by this name.
    """
    spec = known_dataset(name_or_path)
    if spec is None:
        return _locate_own_folder(name_or_path)
    data_root = expanded(data_root or os.environ.get(DATA_ROOT_VARIABLE) or DEFAULT_DATA_ROOT)
    root = _find(spec, data_root) if is_folder(data_root) else None
    if root is None and spec.name in TOY_DATASETS:
        root = _draw_toy_dataset(spec, data_root)
    if root is None:
        if is_folder(data_root):
            check_lookalikes(spec, data_root)
        raise MissingDatasetError(_missing_folder_message(spec, data_root))
    return LocatedDataset(spec, root)


def check_lookalikes(spec: DatasetSpec, folder: Path) -> None:
    """Raise `UserError` if a folder holds another dataset that goes by this name."""
    layout, classes = _layout_in(spec, folder)
    has_own_layout = bool(classes) and layout == spec.layouts[0]
    for sign, other in spec.lookalikes.items():
        if sign in LAYOUTS:
            is_other = not has_own_layout and bool(LAYOUTS[sign].classes(folder, list(spec.class_names)))
        else:
            is_other = len(classes) == int(sign)
        if is_other:
            raise UserError(f"{folder} is not {spec.name} but another dataset that goes by this name: {other}")


def _locate_own_folder(path: str) -> LocatedDataset:
    if path.lower() in GROUPS:
        raise UserError(f"{path} is a group of datasets, which only inference.py and studies accept: name one dataset")
    root = expanded(path)
    if not path.strip() or not is_folder(root):
        raise UserError(
            f"unknown dataset {path!r}: it is neither a folder nor one of the known datasets ({', '.join(CATALOG)}), "
            f"nor one of inference.py's groups of them ({', '.join(GROUPS)})"
        )
    name = root.resolve().name
    classes = [name] if test_folder(root) else [child.name for child in subfolders(root) if test_folder(child)]
    return LocatedDataset(mvtec_spec(name, {name: readable_name(name) for name in classes}), root)


def _layout_in(spec: DatasetSpec, folder: Path) -> tuple[str, list[str]]:
    classes = ((name, LAYOUTS[name].classes(folder, list(spec.class_names))) for name in spec.layouts)
    return max(classes, key=lambda layout: len(layout[1]))


def _find(spec: DatasetSpec, data_root: Path) -> Path | None:
    """The folder with most of the dataset's classes; if none has any, the first of its name, for the error message."""
    named = [
        folder
        for name in dict.fromkeys((spec.folder, *spec.folders, spec.name))
        for folder in find_folders(data_root, name)
    ]
    if spec.is_own_name(data_root.resolve().name):
        named.append(data_root)
    fullest, most = _fullest(spec, chain(named, _below(named)))
    # A folder of another name must hold most of the classes, because datasets share some, or a layout that only this
    # dataset has. Only the name tells datasets of one class and a common layout apart.
    layout, classes = _layout_in(spec, data_root)
    is_own = sum(layout in other.layouts for other in CATALOG.values()) == 1
    if len(classes) > most and (is_own or 2 * len(classes) > len(spec.class_names) > 1):
        return data_root
    return fullest or next(iter(named), None)


def _below(folders: Iterable[Path]) -> Iterator[Path]:
    """The folders one and two levels below, level by level."""
    for _ in range(2):
        folders = [child for folder in folders for child in subfolders(folder) if child.name not in _OTHER_SPLITS]
        yield from folders


def _fullest(spec: DatasetSpec, folders: Iterable[Path]) -> tuple[Path | None, int]:
    """The first folder with most classes of a dataset, and how many it has."""
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
            f"the data root {data_root} does not exist: set the folder of the datasets with --data_root or "
            f"{DATA_ROOT_VARIABLE}; expected for {spec.name}: {expected}"
        )
    others = f" (or named {', '.join(spec.folders)})" if spec.folders else ""
    return (
        f"{spec.name} is not under the data root {data_root}, which holds {describe_folder(data_root)}: expected "
        f"{expected}{others}; use another --data_root, move the dataset's files into that folder, or for any other "
        "layout list the images with --metadata FILE"
    )


def _draw_toy_dataset(spec: DatasetSpec, data_root: Path) -> Path:
    from dataset.toy_world import write_toy_dataset  # scipy is slow to import and rarely needed

    root = data_root / spec.folder
    logger.info("drawing the toy dataset %s into %s (once)", spec.name, root)
    try:
        write_toy_dataset(spec.name, root, seed=0)
    except OSError as error:
        raise UserError(f"the toy dataset cannot be drawn into {root}: {error}; use another --data_root") from error
    return root
