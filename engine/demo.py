"""The demo: train the base on one toy dataset, evaluate it and unadapted CLIP on the other, and show pictures."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np

from dataset.metadata import Record
from dataset.samples import read_image, read_mask
from engine.base import train_base
from engine.config import BaseConfig, check_device
from engine.data import TaskData, load_task
from engine.detector import Detector, build_detector, unadapted_detector
from engine.evaluate import evaluate, evaluation_table, summary_table, write_csv
from engine.trainer import readable_time
from model.checkpoint import read_checkpoint
from model.clip import load_clip
from utils.cli import run_script
from utils.logging import set_up_logging
from utils.plots import Example, example_grid

logger = logging.getLogger(__name__)

TEST_DATASET = "toy_test"
# What the toy CLIP needs other than the published recipe, and why, is in docs/base.md.
CONFIG = BaseConfig(
    model_name="toy",
    dataset="toy_train",
    training_mode="full_shot",
    text_epoch=4,
    image_epoch=8,
    text_lr=1e-3,
    text_norm_weight=3.0,
    text_adapt_until=2,
    text_adapt_weight=0.3,
    image_lr=1e-3,
    image_batch_size=8,
    save_path=Path("runs/demo"),
)


def main() -> None:
    set_up_logging()
    run_demo(CONFIG)


def run_demo(config: BaseConfig) -> None:
    """Train as `config` says, then write tables, `evaluation.csv` and `examples.png` to its save path."""
    start = time.perf_counter()
    folder = config.save_path
    logger.info("1 of 3: training the base on %s\n", config.dataset)
    train_base(config)
    logger.info("\n2 of 3: evaluating on %s, whose classes training has not seen\n", TEST_DATASET)
    device = check_device(config.device, config.precision)
    clip = load_clip(config.model_name)
    adapted = build_detector(read_checkpoint(folder / "image_adapter.pth"), clip)
    models = {"unadapted CLIP": unadapted_detector(clip).to(device), "base": adapted.to(device)}
    data = load_task(TEST_DATASET, config.data_root)
    evaluations = list(evaluate(models, data, device, batch_size=32).values())
    for evaluation in evaluations:
        logger.info("%s on %s, in percent\n\n%s\n", evaluation.model, TEST_DATASET, evaluation_table(evaluation))
    logger.info("Both, averaged over classes\n\n%s\n", summary_table(evaluations))
    write_csv(evaluations, folder / "evaluation.csv")
    logger.info("3 of 3: drawing examples\n")
    grid = folder / "examples.png"
    example_grid(draw_examples(data, models), list(models), grid, "Images of classes that training has not seen")
    logger.info(
        "Pictures: %s\nFigures:  %s\nModel:    %s", grid, folder / "evaluation.csv", folder / "image_adapter.pth"
    )
    logger.info("Done in %s", readable_time(time.perf_counter() - start))


def draw_examples(data: TaskData, models: dict[str, Detector]) -> list[Example]:
    """One anomalous image of each class and one normal image of the first, as every model sees them."""
    examples = []
    for record in choose_examples(data):
        image = read_image(data.located.root / record.image_path)
        mask = np.asarray(read_mask(data.located.root / record.mask_path)) > 0 if record.mask_path else None
        name = data.names[record.class_name]
        found = [detector.predict(image, name, data.located.spec.domain) for detector in models.values()]
        title = f"{name}\n{Path(record.image_path).parent.name.replace('_', ' ')}"
        examples.append(Example(title, image, mask, [p.anomaly_map for p in found], [p.score for p in found]))
    return examples


def choose_examples(data: TaskData) -> list[Record]:
    """Of each class an anomalous image, a different defect type from class to class where there are several."""
    chosen = []
    for row, class_name in enumerate(data.classes):
        records = [record for record in data.records if record.class_name == class_name]
        anomalous = [record for record in records if record.label]
        kinds = sorted({Path(record.image_path).parent.name for record in anomalous})
        kind = kinds[row % len(kinds)]
        chosen.append(next(record for record in anomalous if Path(record.image_path).parent.name == kind))
    normal = next(record for record in data.records if record.class_name == data.classes[0] and not record.label)
    return [*chosen, normal]


if __name__ == "__main__":
    run_script(main)
