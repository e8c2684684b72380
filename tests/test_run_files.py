"""A run's folder: one run at a time, full disks, open files."""

import errno
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tensorboard.summary.writer.record_writer
import torch

import utils.files
from engine.config.training import BaseConfig
from engine.training.base import train_base
from engine.training.run import TrainingRun
from engine.training.trainer import Trainer
from tests.helpers import equal, write_lock
from tests.scripts import common_arguments, write_clip, write_dataset
from utils.errors import Stopped, UserError, WriteError
from utils.logging import set_up_logging


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished base of one text and two image epochs."""
    folder = tmp_path_factory.mktemp("world")
    write_clip(folder / "clip")
    write_dataset(folder / "train", count=3)
    set_up_logging()
    train_base(base_config(folder, folder / "base"))
    return folder


def base_config(world: Path, save_path: Path, **changes: Any) -> BaseConfig:
    epochs = {"text_epoch": 1, "image_epoch": 2}
    return BaseConfig(**common_arguments(world, save_path=save_path, **{**epochs, **changes}))


def read(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def test_the_rates_of_a_base(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phases: list[Any] = []
    monkeypatch.setattr(TrainingRun, "run", lambda _, planned: phases.extend(planned))
    train_base(base_config(world, tmp_path))
    text, image = ([phase.factor(step) for step in (0, 15999, 16000, 31999, 32000)] for phase in phases)
    assert (text, image) == ([1] * 5, [1, 1, 0.5, 0.5, 0.25])
    assert not any(phase.reset_optimizers or phase.loader.pin_memory for phase in phases)


def test_steps_and_images_of_a_base(world: Path) -> None:
    """8 images: 2 steps of 4 in the text epoch, 4 of 2 in each image epoch."""
    state = read(world / "base" / "training_state.pth")
    assert [(row["steps"], row["images"]) for row in state["history"]] == [(2, 8), (4, 8), (4, 8)]
    assert state["steps"] == {"text": 2, "image": 8} and state["loops"] == []
    assert "loop" not in read(world / "base" / "image_adapter.pth")


def test_a_run_without_epochs_leaves_its_state_and_arguments(world: Path, tmp_path: Path) -> None:
    train_base(base_config(world, tmp_path, text_epoch=0, image_epoch=0))
    assert {"training_state.pth", "args.json"} <= {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize("fails", [False, True])
def test_a_signal_in_an_epoch_ends_the_run_with_its_number(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """After a signal an epoch has no result, or torch raises an error because the signal has ended its workers."""

    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        if fails:
            raise RuntimeError("a worker ended")

    monkeypatch.setattr(Trainer, "train_epoch", interrupted)
    monkeypatch.setattr("engine.training.trainer.ignore_ended_workers", lambda: None)
    with pytest.raises(Stopped, match="repeats this epoch") as stopped:
        train_base(base_config(world, tmp_path))
    assert stopped.value.signal_number == signal.SIGINT


def test_an_error_in_an_epoch_is_no_signal(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("an error")

    monkeypatch.setattr(Trainer, "train_epoch", failing)
    with pytest.raises(RuntimeError, match="an error"):
        train_base(base_config(world, tmp_path))


def test_each_stage_has_its_own_steps_in_tensorboard(tmp_path: Path) -> None:
    history = [{"stage": "text"}, {"stage": "text"}, {"stage": "image"}]
    logged: dict[int, list[str]] = {}
    accelerator = SimpleNamespace(
        log=lambda values, step: logged.update({step: list(values)}), trackers=[object()], is_main_process=True
    )
    run: Any = SimpleNamespace(history=history[:2], save_path=tmp_path, accelerator=accelerator)
    TrainingRun._track(run, {"stage": "text", "epoch": 2, "loss": 1.0})
    run.history = history
    TrainingRun._track(run, {"stage": "image", "epoch": 1, "loss": 1.0})
    assert logged == {2: ["text/loss"], 1: ["image/loss"]}


def test_two_runs_at_once_on_one_folder(world: Path, tmp_path: Path) -> None:
    """The second is refused and leaves no files, in a used and in a new folder."""
    used, new = shutil.copytree(world / "base", tmp_path / "used"), tmp_path / "new"
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
    run = shutil.copytree(world / "base", tmp_path / "base")
    log = (run / "train.log").read_bytes()
    with pytest.raises(UserError, match="image_lr was"):
        train_base(base_config(world, run, image_lr=0.3))
    assert (run / "train.log").read_bytes() == log
    assert {path.name for path in tmp_path.iterdir()} == {"file", "base"}


def test_a_run_whose_lock_was_taken_over_stops_writing(
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


def test_a_full_disk_in_tensorboard_ends_the_run_with_an_error(
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
        assert equal(read(run / name)[part], read(world / "base" / name)[part])


def test_an_open_history_file_does_not_end_the_run_but_an_open_state_does(
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


def test_an_interruption_between_epochs_tells_how_to_resume(
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
