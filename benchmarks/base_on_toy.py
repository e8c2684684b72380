"""The base on the toy world over several seeds: trained on toy_train, tested on toy_test beside unadapted CLIP.

Writes a Markdown table of every seed, mean and spread to `--output`; a seed that is trained is not trained again.
"""

from __future__ import annotations

from utils.script import run_script

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

from benchmarks.arms import SHORT, add_short_argument, tested_images
from engine.demo import CONFIG
from engine.detector import UNADAPTED, build_detector, unadapted_detector
from engine.device import check_device
from engine.evaluation.evaluate import METRICS, Evaluation, evaluate
from engine.training.base import train_base
from model.checkpoint import read_checkpoint
from model.clip_loading import load_clip
from utils.files import write_text
from utils.logging import set_up_logging


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one training run each")
    parser.add_argument("--text_epoch", type=int, default=6, help="epochs of Stage 1")
    parser.add_argument("--image_epoch", type=int, default=28, help="epochs of Stage 2")
    parser.add_argument("--save_path", type=Path, default=Path("runs/base_on_toy"), help="a folder in it per seed")
    parser.add_argument("--output", type=Path, default=Path("runs/base_on_toy/table.md"), help="Markdown table")
    add_short_argument(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device = check_device("auto", "fp32")
    detectors = {}
    for seed in arguments.seeds:
        config = replace(
            CONFIG,
            text_epoch=arguments.text_epoch,
            image_epoch=arguments.image_epoch,
            seed=seed,
            save_path=arguments.save_path / f"seed_{seed}",
        )
        if arguments.short:
            config = replace(config, **SHORT, text_epoch=1, image_epoch=1)
        train_base(config)
        clip = load_clip("toy")
        checkpoint = read_checkpoint(config.save_path / "image_adapter.pth")
        detectors[f"base, seed {seed}"] = build_detector(checkpoint, clip).to(device)
    set_up_logging()
    models = {UNADAPTED: unadapted_detector(load_clip("toy")).to(device), **detectors}
    evaluations = evaluate(models, tested_images(arguments.short), device, batch_size=32)
    table = markdown_table(list(evaluations.values()))
    write_text(arguments.output, table)
    print(table)


def markdown_table(evaluations: list[Evaluation]) -> str:
    """A row per model, then mean and standard deviation of the trained ones, then their gain over the first."""
    names = list(METRICS)
    values = {e.model: [e.average(name)[0] for name in names] for e in evaluations}
    baseline, *trained = values.values()
    columns = list(zip(*trained, strict=True))
    means = [statistics.mean(column) for column in columns]
    spread = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
    lines = [f"| | {' | '.join(METRICS.values())} |", f"|---|{'---:|' * len(names)}"]
    lines += [row(model, [f"{value:.2f}" for value in found]) for model, found in values.items()]
    lines.append(row("base, mean ± sd", [f"{m:.2f} ± {s:.2f}" for m, s in zip(means, spread, strict=True)]))
    lines.append(row("gain", [f"{m - b:+.2f}" for m, b in zip(means, baseline, strict=True)]))
    return "\n".join(lines) + "\n"


def row(first: str, cells: list[str]) -> str:
    return f"| {first} | {' | '.join(cells)} |"


if __name__ == "__main__":
    run_script(main)
