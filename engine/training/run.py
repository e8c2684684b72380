"""A training run on one persistent model: its phases, its state on disk, and going on after a kill."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.tracking import TensorBoardTracker
from torch.utils.data import DataLoader

from engine.runtime.device import warn_of_unused_gpu
from engine.runtime.distributed import from_first, stopping_with_others
from engine.runtime.run_folder import ARGUMENTS_FILE, EVENTS_FOLDER, HISTORY_FILE, LOCK_FILE, STATE_FILE, is_there
from engine.training.advice import after_not_finite
from engine.training.phases import Phase, RunState
from engine.training.restart import continued, describe_progress, still_finished
from engine.training.schedules import Together, make_schedule
from engine.training.state import STATE_SCHEMA, read_state, restore
from engine.training.trainer import StopRequest, log_epoch, stage_name, train_epoch
from engine.training.turns import BothStage, Turns
from engine.training.verdicts import judge_run
from model.adapter import AdaptedCLIP
from model.checkpoint import save, state_of
from model.config import SIDES
from utils.errors import Interrupted, NotFiniteError, Stopped, UserError
from utils.files import remove_leftovers, write_json, write_text, writing
from utils.locks import check_ours
from utils.processes import another_ended
from utils.seeding import derive_seed

logger = logging.getLogger(__name__)

STATE_FIELDS = ("done", "planned", "history", "schedule", "loops")


class LoopEnd(Protocol):
    """What a run does once after the last phase of each loop, in all processes."""

    def files(self, loop: int) -> Sequence[str]:
        """The names of the checkpoint of all components after that loop."""

    def __call__(self, loop: int) -> dict[str, Any]:
        """Do what there is to do once that checkpoint is written; what is returned is kept with the run."""


class Written(NamedTuple):
    """A checkpoint of a run: its names, what is in it, and after how many epochs of the run it was written."""

    names: Sequence[str]
    parts: Sequence[str]
    sides: Sequence[str]
    loop: int
    rows: int


class TrainingRun:
    """The persistent part of a run: one model, one optimizer per side for all of it, and the state on disk.

    `signature` is what a restart must agree in. `optimizers` are by side, "text" and "image"; parameters carry names.
    `describe` gives the `config` of a loop's checkpoints; `begin_log` is called once it is known that the run goes on;
    `steps_before`: optimizer steps by side that the weights had seen; `feedback`: whether advice may name the flags of
    the feedback script.
    """

    def __init__(
        self,
        model: AdaptedCLIP,
        optimizers: dict[str, torch.optim.Optimizer],
        accelerator: Accelerator,
        save_path: Path,
        seed: int,
        signature: dict[str, Any],
        describe: Callable[[int], dict[str, Any]],
        begin_log: Callable[[], object],
        steps_before: Mapping[str, int | None] | None = None,
        feedback: bool = False,
    ) -> None:
        self.model = model
        self.accelerator = accelerator
        self.save_path = save_path
        self.seed = seed
        self.signature = signature
        self.optimizers = {side: accelerator.prepare(optimizer) for side, optimizer in optimizers.items()}
        self.describe = describe
        self.begin_log = begin_log
        self.steps_before = dict(steps_before or {})
        self.feedback = feedback
        self.state = RunState([], [])
        self._loaders: dict[int, DataLoader] = {}
        warn_of_unused_gpu(accelerator.device, model)

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.state.history

    def _write(self, written: Written, names: Sequence[str]) -> None:
        check_ours(self.save_path / LOCK_FILE)
        checkpoint = self._checkpoint(written.parts, written.sides, self.history[: written.rows], written.loop)
        if self.feedback:
            checkpoint["loop"] = written.loop
        for name in names:
            save(checkpoint, self.save_path / name)

    def _checkpoint(
        self, parts: Sequence[str], sides: Sequence[str], history: Sequence[Mapping[str, Any]], loop: int
    ) -> dict[str, Any]:
        """Components and the optimizers of `sides` after `history`; the last side's epochs count."""
        return {
            **{name: state_of(self.model.components[name]) for name in parts},
            **{f"{side}_optimizer": self.optimizers[side].state_dict() for side in sides},
            "epoch": sum(row["stage"] in (sides[-1], BothStage.name) for row in history),
            "steps": {side: self._steps(side, history) for side in self.optimizers},
            "config": self.describe(loop),
        }

    def _steps(self, side: str, history: Sequence[Mapping[str, Any]]) -> int | None:
        """Optimizer steps that a side's weights have seen, those before this run included; None where not known."""
        before = self.steps_before.get(side, 0)
        if before is None:
            return None
        return before + sum(row.get(f"{side}_steps", row["steps"] * (row["stage"] == side)) for row in history)

    def run(self, phases: Sequence[Phase], loop_end: LoopEnd | None = None) -> list[dict[str, Any]]:
        """Train all phases, going on where the state on disk ends; raises `Stopped` and `NotFiniteError`.

        What `loop_end` finds is kept, and returned for all loops; a restart repeats it where it did not come to its
        end. Checkpoints that are gone are written again where the state still holds what was in them; a run that is
        complete but for others is a `UserError`.
        """
        try:
            with stopping_with_others():
                self._restore(phases)
                gone = self._write_missing(phases, loop_end) if self.accelerator.is_main_process else []
                trained = False
                for index, phase in enumerate(phases):
                    if self.state.done[index] < phase.epochs:
                        with StopRequest() as stop:
                            self._run_phase(index, phase, stop)
                        if stop.signal_number is not None:
                            # It came after the last step, whose epoch is kept.
                            raise Interrupted(stop.signal_number)
                        trained = True
                    ends = index + 1 == len(phases) or phases[index + 1].loop != phase.loop
                    if loop_end is not None and ends and len(self.state.loops) < phase.loop:
                        self._finish_loop(phase.loop, loop_end)
        except KeyboardInterrupt as error:
            number = getattr(error, "signal_number", signal.SIGINT)
            raise Stopped("stopped: the same command goes on", number) from error
        with writing(self.save_path / EVENTS_FOLDER):
            self.accelerator.end_training()
        if gone and not trained:
            raise UserError(f"the run in {self.save_path} has nothing left to train, but {lost(gone)}")
        return self.state.loops

    def _finish_loop(self, loop: int, loop_end: LoopEnd) -> None:
        if self.accelerator.is_main_process:
            written = self._loop_written(loop, loop_end, len(self.history))
            self._write(written, written.names)
        self.state.loops.append({"loop": loop, **loop_end(loop)})
        if self.accelerator.is_main_process:
            self._save_state()
        self.accelerator.wait_for_everyone()

    def _phase_written(self, phase: Phase, epoch: int, rows: int) -> Written:
        return Written(phase.files(epoch), phase.parts, list(phase.rates), phase.loop, rows)

    def _loop_written(self, loop: int, loop_end: LoopEnd, rows: int) -> Written:
        return Written(loop_end.files(loop), list(self.model.components), list(self.optimizers), loop, rows)

    def _all_written(self, phases: Sequence[Phase], loop_end: LoopEnd | None) -> Iterator[Written]:
        """The checkpoints that the run has written so far, in order."""
        rows = 0
        for index, phase in enumerate(phases):
            for epoch in range(1, self.state.done[index] + 1):
                rows += 1
                yield self._phase_written(phase, epoch, rows)
            ends = index + 1 == len(phases) or phases[index + 1].loop != phase.loop
            if loop_end is not None and ends and phase.loop <= len(self.state.loops):
                yield self._loop_written(phase.loop, loop_end, rows)

    def _write_missing(self, phases: Sequence[Phase], loop_end: LoopEnd | None) -> list[str]:
        """Write again what is gone of the run's checkpoints; the names of those whose weights were trained on since."""
        latest = {name: written for written in self._all_written(phases, loop_end) for name in written.names}
        gone = []
        for name, written in latest.items():
            if is_there(self.save_path, name):
                continue
            stages = {row["stage"] for row in self.history[written.rows :]}
            trained_since = SIDES if BothStage.name in stages else tuple(stages)
            if any(part.startswith(trained_since) for part in written.parts):
                gone.append(name)
                continue
            self._write(written, [name])
            logger.warning("%s was gone: written again from %s", self.save_path / name, STATE_FILE)
        if gone:
            logger.warning("%s", lost(gone))
        return gone

    def _run_phase(self, index: int, phase: Phase, stop: StopRequest) -> None:
        stage = phase.make_stage()
        stage.begin()
        prepared, loader = self.accelerator.prepare(stage), self._prepared_loader(phase.loader)
        begun = self.state.done[index] > 0
        optimizer = Together([self.optimizers[side] for side in phase.rates])
        if phase.fresh_optimizer and not begun:
            for member in optimizer.members:
                member.optimizer.state.clear()
        schedule = Together(
            [
                make_schedule(
                    self.optimizers[side].optimizer, rate, phase.factor, self.state.schedule if begun else None
                )
                for side, rate in phase.rates.items()
            ]
        )
        for epoch in range(self.state.done[index] + 1, phase.epochs + 1):
            phase.sampler.set_position(phase.loop, epoch)
            # Each rank draws its own dropout.
            rank = self.accelerator.process_index
            torch.manual_seed(derive_seed(self.seed, stage.number, phase.loop, epoch, rank))
            # A draw that iterators once took from this stream; without it the figures in docs/ would be other ones.
            torch.empty((), dtype=torch.int64).random_()
            description = stage_name(stage, phase.loop, epoch)
            stage.train()
            shares = phase.loader.batch_sampler.shares() if self.accelerator.num_processes > 1 else None
            try:
                row = train_epoch(
                    prepared,
                    stage.trained,
                    loader,
                    optimizer,
                    schedule,
                    self.accelerator,
                    description,
                    phase.max_norm,
                    lambda: stop.signal_number is not None,
                    shares,
                )
            except NotFiniteError as error:
                raise NotFiniteError(
                    f"{error}. {after_not_finite(self.save_path / STATE_FILE, phase.side, self.feedback)}"
                ) from error
            except RuntimeError:
                # A signal to all processes ends those that load images, or that share the step, first, and torch
                # complains of that.
                if stop.signal_number is None and not another_ended(lambda: stop.signal_number is not None):
                    raise
                row = None
            if row is None:
                raise Stopped(
                    f"stopped in {description}: the same command goes on, and repeats this epoch",
                    stop.signal_number or signal.SIGTERM,
                )
            steps = {f"{side}_steps": row["steps"] for side in phase.rates} if len(phase.rates) > 1 else {}
            if isinstance(phase.sampler, Turns):
                steps = phase.sampler.steps()
            row = {"loop": phase.loop, "stage": stage.name, "epoch": epoch, **row, **steps}
            self.state.history.append(row)
            self.state.done[index] = epoch
            self.state.schedule = schedule.members[0].state_dict()
            log_epoch(row, phase.epochs)
            self._track(row)
            if self.accelerator.is_main_process:
                written = self._phase_written(phase, epoch, len(self.history))
                self._write(written, written.names)
                self._save_state()
            self.accelerator.wait_for_everyone()
        verdict = judge_run(self.history, self.feedback)[phase.loop, phase.side]
        if verdict.remedies:
            logger.warning("loop %d, %s: %s", phase.loop, phase.side, verdict)

    def _prepared_loader(self, loader: DataLoader | Turns) -> DataLoader | Turns:
        """`loader` as accelerate prepares it, once for all loops: each preparation keeps worker processes of its own.

        An iterator draws a seed when it is made, which with persistent workers is not in every epoch. Drawn from
        dropout's stream, it would make a run depend on the number of workers and on where it was killed.
        """
        if isinstance(loader, Turns):
            loader.text, loader.image = self._prepared_loader(loader.text), self._prepared_loader(loader.image)
            return loader
        if id(loader) not in self._loaders:
            loader.generator = torch.Generator()
            # As if it were alone: it loads this process's share already.
            accelerator = self.accelerator
            self._loaders[id(loader)] = prepare_data_loader(
                loader,
                accelerator.device,
                num_processes=1,
                process_index=0,
                put_on_device=True,
                non_blocking=accelerator.non_blocking,
            )
        return self._loaders[id(loader)]

    def _track(self, row: dict[str, Any]) -> None:
        position = sum(other["stage"] == row["stage"] for other in self.history)
        values = {f"{row['stage']}/{name}": value for name, value in row.items() if name not in ("stage", "epoch")}
        with writing(self.save_path / EVENTS_FOLDER):
            self.accelerator.log(values, step=position)
            for tracker in self.accelerator.trackers:
                if isinstance(tracker, TensorBoardTracker) and self.accelerator.is_main_process:
                    # Its thread keeps an error to itself until somebody asks.
                    tracker.writer.flush()

    def _save_state(self) -> None:
        check_ours(self.save_path / LOCK_FILE)
        loop = self.history[-1]["loop"] if self.history else 1
        save(
            {
                "schema": STATE_SCHEMA,
                "signature": self.signature,
                **self._checkpoint(list(self.model.components), list(self.optimizers), self.history, loop),
                **{name: getattr(self.state, name) for name in STATE_FIELDS},
            },
            self.save_path / STATE_FILE,
        )
        self._write_history()

    def _write_history(self) -> None:
        lines = [json.dumps(row) for row in self.history]
        write_text(self.save_path / HISTORY_FILE, "\n".join(lines) + "\n" if lines else "")

    def _restore(self, phases: Sequence[Phase]) -> None:
        planned = [phase.epochs for phase in phases]
        self.state = RunState([0] * len(phases), planned)
        file = self.save_path / STATE_FILE
        if self.accelerator.is_main_process:
            remove_leftovers(self.save_path)
        if file.is_file():
            saved = read_state(file)
            done = continued(saved["done"], saved["planned"], phases, self.save_path)
            loops = still_finished(saved["loops"], len(saved["done"]), done, phases)
            self.state = RunState(done, planned, saved["history"], saved["schedule"], loops)
            restore(saved, self.model.components, self.optimizers, file)
            logger.info("Going on with the run in %s: %s", self.save_path, describe_progress(self.state.done, phases))
        if from_first(lambda: self.state.done) != self.state.done:
            raise UserError(f"--save_path {self.save_path}: not the same folder on all machines, which they must share")
        # Not before: what is refused leaves no log, and does not take the place of what the run was asked for.
        self.begin_log()
        if self.accelerator.is_main_process:
            if file.is_file():
                # A kill may have come between the state and the history's last row.
                self._write_history()
            else:
                self._save_state()
            write_json(self.save_path / ARGUMENTS_FILE, self.describe(1)["arguments"])
        self.accelerator.wait_for_everyone()
        if self.accelerator.log_with:
            with writing(self.save_path / EVENTS_FOLDER):
                self.accelerator.init_trackers(EVENTS_FOLDER)


def lost(names: Sequence[str]) -> str:
    """Checkpoints that are gone for good, and what can be done about it."""
    return (
        f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} gone and cannot be written again: the weights were "
        f"trained on since, and {STATE_FILE} holds the latest alone; take them from a copy, or train with another "
        "--save_path"
    )
