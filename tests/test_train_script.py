"""`train.py` as a user runs it: files, log, restart, refusals."""

from __future__ import annotations

import json
import logging
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.scripts import error_line, run, start, wait_for_rows, write_clip, write_dataset
from utils.logging import set_up_logging


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_clip(folder / "clip")
    write_dataset(folder / "train")
    return folder


def arguments(world: Path, save_path: Path, **changes: object) -> list[object]:
    values: dict[str, object] = {
        "model_name": f"local-dir:{world / 'clip'}",
        "dataset": world / "train",
        "shot": 8,
        "text_epoch": 3,
        "image_epoch": 3,
        "text_batch_size": 4,
        "image_lr": 0.005,
        "num_workers": 0,
        "device": "cpu",
        "tracker": "none",
        "save_path": save_path,
    }
    return [part for name, value in {**values, **changes}.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def finished(world: Path) -> Path:
    """An uninterrupted run; tests that change it copy it first."""
    path = world / "finished"
    run("train.py", *arguments(world, path))
    return path


def same_weights(first: Path, second: Path) -> bool:
    one, two = (torch.load(path, weights_only=True) for path in (first, second))
    return all(
        torch.equal(one[part][key], two[part][key]) for part in ("text_adapter", "image_adapter") for key in one[part]
    )


def test_files_and_log(finished: Path) -> None:
    files = {path.name for path in finished.iterdir()}
    log = (finished / "train.log").read_text(encoding="utf-8")
    assert files == {
        "args.json",
        "history.jsonl",
        "train.log",
        "training_state.pth",
        "text_adapter.pth",
        "image_adapter.pth",
        "image_adapter_1.pth",
        "image_adapter_2.pth",
        "image_adapter_3.pth",
    }, log
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
    chance = random.Random(time.time_ns())
    for rows in (1, 4):
        process = start("train.py", *arguments(world, path), slowly=True)
        wait_for_rows(path / "history.jsonl", rows, process)
        time.sleep(chance.uniform(0, 0.2))
        process.kill()
        process.wait()
        assert not (path / "image_adapter_3.pth").exists(), "killed too late to show anything"
    errors = run("train.py", *arguments(world, path, num_workers=1))
    assert "Resuming the run" in errors
    assert same_weights(path / "image_adapter.pth", finished / "image_adapter.pth")


def test_sigterm_finishes_the_step_and_tells_how_to_resume(world: Path, finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "stopped"
    process = start("train.py", *arguments(world, path), slowly=True)
    wait_for_rows(path / "history.jsonl", 1, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "the same command resumes" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    run("train.py", *arguments(world, path))
    assert same_weights(path / "image_adapter.pth", finished / "image_adapter.pth")


def test_more_image_epochs_continue_the_run(world: Path, finished: Path, tmp_path: Path) -> None:
    longer = shutil.copytree(finished, tmp_path / "longer")
    run("train.py", *arguments(world, longer, image_epoch=4))
    assert torch.load(longer / "image_adapter.pth", weights_only=True)["epoch"] == 4
    direct = tmp_path / "direct"
    run("train.py", *arguments(world, direct, image_epoch=4))
    assert same_weights(longer / "image_adapter.pth", direct / "image_adapter.pth")


def test_different_settings_in_the_same_folder_are_refused_by_name(world: Path, finished: Path) -> None:
    assert "image_lr was 0.005, now 0.1" in error_line("train.py", *arguments(world, finished, image_lr=0.1))
    assert "text stage ended after 3 epochs" in error_line("train.py", *arguments(world, finished, text_epoch=9))
    assert "has 3 image epochs, more than 1" in error_line("train.py", *arguments(world, finished, image_epoch=1))


def test_without_stage_1_anchors_come_from_clip(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "image_only"
    run("train.py", *arguments(world, path, text_epoch=0, image_epoch=1))
    checkpoint = torch.load(path / "image_adapter.pth", weights_only=True)
    assert "text_adapter" not in checkpoint
    assert checkpoint["config"]["model"]["text_adapted"] is False
    assert not (path / "text_adapter.pth").exists()


def test_mistakes_end_in_one_line(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "unused"
    assert "MVTec" in error_line("train.py", *arguments(world, path, dataset="Nowhere"))
    assert "VisA" in error_line("train.py", *arguments(world, path, dataset="VisA", data_root=tmp_path))
    assert "12" in error_line("train.py", *arguments(world, path, shot=13))
    assert "cuda" in error_line("train.py", *arguments(world, path, device="cuda:99"))
    assert "multiple" in error_line("train.py", *arguments(world, path, img_size=41))
    assert "--clip_weights" in error_line("train.py", *arguments(world, path, model_name="ViT-L-14-336"))
    assert "--shot" in error_line("train.py", *arguments(world, path, shot="many"))
    names = tmp_path / "names.json"
    names.write_text('{"screw": "metal screw"}', encoding="utf-8")
    assert "screw" in error_line("train.py", *arguments(world, path, class_names=names))
    assert not path.exists(), "a mistake found before training leaves nothing behind"


def test_a_bad_image_ends_in_one_line_also_in_a_worker(world: Path, tmp_path: Path) -> None:
    data = shutil.copytree(world / "train", tmp_path / "data")
    bad = data / "bolt" / "test" / "good" / "000.png"
    bad.write_bytes(bad.read_bytes()[:100])
    asked = arguments(world, tmp_path / "run", dataset=data, shot=12, num_workers=1)
    assert str(bad) in error_line("train.py", *asked)
    errors = run("train.py", *asked, "--skip_bad_images", "--shot", "10", "--save_path", tmp_path / "other")
    assert "1 images cannot be read and are left out" in errors


def test_a_non_finite_loss_stops_before_the_step(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "exploding"
    errors = run("train.py", *arguments(world, path, image_lr=1e30, text_epoch=1), status=3)
    assert "the step was not taken" in errors.splitlines()[-1]
    state = torch.load(path / "training_state.pth", weights_only=True)
    assert all(value.isfinite().all() for name in ("text_adapter", "image_adapter") for value in state[name].values())
