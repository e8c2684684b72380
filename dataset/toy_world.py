"""The toy datasets: small inspection sets (docs/toy_world.md), drawn from a seed and written once in MVTec's layout."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.toy.classes import CLASSES, TOY_DATASETS, ToyClass
from dataset.toy.objects import TEXTURES
from dataset.toy.scene import COLORS, Scene, Thing, draw, draw_with_mask
from utils.errors import UserError

IMAGE_SIZE = 96  # pixels; what the toy CLIP takes, so that nothing is resampled
GOOD_IMAGES = {"toy_train": 48, "toy_test": 24}  # per class; as many more are defective
# Normal images of a class that are drawn when references are asked for, and from which place on.
NEW_NORMALS, FIRST_NEW = 32, 10_000
SEVERITY = 1.3  # defects are larger than in the pre-training drawings
SMALLEST_DEFECT = 0.01  # share of the image that a mask covers at least, about one patch


def _apart(one: str, other: str) -> bool:
    """Whether two named colours can be told apart at a glance, so that what is missing from an object is seen."""
    return max(abs(a - b) for a, b in zip(COLORS[one], COLORS[other], strict=True)) > 0.3


def _scene(toy: ToyClass, seed: tuple[int, ...]) -> Scene:
    """One instance of a class: its colours, pose and place are the seed's."""
    rng = np.random.default_rng((*seed, 4))

    def pick(names: tuple[str, ...]) -> str:
        return names[int(rng.integers(len(names)))]

    color = pick(toy.colors)
    accent = pick(tuple(name for name in toy.accents if name != color) or ("black",))
    background = pick(tuple(name for name in toy.backgrounds if _apart(name, color)))
    texture = toy.kind in TEXTURES
    center = (0.0, 0.0) if texture else (float(rng.uniform(-0.16, 0.16)), float(rng.uniform(-0.16, 0.16)))
    radius = float(rng.uniform(0.85, 1.2) if texture else rng.uniform(0.82, 1.02))
    turn = float(rng.uniform(0, 2 * np.pi))
    return Scene((Thing(toy.kind, color, accent, toy.material, center, radius, turn),), background, (), seed)


def _defective(toy: ToyClass, defect: str, seed: tuple[int, ...], size: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture with a defect that is large enough to count: attempts follow one another until one is."""
    for attempt in range(50):
        image, mask = draw_with_mask(_scene(toy, (*seed, attempt)), size, defect, SEVERITY)
        if mask.mean() >= SMALLEST_DEFECT:
            return image, mask
    raise RuntimeError(f"no {defect} of {SMALLEST_DEFECT:.1%} of the image fits on a {toy.name}")


def draw_toy_class(
    dataset: str, class_folder: str, defect: str | None, index: int, seed: int = 0, size: int = IMAGE_SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one picture of a toy dataset: image (size x size x 3, uint8) and mask (size x size, bool).

    The picture depends on these arguments alone, not on what was drawn before. `defect` None is a normal picture.
    """
    toy = CLASSES[dataset][class_folder]
    defect_number = 0 if defect is None else 1 + toy.defects.index(defect)
    place = (list(CLASSES).index(dataset), list(CLASSES[dataset]).index(class_folder), defect_number, index)
    if defect is None:
        return draw(_scene(toy, (seed, *place, 0)), size), np.zeros((size, size), bool)
    return _defective(toy, defect, (seed, *place), size)


def toy_defects(dataset: str, class_folder: str) -> dict[str, int]:
    """The defects of a class and how many pictures each has."""
    toy = CLASSES[dataset][class_folder]
    return dict.fromkeys(toy.defects, toy.images_per_defect)


def write_toy_normals(name: str, class_folder: Path, seed: int = 0, count: int = NEW_NORMALS) -> None:
    """Write CLASS/train/good/000.png of a toy dataset beside the images that it tests on: normal ones drawn anew.

    class_folder: CLASS. The folder appears complete or not at all, as the dataset's own.
    """
    with _complete_folder(class_folder / "train") as unfinished:
        (unfinished / "good").mkdir()
        for index in range(count):
            image, _ = draw_toy_class(name, class_folder.name, None, FIRST_NEW + index, seed)
            Image.fromarray(image).save(unfinished / "good" / f"{index:03d}.png")


def write_toy_dataset(name: str, folder: Path, seed: int = 0) -> None:
    """Write a toy dataset in MVTec's layout: CLASS/test/{good,DEFECT}/000.png, CLASS/ground_truth/DEFECT/000_mask.png.

    The folder appears complete or not at all: everything is written beside it first. A folder that is there already is
    left as it is. Raises UserError for a name that is none of `TOY_DATASETS`.
    """
    if name not in TOY_DATASETS:
        raise UserError(f"'{name}' is not a toy dataset; the toy datasets are {', '.join(TOY_DATASETS)}")
    folder = Path(folder)
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _complete_folder(folder) as unfinished:
        for class_folder in TOY_DATASETS[name]:
            _write_class(name, class_folder, unfinished / class_folder, seed)


@contextmanager
def _complete_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, whose name it takes when the block ends well; removed otherwise."""
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process was faster: its folder is as good as this one.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_class(dataset: str, class_folder: str, folder: Path, seed: int) -> None:
    good = folder / "test" / "good"
    good.mkdir(parents=True)
    for index in range(GOOD_IMAGES[dataset]):
        image, _ = draw_toy_class(dataset, class_folder, None, index, seed)
        Image.fromarray(image).save(good / f"{index:03d}.png")
    for defect, count in toy_defects(dataset, class_folder).items():
        images, masks = folder / "test" / defect, folder / "ground_truth" / defect
        images.mkdir()
        masks.mkdir(parents=True)
        for index in range(count):
            image, mask = draw_toy_class(dataset, class_folder, defect, index, seed)
            Image.fromarray(image).save(images / f"{index:03d}.png")
            Image.fromarray(mask.astype(np.uint8) * 255).save(masks / f"{index:03d}_mask.png")
