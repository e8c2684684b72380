"""The training loop's own sayings and safeguards, restarts' rules, and how errors reach the user (DESIGN 5, 8)."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from engine.run import constant_then_halved, continued, describe_differences
from engine.trainer import epoch_warnings, gradient_norms, readable_time, stage_verdict
from utils.cli import run_script
from utils.errors import NotFiniteError, Stopped, UserError


def epoch(**changes: Any) -> dict[str, Any]:
    return {
        "stage": "image", "loss": 2.0, "opening_loss": 3.0, "steps": 200, "grad_norm/total": 0.1,
        "abnormal_inside": 0.6, "abnormal_outside": 0.1, **changes,
    }  # fmt: skip


def test_a_healthy_epoch_is_not_warned_of() -> None:
    assert epoch_warnings(epoch()) == []
    assert stage_verdict([epoch()]) is None


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"grad_norm/total": 0.005}, "low"),
        ({"grad_norm/total": 0.0005}, "vanishing"),
        ({"abnormal_inside": 0.01, "abnormal_outside": 0.001}, "all normal"),
    ],
)
def test_an_unhealthy_epoch_is_named(changes: dict[str, float], word: str) -> None:
    (warning,) = epoch_warnings(epoch(**changes))
    assert word in warning


def test_an_epoch_without_anomalous_pixels_is_not_called_collapsed() -> None:
    assert epoch_warnings(epoch(abnormal_inside=math.nan, abnormal_outside=0.001)) == []


def test_not_learning_is_said_of_a_flat_loss_and_of_a_collapse_in_a_stage_of_enough_steps() -> None:
    assert "--image_lr" in stage_verdict([epoch(loss=2.99), epoch(loss=2.98)])
    assert stage_verdict([epoch(loss=2.99), epoch(loss=2.9)]) is None
    assert "every pixel normal" in stage_verdict([epoch(abnormal_inside=0.0, abnormal_outside=0.0)])
    assert stage_verdict([epoch(loss=3.0, steps=40), epoch(loss=3.0, steps=40)]) is None


def test_gradient_norms_are_those_of_each_component_and_of_all() -> None:
    parts = {"a": nn.Linear(2, 1, bias=False), "b": nn.Linear(1, 1, bias=False)}
    parts["a"].weight.grad = torch.tensor([[3.0, 4.0]])
    parts["b"].weight.grad = torch.tensor([[12.0]])
    norms = gradient_norms(parts)
    assert {name: value.item() for name, value in norms.items()} == {"a": 5.0, "b": 12.0, "total": 13.0}


def test_the_base_schedule_halves_at_its_steps_and_survives_a_restart() -> None:
    def steps(schedule: Any, optimizer: Any, count: int) -> list[float]:
        rates = []
        for _ in range(count):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return rates

    def new() -> tuple[Any, Any]:
        optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=1.0)
        return constant_then_halved((3, 5))(optimizer), optimizer

    schedule, optimizer = new()
    assert steps(schedule, optimizer, 7) == [1, 1, 1, 0.5, 0.5, 0.25, 0.25]
    schedule, optimizer = new()
    steps(schedule, optimizer, 4)
    later, later_optimizer = new()
    later.load_state_dict(schedule.state_dict())
    later_optimizer.load_state_dict(optimizer.state_dict())
    assert steps(later, later_optimizer, 3) == [0.5, 0.25, 0.25]


def phases(*epochs: int) -> list[Any]:
    sides = ("text", "image", "text", "image")
    return [SimpleNamespace(side=side, epochs=count) for side, count in zip(sides, epochs, strict=False)]


def test_a_run_may_grow_where_it_stands_and_nowhere_else() -> None:
    folder = Path("somewhere")
    assert continued([3, 0], phases(5, 20), folder) == [3, 0]
    assert continued([5, 20], phases(5, 30), folder) == [5, 20]
    assert continued([5, 20], phases(5, 20, 4, 16), folder) == [5, 20, 0, 0]
    for done, asked in (([5, 1], (6, 20)), ([5, 20], (5, 10)), ([5, 20, 4, 16], (5, 20))):
        with pytest.raises(UserError, match="save_path"):
            continued(done, phases(*asked), folder)


def test_differences_are_named_with_both_values() -> None:
    assert describe_differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == "b was 2, now 3; c was None, now 4"


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("no such\nfile"), 2, "error: no such file"),
        (NotFiniteError("loss nan"), 3, "error: loss nan"),
        (Stopped("stopped in epoch 2", 15), 143, "stopped in epoch 2"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "--image_batch_size"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_errors_end_in_one_line_and_their_status(
    error: BaseException, status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as exit_:
        run_script(main)
    assert exit_.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_mistake_of_the_programmer_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 // 0)


def test_times_are_readable() -> None:
    assert [readable_time(seconds) for seconds in (12.4, 200, 7500)] == ["12 s", "3 min 20 s", "2 h 05 min"]
