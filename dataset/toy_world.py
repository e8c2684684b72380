"""The toy datasets (docs/toy_world.md): drawn from a seed and written once, in MVTec's layout."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataset.toy.classes import CLASSES, TOY_DATASETS
from dataset.toy.scene import COLORS, Scene, Thing, draw, draw_with_mask
from dataset.toy.textures import TEXTURES
from utils.errors import UserError

IMAGE_SIZE = 96  # pixels; the input size of the toy CLIP, so that nothing is resampled
GOOD_IMAGES = {"toy_train": 48, "toy_test": 24}  # per class
# Normal images for references: their number in a class, and the index of the first, which no test image has.
NEW_NORMALS, FIRST_NEW = 32, 10_000
SEVERITY = 1.3  # defects are larger than in the drawings of the pre-training
SMALLEST_DEFECT = 0.01  # smallest share of the image in the mask, about one patch
BACKGROUNDS = ("grey", "white", "beige")


def _distinct(one: str, other: str) -> bool:
    """Whether two named colours differ clearly, so that a missing part of an object is visible."""
    return max(abs(a - b) for a, b in zip(COLORS[one], COLORS[other], strict=True)) > 0.3


def _scene(dataset: str, class_folder: str, seed: tuple[int, ...]) -> Scene:
    """One instance of a class; the seed decides its colours, pose and place."""
    toy, kind = CLASSES[dataset][class_folder], TOY_DATASETS[dataset][class_folder]
    rng = np.random.default_rng((*seed, 4))

    def pick(names: Sequence[str]) -> str:
        return names[int(rng.integers(len(names)))]

    color = pick(toy.colors)
    accent = pick([name for name in toy.accents if name != color] or ["black"])
    background = pick([name for name in BACKGROUNDS if _distinct(name, color)])
    texture = kind in TEXTURES
    center = (0.0, 0.0) if texture else (float(rng.uniform(-0.16, 0.16)), float(rng.uniform(-0.16, 0.16)))
    radius = float(rng.uniform(0.85, 1.2) if texture else rng.uniform(0.82, 1.02))
    turn = float(rng.uniform(0, 2 * np.pi))
    return Scene((Thing(kind, color, accent, toy.material, center, radius, turn),), background, (), seed)


def draw_toy_class(
    dataset: str, class_folder: str, defect: str | None, index: int, seed: int = 0, size: int = IMAGE_SIZE
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Draw one image of a toy dataset; it depends on these arguments alone.

    Args:
        dataset: "toy_train" or "toy_test".
        class_folder: The class.
        defect: One of the class's defects; None for a normal image.
        index: The image's number.
        seed: The dataset's seed.
        size: Side in pixels.

    Returns:
        The image (size, size, 3) and its mask (size, size).
    """
    defects = CLASSES[dataset][class_folder].defects
    number = 0 if defect is None else 1 + defects.index(defect)
    seeds = (seed, list(CLASSES).index(dataset), list(CLASSES[dataset]).index(class_folder), number, index)
    if defect is None:
        return draw(_scene(dataset, class_folder, (*seeds, 0)), size), np.zeros((size, size), bool)
    for attempt in range(50):
        image, mask = draw_with_mask(_scene(dataset, class_folder, (*seeds, attempt)), size, defect, SEVERITY)
        if mask.mean() >= SMALLEST_DEFECT:
            return image, mask
    raise RuntimeError(f"no {defect} of {SMALLEST_DEFECT:.1%} of the image fits on {class_folder}")


def toy_defects(dataset: str, class_folder: str) -> dict[str, int]:
    """The defects of a class and the number of images of each."""
    toy = CLASSES[dataset][class_folder]
    return dict.fromkeys(toy.defects, toy.images_per_defect)


def write_toy_normals(name: str, class_folder: Path, seed: int = 0, count: int = NEW_NORMALS) -> None:
    """Write new normal images of a class of a toy dataset to CLASS/train/good; the folder appears complete."""
    with _complete_folder(class_folder / "train") as unfinished:
        (unfinished / "good").mkdir()
        for index in range(count):
            image, _ = draw_toy_class(name, class_folder.name, None, FIRST_NEW + index, seed)
            Image.fromarray(image).save(unfinished / "good" / f"{index:03d}.png")


def write_toy_dataset(name: str, folder: Path, seed: int = 0) -> None:
    """Write a toy dataset in MVTec's layout; the folder appears complete, and an existing one is not changed.

    Args:
        name: One of `TOY_DATASETS`.
        folder: Gets CLASS/test/{good,DEFECT}/000.png and CLASS/ground_truth/DEFECT/000_mask.png.
        seed: Of all images.

    Raises:
        UserError: `name` is no toy dataset.
    """
    if name not in TOY_DATASETS:
        raise UserError(f"'{name}' is not a toy dataset; the toy datasets are {', '.join(TOY_DATASETS)}")
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _complete_folder(folder) as unfinished:
        for class_folder in TOY_DATASETS[name]:
            _write_class(name, class_folder, unfinished / class_folder, seed)


@contextmanager
def _complete_folder(folder: Path) -> Iterator[Path]:
    """A new folder next to `folder`, renamed to it after the block; removed if the block fails."""
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process may have written the same content first.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_class(dataset: str, class_folder: str, folder: Path, seed: int) -> None:
    counts: list[tuple[str | None, int]] = [(None, GOOD_IMAGES[dataset]), *toy_defects(dataset, class_folder).items()]
    for defect, count in counts:
        images, masks = folder / "test" / (defect or "good"), folder / "ground_truth" / (defect or "good")
        images.mkdir(parents=True)
        if defect:
            masks.mkdir(parents=True)
        for index in range(count):
            image, mask = draw_toy_class(dataset, class_folder, defect, index, seed)
            Image.fromarray(image).save(images / f"{index:03d}.png")
            if defect:
                Image.fromarray(mask.astype(np.uint8) * 255).save(masks / f"{index:03d}_mask.png")
