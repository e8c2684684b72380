"""Heatmaps, scores, pixel AUROC and attention maps of single images of a dataset."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset.images import read_pair, resize_mask
from dataset.prompts import build_prompts, readable_name
from dataset.records import Record
from engine.data.task import TaskData
from engine.detector.detector import Detector
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention, Attention
from utils.heatmaps import Heatmap, comparison_figure
from utils.logging import with_progress
from utils.metrics import PixelCounter
from utils.paths import figure_path


@dataclass(frozen=True)
class DatasetImage:
    """An image of a dataset with its ground truth (H, W), its class's name in prompts, and its domain."""

    record: Record
    image: Image.Image
    mask: np.ndarray
    class_name: str
    domain: str

    @property
    def title(self) -> str:
        """Class, kind of defect, and whether a mask is missing; folders of medical datasets do not name the kind."""
        kind = Path(self.record.image_path).parent.name
        if self.domain == "medical":
            kind = "anomalous" if self.record.label else "normal"
        # Several classes may share a name in prompts, so it is not used here.
        unknown = " (no mask)" if self.record.lacks_mask else ""
        return f"{readable_name(self.record.class_name)}, {readable_name(kind)}{unknown}"


def read_dataset_image(data: TaskData, record: Record) -> DatasetImage:
    """An image with its ground truth; `UserError` for an unreadable file or a mask of another size."""
    image, mask = read_pair(data.located.root, record, data.mask_threshold)
    return DatasetImage(record, image, np.asarray(mask) > 0, data.names[record.class_name], data.located.spec.domain)


def predict_heatmap(detector: Detector, picture: DatasetImage, name: str, attention: bool = False) -> Heatmap:
    """The result of a model, called `name`, for an image; with attention maps if requested and if there are any."""
    crossed = isinstance(detector.model, AdaptedCLIPWithCrossAttention)
    prediction = detector.predict(
        picture.image,
        picture.record.class_name,
        picture.domain,
        return_attention=attention and crossed,
        class_names={picture.record.class_name: picture.class_name},
    )
    maps: dict[str, np.ndarray] = {}
    if prediction.attention is not None:
        maps = attention_heatmaps(prediction.attention, len(build_prompts(picture.class_name)[0]))
    anomaly_map = prediction.anomaly_map
    truth = resize_mask(Image.fromarray(picture.mask), anomaly_map.shape[::-1])
    pixels = PixelCounter()
    pixels.update(
        torch.from_numpy(anomaly_map)[None], torch.from_numpy(np.array(truth))[None], [picture.record.image_path]
    )
    return Heatmap(name, anomaly_map, prediction.score, pixels.result()["pixel_auroc"], maps)


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


def draw_overlays(detector: Detector, data: TaskData, per_class: int | str, folder: Path) -> int:
    """Draw a figure for `per_class` images of each class, alternately anomalous and normal, or for "all" images.

    The figures have the images' relative paths under `folder`. Returns their number.
    """
    records = []
    for class_name in data.classes:
        of_class = data.of_class(class_name)
        by_label = ([record for record in of_class if record.label == label] for label in (1, 0))
        alternating = [record for pair in zip_longest(*by_label) for record in pair if record is not None]
        records += alternating if isinstance(per_class, str) else alternating[:per_class]
    taken: set[str] = set()
    for record in with_progress(records, "drawing"):
        picture = read_dataset_image(data, record)
        path = figure_path(folder, record.image_path, ".png", taken)
        heatmap = predict_heatmap(detector, picture, detector.name)
        comparison_figure(picture.image, picture.mask, [heatmap], path, picture.title)
    return len(records)
