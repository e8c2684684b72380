"""What `tests/test_extending.py` runs in a copy of the repository with the changes of docs/extending.md: each is used.

`python -m tests.extended FOLDER` writes small images to FOLDER; it ends with a traceback where a change does not do
what the page says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import train as train_script
import train_cross_attention
import train_cross_attention_feedback_v2
from engine.config.training import BaseConfig
from engine.data.task import load_task
from engine.evaluation.results import METRICS
from engine.report.comparison import COLUMNS
from engine.training.base import train_base
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.config import CrossAttentionConfig
from tests.helpers import config_for, random_batch, tiny_clip, tiny_prompts
from tests.scripts import write_clip, write_dataset
from utils.metrics import image_metrics


def check_dataset(folder: Path) -> None:
    """A dataset: its images are found, and it is scored and named as its entry says."""
    for place in ("good/img", "Ungood/img", "Ungood/label"):
        path = folder / "Lung_AD" / "test" / place / "x.png"
        path.parent.mkdir(parents=True)
        Image.new("L", (8, 8), 255).save(path)
    data = load_task("lung", folder)
    assert data.names == {"Lung": "lung tissue"}
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


def train(folder: Path, **asked: object) -> list[dict[str, float]]:
    """Train a tiny base for an epoch of Stage 2; the rows of its history."""
    common = {"model_name": f"local-dir:{folder / 'clip'}", "dataset": str(folder / "train"), "shot": 2}
    machine = {"device": "cpu", "num_workers": 0, "tracker": "none", "text_epoch": 0, "image_epoch": 1}
    config = BaseConfig.of(**{**common, **machine, **asked})
    train_base(config)
    return [json.loads(line) for line in (config.save_path / "history.jsonl").read_text("utf-8").splitlines()]


def check_loss(folder: Path) -> None:
    """A loss term: a flag, a part of the total, and a row in the history."""
    assert train_script.script.parse(["--agreement_weight", "2"]).agreement_weight == 2
    (row,) = train(folder, agreement_weight=2.0, save_path=folder / "loss")
    parts = ("focal", "dice_normal", "dice_abnormal", "classification")
    assert row["disagreement"] > 0
    assert np.isclose(row["loss"], sum(row[name] for name in parts) + 2 * row["disagreement"])


def check_cross_attention() -> None:
    """A kind of cross-attention: context without its mean, of length 1."""
    clip = tiny_clip()
    cross = CrossAttentionConfig(context_norm="centred")
    model = AdaptedCLIPWithCrossAttention(clip, config_for(clip), cross=cross)
    batch, prompts = random_batch(clip.img_size), tiny_prompts(clip)
    side = model.text_side(prompts)
    assert torch.allclose(side.context.norm(dim=-1), torch.ones(side.mask.shape))
    assert torch.allclose(side.context.mean(dim=-1), torch.zeros(side.mask.shape), atol=1e-6)
    assert model(batch.images, side, batch.rows).det.isfinite().all()


def check_option() -> None:
    """An option: parsed, with an effect on the trained components, and compared when a run resumes."""
    config = train_cross_attention.script.parse(["--freeze_text"])
    assert config.frozen == ("text_adapter",)
    assert config.signature()["freeze_text"] is True


def check_preset() -> None:
    """A preset: its own value, the values of v3, and explicit options above both."""
    config = train_cross_attention_feedback_v2.script.parse(["--preset", "v3_plain", "--text_lr", "1"])
    assert (config.image_cross_attn_weight, config.order, config.text_lr) == (0.0, "joint", 1.0)


def main(folder: Path) -> None:
    check_dataset(folder)
    check_metric()
    write_clip(folder / "clip")
    write_dataset(folder / "train")
    check_loss(folder)
    check_cross_attention()
    check_option()
    check_preset()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
