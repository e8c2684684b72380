"""Images of the toy dataset to try the page with."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image

from dataset.toy.classes import CLASSES, TOY_DATASETS
from dataset.toy_world import draw_toy_class
from engine.app.uploads import Upload


class Example(NamedTuple):
    """An image and its class."""

    image: Upload
    class_name: str
    caption: str


def toy_examples(dataset: str = "toy_test", count: int = 8) -> list[Example]:
    """An image with a defect of each of the first classes, and a normal image of the first class."""
    examples = []
    for row, (folder, toy) in enumerate(list(CLASSES[dataset].items())[: count - 1]):
        defect = toy.defects[row % len(toy.defects)]
        examples.append(_draw(dataset, folder, TOY_DATASETS[dataset][folder], defect))
    folder, name = next(iter(TOY_DATASETS[dataset].items()))
    return [*examples, _draw(dataset, folder, name, None)]


def _draw(dataset: str, folder: str, name: str, defect: str | None) -> Example:
    pixels, _ = draw_toy_class(dataset, folder, defect, 0)
    caption = f"{name}, {defect.replace('_', ' ') if defect else 'normal'}"
    return Example(Upload(f"{caption}.png", Image.fromarray(pixels)), name, caption)
