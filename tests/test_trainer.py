"""The training loop: verdicts, safeguards, rules of restarts, and errors."""

import json
import math
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from engine.config.training import BaseConfig
from engine.runtime.run_folder import describe_differences
from engine.training import restart
from engine.training.restart import check_phases
from engine.training.schedules import Schedule, halved_at, warmup_cosine
from engine.training.stages import WATCHED, StageOutput
from engine.training.start import Start
from engine.training.trainer import StopRequest, Trainer, gradient_norms
from engine.training.verdicts import StageVerdict, epoch_warnings, judge_run, judge_stage, remedies_for, run_summary
from model.checkpoint import Checkpoint
from utils.errors import NotFiniteError, UserError
from utils.files import write_json_lines
from utils.processes import Share


def epoch(**changes: Any) -> dict[str, Any]:
    return {
        "stage": "image",
        "loss": 2.0,
        "opening_loss": 3.0,
        "steps": 200,
        "grad_norm/total": 0.1,
        "abnormal_inside": 0.6,
        "abnormal_outside": 0.1,
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, None),
        ({"grad_norm/total": 0.005}, "low"),
        ({"grad_norm/total": 0.0005}, "vanishing"),
        ({"abnormal_inside": 0.01, "abnormal_outside": 0.001}, "all normal"),
        # High in the wrong places; without masks.
        ({"abnormal_inside": 0.01, "abnormal_outside": 0.3}, None),
        ({"abnormal_inside": math.nan, "abnormal_outside": math.nan}, None),
        ({"abnormal_inside": math.nan, "abnormal_outside": 0.001}, "undefined"),
        ({"grad_norm/total": math.nan}, "undefined"),
    ],
)
def test_a_failing_epoch_is_reported(changes: dict[str, float], word: str | None) -> None:
    warnings = epoch_warnings(epoch(**changes))
    assert [word in warning for warning in warnings] == [True] * (word is not None)


def verdict(*rows: dict[str, Any], first: float = 3.0, feedback: bool = True) -> StageVerdict:
    return judge_stage(rows, first, remedies_for("image", feedback))


@pytest.mark.parametrize(
    ("rows", "label", "remedy"),
    [
        ([epoch(loss=2.99), epoch(loss=2.9)], "learning", ""),
        ([epoch(loss=2.99), epoch(loss=2.98)], "not learning", "--image_lr"),
        ([epoch(abnormal_inside=0.0, abnormal_outside=0.0)], "all normal", "--cross_attn_start_loop 2"),
        ([epoch(loss=4.6)], "exploding", "--grad_clip"),
        ([epoch(**{"grad_norm/total": 0.0005})], "vanishing", "a higher --image_lr"),
        ([epoch(loss=3.2, **{"grad_norm/total": 0.0005})], "vanishing", "a lower --image_lr"),
        ([epoch(abnormal_inside=math.nan)], "undefined", ""),
        ([epoch(loss=math.nan)], "undefined", ""),
        ([epoch(loss=3.0, steps=40), epoch(loss=3.0, steps=40)], "too short to tell", ""),
    ],
)
def test_a_stage_gets_a_verdict_with_remedies(rows: list[dict[str, Any]], label: str, remedy: str) -> None:
    found = verdict(*rows)
    assert label in found.label
    assert remedy in str(found)
    assert bool(found.remedies) == bool(remedy)


def test_remedies_name_options_of_the_script() -> None:
    assert "--cross_attn_start_loop" not in str(verdict(epoch(loss=2.99), feedback=False))
    assert "--grad_clip" not in str(verdict(epoch(loss=4.6), feedback=False))


def test_later_loops_are_judged_by_the_first_loss_of_the_run() -> None:
    history = [
        {**epoch(loss=2.0), "loop": 1, "epoch": 1},
        {**epoch(loss=1.99, opening_loss=2.0), "loop": 2, "epoch": 1},
        {**epoch(loss=2.98, opening_loss=2.0), "loop": 3, "epoch": 1},
    ]
    verdicts = judge_run(history, feedback=True)
    assert [found.label for found in verdicts.values()] == ["learning", "learning", "not learning"]
    summary = run_summary(history, feedback=True).splitlines()
    assert summary[2].split() == ["1", "image", "1", "3.0000", "2.0000", "0.1000", "learning"]
    assert summary[-1].startswith("Loop 3, image: not learning")
    assert len(summary) == 6


def test_non_finite_values_are_null_in_the_history(tmp_path: Path) -> None:
    history = [{**epoch(abnormal_inside=math.nan, loss=math.inf), "loop": 1, "epoch": 1}]
    write_json_lines(tmp_path / "history.jsonl", history)
    (line,) = (tmp_path / "history.jsonl").read_text(encoding="utf-8").splitlines()
    assert "NaN" not in line and "Infinity" not in line
    read = [json.loads(line)]
    assert read[0]["abnormal_inside"] is None
    assert run_summary(read, feedback=False).splitlines()[2].split()[0] == "1"


def test_gradient_norms_are_those_of_each_component_and_of_all() -> None:
    parts = {"a": nn.Linear(2, 1, bias=False), "b": nn.Linear(1, 1, bias=False)}
    parts["a"].weight.grad = torch.tensor([[3.0, 4.0]])
    parts["b"].weight.grad = torch.tensor([[12.0]])
    norms = gradient_norms(parts)
    assert {name: value.item() for name, value in norms.items()} == {"a": 5.0, "b": 12.0, "total": 13.0}


def rates(optimizer: torch.optim.Optimizer, schedule: Schedule, count: int) -> list[float]:
    taken = []
    for _ in range(count):
        taken.append(optimizer.param_groups[0]["lr"])
        schedule.advance()
    return taken


def one_weight() -> torch.optim.Optimizer:
    return torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=0.123)


def test_a_schedule_halves_at_its_steps_and_resumes_at_any() -> None:
    optimizer = one_weight()
    assert rates(optimizer, Schedule({optimizer: 1.0}, halved_at((3, 5))), 7) == [1, 1, 1, 0.5, 0.5, 0.25, 0.25]
    assert rates(optimizer, Schedule({optimizer: 1.0}, halved_at((3, 5)), step=4), 3) == [0.5, 0.25, 0.25]
    other = one_weight()
    rates(optimizer, Schedule({optimizer: 1.0, other: 0.1}, halved_at((1,))), 1)
    assert (optimizer.param_groups[0]["lr"], other.param_groups[0]["lr"]) == (0.5, 0.05)


def test_warm_up_rises_to_the_rate_and_the_cosine_falls_to_0() -> None:
    factor = warmup_cosine(12, 4)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(4) == 1.0
    assert factor(8) == pytest.approx(0.5)
    assert factor(11) == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert factor(12) == pytest.approx(0.0)


def test_warm_up_takes_at_most_half_the_stage() -> None:
    assert [warmup_cosine(6, 100)(step) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    assert warmup_cosine(1, 100)(0) == 1.0


def test_a_loop_starts_from_its_own_rate() -> None:
    optimizer = one_weight()
    rates(optimizer, Schedule({optimizer: 1.0}, warmup_cosine(4, 1)), 4)
    assert rates(optimizer, Schedule({optimizer: 0.5}, warmup_cosine(4, 1)), 2) == [0.5, 0.5]


def phases(*epochs: int, can_grow: bool = True) -> list[Any]:
    return [
        SimpleNamespace(loop=1 + index // 2, stage=("text", "image")[index % 2], epochs=count, can_grow=can_grow)
        for index, count in enumerate(epochs)
    ]


def test_a_run_may_only_be_extended_at_its_end() -> None:
    folder = Path("somewhere")
    assert check_phases([3, 0], [5, 20], phases(5, 20), folder) == [3, 0]
    assert check_phases([5, 20], [5, 20], phases(5, 30), folder) == [5, 20]
    assert check_phases([5, 20], [5, 20], phases(5, 20, 4, 16), folder) == [5, 20, 0, 0]
    for done, asked in (([5, 1], (6, 20)), ([5, 20], (5, 10)), ([5, 20, 4, 16], (5, 20))):
        with pytest.raises(UserError, match="save_path"):
            check_phases(done, [5, 20, 4, 16], phases(*asked), folder)


def test_a_started_stage_with_a_falling_rate_cannot_be_extended() -> None:
    folder = Path("somewhere")
    with pytest.raises(UserError, match="was started with 20 epochs"):
        check_phases([5, 3], [5, 20], phases(5, 30, can_grow=False), folder)
    with pytest.raises(UserError, match="was started with 20 epochs"):
        check_phases([5, 3], [5, 20], phases(5, 10, can_grow=False), folder)
    assert check_phases([5, 0], [5, 20], phases(5, 30, can_grow=False), folder) == [5, 0]
    assert check_phases([5, 20], [5, 20], phases(5, 20, 4, 16, can_grow=False), folder) == [5, 20, 0, 0]


def test_a_run_refused_by_another_process_ends_as_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(restart, "broadcast_object_list", lambda values: values.__setitem__(0, True))
    with (
        pytest.raises(SystemExit) as ended,
        restart.locked_folder(tmp_path, {}, SimpleNamespace(is_main_process=False)),
    ):
        pass
    assert ended.value.code == 2


def test_differences_are_reported_with_both_values() -> None:
    assert describe_differences({"a": 1, "b": 2, "gone": 5}, {"a": 1, "b": 3}) == "b was 2, now 3"


def test_a_run_from_a_checkpoint_differs_from_one_from_a_base(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"weights")
    checkpoint = Checkpoint(tmp_path / "file", {})
    starts = [Start(), Start(checkpoint, checkpoint), Start(checkpoint, checkpoint, whole=True), Start(checkpoint)]
    for one in starts:
        for other in starts:
            same = not describe_differences(one.signature(), other.signature())
            assert same == (one is other)


def test_the_folder_of_own_images_may_move() -> None:
    before, moved, other = (BaseConfig.of(dataset=name).signature() for name in ("a/own", "b/own", "VisA"))
    assert not describe_differences(before, moved)
    assert describe_differences(before, other) == "dataset was None, now VisA"


class OneWeight(nn.Module):
    """A stage whose loss is the mean of weight * image: the gradient is the mean of the batch's images."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.part.weight)

    def forward(self, batch: dict[str, Any]) -> StageOutput:
        loss = self.part(batch["image"][:, None]).mean()
        watch = dict(zip(WATCHED, torch.tensor([1.0, 2, 3, 4]), strict=True))
        return StageOutput({"total": loss, "focal": loss + 1}, watch)


class Steep(OneWeight):
    """Its loss is finite, its gradient is not."""

    def forward(self, batch: dict[str, Any]) -> StageOutput:
        output = super().forward(batch)
        return output._replace(losses={"total": output.losses["total"].sqrt()})


def train(
    images: Sequence[float],
    batch_size: int,
    scaler: torch.amp.GradScaler | None = None,
    stage: OneWeight | None = None,
    shares: list[Share] | None = None,
    stop: bool = False,
    **options: Any,
) -> tuple[list[float], dict[str, float] | None, Schedule]:
    """One epoch of SGD at rate 1; the weight after each step, the epoch's row, and the schedule."""
    stage = stage or OneWeight()
    batches = [{"image": part, "label": torch.zeros(len(part))} for part in torch.tensor(images).split(batch_size)]
    optimizer, other = torch.optim.SGD(stage.parameters(), lr=0.0), one_weight()
    weights: list[float] = []
    optimizer.register_step_post_hook(lambda *_: weights.append(stage.part.weight.item()))
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler
    schedule = Schedule({optimizer: 1.0, other: 0.5}, halved_at(()))
    trainer = Trainer(stage, {"part": stage.part}, batches, schedule, accelerator, **options)
    return weights, trainer.train_epoch("epoch", lambda: stop, shares), schedule


def test_the_row_of_an_epoch() -> None:
    """22 batches: the loss is -(k - 1) in the k-th, and the opening loss that of the first two."""
    _, row, _ = train([1.0] * 44, batch_size=2)
    assert (row["loss"], row["focal"], row["opening_loss"], row["lr"]) == (-10.5, -9.5, -0.5, 1.0)
    assert (row["abnormal_inside"], row["abnormal_outside"], row["images"], row["steps"]) == (0.5, 0.75, 44, 22)
    assert not set(WATCHED) & set(row) and "total" not in row
    assert 0 < row["seconds"] < 60 and row["images_per_second"] == pytest.approx(44 / row["seconds"])
    assert row["memory_gib"] == pytest.approx(psutil.Process().memory_info().rss / 2**30, rel=0.2)
    assert [train([1.0] * count, batch_size=1)[1]["opening_loss"] for count in (1, 19, 20)] == [0, 0, -0.5]
    assert train([1.0], batch_size=1)[1]["lr"] == 1.0


def test_a_share_of_a_step_weighs_as_its_images() -> None:
    """Of 3 images one process has 2, the other 1: the weight of their losses is 4/3 and 2/3."""
    shares = [Share.of(3, rank, 2) for rank in range(2)] + [Share.of(1, 1, 2)]
    weights, row, _ = train([1.0] * 3, batch_size=1, shares=shares)
    assert weights == pytest.approx([-4 / 3, -2, -2])
    assert row["abnormal_inside"] == 0.5 and row["images"] == 7
    assert train([1.0], 1, shares=shares[1:2])[1]["abnormal_inside"] == 0.5
    assert math.isnan(train([1.0], 1, shares=shares[2:])[1]["abnormal_inside"])


def test_a_stop_ends_the_epoch_after_its_step() -> None:
    weights, row, _ = train([1.0] * 3, batch_size=1, stop=True)
    assert (weights, row) == ([-1.0], None)


def test_a_second_interruption_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.training.trainer.ignore_ended_workers", lambda: None)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop() and stop.signal_number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_partial_step_at_the_end_is_the_mean_of_its_own_batches() -> None:
    weights, row, _ = train([1.0] * 5, batch_size=1, accumulate=4)
    assert weights == [-1.0, -2.0]
    assert (row["grad_norm/total"], row["steps"], row["images"]) == (1.0, 2, 5)


def test_accumulated_batches_are_one_large_batch() -> None:
    images = torch.randn(40, generator=torch.Generator().manual_seed(0)).tolist()
    small, small_row, _ = train(images, batch_size=8, accumulate=4)
    large, large_row, _ = train(images, batch_size=32)
    assert small == pytest.approx(large, rel=1e-6) and len(small) == 2
    assert small_row["grad_norm/total"] == pytest.approx(large_row["grad_norm/total"], rel=1e-6)


def test_a_step_that_the_gradient_scaler_skips_does_not_count() -> None:
    """The scaler of fp16, on the CPU: its first scale lets the gradient overflow, the next ones do not."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=0.25)
    weights, row, schedule = train([4.0] * 5, batch_size=1, scaler=scaler)
    assert weights == [-4.0, -8.0, -12.0, -16.0]
    assert (row["steps"], row["grad_norm/total"], row["lr"], schedule.step) == (4, 4.0, 1.0, 4)
    row = train([4.0], batch_size=1, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**127))[1]
    assert row["steps"] == row["lr"] == 0 and math.isnan(row["grad_norm/total"])


def test_the_reported_norm_is_that_before_clipping() -> None:
    weights, row, _ = train([4.0, 0.25], batch_size=1, max_norm=1.0)
    assert weights == pytest.approx([-1.0, -1.25], rel=1e-5)
    assert row["grad_norm/total"] == pytest.approx((4.0 + 0.25) / 2)


@pytest.mark.parametrize(("stage", "images"), [(OneWeight, [math.inf]), (OneWeight, [math.nan]), (Steep, [1.0])])
def test_a_non_finite_step_is_not_taken(stage: type[OneWeight], images: list[float]) -> None:
    trained = stage()
    with pytest.raises(NotFiniteError, match="the step was not taken"):
        train(images, batch_size=1, stage=trained)
    assert trained.part.weight.item() == 0
