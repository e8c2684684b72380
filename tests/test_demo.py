"""The demo, shortened, on the shipped toy CLIP and the real toy datasets."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

from PIL import Image

from engine.demo import CONFIG, run_demo


def test_a_short_demo_trains_evaluates_and_draws(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    config = replace(
        CONFIG, training_mode="few_shot", shot=8, text_epoch=1, image_epoch=2, device="cpu", num_workers=0,
        data_root=tmp_path / "data", save_path=folder,
    )  # fmt: skip
    run_demo(config)
    with (folder / "evaluation.csv").open(encoding="utf-8", newline="") as file:
        averages = {row["model"]: row for row in csv.DictReader(file) if row["class"] == "average"}
    assert set(averages) == {"unadapted CLIP", "base"}
    # Two epochs on 64 images are no training to speak of, but they must point the right way.
    assert float(averages["base"]["pixel_ap"]) > float(averages["unadapted CLIP"]["pixel_ap"])
    with Image.open(folder / "examples.png") as grid:
        assert min(grid.size) > 400
