"""An unreadable image stops a run, and the same command resumes without it (in this process, with a tiny CLIP)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config.training import BaseConfig
from engine.data.loaders import hold_out
from engine.data.task import load_task
from engine.training.base import train_base
from tests.helpers import equal
from tests.scripts import common_arguments, write_clip, write_dataset
from utils.errors import UserError


@pytest.fixture
def config(tmp_path: Path) -> BaseConfig:
    """A run of one epoch per stage on all twelve images of two classes."""
    write_clip(tmp_path / "clip")
    write_dataset(tmp_path / "train", count=3)
    values = common_arguments(tmp_path, shot=None, training_mode="full_shot")
    return BaseConfig.of(**values, text_epoch=1, image_epoch=1, save_path=tmp_path / "run")


def spoil(dataset: str) -> Path:
    bad = Path(dataset) / "bolt" / "test" / "good" / "001.png"
    bad.write_bytes(bad.read_bytes()[:100])
    return bad


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "image_adapter.pth", weights_only=True)["image_adapter"]


def test_a_run_stopped_by_a_bad_image_resumes_without_it(config: BaseConfig, tmp_path: Path) -> None:
    bad = spoil(config.dataset)
    with pytest.raises(UserError, match=bad.name):
        train_base(config)
    train_base(replace(config, skip_bad_images=True))
    fresh = replace(config, skip_bad_images=True, save_path=tmp_path / "fresh")
    train_base(fresh)
    assert equal(weights(config.save_path), weights(fresh.save_path))


def test_a_dataset_without_readable_images_is_an_error(tmp_path: Path) -> None:
    for image in write_dataset(tmp_path / "data", count=1).rglob("*.png"):
        image.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of its 4 images in .* can be read"):
        load_task(str(tmp_path / "data"), skip_bad_images=True)


def test_a_bad_held_out_image_is_found_before_training(tmp_path: Path) -> None:
    data = load_task(str(write_dataset(tmp_path / "data", count=4)))
    _, held = hold_out(data, 0.25, seed=0)
    bad = tmp_path / "data" / held.records[0].image_path
    bad.write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot be read as an image.*held out by --val_fraction; --skip_bad_images"):
        hold_out(data, 0.25, seed=0)
