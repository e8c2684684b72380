"""Accuracy and time with and without tiles, on toy images of four times the size with defects of the usual size.

For each choice of `--tiles`: image and pixel metrics of a checkpoint, averaged over classes, and the time per image.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from dataset import toy_world
from dataset.toy import scene
from dataset.toy.defects import DEFECTS, Change, Site
from dataset.toy.shapes import Field
from engine import load_model
from engine.data.task import load_task
from engine.evaluation.evaluate import evaluate
from utils.text import markdown_table

ZOOM = 4
METRICS = {"image_auroc": "Image AUROC", "pixel_auroc": "Pixel AUROC", "pixel_ap": "Pixel AP", "aupro": "AUPRO"}


class SmallSite(Site):
    """The place of a defect that is drawn at 1 / `ZOOM` of its size relative to the image."""

    @property
    def grid(self) -> tuple[Field, Field]:
        x, y = (center + ZOOM * (axis - center) for axis, center in zip(super().grid, self.center, strict=True))
        return x, y

    @property
    def soft(self) -> float:
        return ZOOM * super().soft


def small_change(drawn: scene.Scene, sound: scene._Stage, defect: str, severity: float = 1.0) -> Change:
    """A defect, `ZOOM` times smaller than `dataset.toy.scene` draws it."""
    site = scene._place_defect(drawn, sound, defect, np.random.default_rng((*drawn.seed, 2)), severity)
    change = DEFECTS[defect](SmallSite(**vars(site)))
    cut, height = (None if field is None else field / ZOOM for field in (change.cut, change.height))
    warp = change.warp and (change.warp[0] / ZOOM, change.warp[1] / ZOOM)
    return replace(change, cut=cut, height=height, warp=warp)


def write_images(folder: Path, dataset: str, per_kind: int) -> None:
    """Draw `per_kind` normal images of each class and `per_kind` of each defect, in MVTec's layout."""
    size = ZOOM * toy_world.IMAGE_SIZE
    smallest = mock.patch.object(toy_world, "SMALLEST_DEFECT", toy_world.SMALLEST_DEFECT / ZOOM**2)
    with smallest, mock.patch.object(scene, "_change", small_change):
        for name, toy in toy_world.CLASSES[dataset].items():
            for defect, index in ((kind, index) for kind in (None, *toy.defects) for index in range(per_kind)):
                image, mask = toy_world.draw_toy_class(dataset, name, defect, index, size=size)
                paths = {f"test/{defect or 'good'}/{index:03d}.png": image}
                if defect:
                    paths[f"ground_truth/{defect}/{index:03d}_mask.png"] = mask.astype(np.uint8) * 255
                for path, pixels in paths.items():
                    (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(folder / name / path)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    detector = load_model(options.checkpoint, device="cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "large"
        if not folder.exists():
            write_images(folder, options.dataset, options.images)
        data = load_task(str(folder))
        rows, seconds = [], []
        for tiles in options.tiles:
            detector.tiles = tiles
            start = time.process_time()
            result = evaluate({tiles: detector}, data, "cpu")[tiles].total
            seconds.append((time.process_time() - start) / result.images)
            values = [result.values[metric] or 0 for metric in METRICS]
            rows.append([tiles, *(f"{value:.1f}" for value in (*values, seconds[-1] / seconds[0]))])
    print(f"{result.images} images of {ZOOM * toy_world.IMAGE_SIZE} pixels, model of {detector.clip.img_size} pixels\n")
    print(markdown_table(["tiles", *METRICS.values(), "times the processor time"], rows))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--dataset", default="toy_test", choices=toy_world.TOY_DATASETS)
    parser.add_argument("--images", type=int, default=6, help="normal images of each class, and images of each defect")
    parser.add_argument("--tiles", nargs="+", default=["off", "2", "auto"])
    parser.add_argument("--folder", type=Path, help="keep the images there, or use those that are there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
