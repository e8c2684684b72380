"""Images of a dataset as models see them: heatmap, score, that image's pixel AUROC, and attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset.catalog import readable_name
from dataset.images import read_pair, resize_mask
from dataset.options import CATALOG_NAMES
from dataset.prompts import build_prompts
from dataset.records import Record
from engine.data.task import TaskData
from engine.detector.detector import Detector
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention, Attention
from utils.heatmaps import Heatmap, comparison_figure
from utils.logging import progress_bar
from utils.metrics import PixelCounter
from utils.paths import figure_path


@dataclass(frozen=True)
class Picture:
    """An image of a dataset: its record, its pixels, its ground truth (H, W), and what prompts and scoring need."""

    record: Record
    image: Image.Image
    mask: np.ndarray
    class_name: str
    domain: str

    @property
    def title(self) -> str:
        """Class and kind of defect, in words; medical datasets' folders tell no kind. Whether a mask is missing."""
        kind = Path(self.record.image_path).parent.name
        if self.domain == "medical":
            kind = "anomalous" if self.record.label else "normal"
        # Not the name in prompts, which several classes may share.
        unknown = " (no mask)" if self.record.lacks_mask else ""
        return f"{readable_name(self.record.class_name)}, {readable_name(kind)}{unknown}"


def read_picture(data: TaskData, record: Record) -> Picture:
    """An image with its ground truth; `UserError` for a file that cannot be read, and a mask of another size."""
    image, mask = read_pair(data.located.root, record, data.mask_threshold)
    return Picture(record, image, np.asarray(mask) > 0, data.names[record.class_name], data.located.spec.domain)


def look(detector: Detector, picture: Picture, name: str, attention: bool = False) -> Heatmap:
    """One image through one model, called `name`; with its attention maps where asked for and where it has any."""
    asked = (picture.image, picture.class_name, picture.domain)
    # The picture's class has its name in prompts already.
    references = detector.references.get(readable_name(picture.record.class_name))
    predict = partial(detector.predict, *asked, class_names=CATALOG_NAMES, references=references)
    maps: dict[str, np.ndarray] = {}
    if attention and isinstance(detector.model, AdaptedCLIPWithCrossAttention):
        prediction, weights = predict(return_attention=True)
        maps = attention_heatmaps(weights, len(build_prompts(picture.class_name)[0]))
    else:
        prediction = predict()
    found = prediction.anomaly_map
    truth = resize_mask(Image.fromarray(picture.mask), found.shape[::-1])
    pixels = PixelCounter()
    pixels.update(torch.from_numpy(found)[None], torch.from_numpy(np.array(truth))[None], [picture.record.image_path])
    return Heatmap(name, found, prediction.score, pixels.result()["pixel_auroc"], maps)


def attention_heatmaps(attention: Attention, normal: int) -> dict[str, np.ndarray]:
    """Maps on the patch grid, mean over heads, relative to even attention: 1 is what a patch gets by chance.

    "Abnormal prompts look at": from the words of the abnormal prompts to each patch. "Looks at abnormal words": the
    weight that each patch gives to the abnormal prompts. normal: how many of the prompts are normal; they come first.
    """
    maps = {}
    words = attention.words[0]  # (P, T)
    if attention.text is not None:
        looked_at = attention.text[0].mean(dim=0)[normal:][words[normal:]].mean(dim=0)  # (N,)
        maps["Abnormal prompts look at"] = on_grid(looked_at * looked_at.numel())
    if attention.image is not None:
        share = attention.image[0, :, 1:, normal:].sum(dim=(2, 3)).mean(dim=0)
        maps["Looks at abnormal words"] = on_grid(share * words.sum() / words[normal:].sum())
    return maps


def on_grid(values: torch.Tensor) -> np.ndarray:
    """(N,) -> (side, side)."""
    side = round(values.numel() ** 0.5)
    return values.reshape(side, side).cpu().numpy()


def draw_overlays(detector: Detector, data: TaskData, per_class: int | None, folder: Path) -> list[Path]:
    """A figure for every image, or for `per_class` of each class, anomalous and normal ones in turn.

    Returns the figures' paths, which are those of the images, under `folder`.
    """
    records = list(data.records) if per_class is None else some_of_each_class(data, per_class)
    figures: list[Path] = []
    taken: set[str] = set()
    bar = progress_bar(len(records), "drawing")
    for record in records:
        picture = read_picture(data, record)
        figures.append(figure_path(folder, record.image_path, ".png", taken))
        heatmap = look(detector, picture, detector.name)
        comparison_figure(picture.image, picture.mask, [heatmap], figures[-1], picture.title)
        bar.update()
    bar.close()
    return figures


def some_of_each_class(data: TaskData, count: int) -> list[Record]:
    """The first `count` records of each class, anomalous and normal ones in turn while there are both."""
    chosen = []
    for class_name in data.classes:
        records = data.of_class(class_name)
        kinds = ([record for record in records if record.label == label] for label in (1, 0))
        in_turn = [record for pair in zip_longest(*kinds) for record in pair if record is not None]
        chosen += in_turn[:count]
    return chosen
