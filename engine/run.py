"""A training run on one persistent model: its phases, its state on disk, and going on after a kill (DESIGN 5)."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader

from dataset.samples import SeededSampler
from engine.config import check_device
from engine.stages import Stage
from engine.trainer import StopRequest, log_epoch, stage_name, stage_verdict, train_epoch
from model.adapter import AdaptedCLIP
from model.checkpoint import load, load_component, save, state_of
from utils.errors import NotFiniteError, Stopped, UserError
from utils.files import write_json, write_text
from utils.seeding import derive_seed

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.pth"
STATE_SCHEMA = 1


@dataclass(frozen=True)
class Phase:
    """One stage in one loop: how often it goes over its images, and what is written after each epoch."""

    loop: int
    side: str
    epochs: int
    make_stage: Callable[[], Stage]
    make_schedule: Callable[[torch.optim.Optimizer], LRScheduler]
    loader: DataLoader
    sampler: SeededSampler
    write: Callable[[int], None]
    max_norm: float | None = None


@dataclass
class RunState:
    """Where a run stands: epochs done in each phase, the rows of all epochs, the schedule of the phase under way."""

    done: list[int]
    history: list[dict[str, Any]] = field(default_factory=list)
    schedule: dict[str, Any] | None = None


def make_accelerator(device: str, precision: str, accumulate: int, tracker: str, save_path: Path) -> Accelerator:
    """accelerate's Accelerator for the arguments of a run; `UserError` for a device or tracker that is not there."""
    device = check_device(device, precision)
    if tracker == "wandb" and find_spec("wandb") is None:
        raise UserError("--tracker wandb: wandb is not installed; pip install wandb, or take tensorboard")
    if device.startswith("cuda:"):
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        gradient_accumulation_steps=accumulate,
        log_with=None if tracker == "none" else tracker,
        project_dir=str(save_path),
    )


def constant_then_halved(milestones: Sequence[int]) -> Callable[[torch.optim.Optimizer], LRScheduler]:
    """The rate times 0.5 from each of these steps on."""
    return lambda optimizer: LambdaLR(optimizer, lambda step: 0.5 ** sum(step >= milestone for milestone in milestones))


class TrainingRun:
    """The persistent part of a run: one model, one optimizer per side for all of it, and the state on disk.

    `signature` is what a restart must agree in. `optimizers` are by side, "text" and "image"; parameters carry names.
    """

    def __init__(
        self,
        model: AdaptedCLIP,
        optimizers: dict[str, torch.optim.Optimizer],
        accelerator: Accelerator,
        save_path: Path,
        seed: int,
        signature: dict[str, Any],
    ) -> None:
        self.model = model
        self.accelerator = accelerator
        self.save_path = save_path
        self.seed = seed
        self.signature = signature
        self.optimizers = {side: accelerator.prepare(optimizer) for side, optimizer in optimizers.items()}
        self.state = RunState([])

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.state.history

    def optimizer_state(self, side: str) -> dict[str, Any]:
        """An optimizer's state as checkpoints hold it."""
        return self.optimizers[side].state_dict()

    def run(self, phases: Sequence[Phase]) -> None:
        """Train all phases, going on where the state on disk ends; raises `Stopped` and `NotFiniteError`."""
        self._restore(phases)
        with StopRequest() as stop:
            for index, phase in enumerate(phases):
                if self.state.done[index] < phase.epochs:
                    self._run_phase(index, phase, stop)
        self.accelerator.end_training()

    def is_complete(self, phases: Sequence[Phase]) -> bool:
        return all(done >= phase.epochs for done, phase in zip(self.state.done, phases, strict=True))

    def _run_phase(self, index: int, phase: Phase, stop: StopRequest) -> None:
        stage = phase.make_stage()
        stage.begin()
        prepared, loader = self.accelerator.prepare(stage, phase.loader)
        optimizer = self.optimizers[phase.side]
        schedule = phase.make_schedule(optimizer.optimizer)
        if self.state.done[index] and self.state.schedule is not None:
            schedule.load_state_dict(self.state.schedule)
            for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
                group["lr"] = rate
        for epoch in range(self.state.done[index] + 1, phase.epochs + 1):
            phase.sampler.set_position(phase.loop, epoch)
            torch.manual_seed(derive_seed(self.seed, stage.number, phase.loop, epoch, self.accelerator.process_index))
            description = stage_name(stage, phase.loop, epoch)
            stage.train()
            try:
                row = train_epoch(
                    prepared, stage.trained, loader, optimizer, schedule, self.accelerator, description,
                    phase.max_norm, lambda: stop.signal_number is not None,
                )  # fmt: skip
            except NotFiniteError as error:
                raise NotFiniteError(
                    f"{error}. The last good state is {self.save_path / STATE_FILE}; start with another --save_path "
                    f"and a lower --{phase.side}_lr"
                ) from error
            if row is None:
                raise Stopped(
                    f"stopped in {description}: the same command goes on, and repeats this epoch", stop.signal_number
                )
            row = {"loop": phase.loop, "stage": stage.name, "epoch": epoch, **row}
            self.state.history.append(row)
            self.state.done[index] = epoch
            self.state.schedule = schedule.state_dict()
            log_epoch(row, phase.epochs)
            self._track(row)
            if self.accelerator.is_main_process:
                phase.write(epoch)
                self._save_state()
            self.accelerator.wait_for_everyone()
        rows = [row for row in self.history if row["loop"] == phase.loop and row["stage"] == stage.name]
        verdict = stage_verdict(rows)
        if verdict:
            logger.warning(verdict)

    def _track(self, row: dict[str, Any]) -> None:
        position = sum(other["stage"] == row["stage"] for other in self.history)
        values = {f"{row['stage']}/{name}": value for name, value in row.items() if name not in ("stage", "epoch")}
        self.accelerator.log(values, step=position)

    def _save_state(self) -> None:
        save(
            {
                "schema": STATE_SCHEMA,
                "signature": self.signature,
                "components": {name: state_of(part) for name, part in self.model.components.items()},
                "optimizers": {side: self.optimizer_state(side) for side in self.optimizers},
                "done": self.state.done,
                "schedule": self.state.schedule,
                "history": self.history,
            },
            self.save_path / STATE_FILE,
        )
        lines = [json.dumps(row) for row in self.history]
        write_text(self.save_path / "history.jsonl", "\n".join(lines) + "\n" if lines else "")

    def _restore(self, phases: Sequence[Phase]) -> None:
        self.state = RunState([0] * len(phases))
        file = self.save_path / STATE_FILE
        if file.is_file():
            saved = load(file)
            self.state = RunState(continued(saved["done"], phases, self.save_path), saved["history"], saved["schedule"])
            for name, part in self.model.components.items():
                load_component(part, saved["components"][name], name, file)
            for side, optimizer in self.optimizers.items():
                optimizer.load_state_dict(saved["optimizers"][side])
            logger.info("Going on with the run in %s: %s", self.save_path, describe_progress(self.state.done, phases))
        elif self.accelerator.is_main_process:
            self._save_state()
        self.accelerator.wait_for_everyone()
        if self.accelerator.log_with:
            self.accelerator.init_trackers("events")


def describe_progress(done: Sequence[int], phases: Sequence[Phase]) -> str:
    """Epochs done, as "text 5 of 5 epochs, image 3 of 20 epochs"."""
    several = len({phase.loop for phase in phases}) > 1
    return ", ".join(
        f"{f'loop {phase.loop} ' if several else ''}{phase.side} {count} of {phase.epochs} epochs"
        for count, phase in zip(done, phases, strict=True)
    )


def continued(done: Sequence[int], phases: Sequence[Phase], save_path: Path) -> list[int]:
    """Epochs done, fitted to the phases now asked for; `UserError` where they would not be the same run.

    More epochs are fine at the point that the run has reached. A phase that others were built on cannot grow.
    """
    counts = [*done, *([0] * (len(phases) - len(done)))]
    if len(counts) > len(phases) and any(counts[len(phases) :]):
        raise UserError(f"{save_path} holds a longer run; give another --save_path")
    counts = counts[: len(phases)]
    for index, (count, phase) in enumerate(zip(counts, phases, strict=True)):
        if count > phase.epochs:
            raise UserError(
                f"{save_path} has {count} {phase.side} epochs already, {phase.epochs} are asked for; "
                "give another --save_path"
            )
        if count < phase.epochs and any(counts[index + 1 :]):
            raise UserError(
                f"{save_path}: the {phase.side} stage ended after {count} epochs and others were trained on it; "
                f"{phase.epochs} epochs are another run: give another --save_path"
            )
    return counts


def check_save_path(save_path: Path, resume: str, signature: dict[str, Any]) -> None:
    """Raise `UserError` where a run must not be written: another run's folder, or a used one with `--resume never`."""
    if save_path.exists() and not save_path.is_dir():
        raise UserError(f"--save_path {save_path}: is a file, not a folder")
    entries = [entry for entry in save_path.iterdir() if not entry.name.startswith(".")] if save_path.exists() else []
    if resume == "never" and entries:
        raise UserError(f"--save_path {save_path} is not empty, and --resume never starts in a new folder only")
    file = save_path / STATE_FILE
    if not file.is_file():
        checkpoints = sorted(entry.name for entry in entries if entry.suffix == ".pth")
        if checkpoints:
            raise UserError(
                f"--save_path {save_path} holds {checkpoints[0]} of a run without {STATE_FILE}; give another"
            )
        return
    saved = load(file)
    if not isinstance(saved, dict) or saved.get("schema") != STATE_SCHEMA:
        raise UserError(f"{file}: not a training state of this version; give another --save_path")
    differences = describe_differences(saved["signature"], signature)
    if differences:
        raise UserError(f"--save_path {save_path} holds another run ({differences}); give another --save_path")


def describe_differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The settings that differ, as "image_lr was 0.0005, now 0.001"."""
    names = [*before, *(name for name in now if name not in before)]
    return "; ".join(
        f"{name} was {before.get(name)}, now {now.get(name)}" for name in names if before.get(name) != now.get(name)
    )


def write_arguments(save_path: Path, arguments: dict[str, Any]) -> None:
    """`args.json`: what this run was asked for."""
    write_json(save_path / "args.json", arguments)
