"""Arms of a study on the toy world: each trained over several seeds, all tested on the same images, in one table."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dataset.few_shot import few_shot
from engine.data import TaskData, load_task
from engine.detector import build_detector
from engine.evaluation.evaluate import METRICS, Evaluation, evaluate
from model.checkpoint import read_checkpoint
from model.clip_loading import load_clip

# What `--short` trains on, and how many images of each class it tests on; its epochs are one of each.
SHORT = {"training_mode": "few_shot", "shot": 4}


def add_short_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--short",
        action="store_true",
        help="one epoch of every stage, training and testing on 4 images per class: to see that it runs",
    )


def tested_images(short: bool) -> TaskData:
    """All images of toy_test, or a few of each class."""
    data = load_task("toy_test")
    return replace(data, records=few_shot(data.records, SHORT["shot"], 0)) if short else data


@dataclass(frozen=True)
class Arm:
    """One way to train or to test.

    train: given a seed and a folder, leaves `checkpoint` there, at once where it is there already; folder: of its runs,
    to which the seed is added; overrides: what testing asks for that training did not.
    """

    name: str
    train: Callable[[int, Path], None]
    checkpoint: str
    folder: Path
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def path(self, seed: int) -> Path:
        return self.folder.with_name(f"{self.folder.name}_seed_{seed}")


def train_arms(arms: Sequence[Arm], seeds: Sequence[int]) -> None:
    """Train every arm with every seed, seed by seed."""
    for seed in seeds:
        for arm in arms:
            arm.train(seed, arm.path(seed))


def test_arms(arms: Sequence[Arm], seeds: Sequence[int], short: bool = False) -> dict[str, list[Evaluation]]:
    """Every arm's evaluations on toy_test, in the order of the seeds; images are loaded once."""
    clip = load_clip("toy")
    detectors = {}
    for arm in arms:
        for seed in seeds:
            checkpoint = read_checkpoint(arm.path(seed) / arm.checkpoint)
            detectors[arm.name, seed] = build_detector(checkpoint, clip, **arm.overrides)
    models = {f"{name}, {seed}": detector for (name, seed), detector in detectors.items()}
    found = evaluate(models, tested_images(short), "cpu", 32)
    return {arm.name: [found[f"{arm.name}, {seed}"] for seed in seeds] for arm in arms}


def arms_table(results: Mapping[str, Sequence[Evaluation]], seeds: Sequence[int], against: str) -> str:
    """Markdown: mean and standard deviation of each arm and its seed-by-seed gain over `against`, then every seed."""
    lines = [f"| arm | {' | '.join(METRICS.values())} |", f"|---|{'---:|' * len(METRICS)}"]
    lines += [
        _row(name, [_spread([e.average(m)[0] for e in found]) for m in METRICS]) for name, found in results.items()
    ]
    lines += ["", f"Difference from *{against}*, seed by seed:", "", *lines[:2]]
    for name, found in results.items():
        if name != against:
            pairs = list(zip(found, results[against], strict=True))
            lines.append(
                _row(name, [_spread([a.average(m)[0] - b.average(m)[0] for a, b in pairs], "+") for m in METRICS])
            )
    lines += [
        "",
        "Every seed:",
        "",
        f"| arm | seed | {' | '.join(METRICS.values())} |",
        f"|---|---:|{'---:|' * len(METRICS)}",
    ]
    for name, found in results.items():
        lines += [
            _row(name, [str(seed), *(f"{e.average(m)[0]:.2f}" for m in METRICS)])
            for seed, e in zip(seeds, found, strict=True)
        ]
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], sign: str = "") -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.2f} ± {spread:.2f}"


def _row(first: str, cells: Sequence[str]) -> str:
    return f"| {first} | {' | '.join(cells)} |"
