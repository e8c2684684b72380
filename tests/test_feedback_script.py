"""`train_cross_attention_feedback_v2.py` as a user runs it: log, kills, signals."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import load_model
from tests.helpers import equal
from tests.scripts import (
    base_arguments,
    common_arguments,
    flags,
    kill_after,
    read_csv,
    read_history,
    run,
    start,
    wait_for_rows,
    write_world,
)

SCRIPT = "train_cross_attention_feedback_v2.py"
COMPONENTS = ("text_adapter", "text_cross_attn", "image_adapter", "image_cross_attn")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_world(tmp_path_factory.mktemp("world"), ("cork",), count=4)
    run("train.py", *flags(**common_arguments(folder, shot=8), text_epoch=1, image_epoch=2, save_path=folder / "base"))
    return folder


def three_loops(world: Path, save_path: Path, **changes: object) -> list[object]:
    """From a base, with evaluation and held-out images."""
    values = {
        **common_arguments(world, shot=8),
        **base_arguments(world),
        "num_feedback_loops": 3,
        "text_epochs_per_loop": 3,
        "image_epochs_per_loop": 3,
        "val_fraction": 0.25,
        "eval_dataset": world / "test",
        "save_path": save_path,
    }
    return flags(**{**values, **changes})


@pytest.fixture(scope="module")
def finished(world: Path) -> Path:
    """An uninterrupted run, with workers and TensorBoard."""
    path = world / "finished"
    run(SCRIPT, *three_loops(world, path, num_workers=1, tracker="tensorboard"))
    return path


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def epochs_of(folder: Path) -> list[tuple[str, ...]]:
    return [(str(row["loop"]), row["stage"], str(row["epoch"])) for row in read_history(folder)]


def assert_same_run(one: Path, two: Path) -> None:
    """Every file has bit-identical weights; history and results are equal; no temporary file remains."""
    names = sorted(path.name for path in two.glob("*.pth"))
    assert sorted(path.name for path in one.glob("*.pth")) == names
    for name in names:
        first, second = read(one / name), read(two / name)
        assert all(equal(first[part], second[part]) for part in COMPONENTS), name
    assert read_history(one) == read_history(two)
    assert read(one / "training_state.pth")["loops"] == read(two / "training_state.pth")["loops"]
    assert not list(one.glob(".*"))


def test_log_and_events(finished: Path) -> None:
    assert [path for path in finished.rglob("*tfevents*") if path.stat().st_size > 500]
    log = (finished / "train.log").read_text(encoding="utf-8")
    table = [line.split() for line in log.splitlines() if re.fullmatch(r"[123]\s.*\son", line)]
    assert table == [
        ["1", "3", "3", "2e-05", "0.005", "on"],
        ["2", "2", "2", "1.6e-05", "0.004", "on"],
        ["3", "1", "1", "1.28e-05", "0.0032", "on"],
    ]
    for line in (
        "Base text adapter loaded successfully!",
        "image optimizer: moments of 9 tensors loaded from",
        "Complete: 3 loops",
    ):
        assert line in log, line


def test_killed_runs_end_with_the_same_weights(world: Path, finished: Path, tmp_path: Path) -> None:
    """SIGKILL in each loop and near the end of one, with and without workers."""
    path = tmp_path / "killed"
    for count, workers in ((1, 0), (4, 1), (6, 2), (10, 0)):
        kill_after(count, path, SCRIPT, *three_loops(world, path, num_workers=workers))
        assert len(read_history(path)) < 12, "killed too late to show anything"
    errors = run(SCRIPT, *three_loops(world, path))
    assert "Resuming the run" in errors
    assert_same_run(path, finished)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send")
def test_signals_finish_the_step_and_tell_how_to_resume(world: Path, finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "stopped"
    for number, status, count in ((signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 7)):
        process = start(SCRIPT, *three_loops(world, path), slowly=True)
        wait_for_rows(path / "history.jsonl", count, process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == status, errors
        assert "Traceback" not in errors
        last = errors.splitlines()[-1]
        assert "the same command resumes, and repeats this epoch" in last
        loop, side, epoch = re.search(r"stopped in loop (\d), (\w+) epoch (\d)", last).groups()
        done, expected = epochs_of(path), epochs_of(finished)
        assert (loop, side, epoch) == expected[len(done)]
        assert done == expected[: len(done)]
    run(SCRIPT, *three_loops(world, path))
    assert_same_run(path, finished)


def test_the_v1_script_of_older_notes(world: Path, tmp_path: Path) -> None:
    loops = {"num_feedback_loops": 2, "image_epochs_per_loop": (2, 1), "text_epochs_per_loop": 1}
    log = run("train_cross_attention_feedback.py", *flags(**common_arguments(world), **loops, save_path=tmp_path))
    assert "2 feedback loops, preset v1" in log
    table = [line.split() for line in log.splitlines() if re.fullmatch(r"[12]\s.*\son", line)]
    assert table == [["1", "1", "2", "1e-05", "0.0005", "on"], ["2", "1", "1", "5e-06", "0.00025", "on"]]
    config = read(tmp_path / "final_model.pth")["config"]
    assert config["arguments"]["preset"] == "v1"
    assert config["arguments"]["reset_optimizers"] is True
    assert config["cross_attention"]["text_cross_attn_weight"] == 0.1
    assert config["cross_attention"]["context_norm"] == "none"


def test_inference_accepts_a_loop_and_a_folder_of_loops(world: Path, finished: Path, tmp_path: Path) -> None:
    """Compared with the evaluation during training."""
    test = ["--dataset", world / "test", "--device", "cpu", "--num_workers", 0]
    run("inference.py", "--checkpoint", finished, *test, "--output_dir", tmp_path)
    rows = read_csv(tmp_path / "evaluation_test.csv")
    found = {row["model"]: row for row in rows if row["class"] == "average"}
    assert list(found) == ["loop_1_final", "loop_2_final", "loop_3_final"]
    for result in read(finished / "training_state.pth")["loops"]:
        row = found[f"loop_{result['loop']}_final"]
        for metric, value in result["eval_dataset"].items():
            assert (None if row[metric] == "n/a" else float(row[metric])) == pytest.approx(value, abs=1e-5)
    # A stage's file alone, in another place.
    alone = tmp_path / "elsewhere.pth"
    alone.write_bytes((finished / "loop_2_text_adapter.pth").read_bytes())
    prediction = load_model(alone, device="cpu").predict(world / "test" / "cork" / "test" / "spot" / "000.png", "cork")
    assert 0 <= prediction.score <= 1
