"""Compare image scores without parameters on the trained models of a study.

    python -m benchmarks.screen_scores studies/confirmation.toml --arms "base continued" feedback --csv scores.csv

Each score is computed from one image alone, as in `Detector.predict`. The CSV file has the image AUROC of each score,
arm, seed and pair of datasets, averaged over classes, and the share of images whose score equals that of another image
of their class: as trained, and with logits 30 times as large, as of a model whose p(abnormal) saturates at 1.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from engine.data.loaders import evaluation_loader, make_dataset
from engine.data.task import load_task
from engine.detector.detector import Detector
from engine.detector.loading import load_model, unadapted_detector
from engine.study.plan import ROOT, make_plan
from engine.study.study import read_study
from model.scoring import TEMPERATURE, Outputs, calibrated_maps, calibrated_scores, det_scores
from utils.files import write_text
from utils.text import csv_table, markdown_table

TOP_SHARE = 0.001
SATURATION = 30.0
LOWER_SCALE = 0.25
COLUMNS = ("score", "trained", "seed", "train", "test", "image_auroc", "tied", "saturated_auroc", "saturated_tied")
Scores = dict[str, list[float]]


def candidates(outputs: Outputs, class_token: Tensor, own_anchors: Tensor, size: int) -> dict[str, Tensor]:
    """The scores of B images by name.

    Args:
        outputs: the forward of a trained model.
        class_token: p(abnormal) of CLIP's class token with the trained anchors, (B,).
        own_anchors: the same with CLIP's own anchors, (B,).
        size: side of the maps, pixels.
    """
    maps = calibrated_maps(outputs, size).mean(dim=0)
    lower = outputs._replace(levels=[LOWER_SCALE * level for level in outputs.levels])
    softer = calibrated_maps(lower, size).mean(dim=0).flatten(1).amax(dim=1)
    top = maps.flatten(1).topk(max(1, round(TOP_SHARE * maps[0].numel())), dim=1).values.mean(dim=1)
    peak, det = maps.flatten(1).amax(dim=1), det_scores(outputs)
    return {
        "half maximum, half det (default)": calibrated_scores(maps, det, "industrial"),
        "half maximum, half det difference": calibrated_scores(maps, det_scores(outputs, "difference"), "industrial"),
        "maximum": peak,
        "mean of the top 0.1 %": top,
        "half top 0.1 %, half det": 0.5 * top + 0.5 * det,
        "maximum, a quarter of the logit scale": softer,
        "half maximum at that scale, half det": 0.5 * softer + 0.5 * det,
        "half maximum, half CLIP's class token": 0.5 * peak + 0.5 * class_token,
        "CLIP's class token": class_token,
        "CLIP's class token and anchors": own_anchors,
    }


@torch.inference_mode()
def scores_of(detector: Detector, dataset: str, data_root: Path | None) -> tuple[list[str], list[bool], list[Scores]]:
    """Classes and labels of all images, and their scores by name, for both scales of logits."""
    data, model = load_task(dataset, data_root), detector.model
    prompts = data.prompts(detector.clip)
    side, own_side = detector.text_side(prompts), unadapted_detector(detector.clip).text_side(prompts)
    classes: list[str] = []
    labels: list[bool] = []
    found: list[Scores] = [defaultdict(list), defaultdict(list)]
    for batch in evaluation_loader(make_dataset(data, detector.clip), 32, 0):
        images, rows = batch["image"], torch.full((len(batch["label"]),), data.classes.index(batch["class_name"][0]))
        outputs = model(images, side, rows)
        features = model.stage1_features(images, prompts, rows)
        pair = [model.batch_anchors(prompts, rows, features), own_side[rows]]
        tokens = [(TEMPERATURE * features.det[:, None] @ each)[:, 0].softmax(dim=1)[:, 1] for each in pair]
        classes += batch["class_name"]
        labels += batch["label"].bool().tolist()
        for scale, scores in zip((1.0, SATURATION), found, strict=True):
            scaled = outputs._replace(levels=[scale * level for level in outputs.levels])
            for name, values in candidates(scaled, *tokens, detector.clip.img_size).items():
                scores[name] += values.tolist()
    return classes, labels, found


def summary(classes: Sequence[str], labels: Sequence[bool], scores: Sequence[float]) -> tuple[float, float]:
    """Image AUROC averaged over classes, and the share of images with a tied score, in percent."""
    by_class: dict[str, list[tuple[bool, float]]] = defaultdict(list)
    for name, label, score in zip(classes, labels, scores, strict=True):
        by_class[name].append((label, score))
    aurocs = [roc_auc_score(*zip(*pairs, strict=True)) for pairs in by_class.values()]
    counts = [count for pairs in by_class.values() for count in Counter(score for _, score in pairs).values()]
    return 100 * mean(aurocs), 100 * sum(count for count in counts if count > 1) / len(scores)


def main(arguments: argparse.Namespace) -> None:
    study = read_study(arguments.study)
    study = read_study(arguments.study, tuple(arguments.seeds))
    rows: list[Sequence[object]] = []
    for (_, arm, seed, number), cell in make_plan(study, arguments.save_path.resolve() / study.name).by_key.items():
        if arm not in arguments.arms:
            continue
        detector = load_model(ROOT / cell.checkpoint, device="cpu")
        for test in study.pairs[number].test:
            classes, labels, (plain, saturated) = scores_of(detector, test, arguments.data_root)
            for name in plain:
                values = *summary(classes, labels, plain[name]), *summary(classes, labels, saturated[name])
                rows.append((name, arm, seed, cell.pair.train, test, *(f"{value:.3f}" for value in values)))
        write_text(arguments.csv, csv_table([COLUMNS, *rows]))


def table(rows: Sequence[Mapping[str, str]], selection: Sequence[int]) -> str:
    """The means of all scores as Markdown: seeds of the selection and others, by pair, and ties of saturated maps."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    tied: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        kind = "selection" if int(row["seed"]) in selection else "other seeds"
        column = f"{kind}, {row['train']} to {row['test']}"
        values[row["score"]][column].append(float(row["image_auroc"]))
        tied[row["score"]].append(float(row["saturated_tied"]))
    columns = list(dict.fromkeys(column for of_score in values.values() for column in of_score))
    lines = [
        [score, *(f"{mean(of_score[column]):.2f}" for column in columns), f"{mean(tied[score]):.1f}"]
        for score, of_score in values.items()
    ]
    return markdown_table(["image score", *columns, "tied, saturated"], lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="study file, such as studies/confirmation.toml")
    parser.add_argument("--save_path", type=Path, default=Path("runs/studies"), help="folder of all studies")
    parser.add_argument("--arms", nargs="+", required=True, help="trained arms of the study")
    parser.add_argument("--seeds", nargs="+", type=int, default=(), help="seeds (default: those of the study)")
    parser.add_argument("--data_root", type=Path, help="root of all datasets")
    parser.add_argument("--csv", type=Path, required=True, help="file to write")
    main(parser.parse_args())
