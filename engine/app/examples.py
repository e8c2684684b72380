"""Images of the toy dataset to try the page with."""

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
    folders = list(CLASSES[dataset])
    defects = [toy.defects[row % len(toy.defects)] for row, toy in enumerate(CLASSES[dataset].values())]
    examples = []
    for folder, defect in [*zip(folders[: count - 1], defects[: count - 1], strict=True), (folders[0], None)]:
        pixels, _ = draw_toy_class(dataset, folder, defect, 0)
        name = TOY_DATASETS[dataset][folder]
        caption = f"{name}, {defect.replace('_', ' ') if defect else 'normal'}"
        examples.append(Example(Upload(f"{caption}.png", Image.fromarray(pixels)), name, caption))
    return examples
