"""Several processes of one launch compute what one process does, and end in one line."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState

import engine.training.restart
import engine.training.run
from dataset.samples import SeededSampler, SharedBatches
from engine.config.training import BaseConfig
from engine.runtime.distributed import make_accelerator
from engine.training.base import train_base
from tests.helpers import relative_error
from tests.in_process import ROOT
from tests.launched import base_config, run_all
from tests.scripts import (
    environment,
    error_line,
    fork,
    free_port,
    launch,
    read_history,
    run,
    train_small_runs,
    wait_for_rows,
)
from utils.errors import UserError
from utils.processes import LAUNCH_NAMES, Share, another_process_ended, check_launch, claim_message, env_world_size

RUNS = ("base", "cross", "feedback", "joint")
WHY_NOT = "torch's launcher starts no processes on Windows"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and runs to be tested."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return train_small_runs(tmp_path_factory.mktemp("world"), count=5)


@pytest.fixture(scope="module")
def one(world: Path) -> Path:
    """The results of one process."""
    run_all(world, world / "one")
    return world / "one"


@pytest.fixture(scope="module", params=(2, 3))
def several(world: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, str]]:
    """The results and output of two processes with accelerate's launcher and three without."""
    if sys.platform == "win32":
        pytest.skip(WHY_NOT)
    output = world / f"{request.param} processes"
    if request.param == 2:
        processes = [launch(2, "-m", "tests.launched", world, output)]
    else:
        processes = fork(request.param, "tests/launched.py", world, output)
    said = "".join(process.communicate(timeout=300)[1] for process in processes)
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return output, said


def test_several_processes_train_like_one(one: Path, several: tuple[Path, str]) -> None:
    """Both stages, with accumulation; feedback with cross-attention and dropout; an incomplete step."""
    for name in RUNS:
        first, expected = read_history(several[0] / name), read_history(one / name)
        assert [list(row) for row in first] == [list(row) for row in expected]
        for row, other in zip(first, expected, strict=True):
            assert row.pop("stage") == other.pop("stage")
            assert row == pytest.approx(other, rel=1e-5, abs=1e-6), (name, row, other)


def test_first_gradients_of_several_processes_equal_those_of_one(one: Path, several: tuple[Path, str]) -> None:
    for name in RUNS:
        first, expected = (torch.load(folder / f"{name}_gradients.pth") for folder in (several[0], one))
        assert first.keys() == expected.keys() and len(first) > 4
        largest = max(value.abs().max() for value in expected.values())
        for key, value in first.items():
            # Biases of keys have no gradient but rounding's: softmax does not see them.
            if expected[key].abs().max() > 1e-5 * largest:
                assert relative_error(value, expected[key]) < 1e-4, (name, key)


def test_several_processes_give_identical_test_results(one: Path, several: tuple[Path, str]) -> None:
    for name in ("tested/evaluation_test.csv", "comparison.csv"):
        assert (several[0] / name).read_bytes() == (one / name).read_bytes(), name


def test_all_processes_stop_at_the_same_step_and_resume_identically(one: Path, several: tuple[Path, str]) -> None:
    lines = {file.read_text(encoding="utf-8") for file in several[0].glob("stopped_*.txt")}
    assert lines == {"stopped in loop 1, image epoch 1: the same command resumes, and repeats this epoch"}
    assert read_history(several[0] / "stopped") == read_history(several[0] / "base")


@pytest.mark.skipif(sys.platform == "win32", reason=WHY_NOT)
def test_a_killed_process_ends_the_others_and_any_number_resumes(world: Path, one: Path, tmp_path: Path) -> None:
    config = replace(base_config(world, tmp_path / "run"), image_epoch=3, accumulate=1)
    names = ("model_name", "dataset", "shot", "text_batch_size", "image_batch_size", "text_epoch", "image_epoch")
    given = [word for name in names for word in (f"--{name}", getattr(config, name))]
    process = launch(
        2, "train.py", *given, "--num_workers", 0, "--device", "cpu", "--save_path", config.save_path, slowly=True
    )
    wait_for_rows(config.save_path / "history.jsonl", 2, process)
    ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
    ranks["1"].kill()
    _, said = process.communicate(timeout=100)
    assert len([line for line in said.splitlines() if line.startswith("stopped")]) == 1, said
    assert "Traceback" not in (config.save_path / "train.log").read_text(encoding="utf-8")
    assert len(read_history(config.save_path)) < 4, "killed too late to show anything"
    train_base(config)
    whole = replace(config, save_path=tmp_path / "whole")
    train_base(whole)
    for row, other in zip(read_history(config.save_path), read_history(whole.save_path), strict=True):
        assert row.pop("stage") == other.pop("stage")
        assert row == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_machines_must_share_the_save_path_and_have_the_same_files(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = base_config(world, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="not the same folder on all machines"):
        patch.setattr(engine.training.run, "from_main_process", lambda make: [1, 0])
        train_base(config)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="metadata_digest was other, now"):
        patch.setattr(engine.training.restart, "from_main_process", lambda make: {**make(), "metadata_digest": "other"})
        train_base(config)
    assert not config.save_path.exists()


def test_only_the_first_process_prints(several: tuple[Path, str]) -> None:
    said = [line for line in several[1].splitlines() if "Complete: " in line]
    assert len(said) == len(RUNS) + 1
    assert "Warning" not in several[1] and "Traceback" not in several[1]


@pytest.mark.parametrize("total", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_shares_are_even_and_add_up_to_the_step(total: int, processes: int) -> None:
    shares = [Share.of(total, process, processes) for process in range(processes)]
    found = [position for share in shares for position in range(share.first, share.first + share.size)]
    assert found == list(range(total))
    counts = [share.size for share in shares]
    assert max(counts) - min(counts) <= 1
    assert sum(share.weight for share in shares) == pytest.approx(processes)
    if total % processes == 0:
        assert {share.weight for share in shares} == {1.0}


def test_each_process_loads_its_share_of_each_batch_and_all_take_as_many_steps() -> None:
    sampler = SeededSampler(7, seed=0, stage=1)
    whole = list(SharedBatches(sampler, 6))
    batches = [list(SharedBatches(sampler, 6, process, 3)) for process in range(3)]
    assert [len(batch) for batch in whole] == [6, 1]
    assert [key for each in batches for key in each[0]] == whole[0]
    # One image for three processes: two compute it for nothing.
    assert [each[1] for each in batches] == [whole[1]] * 3
    assert [share.size for share in (SharedBatches(sampler, 6, process, 3).shares()[1] for process in range(3))] == [
        1,
        0,
        0,
    ]


def test_a_batch_that_processes_cannot_share_evenly_is_refused() -> None:
    config = BaseConfig(text_batch_size=6, image_batch_size=4)
    config.check_processes(1)
    config.check_processes(2)
    with pytest.raises(UserError, match=r"--image_batch_size 4 .*such as 6"):
        config.check_processes(3)
    with pytest.raises(UserError, match="batch_axis"):
        BaseConfig(surgery="batch_axis").check_processes(2)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As one of three processes that torch's launcher started; the folder of the launch's attempt."""
    folder = tmp_path / "attempt_0"
    (folder / "1").mkdir(parents=True)
    launch = {"WORLD_SIZE": 3, "RANK": 1, "LOCAL_RANK": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    for name, value in {**launch, "TORCHELASTIC_ERROR_FILE": folder / "1" / "error.json"}.items():
        monkeypatch.setenv(name, str(value))
    return folder


def test_an_invalid_launch_is_refused_before_the_model_is_built(launched: Path, tmp_path: Path) -> None:
    said = error_line("train.py", "--image_batch_size", 4, "--text_batch_size", 6, "--save_path", tmp_path / "run")
    assert said.startswith("error: --image_batch_size 4 cannot be divided among 3 processes")
    # Another process has said it.
    assert run("train.py", "--image_batch_size", 4, "--save_path", tmp_path / "run", status=2) == ""


@pytest.mark.parametrize(
    "words",
    [
        ("visualize_comparison.py", "--class_name", "cork"),
        ("run_study.py", "studies/smoke.toml"),
        ("inference.py", "--checkpoint", "none", "--image", "somewhere"),
    ],
)
def test_options_for_one_process_only_are_refused(words: tuple[str, ...], launched: Path) -> None:
    assert "in one process: leave accelerate launch out" in error_line(*words)


def test_the_first_process_to_end_prints_the_message(launched: Path) -> None:
    assert claim_message()
    assert not claim_message()
    assert another_process_ended()


def test_a_single_process_prints_and_does_not_wait() -> None:
    assert claim_message() and claim_message()
    assert not another_process_ended()


ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*LAUNCH_NAMES, *(other for others in LAUNCH_NAMES.values() for other in others), *ADDRESS):
        monkeypatch.setenv(name, "")  # restored at the end
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LOCAL_RANK": "0"}, "contains LOCAL_RANK, but not WORLD_SIZE, RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "1"}, "contains RANK, but not WORLD_SIZE"),
        ({"WORLD_SIZE": "2", **ADDRESS}, "contains WORLD_SIZE, but not RANK;"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_RANK, but not MASTER_ADDR"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: must be a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2", **ADDRESS}, "RANK=2: must be below WORLD_SIZE=2"),
    ],
)
def test_incomplete_launches_are_refused(
    variables: dict[str, str], message: str, no_launch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        no_launch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        check_launch()


@pytest.mark.parametrize(
    ("variables", "processes", "local_rank"),
    [
        ({}, 1, None),
        ({"LOCAL_RANK": "-1"}, 1, None),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, 1, None),
        ({"WORLD_SIZE": "3", "RANK": "2", **ADDRESS}, 3, "2"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "0", **ADDRESS}, 2, "0"),
    ],
)
def test_complete_launches_get_the_variables_of_torchrun(
    variables: dict[str, str], processes: int, local_rank: str | None, no_launch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        no_launch.setenv(name, value)
    check_launch()
    assert (env_world_size(), os.environ.get("LOCAL_RANK")) == (processes, local_rank)


def test_options_are_not_changed_by_accelerates_variables(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    variables = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_TORCH_DEVICE": "meta",
    }
    harmless = {"ACCELERATE_DYNAMO_MODE": "default", "ACCELERATE_USE_DEEPSPEED": "False"}
    for name, value in {**variables, **harmless}.items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator, _ = make_accelerator("cpu", "fp32", "off", "none", Path())
        assert accelerator.gradient_accumulation_steps == 1
        assert accelerator.state.dynamo_plugin.backend == "NO"
        assert (accelerator.distributed_type, accelerator.device.type) == ("NO", "cpu")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    (line,) = [message for message in caplog.messages if message.startswith("Ignored")]
    assert all(f"{name}={value}" in line for name, value in variables.items())
    assert not any(name in line for name in harmless)


WAITING = """
import sys
import engine.runtime.distributed as distributed
from utils.script import run_script

distributed.REPORT_INTERVAL, distributed.ANSWER_TIMEOUT = 0.0, float(sys.argv[1])
run_script(lambda: distributed.connect_processes(on_cpu=True), shared=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals to send")
@pytest.mark.parametrize(
    ("rank", "other", "patience"),
    [(0, "rank 1", None), (1, "rank 0 (Connection refused)", None), (1, "the answer", 600.0), (1, "the answer", 1.0)],
)
def test_a_process_that_waits_says_so_and_ends(rank: int, other: str, patience: float | None) -> None:
    """On a signal, or after `patience` seconds with another program, which accepts connections and never answers."""
    port = free_port()
    launch = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", WAITING, str(patience or 0)]
    with socket.create_server(("127.0.0.1", port)) if patience else nullcontext():
        process = subprocess.Popen(
            command, cwd=ROOT, env={**environment(), **launch}, text=True, stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        assert process.stderr.readline().startswith(f"Rank {rank} is waiting for {other}")
        if patience == 1.0:
            assert "another program listens there" in process.communicate(timeout=60)[1]
        else:
            process.send_signal(signal.SIGTERM)
            assert process.communicate(timeout=60)[1].endswith("stopped\n")
    assert process.returncode == (2 if patience == 1.0 else 143)
