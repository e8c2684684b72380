"""`train.py` as a user runs it: files, log, restarts."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.prompts import build_prompts
from engine import load_model
from model.text import Prompts
from tests.helpers import equal
from tests.scripts import common_arguments, error_line, flags, kill_after, run, write_clip, write_dataset
from utils.logging import set_up_logging


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_clip(folder / "clip")
    write_dataset(folder / "train")
    return folder


def arguments(world: Path, save_path: Path, **changes: object) -> list[object]:
    values = {"shot": 8, "text_epoch": 3, "image_epoch": 3, "image_lr": 0.005, "save_path": save_path}
    return flags(**common_arguments(world, **{**values, **changes}))


@pytest.fixture(scope="module")
def finished(world: Path) -> Path:
    """An uninterrupted run; tests that change it copy it first."""
    path = world / "finished"
    run("train.py", *arguments(world, path))
    return path


def same_weights(first: Path, second: Path) -> bool:
    one, two = (torch.load(path, weights_only=True) for path in (first, second))
    return all(equal(one[part], two[part]) for part in ("text_adapter", "image_adapter"))


def test_files_and_log(finished: Path) -> None:
    files = {path.name for path in finished.iterdir()}
    log = (finished / "train.log").read_text(encoding="utf-8")
    images = {f"image_adapter{epoch}.pth" for epoch in ("", "_1", "_2", "_3")}
    assert files == {"args.json", "history.jsonl", "train.log", "training_state.pth", "text_adapter.pth", *images}, log
    for line in ("Loop 1 - text loss: ", "Loop 1 - image loss: ", "Average Grad Norm: ", "p_abnormal"):
        assert log.count(line) >= 3, line
    rows = [json.loads(line) for line in (finished / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["stage"], row["epoch"]) for row in rows] == [(s, e) for s in ("text", "image") for e in (1, 2, 3)]
    assert rows[-1]["loss"] < rows[3]["loss"]
    checkpoint = torch.load(finished / "image_adapter_2.pth", weights_only=True)
    assert checkpoint["epoch"] == 2
    assert {"text_adapter", "image_adapter", "image_optimizer", "config"} <= set(checkpoint)
    assert checkpoint["config"]["model"]["activation"] == "quick_gelu"
    assert not list(finished.glob(".*.tmp"))


def test_earlier_warnings_are_not_in_a_run(world: Path, tmp_path: Path) -> None:
    set_up_logging()
    logging.getLogger("another").warning("of another script")
    run("train.py", *arguments(world, tmp_path / "new", text_epoch=1, image_epoch=0))
    assert not (tmp_path / "new" / "warnings.jsonl").exists()


def test_a_complete_run_is_reported_and_unchanged(world: Path, finished: Path) -> None:
    before = {path.name: path.read_bytes() for path in finished.glob("*.pth")}
    assert "Complete" in run("train.py", *arguments(world, finished))
    assert before == {path.name: path.read_bytes() for path in finished.glob("*.pth")}


def test_killed_runs_end_with_the_same_weights(world: Path, finished: Path, tmp_path: Path) -> None:
    """SIGKILL at a random moment of Stage 1, again in Stage 2; then to the end. Workers change nothing either."""
    path = tmp_path / "killed"
    for rows in (1, 4):
        kill_after(rows, path, "train.py", *arguments(world, path))
        assert not (path / "image_adapter_3.pth").exists(), "killed too late to show anything"
    errors = run("train.py", *arguments(world, path, num_workers=1))
    assert "Resuming the run" in errors
    assert same_weights(path / "image_adapter.pth", finished / "image_adapter.pth")


def test_more_image_epochs_continue_the_run(world: Path, finished: Path, tmp_path: Path) -> None:
    longer = shutil.copytree(finished, tmp_path / "longer")
    run("train.py", *arguments(world, longer, image_epoch=4))
    assert torch.load(longer / "image_adapter.pth", weights_only=True)["epoch"] == 4
    direct = tmp_path / "direct"
    run("train.py", *arguments(world, direct, image_epoch=4))
    assert same_weights(longer / "image_adapter.pth", direct / "image_adapter.pth")


def test_without_stage_1_anchors_come_from_clip(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "image_only"
    run("train.py", *arguments(world, path, text_epoch=0, image_epoch=1))
    checkpoint = torch.load(path / "image_adapter.pth", weights_only=True)
    assert "text_adapter" not in checkpoint
    assert checkpoint["config"]["model"]["text_adapted"] is False
    assert not (path / "text_adapter.pth").exists()


def test_two_vectors_replace_the_text_encoder(world: Path, tmp_path: Path) -> None:
    """They are trained by Stage 1 alone, are the anchors of every class, and are no base for cross-attention."""
    path = tmp_path / "vectors"
    run("train.py", *arguments(world, path, text_side="vectors", text_lr=0.01))
    (text,) = torch.load(path / "text_adapter.pth")["text_adapter"].values()
    (later,) = torch.load(path / "image_adapter.pth")["text_adapter"].values()
    assert torch.equal(text, later) and text.shape[0] == 2
    rows = [json.loads(line) for line in (path / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in rows if row["stage"] == "text"]
    assert losses[0] > losses[-1]
    model = load_model(path, device="cpu")
    assert model.model.config.text_side == "vectors"
    image = next((world / "train").rglob("spot/*.png"))
    first, second = (model.predict(image, class_name=name) for name in ("bolt", "a thing of another kind"))
    assert np.array_equal(first.anomaly_map, second.anomaly_map) and first.score == second.score
    side = model.text_side(Prompts.from_texts(model.clip, [build_prompts("bolt"), build_prompts("felt")]))
    assert torch.equal(side[0], side[1]) and torch.allclose(side[0].T, text / text.norm(dim=1, keepdim=True))
    base = {f"load_base_{side}_adapter": path / f"{side}_adapter.pth" for side in ("text", "image")}
    line = error_line("train_cross_attention.py", *arguments(world, tmp_path / "cross", **base))
    assert "was trained with --text_side vectors" in line
    line = error_line("train.py", *arguments(world, tmp_path / "none", text_side="vectors", text_epoch=0))
    assert "--text_side has no effect without epochs of Stage 1" in line


def test_a_bad_image_ends_in_one_line_also_in_a_worker(world: Path, tmp_path: Path) -> None:
    data = shutil.copytree(world / "train", tmp_path / "data")
    bad = data / "bolt" / "test" / "good" / "000.png"
    bad.write_bytes(bad.read_bytes()[:100])
    asked = arguments(world, tmp_path / "run", dataset=data, shot=12, num_workers=1)
    assert str(bad) in error_line("train.py", *asked)
    errors = run("train.py", *asked, "--skip_bad_images", "--shot", "10", "--save_path", tmp_path / "other")
    assert "1 images cannot be read and are left out" in errors
