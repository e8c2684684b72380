"""The classes of the toy datasets (`classes.json`, docs/toy_world.md)."""

from dataclasses import dataclass
from pathlib import Path

from utils.reading import read_json


@dataclass(frozen=True)
class ToyClass:
    """The looks of a class, by name, and the number of images of each defect."""

    colors: list[str]
    accents: list[str]
    defects: list[str]
    images_per_defect: int
    material: str = "plastic"


# In this order: the index of a dataset and of a class is part of each image's seed.
CLASSES = {
    dataset: {folder: ToyClass(**row) for folder, row in classes.items()}
    for dataset, classes in read_json(Path(__file__).with_name("classes.json"), dict[str, dict[str, ToyClass]]).items()
}
# The name of each class in prompts, which is also the kind of object that is drawn.
TOY_DATASETS = {
    dataset: {folder: folder.replace("_", " ") for folder in classes} for dataset, classes in CLASSES.items()
}
