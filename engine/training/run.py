"""A training run on one model: its phases, its state on disk, and resuming after a kill."""

import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.tracking import TensorBoardTracker
from torch.utils.data import DataLoader

from engine.config.training import FeedbackConfig, RunConfig
from engine.runtime.device import warn_of_unused_gpu
from engine.runtime.distributed import from_main_process, interrupted_by_others
from engine.runtime.run_folder import ARGUMENTS_FILE, EVENTS_FOLDER, HISTORY_FILE, LOCK_FILE, STATE_FILE
from engine.training.phases import Phase, RunState
from engine.training.restart import check_phases, unchanged_loops
from engine.training.schedules import Schedule
from engine.training.stage2 import JointStage
from engine.training.state import STATE_SCHEMA, read_state, restore
from engine.training.trainer import StopRequest, Trainer
from engine.training.verdicts import after_not_finite, judge_run, log_epoch
from model.adapter import AdaptedCLIP
from model.checkpoint import save, state_of
from utils.errors import Interrupted, NotFiniteError, Stopped, UserError
from utils.files import remove_leftovers, write_json, write_json_lines, writing
from utils.locks import check_ours
from utils.processes import another_process_ended
from utils.seeding import derive_seed

logger = logging.getLogger(__name__)


@dataclass
class TrainingRun:
    """One model with one optimizer per side for the whole run, and the run's state on disk.

    optimizers: by side, "text" and "image"; parameters carry names. signature: what a restart must equal. describe: the
    `config` of a loop's checkpoints. begin_log: called once the run is known to start. steps_before: optimizer steps of
    each side before this run, None if unknown.
    """

    model: AdaptedCLIP
    optimizers: dict[str, torch.optim.Optimizer]
    accelerator: Accelerator
    config: RunConfig
    signature: dict[str, Any]
    describe: Callable[[int], dict[str, Any]]
    begin_log: Callable[[], object]
    steps_before: Mapping[str, int | None] = field(default_factory=dict)
    state: RunState = field(default_factory=lambda: RunState([], []), init=False)
    _loaders: dict[int, DataLoader] = field(default_factory=dict, init=False)

    @property
    def save_path(self) -> Path:
        return self.config.save_path

    @property
    def feedback(self) -> bool:
        """Whether advice may name options of the feedback script."""
        return isinstance(self.config, FeedbackConfig)

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.state.history

    def run(
        self, phases: Sequence[Phase], loop_end: Callable[[int], dict[str, Any]] = lambda _: {}
    ) -> list[dict[str, Any]]:
        """Train all phases, from where the state on disk ends.

        Args:
            phases: The stages in the order of training.
            loop_end: Called in all processes when the checkpoint of a loop is written; the state keeps the result.

        Returns:
            The results of `loop_end` for all loops.

        Raises:
            Stopped: On a signal.
            NotFiniteError: For a loss or gradient that is not finite.
            UserError: If the run on disk cannot become a run of these phases.
        """
        warn_of_unused_gpu(self.accelerator.device, self.model)
        try:
            with interrupted_by_others():
                self._restore(phases)
                for index, phase in enumerate(phases):
                    if self.state.done[index] < phase.epochs:
                        with StopRequest() as stop:
                            self._run_phase(index, phase, stop)
                        if stop.signal_number is not None:
                            # The signal came after the last step, whose epoch is kept.
                            raise Interrupted(stop.signal_number)
                    if phase.loop_files and len(self.state.loops) < phase.loop:
                        self._finish_loop(phase, loop_end)
        except KeyboardInterrupt as error:
            number = getattr(error, "signal_number", signal.SIGINT)
            raise Stopped("stopped: the same command resumes", number) from error
        with writing(self.save_path / EVENTS_FOLDER):
            self.accelerator.end_training()
        return self.state.loops

    def _run_phase(self, index: int, phase: Phase, stop: StopRequest) -> None:
        stage = phase.make_stage()
        stage.begin()
        resumed = self.state.done[index] > 0
        rates = {self.optimizers[side]: rate for side, rate in phase.rates.items()}
        if phase.reset_optimizers and not resumed:
            for optimizer in rates:
                optimizer.state.clear()
        schedule = Schedule(rates, phase.factor, self.state.schedule_step if resumed else 0)
        prepared, loader = self.accelerator.prepare(stage), self._prepared_loader(phase.loader)
        trainer = Trainer(
            prepared, stage.trained, loader, schedule, self.accelerator, self.config.accumulate, phase.max_norm
        )
        for epoch in range(self.state.done[index] + 1, phase.epochs + 1):
            phase.sampler.set_position(phase.loop, epoch)
            # Each process draws its own dropout.
            rank = self.accelerator.process_index
            torch.manual_seed(derive_seed(self.config.seed, stage.number, phase.loop, epoch, rank))
            stage.train()
            row = self._train_epoch(trainer, phase, epoch, stop)
            self._finish_epoch(index, phase, row, trainer.schedule.step)
        verdict = judge_run(self.history, self.feedback)[phase.loop, phase.stage]
        if verdict.remedies:
            logger.warning("loop %d, %s: %s", phase.loop, phase.stage, verdict)

    def _train_epoch(self, trainer: Trainer, phase: Phase, epoch: int, stop: StopRequest) -> dict[str, Any]:
        """The history's row of an epoch."""
        description = f"loop {phase.loop}, {phase.stage} epoch {epoch}"
        shares = phase.sampler.shares() if self.accelerator.num_processes > 1 else None
        try:
            means = trainer.train_epoch(description, stop, shares)
        except NotFiniteError as error:
            advice = after_not_finite(self.save_path / STATE_FILE, phase.stage, self.feedback)
            raise NotFiniteError(f"{error}. {advice}") from error
        except RuntimeError:
            # A signal may end workers and other processes first, and torch then raises an error.
            if not stop() and not another_process_ended(stop):
                raise
            means = None
        if means is None:
            raise Stopped(
                f"stopped in {description}: the same command resumes, and repeats this epoch",
                stop.signal_number or signal.SIGTERM,
            )
        return {"loop": phase.loop, "stage": phase.stage, "epoch": epoch, **means}

    def _finish_epoch(self, index: int, phase: Phase, row: dict[str, Any], schedule_step: int) -> None:
        self.history.append(row)
        self.state.done[index] = row["epoch"]
        self.state.schedule_step = schedule_step
        log_epoch(row, phase.epochs)
        self._track(row)
        if self.accelerator.is_main_process:
            self._write(phase.files(row["epoch"]), phase.parts, list(phase.rates), phase.loop)
            self._save_state()
        self.accelerator.wait_for_everyone()

    def _finish_loop(self, phase: Phase, loop_end: Callable[[int], dict[str, Any]]) -> None:
        if self.accelerator.is_main_process:
            self._write(phase.loop_files, list(self.model.components), list(self.optimizers), phase.loop)
        self.state.loops.append({"loop": phase.loop, **loop_end(phase.loop)})
        if self.accelerator.is_main_process:
            self._save_state()
        self.accelerator.wait_for_everyone()

    def _prepared_loader(self, loader: DataLoader) -> DataLoader:
        """`loader` as accelerate prepares it, once for all loops: each preparation has worker processes of its own."""
        if id(loader) not in self._loaders:
            # An iterator draws a seed when it is made, which with persistent workers is not in every epoch. From
            # dropout's generator, it would make a run depend on the number of workers and on where it was killed.
            loader.generator = torch.Generator()
            # The loader loads this process's share already.
            options = {"num_processes": 1, "process_index": 0, "non_blocking": self.accelerator.non_blocking}
            prepared = prepare_data_loader(loader, self.accelerator.device, put_on_device=True, **options)
            self._loaders[id(loader)] = prepared
        return self._loaders[id(loader)]

    def _track(self, row: dict[str, Any]) -> None:
        position = sum(other["stage"] == row["stage"] for other in self.history)
        values = {f"{row['stage']}/{name}": value for name, value in row.items() if name not in ("stage", "epoch")}
        with writing(self.save_path / EVENTS_FOLDER):
            self.accelerator.log(values, step=position)
            for tracker in self.accelerator.trackers:
                if isinstance(tracker, TensorBoardTracker) and self.accelerator.is_main_process:
                    # Its thread reports an error only when it is flushed.
                    tracker.writer.flush()

    def _write(self, names: Sequence[str], parts: Sequence[str], sides: Sequence[str], loop: int) -> None:
        check_ours(self.save_path / LOCK_FILE)
        checkpoint = self._checkpoint(parts, sides, loop)
        if self.feedback:
            checkpoint["loop"] = loop
        for name in names:
            save(checkpoint, self.save_path / name)

    def _checkpoint(self, parts: Sequence[str], sides: Sequence[str], loop: int) -> dict[str, Any]:
        """Components and optimizers as they are now; `epoch` counts those of the last side."""
        return {
            **{name: state_of(self.model.components[name]) for name in parts},
            **{f"{side}_optimizer": self.optimizers[side].state_dict() for side in sides},
            "epoch": sum(row["stage"] in (sides[-1], JointStage.name) for row in self.history),
            "steps": {side: self._steps(side) for side in self.optimizers},
            "config": self.describe(loop),
        }

    def _steps(self, side: str) -> int | None:
        """Optimizer steps of a side's weights, those before this run included; None if unknown."""
        before = self.steps_before.get(side, 0)
        if before is None:
            return None
        return before + sum(row["steps"] for row in self.history if row["stage"] in (side, JointStage.name))

    def _save_state(self) -> None:
        check_ours(self.save_path / LOCK_FILE)
        loop = self.history[-1]["loop"] if self.history else 1
        save(
            {
                "schema": STATE_SCHEMA,
                "signature": self.signature,
                **self._checkpoint(list(self.model.components), list(self.optimizers), loop),
                **vars(self.state),
            },
            self.save_path / STATE_FILE,
        )
        write_json_lines(self.save_path / HISTORY_FILE, self.history)

    def _restore(self, phases: Sequence[Phase]) -> None:
        planned = [phase.epochs for phase in phases]
        self.state = RunState([0] * len(phases), planned)
        file = self.save_path / STATE_FILE
        if self.accelerator.is_main_process:
            remove_leftovers(self.save_path)
        if file.is_file():
            saved = read_state(file)
            done = check_phases(saved["done"], saved["planned"], phases, self.save_path)
            loops = unchanged_loops(saved["loops"], len(saved["done"]), done, phases)
            self.state = RunState(done, planned, saved["history"], saved["schedule_step"], loops)
            restore(saved, self.model.components, self.optimizers, file)
            logger.info("Resuming the run in %s: %d of %d epochs are complete", self.save_path, sum(done), sum(planned))
        if from_main_process(lambda: self.state.done) != self.state.done:
            raise UserError(f"--save_path {self.save_path}: not the same folder on all machines, which they must share")
        # Not before: a rejected command must not touch the log and the arguments of the run in this folder.
        self.begin_log()
        if self.accelerator.is_main_process:
            if file.is_file():
                # A kill may have come between writing the state and the history.
                write_json_lines(self.save_path / HISTORY_FILE, self.history)
            else:
                self._save_state()
            write_json(self.save_path / ARGUMENTS_FILE, self.describe(1)["arguments"])
        self.accelerator.wait_for_everyone()
        if self.accelerator.log_with:
            with writing(self.save_path / EVENTS_FOLDER):
                self.accelerator.init_trackers(EVENTS_FOLDER)
