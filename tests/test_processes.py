"""Several processes of one launch compute what one process does, and end in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from dataset.samples import SeededSampler, SharedBatches
from engine.training.arguments import BaseConfig
from tests.helpers import relative_error
from tests.launched import run_all
from tests.scripts import launch, train_small_runs
from utils.errors import UserError
from utils.processes import Share

RUNS = ("base", "batch_mean", "feedback")
TIMED = ("seconds", "images_per_second", "memory_gib")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and runs to be tested."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return train_small_runs(tmp_path_factory.mktemp("world"), count=5)


@pytest.fixture(scope="module")
def one(world: Path) -> Path:
    """What one process makes."""
    run_all(world, world / "one")
    return world / "one"


@pytest.fixture(scope="module", params=(2, 3))
def several(world: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, str]]:
    """What several processes make, and what they say on the way."""
    output = world / f"{request.param} processes"
    process = launch(request.param, "-m", "tests.launched", world, output)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return output, said


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMED} for line in lines]


def test_several_processes_train_as_one_does(one: Path, several: tuple[Path, str]) -> None:
    """Both stages, also accumulated; feedback with cross-attention and its dropout; a step with an image too few."""
    for name in RUNS:
        first, expected = rows(several[0] / name), rows(one / name)
        assert [list(row) for row in first] == [list(row) for row in expected]
        for row, other in zip(first, expected, strict=True):
            assert row.pop("stage") == other.pop("stage")
            assert row == pytest.approx(other, rel=1e-5, abs=1e-6), (name, row, other)


def test_and_their_first_gradients_are_the_same(one: Path, several: tuple[Path, str]) -> None:
    for name in RUNS:
        first, expected = (torch.load(folder / f"{name}_gradients.pth") for folder in (several[0], one))
        assert first.keys() == expected.keys() and len(first) > 4
        largest = max(value.abs().max() for value in expected.values())
        for key, value in first.items():
            # Biases of keys have no gradient but rounding's: softmax does not see them.
            if expected[key].abs().max() > 1e-5 * largest:
                assert relative_error(value, expected[key]) < 1e-4, (name, key)


def test_several_processes_test_as_one_does_digit_for_digit(one: Path, several: tuple[Path, str]) -> None:
    for name in ("tested/evaluation_test.csv", "comparison.csv", "comparison_cache.json"):
        assert (several[0] / name).read_bytes() == (one / name).read_bytes(), name


def test_several_processes_speak_as_one(several: tuple[Path, str]) -> None:
    said = [line for line in several[1].splitlines() if "Complete: " in line]
    assert len(said) == len(RUNS)
    assert "Warning" not in several[1] and "Traceback" not in several[1]


@pytest.mark.parametrize("total", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_shares_are_even_and_make_up_the_step(total: int, processes: int) -> None:
    shares = [Share.of(total, process, processes) for process in range(processes)]
    found = [position for share in shares for position in range(share.first, share.first + share.count)]
    assert found == list(range(total))
    counts = [share.count for share in shares]
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
    assert [share.count for share in (SharedBatches(sampler, 6, process, 3).shares()[1] for process in range(3))] == [
        1, 0, 0
    ]  # fmt: skip


def test_a_batch_that_processes_cannot_share_evenly_is_refused() -> None:
    config = BaseConfig(text_batch_size=6, image_batch_size=4)
    config.check_processes(1)
    config.check_processes(2)
    with pytest.raises(UserError, match=r"--image_batch_size 4 .* 3 processes .* such as 6"):
        config.check_processes(3)
    with pytest.raises(UserError, match="batch_axis"):
        BaseConfig(surgery="batch_axis").check_processes(2)
