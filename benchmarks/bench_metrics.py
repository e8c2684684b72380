"""Metrics of one class from `utils.metrics` and from scikit-learn on the full arrays: seconds and differences.

Maps are smooth noise on CLIP's patch grid, raised at most defects, enlarged bilinearly, in two kinds: sums of four
levels in a narrow range around 2, and probabilities in [0, 1]. Half of the images hold defects. scikit-learn takes
AUROC and AP alone, and its F1-max and a plain AUPRO are compared without being timed; our time is for all seven
metrics. Both are timed in seconds on the clock and of processor time, which others on the machine disturb less. Needs
about 60 bytes of memory per pixel.
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
CLOCKS = {"clock": time.perf_counter, "processor": time.process_time}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="images of the class")
    parser.add_argument("--size", type=int, default=518, help="side of the maps in pixels")
    parser.add_argument("--batch_size", type=int, default=8, help="maps per update")
    parser.add_argument("--repeats", type=int, default=1, help="times each side is timed; the median counts")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads; scikit-learn uses one")
    parser.add_argument("--seed", type=int, default=0, help="of the maps")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.images} images of {arguments.size} x {arguments.size}, batches of {arguments.batch_size}\n")
    print("| maps | anomalous pixels | time | scikit-learn's AUROC and AP, s | all seven here, s | ratio |")
    print(f"|---|---:|---|{'---:|' * 3}")
    differences = []
    for kind in KINDS:
        generator = torch.Generator().manual_seed(arguments.seed)
        masks = draw_masks(arguments.images, arguments.size, generator)
        maps = draw_maps(masks, kind, generator)
        ours, theirs = [], []
        for _ in range(arguments.repeats):
            theirs.append(timed(reference_areas, maps, masks))
            ours.append(timed(streamed, maps, masks, arguments.batch_size))
        (values, _), (expected, _) = ours[-1], theirs[-1]
        for clock in CLOCKS:
            seconds = [statistics.median(times[clock] for _, times in side) for side in (theirs, ours)]
            row = [kind, f"{masks.float().mean().item():.2%}", clock]
            row += [*(f"{s:.2f}" for s in seconds), f"{seconds[0] / seconds[1]:.0f}"]
            print(f"| {' | '.join(map(str, row))} |", flush=True)
        expected = {**expected, **reference_others(maps, masks)}
        differences += [(kind, name, values[name], expected[name]) for name in expected]
    print("\n| maps | metric | value, % | scikit-learn or plain, % | difference, points |")
    print(f"|---|---|{'---:|' * 3}")
    for kind, name, value, reference in differences:
        print(f"| {kind} | {name} | {value:.4f} | {reference:.4f} | {abs(value - reference):.1e} |")


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, dict[str, float]]:
    """What the function returns, and the seconds it took on each of `CLOCKS`."""
    start = {name: clock() for name, clock in CLOCKS.items()}
    result = function(*arguments)
    return result, {name: clock() - start[name] for name, clock in CLOCKS.items()}


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
    """Scores (B, H, W): each level sees a defect on its patches with another strength, some hardly."""
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
    """All seven metrics, from batches."""
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
    """AUPRO by sorting all pixels, in percent."""
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
