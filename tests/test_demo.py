"""The demo, shortened, on the shipped toy CLIP and a few images of the toy datasets."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from engine.cli.demo import CONFIG, feedback_from, run_demo
from tests.helpers import draw_few
from tests.scripts import read_csv


@pytest.mark.draws
def test_a_short_demo_trains_compares_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_few(monkeypatch)  # most of the demo's time is their evaluation
    folder = tmp_path / "demo"
    base = replace(
        CONFIG,
        training_mode="few_shot",
        shot=8,
        text_epoch=1,
        image_epoch=2,
        device="cpu",
        num_workers=0,
        data_root=tmp_path / "data",
        save_path=folder / "base",
    )
    feedback = feedback_from(
        base, num_feedback_loops=2, text_epochs_per_loop=(1,), image_epochs_per_loop=(1,), save_path=folder / "feedback"
    )
    run_demo(base, feedback, folder)
    averages = {row["model"]: row for row in read_csv(folder / "comparison.csv") if row["class"] == "average"}
    assert len(averages) == 4
    # A few epochs on 64 images are no training to speak of, but they must point the right way.
    unadapted, *trained = (float(row["pixel_ap"]) for row in averages.values())
    assert all(value > unadapted for value in trained)
    assert "Worst: anomalous images" in (folder / "report.html").read_text(encoding="utf-8")
    for name in ("examples.png", "comparison.png", "feedback/training_curves.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300
