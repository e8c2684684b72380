"""The demo: a short base, three loops of feedback from it, and both compared with unadapted CLIP on unseen classes."""

import logging
import time
from pathlib import Path

from dataset.records import Record
from engine.cli.runner import Script
from engine.config.evaluation import ComparisonArguments
from engine.config.training import BaseConfig, FeedbackConfig
from engine.data.task import TaskData, load_task
from engine.detector.detector import UNADAPTED, Detector
from engine.detector.loading import build_detector, unadapted_detector
from engine.evaluation.image_heatmaps import predict_heatmap, read_dataset_image
from engine.report.compare import compare_feedback_loops
from engine.runtime.device import check_device
from engine.runtime.run_folder import CURVES_FILE, DEMO_FOLDER, FINAL_FILE, REPORT_FILE, loop_file, side_file
from engine.training.base import train_base
from engine.training.feedback import train_feedback
from model.checkpoint import read_checkpoint
from model.clip_loading import load_clip
from model.config import SIDES
from utils.arguments import Arguments
from utils.heatmaps import Example, example_grid
from utils.text import readable_time

logger = logging.getLogger(__name__)

TEST_DATASET = "toy_test"
CONFIG = BaseConfig.of(recipe="toy", dataset="toy_train", text_epoch=3, image_epoch=5, save_path=DEMO_FOLDER / "base")


def feedback_from(base: BaseConfig, **changes: object) -> FeedbackConfig:
    """The preset v3 on the same images, with the toy world's rates, from the files that `base` writes."""
    shared = {name: getattr(base, name) for name in ("recipe", "dataset", "data_root", "device", "num_workers", "seed")}
    files = {f"load_base_{side}_adapter": base.save_path / side_file(side) for side in SIDES}
    return FeedbackConfig.of(**{"preset": "v3", **shared, **files, **changes})


def main(_arguments: Arguments) -> None:
    epochs = {"text_epochs_per_loop": (1,), "image_epochs_per_loop": (2,)}
    feedback = feedback_from(CONFIG, num_feedback_loops=3, **epochs, save_path=DEMO_FOLDER / "feedback")
    run_demo(CONFIG, feedback, DEMO_FOLDER)


def run_demo(base: BaseConfig, feedback: FeedbackConfig, folder: Path) -> None:
    """Train as both configs say, then write the comparison and `examples.png` to `folder`."""
    start = time.perf_counter()
    logger.info("1 of 4: training a short base on %s\n", base.dataset)
    train_base(base)
    logger.info("\n2 of 4: %d loops of feedback from that base\n", feedback.num_feedback_loops)
    train_feedback(feedback)
    logger.info("\n3 of 4: comparing on %s, whose classes training has not seen\n", TEST_DATASET)
    compare_feedback_loops(
        ComparisonArguments(
            save_path=feedback.save_path,
            dataset=TEST_DATASET,
            base_path=base.save_path,
            unadapted=True,
            output_dir=folder,
            data_root=base.data_root,
            batch_size=32,
            num_workers=0,
            device=base.device,
            report=True,
        )
    )
    logger.info("\n4 of 4: drawing examples\n")
    models = demo_models(base, feedback)
    data = load_task(TEST_DATASET, base.data_root)
    grid = folder / "examples.png"
    example_grid(draw_examples(data, models), grid, "Images of classes that training has not seen")
    logger.info("Report:   %s\nPictures: %s", folder / REPORT_FILE, grid)
    logger.info("Curves:   %s\nModel:    %s", feedback.save_path / CURVES_FILE, feedback.save_path / FINAL_FILE)
    logger.info("Done in %s", readable_time(time.perf_counter() - start))


def demo_models(base: BaseConfig, feedback: FeedbackConfig) -> dict[str, Detector]:
    """Unadapted CLIP, the base and every loop, on one CLIP."""
    device = check_device(base.device, base.precision)
    clip = load_clip(base.model_name)
    files = {"base": base.save_path / side_file("image")}
    for loop in range(1, feedback.num_feedback_loops + 1):
        files[f"loop {loop}"] = feedback.save_path / loop_file(loop)
    trained = {name: build_detector(read_checkpoint(file), clip) for name, file in files.items()}
    return {name: model.to(device) for name, model in {UNADAPTED: unadapted_detector(clip), **trained}.items()}


def draw_examples(data: TaskData, models: dict[str, Detector]) -> list[Example]:
    """One anomalous image of each class and one normal image of the first, as every model sees them."""
    examples = []
    for record in choose_examples(data):
        picture = read_dataset_image(data, record)
        heatmaps = [predict_heatmap(model, picture, name) for name, model in models.items()]
        examples.append(Example(picture.title.replace(", ", "\n"), picture.image, picture.mask, heatmaps))
    return examples


def choose_examples(data: TaskData) -> list[Record]:
    """An anomalous image of each class, of another defect type from class to class, and a normal image."""
    anomalous = [[record for record in data.of_class(name) if record.label] for name in data.classes]
    chosen = [records[row * len(records) // len(anomalous)] for row, records in enumerate(anomalous)]
    return [*chosen, next(record for record in data.records if not record.label)]


script = Script(__doc__, Arguments, "engine.cli.demo.main")

if __name__ == "__main__":
    script.run()
