"""Normal images of a dataset that are not tested on: the source of few-shot references."""

from collections.abc import Sequence
from pathlib import Path

from dataset.conventions import is_normal_name
from dataset.folders import find_folder, find_images, images_in, subfolders
from dataset.layouts import class_folder, image_folder, visa_records
from dataset.locate import LocatedDataset
from dataset.records import random_rank
from dataset.toy.classes import TOY_DATASETS
from utils.errors import UserError


def training_normals(located: LocatedDataset, class_name: str) -> list[Path]:
    """The normal training images of a class: train/good, or VisA's training split.

    The images of a toy dataset are drawn when they are first needed.

    Raises:
        UserError: There are none.
    """
    root = located.root
    layout, classes = located.layout()
    if layout == "visa":
        rows = visa_records(root, classes, split="train")
        images = [root / row.image_path for row in rows if row.class_name == class_name and not row.label]
    else:
        folder = class_folder(root, class_name, classes)
        if folder is not None and located.spec.name in TOY_DATASETS and find_folder(folder, "train") is None:
            from dataset.toy_world import write_toy_normals  # scipy is slow to import and rarely needed

            write_toy_normals(located.spec.name, folder)
        good = [child for child in subfolders(find_folder(folder, "train")) if is_normal_name(child.name)]
        images = [path for place in good for path in images_in(image_folder(place))]
    if not images:
        raise UserError(
            f"{located.spec.name}: class '{class_name}' has no train/good in {root} to take references from; use "
            "normal images of your own with --references FOLDER"
        )
    return images


def normals_of_classes(folder: Path, classes: Sequence[str]) -> dict[str, list[Path]]:
    """Normal images of each class, from the folders named like the classes.

    For a single class, the whole folder is used if there is no such folder in it, and it may be an image.

    Raises:
        UserError: A class has no images.
    """
    images = {}
    for name in classes:
        own = find_folder(folder, name) if name else None
        if own is None and len(classes) > 1:
            raise UserError(f"--references {folder}: there is no folder '{name}' with normal images of this class")
        images[name] = find_images(own or folder, "--references").images
    return images


def choose_normals(images: Sequence[Path], shots: int | None, seed: int, class_name: str) -> list[Path]:
    """Choose `shots` images, or all for None; the choice depends on seed and file names, and more shots contain fewer.

    Raises:
        UserError: There are fewer images.
    """
    if shots is None:
        return list(images)
    if shots > len(images):
        raise UserError(f"--reference_shots {shots}: there are {len(images)} normal images of '{class_name}'")

    return sorted(images, key=lambda path: (random_rank(seed, class_name, path.name), path.as_posix()))[:shots]
