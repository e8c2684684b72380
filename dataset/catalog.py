"""Which datasets are known, where they lie on disk, and what their classes are called in prompts.

A dataset is a name from `CATALOG` below a data root, or the path of any folder in MVTec's layout.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dataset.toy_world import TOY_DATASETS, write_toy_dataset
from utils.errors import UserError

logger = logging.getLogger(__name__)

DATA_ROOT_VARIABLE = "ANOMALY_DATA_ROOT"
DEFAULT_DATA_ROOT = "data"

# What an error shows of a layout: the files that must be there, relative to the dataset's folder.
LAYOUTS = {
    "mvtec": "CLASS/test/good/x.png, CLASS/test/DEFECT/x.png with mask CLASS/ground_truth/DEFECT/x_mask.png",
    "visa": "split_csv/1cls.csv and CLASS/Data/Images/{Normal,Anomaly}/x.JPG with CLASS/Data/Masks/Anomaly/x.png",
    "btad": "CLASS/test/ok/x, CLASS/test/ko/x with mask CLASS/ground_truth/ko/x",
    "medical": "test/good/img/x.png, test/Ungood/img/x.png with mask test/Ungood/label/x.png",
    "colon": "images/x.png with mask masks/x.png",
}


@dataclass(frozen=True)
class DatasetSpec:
    """What is known of a dataset before its folder is looked at.

    `domain` is "industrial" or "medical" and decides the scoring (docs/method.md); `layout` is a key of `LAYOUTS`.
    `folder` is the folder's name under the data root as distributed, `folders` are other names in common use; both may
    be nested, and letter case does not matter. `class_names` maps a class to its name in prompts, in class order.
    """

    name: str
    domain: str
    layout: str
    folder: str
    class_names: dict[str, str]
    folders: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class LocatedDataset:
    """A dataset and the folder that it was found in; the paths of its records are relative to `root`."""

    spec: DatasetSpec
    root: Path


def readable_name(class_name: str) -> str:
    """A class folder's name as words: "metal_nut" becomes "metal nut"."""
    return " ".join(class_name.replace("_", " ").split())


def _same_words(*class_names: str) -> dict[str, str]:
    return {name: readable_name(name) for name in class_names}


_MVTEC_CLASSES = _same_words(
    "bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut", "pill", "screw", "tile",
    "toothbrush", "transistor", "wood", "zipper",
)  # fmt: skip

_VISA_CLASSES = {
    "candle": "candle",
    "capsules": "capsule",
    "cashew": "cashew nut",
    "chewinggum": "chewing gum",
    "fryum": "fryum snack",
    "macaroni1": "macaroni",
    "macaroni2": "macaroni",
    "pcb1": "printed circuit board",
    "pcb2": "printed circuit board",
    "pcb3": "printed circuit board",
    "pcb4": "printed circuit board",
    "pipe_fryum": "pipe-shaped fryum snack",
}

# The distribution only numbers its three products; the nouns say what their pictures show.
_BTAD_CLASSES = {"01": "round plastic part", "02": "wooden panel", "03": "metal ring"}

_MPDD_CLASSES = {
    "bracket_black": "black metal bracket",
    "bracket_brown": "brown metal bracket",
    "bracket_white": "white metal bracket",
    "connector": "metal connector",
    "metal_plate": "metal plate",
    "tubes": "metal tube",
}


def _medical(name: str, noun: str, *folders: str) -> DatasetSpec:
    return DatasetSpec(name, "medical", "medical", name, {name: noun}, folders)


def _colon(name: str, folder: str, *folders: str) -> DatasetSpec:
    nested = tuple(f"{parent}/{folder}" for parent in ("Colon", "TestDataset"))
    return DatasetSpec(name, "medical", "colon", folder, {name: "colon"}, (name, *folders, *nested))


def _toy(name: str) -> DatasetSpec:
    return DatasetSpec(name, "industrial", "mvtec", name, dict(TOY_DATASETS[name]))


CATALOG: dict[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        DatasetSpec(
            "MVTec",
            "industrial",
            "mvtec",
            "mvtec_anomaly_detection",
            _MVTEC_CLASSES,
            ("MVTec", "mvtec_ad", "MVTec-AD", "mvtec2d"),
        ),
        DatasetSpec("VisA", "industrial", "visa", "VisA", _VISA_CLASSES, ("VisA_20220922",)),
        DatasetSpec("BTAD", "industrial", "btad", "BTech_Dataset_transformed", _BTAD_CLASSES, ("BTAD", "BTech")),
        DatasetSpec("MPDD", "industrial", "mvtec", "MPDD", _MPDD_CLASSES),
        _medical("Brain", "brain", "Brain_AD", "BraTS2021_slice"),
        _medical("Liver", "liver", "Liver_AD"),
        _medical("Retina", "retina", "Retina_RESC", "Retina_RESC_AD", "RESC"),
        _colon("Colon_clinicDB", "CVC-ClinicDB"),
        _colon("Colon_colonDB", "CVC-ColonDB"),
        _colon("Colon_Kvasir", "Kvasir", "Kvasir-SEG"),
        _colon("Colon_cvc300", "CVC-300"),
        *(_toy(name) for name in TOY_DATASETS),
    )
}


def locate_dataset(name_or_path: str, data_root: Path | None = None) -> LocatedDataset:
    """Find a dataset by its name in the catalog (letter case aside), or by the path of its own folder.

    A named one is looked for under `data_root`, or is `data_root` itself; without one the environment variable
    ANOMALY_DATA_ROOT counts, then "data". A toy dataset that is not there yet is drawn. Of an own folder
    only the classes are read here: whether its images are complete shows when its metadata is built.

    Raises UserError for an unknown name, and for a folder that is missing, with the layout expected.
    """
    spec = _catalog_entry(name_or_path)
    if spec is None:
        return _locate_own_folder(name_or_path)
    data_root = Path(data_root or os.environ.get(DATA_ROOT_VARIABLE) or DEFAULT_DATA_ROOT).expanduser()
    root = _existing_folder(spec, data_root)
    if root is None and spec.name in TOY_DATASETS:
        root = _draw_toy_dataset(spec, data_root)
    if root is None:
        raise UserError(_missing_folder_message(spec, data_root))
    return LocatedDataset(spec, root)


def class_display_names(
    spec: DatasetSpec, override_file: Path | None = None, class_names: Iterable[str] = ()
) -> dict[str, str]:
    """The name that each class has in prompts: the catalog's, or that of a JSON object {"class": "readable name"}.

    `class_names` are the classes met in the metadata: those that the catalog lacks are called by their own words. The
    file needs to hold only the names that it changes. Raises UserError for a file that cannot be read or is no such
    object, and for classes in it that the dataset does not have.
    """
    names = dict(spec.class_names)
    for class_name in class_names:
        names.setdefault(class_name, readable_name(class_name))
    if override_file is None:
        return names
    replaced = _read_class_names(Path(override_file))
    unknown = [class_name for class_name in replaced if names and class_name not in names]
    if unknown:
        raise UserError(
            f"{override_file}: {spec.name} has no class {', '.join(map(repr, unknown))}; "
            f"its classes are {', '.join(names)}"
        )
    return names | replaced


def find_folder(parent: Path, relative: str) -> Path | None:
    """The folder `relative` (forward slashes) below `parent`, in any letter case; None where there is none."""
    for part in relative.split("/"):
        exact = parent / part
        if exact.is_dir():
            parent = exact
            continue
        if not parent.is_dir():
            return None
        matches = sorted(child for child in parent.iterdir() if child.name.lower() == part.lower() and child.is_dir())
        if not matches:
            return None
        parent = matches[0]
    return parent


def _catalog_entry(name: str) -> DatasetSpec | None:
    return {known.lower(): spec for known, spec in CATALOG.items()}.get(name.lower())


def _locate_own_folder(path: str) -> LocatedDataset:
    root = Path(path).expanduser()
    if not path.strip() or not root.is_dir():
        raise UserError(
            f"unknown dataset {path!r}: it is neither a folder nor one of the known datasets ({', '.join(CATALOG)})"
        )
    name = root.resolve().name
    if (root / "test").is_dir():
        classes = [name]
    else:
        classes = sorted(child.name for child in root.iterdir() if (child / "test").is_dir())
    return LocatedDataset(DatasetSpec(name, "industrial", "mvtec", name, _same_words(*classes)), root)


def _existing_folder(spec: DatasetSpec, data_root: Path) -> Path | None:
    for name in (spec.folder, *spec.folders):
        folder = find_folder(data_root, name)
        if folder is not None:
            return folder
    return data_root if data_root.is_dir() and _is_the_dataset_itself(spec, data_root) else None


def _is_the_dataset_itself(spec: DatasetSpec, folder: Path) -> bool:
    """Whether a data root is the dataset's own folder: by its name, or by holding most of the classes.

    The folder's name alone tells one medical set from another: their layouts are the same.
    """
    own_names = {name.rsplit("/", 1)[-1].lower() for name in (spec.folder, *spec.folders)}
    if folder.resolve().name.lower() in own_names:
        return True
    inside = {"mvtec": "test", "btad": "test", "visa": "Data"}.get(spec.layout)
    if inside is None:
        return False
    present = sum(find_folder(folder, f"{class_name}/{inside}") is not None for class_name in spec.class_names)
    return 2 * present > len(spec.class_names)


def _missing_folder_message(spec: DatasetSpec, data_root: Path) -> str:
    expected = f"{data_root / spec.folder} with {LAYOUTS[spec.layout]}"
    if not data_root.is_dir():
        return (
            f"the data root {data_root} is not there: give the folder that holds the datasets with --data_root or "
            f"{DATA_ROOT_VARIABLE}; expected for {spec.name}: {expected}"
        )
    others = f" (or named {', '.join(spec.folders)})" if spec.folders else ""
    return f"{spec.name} is not under the data root {data_root}: expected {expected}{others}; see --data_root"


def _draw_toy_dataset(spec: DatasetSpec, data_root: Path) -> Path:
    root = data_root / spec.folder
    logger.info("drawing the toy dataset %s into %s (once)", spec.name, root)
    try:
        write_toy_dataset(spec.name, root, seed=0)
    except OSError as error:
        raise UserError(f"the toy dataset cannot be drawn into {root}: {error}; give another --data_root") from error
    return root


def _read_class_names(path: Path) -> dict[str, str]:
    try:
        names = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--class_names {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"--class_names {path} is no valid JSON: {' '.join(str(error).split())}") from error
    if not isinstance(names, dict) or not all(isinstance(name, str) and name.strip() for name in names.values()):
        raise UserError(f'--class_names {path} must hold one JSON object of the form {{"class": "readable name"}}')
    return {class_name: name.strip() for class_name, name in names.items()}
