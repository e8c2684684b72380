"""Feedback training in this process: plan, changes in a loop, persistence, files, restarts."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

import engine.training.feedback
import engine.training.run
from dataset.records import Record
from engine import load_model
from engine.config.presets import PRESETS
from engine.config.training import BaseConfig, FeedbackConfig
from engine.data.loaders import hold_out
from engine.data.task import load_task
from engine.detector.detector import Detector
from engine.report.compare import selected_loop
from engine.training.feedback import loop_phase, rate_factor, train_feedback
from engine.training.optimizers import make_optimizer
from engine.training.plan import loop_forward, plan_loops, plan_table
from engine.training.restart import unchanged_loops
from engine.training.run import TrainingRun
from engine.training.stage1 import TextStage
from engine.training.stage2 import ImageStage
from engine.training.trainer import Trainer
from engine.training.verdicts import validated_loop
from model.adapter import AdaptedCLIP
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.clip import FrozenCLIP
from model.clip_loading import load_clip
from model.config import LoopForward
from tests.helpers import config_for, equal, fill_with_noise, random_batch, tiny_prompts
from tests.scripts import common_arguments, flags, read_history, write_world
from tests.test_trainer import phases
from train_cross_attention_feedback_v2 import script
from utils.errors import NotFiniteError, UserError
from utils.files import finite
from utils.logging import set_up_logging

SIDES = ("text", "image")
CROSSED = ("text_cross_attn", "image_cross_attn")
COMPONENTS = ("text_adapter", "text_cross_attn", "image_adapter", "image_cross_attn")
ONE_EPOCH = {"text_epochs_per_loop": (1,), "image_epochs_per_loop": (1,)}

Weights = dict[str, Tensor]
Moments = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"), ("cork",), count=3)


@pytest.fixture(scope="module")
def clip(world: Path) -> FrozenCLIP:
    return load_clip(f"local-dir:{world / 'clip'}")


def asked(world: Path, save_path: Path, preset: str = "v2", **changes: Any) -> FeedbackConfig:
    """Three loops of 2, 1, 1 epochs in each stage: 2 steps of text and 4 of image an epoch."""
    values = {
        **common_arguments(world),
        "num_feedback_loops": 3,
        "text_epochs_per_loop": (2,),
        "image_epochs_per_loop": (2,),
        "save_path": save_path,
    }
    return FeedbackConfig.of(preset=preset, **{**values, **changes})


class Moment(NamedTuple):
    """The start or end of an epoch: the state of the model and both optimizers, and a prediction."""

    loop: int
    side: str
    epoch: int
    weights: dict[str, Weights]
    moments: dict[str, Moments]
    training: set[str]
    records: set[Record]
    max_norm: float | None
    prediction: np.ndarray | None = None


class Halt(BaseException):
    """Ends a run like a kill; the run must not catch it."""


@dataclass
class Recorder:
    """Records the epochs of one run."""

    halt_at_start: bool = False
    picture: Path | None = None
    starts: list[Moment] = field(default_factory=list)
    ends: list[Moment] = field(default_factory=list)
    run: TrainingRun | None = None
    evaluated: list[set[Record]] = field(default_factory=list)
    finished: dict[int, np.ndarray] = field(default_factory=dict)

    @contextmanager
    def watching(self) -> Iterator[Recorder]:
        with pytest.MonkeyPatch.context() as patch:
            train_epoch, restore = Trainer.train_epoch, TrainingRun._restore
            evaluate, finish = engine.training.feedback.evaluate, engine.training.feedback.LoopFinisher.__call__

            def watched_restore(run: TrainingRun, phases: Any) -> None:
                self.run = run
                restore(run, phases)

            def watched_epoch(trainer: Trainer, description: str, *rest: Any) -> Any:
                self.starts.append(self.look(trainer, description))
                if self.halt_at_start:
                    raise Halt
                row = train_epoch(trainer, description, *rest)
                end = self.look(trainer, description)
                self.ends.append(end._replace(prediction=self.predict(trainer.stage.model, end.loop)))
                return row

            def watched_evaluate(models: Any, data: Any, *rest: Any) -> Any:
                self.evaluated.append(set(data.records))
                return evaluate(models, data, *rest)

            def watched_finish(finisher: Any, loop: int) -> dict[str, Any]:
                found = finish(finisher, loop)
                self.finished[loop] = self.predict(finisher.model, loop)
                return found

            patch.setattr(TrainingRun, "_restore", watched_restore)
            patch.setattr(Trainer, "train_epoch", watched_epoch)
            patch.setattr(engine.training.feedback, "evaluate", watched_evaluate)
            patch.setattr(engine.training.feedback.LoopFinisher, "__call__", watched_finish)
            yield self

    def look(self, trainer: Trainer, description: str) -> Moment:
        model = trainer.stage.model
        loop, side, epoch = re.fullmatch(r"loop (\d+), (\w+) epoch (\d+)", description).groups()
        weights = {name: weights_of(part) for name, part in model.components.items()}
        training = {name for name, part in model.components.items() if part.training}
        moments = {side: moments_of(optimizer) for side, optimizer in self.run.optimizers.items()}
        records = set(trainer.loader.dataset.records)
        return Moment(int(loop), side, int(epoch), weights, moments, training, records, trainer.max_norm)

    def predict(self, model: AdaptedCLIPWithCrossAttention, loop: int) -> np.ndarray | None:
        if self.picture is None:
            return None
        crossed = self.run.describe(loop)["cross_attention"]
        forward = LoopForward(crossed["text_context"], crossed["cross_attn_active"])
        return predict(Detector(copy.deepcopy(model), "copy", loop_forward=forward), self.picture)

    def first(self, loop: int, side: str) -> Moment:
        return next(moment for moment in self.starts if (moment.loop, moment.side) == (loop, side))

    def last(self, loop: int, side: str) -> Moment:
        return [moment for moment in self.ends if (moment.loop, moment.side) == (loop, side)][-1]


def predict(detector: Detector, picture: Path) -> np.ndarray:
    return detector.predict(picture, "cork").level_maps


def weights_of(part: torch.nn.Module) -> Weights:
    return {key: value.detach().clone() for key, value in part.state_dict().items()}


def moments_of(optimizer: torch.optim.Optimizer) -> Moments:
    return {
        name: {key: value.clone() for key, value in optimizer.state[parameter].items()}
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        if optimizer.state.get(parameter)
    }


def watch(config: FeedbackConfig, picture: Path | None = None) -> Recorder:
    set_up_logging()  # as the script does
    with Recorder(picture=picture).watching() as recorder:
        train_feedback(config)
    return recorder


def begin(config: FeedbackConfig) -> Moment:
    """The state at the start of a run's first epoch."""
    set_up_logging()
    with Recorder(halt_at_start=True).watching() as recorder, pytest.raises(Halt):
        train_feedback(config)
    return recorder.starts[0]


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "training_state.pth", weights_only=True)


def results(folder: Path) -> dict[str, Any]:
    """The results of a run without times."""
    saved = state(folder)
    written = [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    assert written == finite(saved["history"])
    names = (*COMPONENTS, "text_optimizer", "image_optimizer", "epoch", "steps", "done", "loops")
    return {**{name: saved[name] for name in names}, "history": json.dumps(read_history(folder))}


def log_of(folder: Path) -> str:
    return (folder / "train.log").read_text(encoding="utf-8")


class Finished(NamedTuple):
    """An uninterrupted run and its records; tests that change the folder copy it first."""

    folder: Path
    seen: Recorder
    picture: Path


def choosing(world: Path) -> dict[str, Any]:
    return {"val_fraction": 0.25, "eval_dataset": str(world / "test"), "shot": 8}


@pytest.fixture(scope="module")
def finished(world: Path) -> Finished:
    """Three loops with held-out images and a test set."""
    picture = world / "test" / "cork" / "test" / "spot" / "000.png"
    folder = world / "finished"
    return Finished(folder, watch(asked(world, folder, **choosing(world)), picture), picture)


# The plan.


def parse(**options: object) -> FeedbackConfig:
    return script.parse([str(word) for word in flags(**options)])


def columns(config: FeedbackConfig) -> tuple[list[Any], ...]:
    plan = plan_loops(config)
    return tuple([loop.epochs[side] for loop in plan] for side in SIDES)


def test_defaults_are_those_of_v2_and_of_recommended() -> None:
    assert parse() == FeedbackConfig() == FeedbackConfig.of(preset="v2")
    assert BaseConfig() == BaseConfig.of(preset="recommended")
    assert PRESETS["v1"].keys() == PRESETS["v2"].keys() == PRESETS["v3"].keys()


def test_v2_is_its_column_of_the_table() -> None:
    plan = plan_loops(parse())
    assert columns(parse()) == ([5, 4, 3, 2, 2], [15, 12, 9, 7, 6])
    assert [loop.loop for loop in plan] == [1, 2, 3, 4, 5]
    assert [loop.rates["text"] for loop in plan] == pytest.approx([2e-5, 1.6e-5, 1.28e-5, 1.024e-5, 8.192e-6])
    assert [loop.rates["image"] for loop in plan] == pytest.approx([5e-3, 4e-3, 3.2e-3, 2.56e-3, 2.048e-3])
    assert all(loop.cross_attention for loop in plan)
    config = parse()
    assert (config.optimizer, config.weight_decay, config.lr_schedule) == ("adamw", 0.01, "cosine")
    assert (config.warmup_epochs, config.grad_clip, config.reset_optimizers) == (2, 1.0, False)
    assert (config.text_batch_size, config.image_batch_size) == (16, 2)


def test_v1_original_is_its_column_of_the_table() -> None:
    config = parse(preset="v1_original")
    plan = plan_loops(config)
    assert columns(config) == ([5, 3, 2], [20, 10, 5])
    assert [loop.rates["text"] for loop in plan] == pytest.approx([1e-5, 5e-6, 2.5e-6])
    assert [loop.rates["image"] for loop in plan] == pytest.approx([5e-4, 2.5e-4, 1.25e-4])
    assert (config.optimizer, config.weight_decay, config.lr_schedule) == ("adam", 0.0, "multistep")
    assert (config.grad_clip, config.reset_optimizers) == (0.0, True)
    assert (config.text_cross_attn_weight, config.image_cross_attn_weight, config.context_norm) == (1.0, 1.0, "none")


@pytest.mark.parametrize(
    ("first", "rate", "loops", "expected"),
    [
        (1, 0.8, 3, [1, 1, 1]),
        (10, 0.1, 3, [10, 1, 1]),
        (5, 1.0, 4, [5, 5, 5, 5]),
        (7, 0.5, 4, [7, 3, 1, 1]),
        (100, 0.7, 4, [100, 70, 49, 34]),
    ],
)
def test_decaying_epochs_are_rounded_down_to_at_least_1(
    first: int, rate: float, loops: int, expected: list[int]
) -> None:
    epochs = {"text_epochs_per_loop": first, "image_epochs_per_loop": first}
    config = parse(num_feedback_loops=loops, epochs_decay_rate=rate, **epochs)
    assert columns(config) == (expected, expected)


def test_rates_within_a_loop() -> None:
    """5 epochs of 4 steps."""

    def factors(schedule: str, side: str, **changes: Any) -> list[float]:
        config = FeedbackConfig.of(preset="v2", lr_schedule=schedule, **changes)
        return [rate_factor(config, side, 5, 4)(step) for step in range(20)]

    for side in SIDES:
        cosine = factors("cosine", side)
        assert cosine[:9] == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1, 1])
        assert cosine[14] == pytest.approx(0.5)
        assert 0 < cosine[19] < 0.03
        assert factors("cosine", side, warmup_epochs=0)[0] == 1
        assert factors("constant", side) == [1] * 20
    assert factors("multistep", "text") == [1] * 20
    assert factors("multistep", "image") == [1] * 10 + [0.5] * 6 + [0.25] * 4


def test_schedules_count_optimizer_steps_not_batches() -> None:
    """10 batches of which 4 make a step, and the rest one: 3 steps an epoch."""
    config = FeedbackConfig.of(preset="v2", accumulate=4)
    loop, run = plan_loops(config)[0], SimpleNamespace(model=SimpleNamespace(components={}))
    factor = loop_phase(config, loop, "image", ImageStage, run, (None, ()), range(10)).factor
    assert factor(3 * config.warmup_epochs - 1) == 1 > factor(3 * config.warmup_epochs - 2)
    assert factor(3 * loop.epochs["image"] - 1) > 0 == factor(3 * loop.epochs["image"])


def test_optimizers_have_their_documented_betas_and_decay(clip: FrozenCLIP) -> None:
    model = AdaptedCLIPWithCrossAttention(clip, config_for(clip))
    for preset, kind, betas, decay in (
        ("v2", torch.optim.AdamW, (0.9, 0.999), 0.01),
        ("v1", torch.optim.Adam, (0.5, 0.999), 0.0),
    ):
        for side in SIDES:
            optimizer = make_optimizer(model, side, FeedbackConfig.of(preset=preset))
            assert type(optimizer) is kind
            assert all(group["betas"] == betas and group["weight_decay"] == decay for group in optimizer.param_groups)
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            parts = (model.components[f"{side}_adapter"], model.components[f"{side}_cross_attn"])
            assert held == {id(parameter) for part in parts for parameter in part.parameters()}


# What loop 2 onward changes.


def stage_in_loop(clip: FrozenCLIP, loop: int, **changes: Any) -> TextStage:
    """Stage 1 of this loop, on a model without dropout."""
    config = FeedbackConfig.of(preset="v2", **{"num_feedback_loops": 2, "cross_attn_dropout": 0.0, **changes})
    torch.manual_seed(0)
    model = AdaptedCLIPWithCrossAttention(clip, config_for(clip), cross=config.cross_attention())
    classes, forward = ("nut", "zipper", "rope"), loop_forward(config, loop)
    stage = TextStage(model, tiny_prompts(clip), classes, config, forward)
    stage.begin()
    return stage


def sample_batch() -> dict[str, Any]:
    batch = random_batch(40)
    names = [("nut", "zipper", "rope")[row] for row in batch.rows]
    return {"image": batch.images, "mask": batch.masks[:, None], "label": batch.labels, "class_name": names}


def changes_loss(stage: TextStage, part: torch.nn.Module) -> bool:
    before = stage(sample_batch()).losses["total"].item()
    kept = copy.deepcopy(part.state_dict())
    fill_with_noise(part, 0.1)
    after = stage(sample_batch()).losses["total"].item()
    part.load_state_dict(kept)
    return abs(after - before) > 1e-4


def parts_that_change_loss(stage: TextStage) -> set[str]:
    adapter = stage.model.image_adapter
    parts = {name: adapter[name] for name in ("layer_adapters", "seg_proj")}
    parts["image_cross_attn"] = stage.model.image_cross_attn
    return {name for name, part in parts.items() if changes_loss(stage, part)}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({}, {"layer_adapters", "seg_proj", "image_cross_attn"}),
        ({"text_cross_attn_weight": 0.0}, {"layer_adapters", "seg_proj", "image_cross_attn"}),
        ({"num_feedback_loops": 3, "cross_attn_start_loop": 3}, {"layer_adapters", "seg_proj"}),
        ({"feedback_features": "projectors"}, {"seg_proj"}),
    ],
)
def test_stage_1_of_loop_2_receives_the_trained_image_branch(
    clip: FrozenCLIP, changes: dict[str, Any], parts: set[str]
) -> None:
    assert parts_that_change_loss(stage_in_loop(clip, 1, **changes)) == set()
    assert parts_that_change_loss(stage_in_loop(clip, 2, **changes)) == parts


@pytest.mark.parametrize("features", ["branch", "projectors"])
@pytest.mark.parametrize("loop", [1, 2])
def test_stage_1_gives_the_image_side_no_gradient(clip: FrozenCLIP, loop: int, features: str) -> None:
    """Even if its parameters require one."""
    stage = stage_in_loop(clip, loop, feedback_features=features)
    asking = {name for name, part in stage.model.components.items() if all(p.requires_grad for p in part.parameters())}
    assert asking == {"text_adapter", "text_cross_attn"}
    stage.model.image_adapter.requires_grad_(True)
    stage.model.image_cross_attn.requires_grad_(True)
    stage(sample_batch()).losses["total"].backward()
    having = {
        name for name, part in stage.model.components.items() if any(p.grad is not None for p in part.parameters())
    }
    assert having == {"text_adapter", "text_cross_attn"}


def test_only_the_trained_side_is_in_train_mode(finished: Finished) -> None:
    for moment in finished.seen.starts:
        assert moment.training == {f"{moment.side}_adapter", f"{moment.side}_cross_attn"}
        assert moment.max_norm == 1.0


# One persistent model.


def check_everything_persists(seen: Recorder, loops: int) -> None:
    """Each stage of each loop starts with the tensors and moments of the previous stage."""
    for loop in range(2, loops + 1):
        for side in SIDES:
            start, end = seen.first(loop, side), seen.last(loop - 1, side)
            own = [name for name in (f"{side}_adapter", f"{side}_cross_attn") if name in start.weights]
            assert equal({name: start.weights[name] for name in own}, {name: end.weights[name] for name in own})
            assert start.moments[side]
            assert equal(start.moments[side], end.moments[side])
    for before, after in zip(seen.ends[:-1], seen.starts[1:], strict=True):
        assert equal(before.weights, after.weights)
        assert equal(before.moments, after.moments)


def test_row2_one_model_and_one_optimizer_per_stage_for_the_whole_run(finished: Finished) -> None:
    check_everything_persists(finished.seen, 3)
    # All of it is trained, so that none of this is the equality of what never moves.
    first, last = finished.seen.starts[0], finished.seen.ends[-1]
    for name in COMPONENTS:
        assert not any(equal(value, last.weights[name][key]) for key, value in first.weights[name].items()), name
    tensors = {side: sum(len(first.weights[f"{side}_{kind}"]) for kind in ("adapter", "cross_attn")) for side in SIDES}
    assert {side: len(last.moments[side]) for side in SIDES} == tensors


@pytest.fixture(scope="module")
def forgetful(world: Path) -> Finished:
    """The old behaviour: moments are forgotten at the start of each loop."""
    folder = world / "forgetful"
    config = asked(world, folder, num_feedback_loops=2, reset_optimizers=True, text_epochs_per_loop=(2, 2))
    return Finished(folder, watch(config), Path())


def test_row2_reset_optimizers_lose_their_moments(forgetful: Finished) -> None:
    seen = forgetful.seen
    with pytest.raises(AssertionError):
        check_everything_persists(seen, 2)
    for side in SIDES:
        start = seen.first(2, side)
        assert start.moments[side] == {}
        assert equal(start.weights[f"{side}_adapter"], seen.last(1, side).weights[f"{side}_adapter"])
        steps = {int(found["step"]) for found in seen.last(2, side).moments[side].values()}
        per_epoch = {"text": 2, "image": 4}[side]
        assert steps == {per_epoch * sum(moment.side == side and moment.loop == 2 for moment in seen.ends)}
    # The other side's moments wait for its own stage.
    assert seen.first(2, "text").moments["image"]


def test_the_loops_learning_rates_are_those_of_the_plan(world: Path, tmp_path: Path) -> None:
    """The schedule of a loop starts from the loop's rate, not from the optimizer's last rate."""
    config = asked(world, tmp_path, num_feedback_loops=2, lr_schedule="constant", **ONE_EPOCH)
    train_feedback(config)
    rates = {(row["loop"], row["stage"]): row["lr"] for row in state(tmp_path)["history"]}
    plan = plan_loops(config)
    for loop in plan:
        assert rates[loop.loop, "text"] == pytest.approx(loop.rates["text"])
        assert rates[loop.loop, "image"] == pytest.approx(loop.rates["image"])


def test_every_step_uses_the_rate_of_its_place_in_the_schedule(finished: Finished) -> None:
    config = asked(finished.folder, finished.folder)
    plan = {(loop.loop, side): loop for loop in plan_loops(config) for side in SIDES}
    for row in state(finished.folder)["history"]:
        side, loop = row["stage"], plan[row["loop"], row["stage"]]
        factor = rate_factor(config, side, loop.epochs[side], row["steps"])
        first = (row["epoch"] - 1) * row["steps"]
        mean = sum(factor(first + step) for step in range(row["steps"])) / row["steps"]
        assert row["lr"] == pytest.approx(loop.rates[side] * mean)


# Cross-attention from a later loop on.


@pytest.fixture(scope="module")
def delayed(world: Path, finished: Finished) -> Finished:
    folder = world / "delayed"
    config = asked(world, folder, num_feedback_loops=2, cross_attn_start_loop=2)
    return Finished(folder, watch(config, finished.picture), finished.picture)


def test_the_state_describes_the_last_loop(delayed: Finished) -> None:
    first, last = (torch.load(delayed.folder / f"loop_{loop}_final.pth")["config"] for loop in (1, 2))
    assert state(delayed.folder)["config"] == last != first


def test_before_its_start_loop_cross_attention_is_off_and_frozen(delayed: Finished) -> None:
    first, after = delayed.seen.starts[0], delayed.seen.last(1, "image")
    for name in CROSSED:
        assert equal(first.weights[name], after.weights[name])
        assert not equal(first.weights[name], delayed.seen.ends[-1].weights[name])
    for moment in delayed.seen.starts:
        own = {f"{moment.side}_adapter"}
        assert moment.training == (own if moment.loop == 1 else own | {f"{moment.side}_cross_attn"})
    rows = state(delayed.folder)["history"]
    assert all(("grad_norm/text_cross_attn" in row) == (row["loop"] == 2) for row in rows if row["stage"] == "text")


def test_a_loop_without_cross_attention_is_the_base_with_its_adapters(delayed: Finished, clip: FrozenCLIP) -> None:
    path = delayed.folder / "loop_1_final.pth"
    loaded = load_model(path, device="cpu").model
    assert not loaded.cross_config.cross_attn_active
    base = AdaptedCLIP(clip, loaded.config).eval()
    for name, part in base.components.items():
        part.load_state_dict(loaded.components[name].state_dict())
    batch, prompts = random_batch(40), tiny_prompts(clip)
    for model in (loaded, base):
        assert not model.training
    outputs = [model(batch.images, model.text_side(prompts), batch.rows) for model in (loaded, base)]
    for one, two in zip((*outputs[0].levels, outputs[0].det), (*outputs[1].levels, outputs[1].det), strict=True):
        assert torch.equal(one, two)
    assert (predict(load_model(path, device="cpu"), delayed.picture) == delayed.seen.finished[1]).all()
    assert load_model(delayed.folder / "loop_2_final.pth", device="cpu").model.cross_config.cross_attn_active
    assert "off" in log_of(delayed.folder)


def test_without_cross_attention_only_features_are_fed_back(world: Path, tmp_path: Path) -> None:
    zero = {"text_cross_attn_weight": 0.0, "image_cross_attn_weight": 0.0}
    seen = watch(asked(world, tmp_path, num_feedback_loops=2, **zero))
    check_everything_persists(seen, 2)
    for name in ("text_adapter", "image_adapter"):
        assert not equal(seen.last(1, "image").weights[name], seen.ends[-1].weights[name])
    checkpoint = torch.load(tmp_path / "final_model.pth", weights_only=True)
    assert checkpoint["loop"] == 2 and not set(CROSSED) & checkpoint.keys()
    assert all(f"{name}: off" in log_of(tmp_path) for name in CROSSED)


# Files.


def test_the_files_of_a_run(finished: Finished) -> None:
    assert {path.name for path in finished.folder.iterdir()} == {
        *(f"loop_{loop}_{kind}.pth" for loop in (1, 2, 3) for kind in ("text_adapter", "image_adapter", "final")),
        "final_model.pth",
        "training_state.pth",
        "training_curves.png",
        "train.log",
        "history.jsonl",
        "args.json",
        "warnings.jsonl",
    }
    files = (finished.folder / name for name in ("loop_3_final.pth", "final_model.pth"))
    one, two = (torch.load(file, weights_only=True) for file in files)
    assert equal(one, two)
    assert {*COMPONENTS, "text_optimizer", "image_optimizer", "epoch", "loop", "config"} <= set(one)
    assert one["config"]["feedback"] is True
    assert one["epoch"] == 4


def files(loops: int) -> list[str]:
    each = [
        f"loop_{loop}_{kind}.pth" for loop in range(1, loops + 1) for kind in ("text_adapter", "image_adapter", "final")
    ]
    return [*each, "final_model.pth"]


@pytest.mark.parametrize("name", files(3))
def test_each_file_alone_predicts_what_the_model_predicted(finished: Finished, name: str, tmp_path: Path) -> None:
    alone = shutil.copy(finished.folder / name, tmp_path)
    match = re.fullmatch(r"loop_(\d)_(\w+?)(?:_adapter)?\.pth", name)
    loop, kind = (int(match.group(1)), match.group(2)) if match else (3, "final")
    expected = finished.seen.finished[loop] if kind == "final" else finished.seen.last(loop, kind).prediction
    detector = load_model(alone, device="cpu")
    assert (predict(detector, finished.picture) == expected).all()
    assert detector.loop == loop


def test_predictions_differ_between_files(finished: Finished) -> None:
    """Otherwise the equality above would be trivial."""
    found = [finished.seen.last(loop, side).prediction for loop in (1, 2, 3) for side in SIDES]
    for index, one in enumerate(found):
        assert all(abs(one - other).max() > 1e-6 for other in found[index + 1 :])


@pytest.mark.parametrize(
    "name", ["loop_2_text_adapter.pth", "loop_1_image_adapter.pth", "final_model.pth", "training_state.pth"]
)
def test_each_file_can_start_another_run(world: Path, finished: Finished, name: str, tmp_path: Path) -> None:
    """All components, and the moments of its sides; rates and loops are those of the new run."""
    path = finished.folder / name
    begun = begin(asked(world, tmp_path, init_from=path, num_feedback_loops=1))
    content = torch.load(path, weights_only=True)
    assert equal(begun.weights, {part: content[part] for part in COMPONENTS})
    assert begun.loop == 1
    for side in SIDES:
        saved = content.get(f"{side}_optimizer")
        assert bool(begun.moments[side]) == (saved is not None)
        if saved is not None:
            names = [each for group in saved["param_groups"] for each in group["param_names"]]
            assert equal(begun.moments[side], {names[index]: value for index, value in saved["state"].items()})
    log = log_of(tmp_path)
    assert log.count("from the checkpoint: ") == 4
    assert "from scratch" not in log
    assert state(tmp_path)["config"]["cross_attention"]["text_context"] == "frozen"


def test_a_run_with_another_start_is_another_run(world: Path, finished: Finished, tmp_path: Path) -> None:
    begin(asked(world, tmp_path, init_from=finished.folder / "loop_1_final.pth"))
    with pytest.raises(UserError, match="holds another run"):
        begin(asked(world, tmp_path, init_from=finished.folder / "loop_2_final.pth"))
    with pytest.raises(UserError, match="holds another run"):
        begin(asked(world, tmp_path))


def mistakes(world: Path, folder: Path, tmp_path: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Changes of a run's arguments, and the expected message."""
    final = folder / "final_model.pth"
    content = torch.load(final, weights_only=True)
    other = tmp_path / "other.pth"
    content["config"]["model"]["weights_digest"] = "0123456789abcdef"
    torch.save(content, other)
    unfit = tmp_path / "unfit.pth"
    content = torch.load(final, weights_only=True)
    content["image_cross_attn"]["q_proj.weight"] = torch.zeros(8, 8)
    torch.save(content, unfit)
    text_only = tmp_path / "text_only.pth"
    torch.save({"text_adapter": content["text_adapter"], "epoch": 3}, text_only)
    return {
        "text only": ({"init_from": text_only}, "has no 'image_adapter'"),
        "other weights": ({"init_from": other}, "other.pth.*set --clip_weights to match"),
        "other adapter": ({"init_from": final, "adapter": "linear"}, "set --adapter to match"),
        "shape": ({"init_from": unfit}, r"unfit.pth: .* 'q_proj.weight' is \(8, 8\), but this model has \(32, 48\)"),
    }


def test_mistakes_are_errors_that_leave_no_files(world: Path, finished: Finished, tmp_path: Path) -> None:
    for what, (changes, message) in mistakes(world, finished.folder, tmp_path).items():
        path = tmp_path / "unused"
        with pytest.raises(UserError, match=message) as raised:
            train_feedback(asked(world, path, **changes))
        assert "\n" not in str(raised.value), what
        assert not path.exists(), what


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cross_attn_start_loop": 2}, "cross_attn_start_loop was 1, now 2"),
        ({"reset_optimizers": True}, "reset_optimizers was False, now True"),
        ({"val_fraction": 0.5}, "val_fraction was 0.25, now 0.5"),
        ({"feedback_features": "projectors"}, "feedback_features was branch, now projectors"),
        ({"num_feedback_loops": 2}, "holds a longer run"),
        ({"text_epochs_per_loop": (2, 1, 3)}, "was started with 1 epochs"),
        ({"image_epochs_per_loop": (3,)}, "was started with 2 epochs"),
    ],
)
def test_the_save_path_of_another_run_is_refused_and_unchanged(
    world: Path, finished: Finished, changes: dict[str, Any], message: str
) -> None:
    before = {path.name: path.read_bytes() for path in finished.folder.iterdir()}
    with pytest.raises(UserError, match=message):
        train_feedback(asked(world, finished.folder, **{**choosing(world), **changes}))
    after = {path.name: path.read_bytes() for path in finished.folder.iterdir()}
    # The rules about epochs come after the log has been opened.
    assert {name for name in before if before[name] != after[name]} <= {"train.log"}
    assert set(before) == set(after)


# Going on.


def test_a_finished_run_continues_with_the_next_loop(world: Path, finished: Finished, tmp_path: Path) -> None:
    """The test set may change: testing does not affect training."""
    train_feedback(asked(world, tmp_path, num_feedback_loops=2, **{**choosing(world), "eval_dataset": None}))
    earlier = {name: (tmp_path / name).read_bytes() for name in files(2)}
    assert torch.load(tmp_path / "final_model.pth", weights_only=True)["loop"] == 2
    seen = watch(asked(world, tmp_path, num_feedback_loops=3, **choosing(world)))
    assert {moment.loop for moment in seen.starts} == {3}
    one, two = results(tmp_path), results(finished.folder)
    assert equal({**one, "loops": one["loops"][2:]}, {**two, "loops": two["loops"][2:]})
    for name, content in earlier.items():
        assert name == "final_model.pth" or (tmp_path / name).read_bytes() == content
    assert torch.load(tmp_path / "final_model.pth", weights_only=True)["loop"] == 3
    log = log_of(tmp_path)
    assert "6 of 8 epochs are complete" in log
    final = log.rpartition("Summary")[2]
    assert [line.split()[:2] for line in final.splitlines()[4:10]] == [
        [str(k), side] for k in (1, 2, 3) for side in SIDES
    ]


def test_the_last_stage_may_be_extended_if_its_rate_allows_it(world: Path, tmp_path: Path) -> None:
    """The loop then ends again, and its file must contain the result of the longer stage."""
    short = {"num_feedback_loops": 1, "lr_schedule": "constant", "text_epochs_per_loop": (1,)}
    train_feedback(asked(world, tmp_path, image_epochs_per_loop=(1,), **short))
    train_feedback(asked(world, tmp_path, image_epochs_per_loop=(2,), **short))
    for name in ("loop_1_final.pth", "final_model.pth"):
        found = torch.load(tmp_path / name, weights_only=True)
        assert found["epoch"] == 2
        assert equal(found["image_adapter"], state(tmp_path)["image_adapter"])
    assert len(state(tmp_path)["loops"]) == 1


def test_a_run_stopped_after_a_loop_has_its_final_model(world: Path, tmp_path: Path) -> None:
    with Killer(kill_at=3).armed(epochs=True), pytest.raises(Halt):
        train_feedback(asked(world, tmp_path, num_feedback_loops=2, **ONE_EPOCH))
    assert not (tmp_path / "final_model.pth").exists()
    assert (tmp_path / "loop_1_final.pth").exists()
    train_feedback(asked(world, tmp_path, num_feedback_loops=1, **ONE_EPOCH))
    assert torch.load(tmp_path / "final_model.pth", weights_only=True)["loop"] == 1


def test_complete_loops_are_not_repeated() -> None:
    one, two = {"loop": 1}, {"loop": 2}
    assert unchanged_loops([one, two], 4, [1, 1, 1, 1], phases(1, 1, 1, 1)) == [one, two]
    assert unchanged_loops([one, two], 4, [1, 1, 1, 1, 0, 0], phases(1, 1, 1, 1, 1, 1)) == [one, two]
    assert unchanged_loops([one], 4, [1, 1, 1, 0], phases(1, 1, 1, 1)) == [one]
    assert unchanged_loops([one, two], 4, [1, 1, 1, 1], phases(1, 1, 1, 2)) == [one]
    assert unchanged_loops([one], 4, [1, 1], phases(1, 1)) == []
    assert unchanged_loops([one, two], 6, [1, 1, 1, 1], phases(1, 1, 1, 1)) == [one]
    assert unchanged_loops([], 2, [1, 1], phases(1, 1)) == []


@dataclass
class Killer:
    """Ends a run at the event of this number, like SIGKILL."""

    kill_at: int
    events: int = 0
    log: list[str] = field(default_factory=list)

    def event(self, name: str) -> None:
        self.events += 1
        self.log.append(name)
        if self.events == self.kill_at:
            raise Halt

    @contextmanager
    def armed(self, epochs: bool = False) -> Iterator[Killer]:
        """epochs: only the ends of the last steps of epochs are events."""
        with pytest.MonkeyPatch.context() as patch:
            self.wrap(patch, Trainer, "train_epoch", "epoch", before=False)
            if not epochs:
                self.wrap(patch, Trainer, "train_epoch", "epoch start", after=False)
                self.wrap(patch, engine.training.run, "save", "save")
                self.wrap(patch, engine.training.run, "write_json_lines", "history")
                self.wrap(patch, engine.training.feedback, "training_curves", "curves")
                self.wrap(patch, engine.training.feedback, "evaluate", "evaluation")
                self.wrap(patch, engine.training.run, "log_epoch", "log", after=False)
            yield self

    def wrap(
        self, patch: pytest.MonkeyPatch, module: Any, name: str, event: str, before: bool = True, after: bool = True
    ) -> None:
        original = getattr(module, name)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            if before:
                self.event(f"before {event}")
            found = original(*arguments, **named)
            if after:
                self.event(f"after {event}")
            return found

        patch.setattr(module, name, wrapped)


def kill_again_and_again(config: FeedbackConfig, chance: random.Random, most: int) -> list[str]:
    """Restart a run until it ends, killed each time after 3 to `most` events; returns where."""
    where = []
    for _ in range(50):
        killer = Killer(chance.randint(3, most))
        set_up_logging()
        try:
            with killer.armed():
                train_feedback(config)
        except Halt:
            where.append(killer.log[-1])
        else:
            return where
    raise AssertionError("the run makes no progress")


def test_a_run_killed_anywhere_ends_with_the_same_weights(world: Path, finished: Finished, tmp_path: Path) -> None:
    """Weights, moments, history and metrics are bit-identical; no temporary file remains."""
    where = kill_again_and_again(asked(world, tmp_path, **choosing(world)), random.Random(4), 24)
    assert len(where) >= 8
    assert len(set(where)) >= 6, where
    assert equal(results(tmp_path), results(finished.folder))
    for name in files(3):
        one, two = (torch.load(folder / name, weights_only=True) for folder in (tmp_path, finished.folder))
        for checkpoint in (one, two):
            checkpoint["config"]["arguments"].pop("save_path")
        assert equal(one, two), name
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in finished.folder.iterdir()}


def test_a_resumed_loop_does_not_reset_its_optimizers_again(world: Path, forgetful: Finished, tmp_path: Path) -> None:
    config = asked(world, tmp_path, num_feedback_loops=2, reset_optimizers=True, text_epochs_per_loop=(2, 2))
    where = kill_again_and_again(config, random.Random(1), 16)
    assert len(where) >= 4
    assert equal(results(tmp_path), results(forgetful.folder))


def test_workers_change_nothing_and_do_not_accumulate(world: Path, finished: Finished, tmp_path: Path) -> None:
    """Also after a kill: a repeated epoch is identical, including dropout."""
    config = asked(world, tmp_path, num_workers=1, **choosing(world))
    with Killer(1).armed(epochs=True), pytest.raises(Halt):
        train_feedback(config)
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    most = []
    with Recorder().watching() as seen, pytest.MonkeyPatch.context() as patch:
        finish = engine.training.feedback.LoopFinisher.__call__

        def counted(finisher: Any, loop: int) -> dict[str, Any]:
            most.append(len({process.pid for process in psutil.Process().children(recursive=True)} - before))
            return finish(finisher, loop)

        patch.setattr(engine.training.feedback.LoopFinisher, "__call__", counted)
        train_feedback(config)
    assert len(seen.starts) > 4
    assert equal(results(tmp_path), results(finished.folder))
    assert len(set(most)) == 1, most


def test_temporary_files_of_a_killed_run_are_removed(world: Path, finished: Finished, tmp_path: Path) -> None:
    path = shutil.copytree(finished.folder, tmp_path / "copy")
    leftover = f".training_state.pth.{2**22 + 1}@{socket.gethostname()}.tmp"
    (path / leftover).write_bytes(b"half")
    rows = (path / "history.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (path / "history.jsonl").write_text("".join(rows[:-1]), encoding="utf-8")
    train_feedback(asked(world, path, **choosing(world)))
    assert not list(path.glob(".*"))
    assert (path / "history.jsonl").read_text(encoding="utf-8") == "".join(rows)
    # One that was killed before its first state was whole.
    (tmp_path / leftover).write_bytes(b"half")
    begin(asked(world, tmp_path, num_feedback_loops=1))
    assert not list(tmp_path.glob(".*"))


# Not finite.


def test_a_non_finite_loss_stops_with_a_usable_state(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "exploding"
    changes = {"num_feedback_loops": 2, "image_lr": 1e30, "grad_clip": 0.0}
    with pytest.raises(NotFiniteError) as raised:
        train_feedback(asked(world, path, **changes))
    message = str(raised.value)
    saved = path / "training_state.pth"
    assert "loop 1, image epoch 1" in message and "the step was not taken" in message
    for part in ("another --save_path", f"--init_from {saved}", "lower --image_lr", "tighter --grad_clip"):
        assert part in message
    assert state(path)["done"] == [2, 0, 0, 0]
    assert all(value.isfinite().all() for name in COMPONENTS for value in state(path)[name].values())
    other = tmp_path / "other"
    train_feedback(asked(world, other, num_feedback_loops=1, init_from=saved))
    assert all(np.isfinite(row["loss"]) for row in state(other)["history"])


def test_weights_ruined_by_the_last_step_of_an_epoch_are_not_saved(world: Path, tmp_path: Path) -> None:
    """With epochs of one step, the named state must still be usable."""
    path = tmp_path / "exploding"
    with pytest.raises(NotFiniteError):
        train_feedback(asked(world, path, num_feedback_loops=1, text_lr=1e30, grad_clip=0.0, text_batch_size=16))
    train_feedback(asked(world, tmp_path / "other", num_feedback_loops=1, init_from=path / "training_state.pth"))


# Choosing a loop.


def test_held_out_images_cover_every_kind_and_are_repeatable(world: Path) -> None:
    data = load_task(str(world / "train"))
    kept, held = hold_out(data, 0.3, seed=3)
    kinds = {(record.class_name, record.label) for record in data.records}
    for part in (kept, held):
        assert {(record.class_name, record.label) for record in part.records} == kinds
    assert set(kept.records) | set(held.records) == set(data.records)
    assert not set(kept.records) & set(held.records)
    assert len(held.records) == 8  # of 6 of each kind, 2
    assert hold_out(data, 0.3, seed=3) == (kept, held)
    assert hold_out(data, 0.3, seed=4)[1].records != held.records
    for fraction in (0.001, 0.999):
        for part in hold_out(data, fraction, seed=0):
            assert {(record.class_name, record.label) for record in part.records} == kinds


def test_too_few_images_to_hold_out_are_an_error_before_clip_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.training.setup.load_clip", None)
    with pytest.raises(UserError, match=r"--val_fraction: class .* has a single normal image"):
        train_feedback(asked(world, tmp_path / "run", shot=2, val_fraction=0.5))


def test_values_of_a_preset_may_be_without_effect() -> None:
    config = parse(recipe="toy", lr_schedule="constant", num_feedback_loops=1)
    assert (config.training_mode, config.shot, config.warmup_epochs) == ("full_shot", 32, 2)
    assert parse(lr_schedule="constant", warmup_epochs=0).warmup_epochs == 0


def test_each_loop_is_evaluated_and_the_best_on_held_out_images_is_reported(finished: Finished) -> None:
    trained = set.union(*(moment.records for moment in finished.seen.starts))
    held, tested = finished.seen.evaluated[:2]
    assert len(trained) == 12 and len(held) == 4 and not trained & held
    assert finished.seen.evaluated == [held, tested] * 3
    log = log_of(finished.folder)
    loops = state(finished.folder)["loops"]
    for loop in (1, 2, 3):
        assert f"Loop {loop} on held-out training images" in log
        assert f"Loop {loop} on test" in log
        assert set(loops[loop - 1]) == {"loop", "validation", "eval_dataset"}
    said = re.search(r"Best loop by held-out training images: loop (\d) \(mean of pixel and image AUROC\)", log)
    means = [(found["validation"]["pixel_auroc"] + found["validation"]["image_auroc"]) / 2 for found in loops]
    assert int(said.group(1)) == 1 + means.index(max(means))
    assert selected_loop(finished.folder) == int(said.group(1))


def test_the_best_loop_is_the_earliest_of_equals() -> None:
    def found(loop: int, pixel: float | None, image: float | None) -> dict[str, Any]:
        return {"loop": loop, "validation": {"pixel_auroc": pixel, "image_auroc": image}}

    assert validated_loop([found(1, 70, 60), found(2, 80, 60), found(3, 60, 80), found(4, None, None)]) == 2
    assert validated_loop([found(1, None, 50), found(2, None, 51), {"loop": 3}]) == 2
    assert validated_loop([{"loop": 1}]) is None


# Watching it.


def test_the_log_has_plan_epochs_and_summary(finished: Finished) -> None:
    log = log_of(finished.folder)
    plan = plan_table(plan_loops(asked(finished.folder, finished.folder)))
    assert plan in log
    for loop in (1, 2, 3):
        for side in SIDES:
            assert f"Loop {loop} - {side} loss: " in log
    assert log.count("Average Grad Norm: ") == 8
    summary = log.partition("Summary")[2].splitlines()
    rows = [line.split() for line in summary[4:10]]
    assert [row[:3] for row in rows] == [
        [str(loop), side, str(2 if loop == 1 else 1)] for loop in (1, 2, 3) for side in SIDES
    ]
    history = state(finished.folder)["history"]
    for row in rows:
        epochs = [found for found in history if (str(found["loop"]), found["stage"]) == (row[0], row[1])]
        assert float(row[3]) == pytest.approx(epochs[0]["opening_loss"], abs=1e-4)
        assert float(row[4]) == pytest.approx(epochs[-1]["loss"], abs=1e-4)
        norms = [found["grad_norm/total"] for found in epochs]
        assert float(row[5]) == pytest.approx(sum(norms) / len(norms), abs=1e-4)
        assert " ".join(row[6:]) == "too short to tell"
