"""Normal images of a dataset beside those it tests on: what a few references are taken from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from dataset.folders import find_folder, find_images, images_in
from dataset.layouts import NORMAL, visa_records
from dataset.locate import LocatedDataset
from dataset.toy.classes import TOY_DATASETS
from utils.errors import UserError


def training_normals(located: LocatedDataset, class_name: str) -> list[Path]:
    """The normal images that a dataset has for training in a class: its train/good, or VisA's list of them.

    A toy dataset's are drawn on first use. Raises `UserError` where there are none.
    """
    root = located.root
    layout, classes = located.layout()
    if layout == "visa":
        rows = visa_records(root, classes, split="train")
        found = [root / row.image_path for row in rows if row.class_name == class_name and not row.label]
    else:
        alone = len(classes) == 1 and find_folder(root, "train") is not None
        folder = root if alone else find_folder(root, class_name)
        if folder is not None and located.spec.name in TOY_DATASETS and find_folder(folder, "train") is None:
            from dataset.toy_world import write_toy_normals  # scipy takes long to import, and is rarely needed here

            write_toy_normals(located.spec.name, folder)
        places = [find_folder(folder, f"train/{name}") for name in NORMAL]
        places += [place and find_folder(place, "img") for place in places]
        found = [path for place in places for path in images_in(place)]
    if not found:
        raise UserError(
            f"{located.spec.name}: class '{class_name}' has no train/good in {root} to take references from; give "
            "normal images with --references FOLDER"
        )
    return found


def normals_of_classes(folder: Path, classes: Sequence[str]) -> dict[str, list[Path]]:
    """Normal images of each class: in the folder of its name, or for a single class in the folder as a whole.

    For a single class it may be an image instead. Raises `UserError` where a class has none.
    """
    found = {}
    for name in classes:
        own = find_folder(folder, name) if name else None
        if own is None and len(classes) > 1:
            raise UserError(f"--references {folder}: no folder '{name}', whose normal images would be compared with")
        found[name] = find_images(own or folder, "--references").images
    return found


def choose_normals(images: Sequence[Path], shots: int | None, seed: int, class_name: str) -> list[Path]:
    """All images, or `shots` of them: the seed's choice, in which more shots contain fewer.

    It depends on the files' names alone, not on where they lie. Raises `UserError` where there are too few.
    """
    if shots is None:
        return list(images)
    if shots > len(images):
        raise UserError(f"--reference_shots {shots}: there are {len(images)} normal images of '{class_name}'")

    def rank(path: Path) -> tuple[bytes, str]:
        return hashlib.sha256(json.dumps([seed, class_name, path.name]).encode("ascii")).digest(), path.as_posix()

    return sorted(images, key=rank)[:shots]
