"""Arms of a study on the toy world: each trained over several seeds, all tested on the same images, in one table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.data import load_task
from engine.detector import build_detector
from engine.evaluate import METRICS, Evaluation, evaluate
from model.checkpoint import read_checkpoint
from model.clip import load_clip


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


def test_arms(arms: Sequence[Arm], seeds: Sequence[int]) -> dict[str, list[Evaluation]]:
    """Every arm's evaluations on toy_test, in the order of the seeds; images are loaded once."""
    clip = load_clip("toy")
    detectors = {}
    for arm in arms:
        for seed in seeds:
            checkpoint = read_checkpoint(arm.path(seed) / arm.checkpoint)
            detectors[arm.name, seed] = build_detector(checkpoint, clip, **arm.overrides)
    found = evaluate({f"{name}, {seed}": d for (name, seed), d in detectors.items()}, load_task("toy_test"), "cpu", 32)
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
