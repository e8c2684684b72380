"""A run's folder: one run at a time, checkpoints that are gone, disks that are full, files that are held open."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tensorboard.summary.writer.record_writer
import torch

import utils.files
from engine.config.training import BaseConfig, FeedbackConfig
from engine.training.base import train_base
from engine.training.feedback import train_feedback
from engine.training.run import TrainingRun
from tests.helpers import write_lock
from tests.scripts import write_clip, write_dataset
from utils.errors import Stopped, UserError, WriteError
from utils.logging import set_up_logging

LOOPS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of one text and two image epochs, and feedback from scratch, each finished."""
    folder = tmp_path_factory.mktemp("world")
    write_clip(folder / "clip")
    write_dataset(folder / "train", count=3)
    set_up_logging()
    train_base(base_config(folder, folder / "base"))
    train_feedback(feedback_config(folder, folder / "feedback"))
    return folder


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def common(world: Path, save_path: Path) -> dict[str, Any]:
    return {
        "model_name": f"local-dir:{world / 'clip'}",
        "dataset": str(world / "train"),
        "shot": 4,
        "text_batch_size": 4,
        "num_workers": 0,
        "device": "cpu",
        "tracker": "none",
        "save_path": save_path,
    }


def base_config(world: Path, save_path: Path, **changes: Any) -> BaseConfig:
    return BaseConfig(**{**common(world, save_path), "text_epoch": 1, "image_epoch": 2, **changes})


def feedback_config(world: Path, save_path: Path) -> FeedbackConfig:
    loops = {"num_feedback_loops": LOOPS, "text_epochs_per_loop": (1,), "image_epochs_per_loop": (1,)}
    return FeedbackConfig.of(**common(world, save_path), **loops)


def same(first: Any, second: Any) -> bool:
    """Whether two checkpoints hold the same, tensors bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def copy_without(finished: Path, target: Path, *names: str) -> Path:
    shutil.copytree(finished, target)
    for name in names:
        (target / name).unlink()
    return target


def read(path: Path) -> Any:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("names", [("text_adapter.pth",), ("image_adapter.pth", "image_adapter_2.pth")])
def test_files_of_a_finished_base_are_written_again(
    world: Path, tmp_path: Path, names: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    run = copy_without(world / "base", tmp_path / "run", *names)
    train_base(base_config(world, run))
    log = (run / "train.log").read_text(encoding="utf-8")
    for name in names:
        left, right = read(world / "base" / name), read(run / name)
        left["config"]["arguments"].pop("save_path"), right["config"]["arguments"].pop("save_path")
        assert same(left, right), name
        assert f"{run / name} was missing: written again" in log
    assert log.rstrip().splitlines()[-1].endswith(str(run)), "complete"


def test_files_of_the_last_loop_are_written_again(world: Path, tmp_path: Path) -> None:
    names = (f"loop_{LOOPS}_final.pth", "final_model.pth", f"loop_{LOOPS}_image_adapter.pth")
    run = copy_without(world / "feedback", tmp_path / "run", *names)
    train_feedback(feedback_config(world, run))
    for name in names:
        left, right = read(world / "feedback" / name), read(run / name)
        left["config"]["arguments"].pop("save_path"), right["config"]["arguments"].pop("save_path")
        assert same(left, right), name


@pytest.mark.parametrize("name", ["loop_1_final.pth", f"loop_{LOOPS}_text_adapter.pth"])
def test_a_finished_run_says_which_files_are_gone_for_good(world: Path, tmp_path: Path, name: str) -> None:
    run = copy_without(world / "feedback", tmp_path / "run", name, "final_model.pth")
    with pytest.raises(UserError) as found:
        train_feedback(feedback_config(world, run))
    for part in (name, "missing", "cannot be written again", "--save_path", str(run)):
        assert part in str(found.value)
    assert (run / "final_model.pth").is_file(), "what can be written again is"
    assert "Complete" not in (run / "train.log").read_text(encoding="utf-8").splitlines()[-1]


def test_a_run_that_goes_on_warns_of_files_that_are_gone(world: Path, tmp_path: Path) -> None:
    run = copy_without(world / "base", tmp_path / "run", "image_adapter_1.pth")
    train_base(base_config(world, run, image_epoch=3))
    rows = [json.loads(line) for line in (run / "warnings.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any("image_adapter_1.pth is missing" in row["message"] for row in rows)
    assert (run / "image_adapter_3.pth").is_file()


def test_two_runs_at_once_on_one_folder(world: Path, tmp_path: Path) -> None:
    """The second is refused and leaves no trace, in a used folder and in a new one."""
    used, new = copy_without(world / "base", tmp_path / "used"), tmp_path / "new"
    new.mkdir()
    for run in (used, new):
        write_lock(run / ".run.lock")
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        with pytest.raises(UserError, match=r"is being written by another run .process 7 on elsewhere"):
            train_base(base_config(world, run, image_epoch=9))
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_refused_run_leaves_no_folder(world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="is a file"):
        train_base(base_config(world, tmp_path / "file" / "run"))
    with pytest.raises(UserError, match="shot"):
        train_base(base_config(world, tmp_path / "run", shot=7000))
    run = copy_without(world / "base", tmp_path / "base")
    log = (run / "train.log").read_bytes()
    with pytest.raises(UserError, match="image_lr was"):
        train_base(base_config(world, run, image_lr=0.3))
    assert (run / "train.log").read_bytes() == log
    assert {path.name for path in tmp_path.iterdir()} == {"file", "base"}


def test_a_run_that_was_taken_over_writes_nothing_more(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    track = TrainingRun._track

    def taken_over(self: TrainingRun, row: dict[str, Any]) -> None:
        track(self, row)
        write_lock(run / ".run.lock")

    monkeypatch.setattr(TrainingRun, "_track", taken_over)
    with pytest.raises(UserError, match="taken over by another run"):
        train_base(base_config(world, run))
    assert not (run / "text_adapter.pth").exists()
    assert (run / ".run.lock").is_file()


def test_a_disk_that_is_full_of_tensorboard_events_ends_the_run_in_a_line(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    written = []

    def write(self: object, data: bytes) -> None:
        written.append(data)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, data)

    real = tensorboard.summary.writer.record_writer.RecordWriter.write
    with monkeypatch.context() as patch:
        patch.setattr(tensorboard.summary.writer.record_writer.RecordWriter, "write", write)
        patch.setattr("threading.excepthook", lambda _: None)
        with pytest.raises(WriteError, match=r"events cannot be written: the disk is full"):
            train_base(base_config(world, run, tracker="tensorboard"))
    assert "events cannot be written" in (run / "train.log").read_text(encoding="utf-8")
    train_base(base_config(world, run, tracker="tensorboard"))
    for name in ("text_adapter.pth", "image_adapter_2.pth"):
        part = f"{name.split('_')[0]}_adapter"
        assert same(read(run / name)[part], read(world / "base" / name)[part])


def test_a_history_that_is_held_open_does_not_end_the_run_and_a_state_does(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.replace
    held = {"history.jsonl"}

    def move(path: Path, target: Path) -> Path:
        if Path(target).name in held:
            raise PermissionError(errno.EACCES, "Access is denied", str(path))
        return real(path, target)

    monkeypatch.setattr(Path, "replace", move)
    monkeypatch.setattr(utils.files, "SHORT_PATIENCE", 0.0)
    monkeypatch.setattr(utils.files, "PATIENCE", 0.0)
    run = tmp_path / "run"
    train_base(base_config(world, run))
    assert len((run / "history.jsonl.not_replaced").read_text(encoding="utf-8").splitlines()) == 3
    assert "history.jsonl is held open" in (run / "warnings.jsonl").read_text(encoding="utf-8")
    held = {"training_state.pth"}
    before = read(run / "training_state.pth")["done"]
    with pytest.raises(WriteError, match=r"training_state\.pth cannot be replaced"):
        train_base(base_config(world, run, image_epoch=3))
    held = set()
    assert read(run / "training_state.pth")["done"] == before
    train_base(base_config(world, run, image_epoch=3))
    assert sorted(path.name for path in run.glob("*.not_replaced")) == []


def test_an_interruption_between_epochs_says_how_to_go_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "_track", interrupted)
        with pytest.raises(Stopped, match="the same command resumes"):
            train_base(base_config(world, tmp_path / "run"))
    assert not (tmp_path / "run" / ".run.lock").exists()
    train_base(base_config(world, tmp_path / "run"))


def test_a_log_begins_with_the_first_line(world: Path) -> None:
    for run in ("base", "feedback"):
        log = (world / run / "train.log").read_text(encoding="utf-8")
        assert "Device: cpu (" in log.splitlines()[0]
        assert "Training on train: 8 images" in log
