"""What `tests/test_extending.py` runs in a copy of the repository with the changes of docs/extending.md: each is used.

`python -m tests.extended FOLDER` writes small images to FOLDER; it ends with a traceback where a change does not do
what the page says.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from engine.data import load_task
from engine.evaluation.evaluate import METRICS
from engine.report.comparison import COLUMNS, PANELS
from utils.metrics import image_metrics


def check_dataset(folder: Path) -> None:
    """A dataset: its images are found, and it is scored and named as its entry says."""
    for place in ("good/img", "Ungood/img", "Ungood/label"):
        path = folder / "Chest_AD" / "test" / place / "x.png"
        path.parent.mkdir(parents=True)
        Image.new("L", (8, 8), 255).save(path)
    data = load_task("chest", folder)
    assert data.names == {"Chest": "chest X-ray"}
    assert data.located.spec.domain == "medical"
    assert sorted(record.label for record in data.records) == [0, 1]


def check_metric() -> None:
    """A metric: computed, undefined where it must be, and in the tables and figures of a comparison."""
    labels, names = np.repeat([0, 1], 20), [str(number) for number in range(40)]
    scores = np.arange(40.0)
    scores[25] = 0.5
    found = image_metrics(labels, scores, names)
    assert set(found) == {metric for metric in METRICS if metric.startswith("image")}
    assert found["image_recall_95"] == 95
    assert image_metrics(np.ones(40), scores, names)["image_recall_95"] is None
    assert COLUMNS["image_recall_95"] == "Image recall at 95"
    assert "image_recall_95" in PANELS


if __name__ == "__main__":
    check_dataset(Path(sys.argv[1]))
    check_metric()
