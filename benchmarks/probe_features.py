"""How well a linear probe sees each kind of defect in a CLIP's frozen patches: what adaptation can hope for.

A logistic regression on the patch tokens of all levels learns from `toy_train` and its masks, and draws maps for
`toy_test`. Beside it stand the patches' true shares of anomalous pixels, which no map on the patch grid can beat, and
the maps of trained checkpoints. Pixel AP in percent, mean over classes, by defect; all images of a class count in
"all".
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from engine import load_model
from engine.data.loaders import evaluation_loader, make_dataset
from engine.data.task import TaskData, load_task
from model.clip import FrozenCLIP
from model.clip_loading import load_clip
from model.scoring import anomaly_map
from utils.tables import markdown_table

ANOMALOUS = 0.2  # share of anomalous pixels from which on a patch counts as anomalous for the probe
NORMAL_PATCHES = 30_000  # of the training images
ALL = "all"


@torch.no_grad()
def patches_and_masks(data: TaskData, clip: FrozenCLIP) -> tuple[Tensor, Tensor]:
    """Of all images in evaluation order: tokens of all levels side by side (B, N, C), and masks (B, 1, S, S)."""
    levels = clip.defaults["levels"]
    tokens, masks = [], []
    for batch in evaluation_loader(make_dataset(data, clip), 32, 0):
        x, found = clip.embed_image(batch["image"]), []
        for number, block in enumerate(clip.clip.visual.transformer.resblocks, start=1):
            x = block(x)
            if number in levels:
                found.append(clip.clip.visual.ln_post(x[:, 1:]))
        tokens.append(torch.cat(found, dim=-1))
        masks.append(batch["mask"])
    return torch.cat(tokens), torch.cat(masks)


def shares(masks: Tensor, grid: int) -> Tensor:
    """Masks (B, 1, S, S) as each patch's share of anomalous pixels (B, N)."""
    return F.adaptive_avg_pool2d(masks, grid).flatten(1)


def fit_probe(tokens: Tensor, anomalous: Tensor) -> Pipeline:
    """A probe for patches (M, C) whose share of anomalous pixels (M) is 0 or large; all that hold some are used."""
    positive, normal = torch.nonzero(anomalous >= ANOMALOUS)[:, 0], torch.nonzero(anomalous == 0)[:, 0]
    chosen = torch.randperm(len(normal), generator=torch.Generator().manual_seed(0))[:NORMAL_PATCHES]
    rows = torch.cat([positive, normal[chosen]])
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    return probe.fit(tokens[rows].numpy(), (anomalous[rows] >= ANOMALOUS).numpy())


def enlarged(grid_map: Tensor, size: int) -> Tensor:
    """Patch scores (B, N) as maps (B, S, S)."""
    side = int(grid_map.shape[1] ** 0.5)
    maps = grid_map.view(len(grid_map), 1, side, side).float()
    return F.interpolate(maps, size, mode="bilinear", align_corners=True)[:, 0]


@torch.no_grad()
def checkpoint_maps(file: Path, data: TaskData) -> Tensor:
    """Anomaly maps (B, S, S) of a checkpoint, in evaluation order."""
    detector = load_model(file, device="cpu")
    prompts = data.prompts(detector.clip)
    text, classes, maps = detector.text_side(prompts), data.classes, []
    samples = make_dataset(data, detector.clip)
    for batch in evaluation_loader(samples, 32, 0):
        rows = torch.tensor([classes.index(name) for name in batch["class_name"]])
        outputs = detector.model(batch["image"], text, rows)
        maps.append(anomaly_map(outputs, data.located.spec.domain, samples.img_size))
    return torch.cat(maps)


def average_precisions(maps: Tensor, masks: Tensor, kinds: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Pixel AP of all images, and of those of each defect; `kinds`: class and defect of each image."""
    found = defaultdict(list)
    for wanted in sorted(set(kinds)):
        class_name, defect = wanted
        one = [kind == wanted for kind in kinds]
        whole = [kind[0] == class_name for kind in kinds]
        for rows, name in ((one, defect), (whole, ALL)):
            if name != "good" and not (name == ALL and defect != "good"):
                labels, scores = masks[rows].bool().flatten().numpy(), maps[rows].flatten().numpy()
                found[name].append(average_precision_score(labels, scores))
    return {name: 100 * float(np.mean(values)) for name, values in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", nargs="+", default=["toy"], help="as the scripts take it; several are compared")
    parser.add_argument("--checkpoint", nargs="*", type=Path, default=[], help="trained models to set beside")
    parser.add_argument("--data_root", type=Path)
    given = parser.parse_args(arguments)
    train, test = (load_task(name, given.data_root) for name in ("toy_train", "toy_test"))
    columns: dict[str, dict[str, float]] = {}
    for name in given.model_name:
        clip = load_clip(name)
        order = make_dataset(test, clip).records
        kinds = [(record.class_name, Path(record.image_path).parent.name) for record in order]
        tokens, masks = patches_and_masks(train, clip)
        probe = fit_probe(tokens.flatten(0, 1), shares(masks, clip.grid).flatten())
        tokens, masks = patches_and_masks(test, clip)
        scores = torch.from_numpy(probe.predict_proba(tokens.flatten(0, 1).numpy())[:, 1]).view(len(tokens), -1)
        ceiling = enlarged(shares(masks, clip.grid), clip.img_size)
        columns.setdefault("true shares", average_precisions(ceiling, masks[:, 0], kinds))
        columns[f"probe, {name}"] = average_precisions(enlarged(scores, clip.img_size), masks[:, 0], kinds)
    for file in given.checkpoint:
        columns[str(file)] = average_precisions(checkpoint_maps(file, test), masks[:, 0], kinds)
    defects = sorted(columns["true shares"], key=lambda name: (name == ALL, name))
    rows = [[defect, *(f"{values[defect]:.1f}" for values in columns.values())] for defect in defects]
    print(markdown_table(["defect", *columns], rows))


if __name__ == "__main__":
    main()
