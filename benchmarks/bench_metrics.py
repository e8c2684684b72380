"""Metrics of one class from `utils.metrics` and from scikit-learn or anomalib: seconds, memory and differences.

Anomaly maps are smooth noise on CLIP's patch grid with higher values at most defects, enlarged bilinearly, means of
four levels. Every second image has defects. scikit-learn computes pixel AUROC and AP on the full arrays, anomalib the
four pixel metrics, this project all seven metrics. Times are processor time, memory is the increase of the process's
peak. scikit-learn needs about 60 bytes per pixel; anomalib is not among the requirements (`pip install anomalib`).
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from benchmarks.bench_vit_l import peak_memory
from utils.metrics import PixelCounter, image_metrics

PATCH = 14


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="images of the class")
    parser.add_argument("--size", type=int, default=518, help="side of the maps in pixels")
    parser.add_argument("--batch_size", type=int, default=8, help="maps per update")
    parser.add_argument("--library", choices=("scikit-learn", "anomalib"), default="scikit-learn", help="to compare")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)  # as scikit-learn
    print(f"{arguments.images} images of {arguments.size} x {arguments.size}, batches of {arguments.batch_size}\n")
    generator = torch.Generator().manual_seed(0)
    masks = draw_masks(arguments.images, arguments.size, generator)
    maps = draw_maps(masks, generator)
    compared = anomalib_metrics if arguments.library == "anomalib" else reference_areas
    for function, more in ((streamed, (arguments.batch_size,)), (compared, ())):
        function(maps[:2], masks[:2], *more)  # imports the libraries
    values, seconds, gib = measured(streamed, maps, masks, arguments.batch_size)
    expected, reference_s, reference_gib = measured(compared, maps, masks)
    largest = max(abs(values[name] - expected[name]) for name in expected)
    print(f"{arguments.library}, {len(expected)} metrics: {reference_s:.2f} s, {reference_gib:.2f} GiB")
    print(f"this project, 7 metrics: {seconds:.2f} s, {gib:.2f} GiB")
    print(f"largest difference: {largest:.1e} percentage points")


def measured(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float, float]:
    """The result of a function, its processor time in seconds, and the growth of the peak memory in GiB."""
    start, peak = time.process_time(), peak_memory("cpu")
    result = function(*arguments)
    return result, time.process_time() - start, peak_memory("cpu") - peak


def draw_masks(images: int, size: int, generator: torch.Generator) -> Tensor:
    """(B, H, W) bool: one to four ellipses in every second image."""
    masks = torch.zeros(images, size, size, dtype=torch.bool)
    y, x = torch.meshgrid(*(torch.linspace(0, 1, size),) * 2, indexing="ij")
    for mask in masks[::2]:
        for _ in range(int(torch.randint(1, 5, (1,), generator=generator))):
            cy, cx, ry, rx = torch.rand(4, generator=generator).tolist()
            mask |= ((y - cy) / (0.02 + 0.09 * ry)) ** 2 + ((x - cx) / (0.02 + 0.09 * rx)) ** 2 < 1
    return masks


def draw_maps(masks: Tensor, generator: torch.Generator) -> Tensor:
    """Anomaly maps (B, H, W) in [0, 1], in which each of four levels responds to a defect with its own strength."""
    size = masks.shape[-1]
    side = max(1, size // PATCH)
    maps = torch.empty(masks.shape)
    for index, mask in enumerate(masks):
        hit = F.adaptive_avg_pool2d(mask[None, None].float(), side)
        noise = F.avg_pool2d(torch.randn(1, 4, side + 4, side + 4, generator=generator), 5, stride=1)
        strength, offset = 2.5 * torch.rand(1, 4, 1, 1, generator=generator) ** 0.5, torch.randn(1, 4, 1, 1) / 7
        levels = torch.sigmoid(4 * noise + 4 * strength * F.avg_pool2d(hit, 3, stride=1, padding=1) + offset - 3)
        maps[index] = F.interpolate(levels, size=(size, size), mode="bilinear", align_corners=True).mean(dim=1)[0]
    return maps


def streamed(maps: Tensor, masks: Tensor, batch_size: int) -> dict[str, float | None]:
    """All seven metrics from batches."""
    names = [f"image {index}" for index in range(len(maps))]
    counter = PixelCounter()
    for start in range(0, len(maps), batch_size):
        rows = slice(start, start + batch_size)
        counter.update(maps[rows], masks[rows], names[rows])
    labels, scores = masks.flatten(1).any(dim=1).numpy(), maps.flatten(1).amax(dim=1).numpy()
    return {**counter.result(), **image_metrics(labels, scores, names)}


def anomalib_metrics(maps: Tensor, masks: Tensor) -> dict[str, float]:
    from anomalib.metrics import aupr, aupro, auroc, f1_score

    classes = {"auroc": auroc._AUROC, "ap": aupr._AUPR, "f1_max": f1_score._F1Max}
    values = {}
    for name, metric in {**{f"pixel_{name}": kind for name, kind in classes.items()}, "aupro": aupro._AUPRO}.items():
        computed = metric()
        computed.update(maps, masks.int())
        values[name] = 100 * float(computed.compute())
    return values


def reference_areas(maps: Tensor, masks: Tensor) -> dict[str, float]:
    labels, scores = masks.flatten().numpy(), maps.flatten().numpy()
    return {
        "pixel_auroc": 100 * float(roc_auc_score(labels, scores)),
        "pixel_ap": 100 * float(average_precision_score(labels, scores)),
    }


if __name__ == "__main__":
    main()
