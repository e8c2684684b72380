"""What a few normal references are worth: a checkpoint on a dataset without them, and with 1, 2, 4, 8 of each class.

References are the dataset's own normal training images (train/good), drawn several times; a toy dataset draws them on
first use. Writes a row for each draw, and prints means and standard deviations over draws as a table.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
from pathlib import Path

from engine.data.task import load_task
from engine.detector.detector import Detector
from engine.detector.references import ReferenceChoice
from engine.evaluation.evaluate import METRICS, Evaluation, evaluate
from engine.evaluation.own_images import load_last_detector
from engine.evaluation.references import remember_for_dataset
from model.config import REFERENCE_FEATURES, REFERENCE_WEIGHT
from utils.files import write_text
from utils.logging import set_up_logging

ZERO_SHOT = "zero-shot"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="file, or folder, whose last epoch counts")
    parser.add_argument("--dataset", default="toy_test", help="dataset to test on")
    parser.add_argument("--data_root", type=Path, help="folder of the datasets")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4, 8], help="references of each class")
    parser.add_argument("--draws", type=int, default=3, help="times that references are drawn: seeds from 0")
    parser.add_argument("--weight", type=float, default=REFERENCE_WEIGHT, help="share of the references in the map")
    parser.add_argument(
        "--features", default=REFERENCE_FEATURES[0], choices=REFERENCE_FEATURES, help="what is compared"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/references.csv"), help="where the draws are written")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    set_up_logging()
    loaded = load_last_detector(arguments.checkpoint, None, arguments.device)
    data = load_task(arguments.dataset, arguments.data_root)
    arms: dict[str, ReferenceChoice | None] = {ZERO_SHOT: None}
    for shots in arguments.shots:
        for draw in range(arguments.draws):
            how = ReferenceChoice(None, shots, draw, arguments.weight, arguments.features)
            arms[f"{shots} shot{'s' * (shots > 1)}/{draw}"] = how
    models = {}
    for name, choice in arms.items():
        models[name] = Detector(loaded.model, name)
        if choice is not None:
            remember_for_dataset([models[name]], data, choice)
    found = evaluate(models, data, arguments.device)
    write_draws(found, arguments.output)
    print(f"| references of each class | {' | '.join(METRICS.values())} |\n|---|{'---:|' * len(METRICS)}")
    for arm in dict.fromkeys(name.partition("/")[0] for name in found):
        draws = [evaluation for name, evaluation in found.items() if name.partition("/")[0] == arm]
        print(f"| {arm} | {' | '.join(shown([draw.average(metric)[0] for draw in draws]) for metric in METRICS)} |")


def write_draws(found: dict[str, Evaluation], path: Path) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", "seed", *METRICS])
    for name, evaluation in found.items():
        arm, _, seed = name.partition("/")
        writer.writerow([arm, seed, *(f"{evaluation.average(metric)[0]:.2f}" for metric in METRICS)])
    write_text(path, text.getvalue())


def shown(values: list[float]) -> str:
    """The mean, with the standard deviation where there are several values."""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
