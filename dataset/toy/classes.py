"""The classes of the toy datasets (docs/toy_world.md).

Apart from what draws them: their names are needed before anything that takes long to import.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ToyClass:
    """A class: what is drawn, its readable name, how it looks, and how many pictures each defect gets."""

    kind: str
    name: str
    colors: tuple[str, ...]
    accents: tuple[str, ...]
    defects: tuple[str, ...]
    images_per_defect: int
    material: str = "plastic"
    backgrounds: tuple[str, ...] = ("grey", "white", "beige")


_TRAIN_OBJECT = ("scratch", "crack", "hole", "stain", "fracture", "bend")
_TRAIN_TEXTURE = ("scratch", "hole", "stain", "contamination")
_TEST_OBJECT = ("scratch", "contamination", "fracture", "bend", "burn", "dent")
_TEST_TEXTURE = ("crack", "hole", "burn", "fibre", "peeling", "stain")

CLASSES: dict[str, dict[str, ToyClass]] = {
    "toy_train": {
        "plate": ToyClass(
            "plate",
            "plate",
            ("white", "blue", "turquoise", "pink", "yellow", "green"),
            ("white", "beige"),
            _TRAIN_OBJECT,
            8,
            "ceramic",
        ),
        "gear": ToyClass(
            "gear", "gear", ("grey", "orange", "brown", "yellow", "blue", "green"), ("grey",), _TRAIN_OBJECT, 8, "metal"
        ),
        "capsule": ToyClass(
            "capsule",
            "capsule",
            ("red", "orange", "purple", "green", "blue", "turquoise"),
            ("white", "yellow", "pink"),
            _TRAIN_OBJECT,
            8,
        ),
        "bottle": ToyClass(
            "bottle",
            "bottle",
            ("green", "brown", "blue", "turquoise", "purple", "orange"),
            ("white", "beige", "yellow"),
            _TRAIN_OBJECT,
            8,
        ),
        "key": ToyClass(
            "key",
            "key",
            ("yellow", "grey", "orange", "brown", "red", "turquoise"),
            ("grey",),
            _TRAIN_OBJECT,
            8,
            "metal",
        ),
        "wood": ToyClass(
            "wood", "wood", ("brown", "orange", "beige", "grey", "red", "yellow"), ("brown",), _TRAIN_TEXTURE, 12
        ),
        "carpet": ToyClass(
            "carpet",
            "carpet",
            ("red", "blue", "beige", "green", "purple", "pink", "grey"),
            ("grey",),
            _TRAIN_TEXTURE,
            12,
        ),
        "tiles": ToyClass(
            "tiles",
            "tiles",
            ("white", "turquoise", "pink", "blue", "orange", "green"),
            ("grey", "white", "beige"),
            _TRAIN_TEXTURE,
            12,
        ),
    },
    "toy_test": {
        "nut": ToyClass(
            "nut",
            "nut",
            ("grey", "yellow", "brown", "orange", "turquoise", "purple"),
            ("grey",),
            _TEST_OBJECT,
            4,
            "metal",
        ),
        "book": ToyClass(
            "book", "book", ("purple", "red", "beige", "blue", "green", "yellow"), ("grey", "white"), _TEST_OBJECT, 4
        ),
        "spoon": ToyClass(
            "spoon",
            "spoon",
            ("beige", "brown", "orange", "red", "yellow", "pink"),
            ("brown",),
            _TEST_OBJECT,
            4,
            "wooden",
        ),
        "cup": ToyClass(
            "cup", "cup", ("white", "blue", "pink", "green", "red", "turquoise"), ("white",), _TEST_OBJECT, 4, "ceramic"
        ),
        "coin": ToyClass(
            "coin",
            "coin",
            ("yellow", "grey", "orange", "brown", "turquoise", "pink"),
            ("grey",),
            _TEST_OBJECT,
            4,
            "metal",
        ),
        "leather": ToyClass(
            "leather",
            "leather",
            ("brown", "beige", "red", "blue", "green", "grey", "orange"),
            ("brown",),
            _TEST_TEXTURE,
            4,
        ),
        "brick_wall": ToyClass(
            "brick wall",
            "brick wall",
            ("red", "brown", "orange", "yellow", "purple", "blue"),
            ("grey", "beige"),
            _TEST_TEXTURE,
            4,
        ),
        "corrugated_sheet": ToyClass(
            "corrugated sheet",
            "corrugated sheet",
            ("grey", "green", "blue", "white", "orange", "pink"),
            ("grey",),
            _TEST_TEXTURE,
            4,
        ),
    },
}

TOY_DATASETS: dict[str, dict[str, str]] = {
    dataset: {folder: toy.name for folder, toy in classes.items()} for dataset, classes in CLASSES.items()
}
