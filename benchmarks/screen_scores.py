"""Compare image scores without parameters on a dataset: `python -m benchmarks.screen_scores DATASET CHECKPOINT...`.

Each score is computed from one image alone, as in `Detector.predict`. Prints the image AUROC, averaged over classes and
checkpoints, and the share of images whose score equals that of another image of their class: as trained, and with
logits 30 times as large, as of a model whose p(abnormal) saturates.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from engine.data.loaders import evaluation_loader, make_dataset
from engine.data.task import load_task
from engine.detector.detector import Detector
from engine.detector.loading import load_model, unadapted_detector
from model.scoring import Outputs, calibrated_maps, calibrated_scores, det_scores
from utils.text import markdown_table

TOP_SHARE = 0.001
SATURATION = 30.0
LOWER_SCALE = 0.25


def candidates(outputs: Outputs, frozen: Outputs, size: int) -> dict[str, Tensor]:
    """The scores of B images by name; frozen: outputs of unadapted CLIP."""
    maps = calibrated_maps(outputs, size).mean(dim=0)
    lower = outputs._replace(levels=[LOWER_SCALE * level for level in outputs.levels])
    softer = calibrated_maps(lower, size).mean(dim=0)
    top = maps.flatten(1).topk(max(1, round(TOP_SHARE * maps[0].numel())), dim=1).values.mean(dim=1)
    peak, softer_peak = maps.flatten(1).amax(dim=1), softer.flatten(1).amax(dim=1)
    det, own = det_scores(outputs), (100 * frozen.det).softmax(dim=1)[:, 1]
    return {
        "half maximum, half det (default)": calibrated_scores(maps, outputs, "industrial"),
        "half maximum, half det difference": calibrated_scores(maps, outputs, "industrial", "difference"),
        "maximum": peak,
        "mean of the top 0.1 % of pixels": top,
        "half top 0.1 %, half det": 0.5 * top + 0.5 * det,
        "maximum at a quarter of the logit scale": softer_peak,
        "half maximum at a quarter of the logit scale, half det": 0.5 * softer_peak + 0.5 * det,
        "half maximum, half CLIP's class token": 0.5 * peak + 0.5 * own,
        "CLIP's class token": own,
    }


@torch.inference_mode()
def scores_of(detector: Detector, dataset: str, data_root: Path | None) -> tuple[list[str], list[bool], list[dict]]:
    """Classes and labels of all images, and their scores by name, for both scales of logits."""
    data = load_task(dataset, data_root)
    frozen = unadapted_detector(detector.clip).model
    prompts = data.prompts(detector.clip)
    sides = [model.text_side(prompts, None) for model in (detector.model, frozen)]
    names: list[str] = []
    labels: list[bool] = []
    found: list[dict[str, list[float]]] = [defaultdict(list), defaultdict(list)]
    for batch in evaluation_loader(make_dataset(data, detector.clip), 32, 0):
        rows = torch.full((len(batch["label"]),), data.classes.index(batch["class_name"][0]))
        own, plain = (m(batch["image"], side, rows) for m, side in zip((detector.model, frozen), sides, strict=True))
        names += batch["class_name"]
        labels += batch["label"].bool().tolist()
        for scale, scores in zip((1.0, SATURATION), found, strict=True):
            outputs = own._replace(levels=[scale * level for level in own.levels])
            for name, values in candidates(outputs, plain, detector.clip.img_size).items():
                scores[name] += values.tolist()
    return names, labels, found


def summary(names: Sequence[str], labels: Sequence[bool], scores: Sequence[float]) -> tuple[float, float]:
    """Image AUROC averaged over classes, and the share of images with a tied score, in percent."""
    aurocs, tied = [], 0
    for name in dict.fromkeys(names):
        chosen = [index for index, each in enumerate(names) if each == name]
        values = [scores[index] for index in chosen]
        aurocs.append(roc_auc_score([labels[index] for index in chosen], values))
        tied += sum(count for count in Counter(values).values() if count > 1)
    return 100 * float(np.mean(aurocs)), 100 * tied / len(names)


def main(dataset: str, checkpoints: Sequence[Path], data_root: Path | None) -> None:
    results: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for checkpoint in checkpoints:
        names, labels, (plain, saturated) = scores_of(load_model(checkpoint, device="cpu"), dataset, data_root)
        for name in plain:
            row = (*summary(names, labels, plain[name]), *summary(names, labels, saturated[name]))
            results[name].append(row)
    rows = [[name, *(f"{value:.2f}" for value in np.mean(values, axis=0))] for name, values in results.items()]
    print(markdown_table(["Image score", "AUROC", "Tied", "AUROC, saturated", "Tied, saturated"], rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--data_root", type=Path)
    arguments = parser.parse_args()
    main(arguments.dataset, arguments.checkpoints, arguments.data_root)
