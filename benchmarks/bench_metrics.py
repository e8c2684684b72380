"""Metrics of one class from `utils.metrics` and from scikit-learn on the full arrays: seconds and differences.

Anomaly maps are smooth noise on CLIP's patch grid with higher values at most defects, enlarged bilinearly: sums of four
levels in a narrow range around 2, or probabilities in [0, 1]. Every second image has defects. scikit-learn computes
pixel AUROC and AP, this project all seven metrics; F1-max and AUPRO are only compared. Times are processor time. The
benchmark needs about 60 bytes of memory per pixel.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch import Tensor

from utils.metrics import FPR_LIMIT, PixelCounter, image_metrics

KINDS = ("around 2", "in [0, 1]")
PATCH = 14


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="images of the class")
    parser.add_argument("--size", type=int, default=518, help="side of the maps in pixels")
    parser.add_argument("--batch_size", type=int, default=8, help="maps per update")
    parser.add_argument("--repeats", type=int, default=1, help="repetitions; the median is printed")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)  # as scikit-learn
    print(f"{arguments.images} images of {arguments.size} x {arguments.size}, batches of {arguments.batch_size}\n")
    print("| maps | anomalous pixels | scikit-learn, 2 metrics, s | this project, 7 metrics, s | largest difference |")
    print(f"|---|---:|{'---:|' * 3}")
    for kind in KINDS:
        generator = torch.Generator().manual_seed(0)
        masks = draw_masks(arguments.images, arguments.size, generator)
        maps = draw_maps(masks, kind, generator)
        expected, reference_s = timed(arguments.repeats, reference_areas, maps, masks)
        values, seconds = timed(arguments.repeats, streamed, maps, masks, arguments.batch_size)
        expected |= reference_others(maps, masks)
        largest = max(abs(values[name] - expected[name]) for name in expected)
        share = f"{masks.float().mean().item():.2%}"
        print(f"| {kind} | {share} | {reference_s:.2f} | {seconds:.2f} | {largest:.1e} |", flush=True)


def timed(repeats: int, function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """The result of a function, and the median of its processor time in seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        result = function(*arguments)
        seconds.append(time.process_time() - start)
    return result, statistics.median(seconds)


def draw_masks(images: int, size: int, generator: torch.Generator) -> Tensor:
    """(B, H, W) bool: one to four ellipses in every second image."""
    masks = torch.zeros(images, size, size, dtype=torch.bool)
    y, x = torch.meshgrid(*(torch.linspace(0, 1, size),) * 2, indexing="ij")
    for mask in masks[::2]:
        for _ in range(int(torch.randint(1, 5, (1,), generator=generator))):
            cy, cx, ry, rx = torch.rand(4, generator=generator).tolist()
            mask |= ((y - cy) / (0.02 + 0.09 * ry)) ** 2 + ((x - cx) / (0.02 + 0.09 * rx)) ** 2 < 1
    return masks


def draw_maps(masks: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Anomaly maps (B, H, W), in which each level responds to a defect with its own strength."""
    images, size = masks.shape[0], masks.shape[-1]
    side = max(1, size // PATCH)
    maps = torch.empty(masks.shape)
    for index in range(images):
        hit = F.adaptive_avg_pool2d(masks[index][None, None].float(), side)
        total = torch.zeros(1, 1, size, size)
        for _ in range(4):
            noise = F.avg_pool2d(torch.randn(1, 1, side + 4, side + 4, generator=generator), 5, stride=1)
            strength = 2.5 * torch.rand(1, generator=generator) ** 0.5
            offset = 0.15 * torch.randn(1, generator=generator)
            logits = 4 * noise + 4 * strength * blur(hit) + offset
            level = torch.sigmoid(logits - 3) if kind == "in [0, 1]" else 0.5 + 0.01 * logits
            total += F.interpolate(level, size=(size, size), mode="bilinear", align_corners=True)
        maps[index] = total[0, 0] / 4 if kind == "in [0, 1]" else total[0, 0]
    return maps


def blur(grid: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(grid, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def streamed(maps: Tensor, masks: Tensor, batch_size: int) -> dict[str, float | None]:
    """All seven metrics from batches."""
    names = [f"image {index}" for index in range(len(maps))]
    counter = PixelCounter()
    for start in range(0, len(maps), batch_size):
        rows = slice(start, start + batch_size)
        counter.update(maps[rows], masks[rows], names[rows])
    labels, scores = masks.flatten(1).any(dim=1).numpy(), maps.flatten(1).amax(dim=1).numpy()
    return {**counter.result(), **image_metrics(labels, scores, names)}


def reference_areas(maps: Tensor, masks: Tensor) -> dict[str, float]:
    labels, scores = masks.flatten().numpy(), maps.flatten().numpy()
    return {
        "pixel_auroc": 100 * float(roc_auc_score(labels, scores)),
        "pixel_ap": 100 * float(average_precision_score(labels, scores)),
    }


def reference_others(maps: Tensor, masks: Tensor) -> dict[str, float]:
    precision, recall, _ = precision_recall_curve(masks.flatten().numpy(), maps.flatten().numpy())
    total = precision + recall
    f1 = np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)
    return {"pixel_f1_max": 100 * float(f1.max()), "aupro": plain_aupro(maps.numpy(), masks.numpy())}


def plain_aupro(maps: np.ndarray, masks: np.ndarray) -> float:
    """AUPRO in percent, by sorting all pixels."""
    shares, regions = np.zeros(masks.shape), 0
    for share, mask in zip(shares, masks, strict=True):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        share[mask] = 1 / np.bincount(labels[mask])[labels[mask]]
        regions += count
    order = np.argsort(-maps.ravel(), kind="stable")
    last = np.append(np.diff(maps.ravel()[order]) != 0, True)
    fpr = np.cumsum(~masks.ravel()[order])[last] / (~masks).sum()
    pro = np.cumsum(shares.ravel()[order])[last] / regions
    fpr, pro = np.append(0, fpr), np.append(0, pro)
    inside = fpr <= FPR_LIMIT
    x, y = np.append(fpr[inside], FPR_LIMIT), np.append(pro[inside], np.interp(FPR_LIMIT, fpr, pro))
    return 100 * float(np.trapezoid(y, x)) / FPR_LIMIT


if __name__ == "__main__":
    main()
