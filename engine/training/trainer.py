"""The one training loop: an epoch of any stage (docs/method.md, "Training")."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader

from engine.training.schedules import Schedule
from engine.training.stages import WATCHED, StageOutput
from utils.errors import NotFiniteError
from utils.logging import progress_bar
from utils.processes import Share
from utils.script import ignore_ended_workers


class StopRequest:
    """Records SIGINT or SIGTERM, so that a stage ends between two steps; a second SIGINT ends it at once."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python lets only the main thread handle signals.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self.signal_number is not None

    def _record(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number
        ignore_ended_workers()


def gradient_norms(components: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """L2 norm of the gradients of each component, and of all of them as "total"."""
    norms = {
        name: get_total_norm([parameter.grad for parameter in part.parameters() if parameter.grad is not None])
        for name, part in components.items()
    }
    return {**norms, "total": torch.stack(list(norms.values())).norm()}


class EpochTotals:
    """Sums over an epoch, kept on the device so that no step waits for it.

    opening_batches: how many first batches the opening loss is the mean of.
    """

    def __init__(self, opening_batches: int) -> None:
        self.opening_batches = opening_batches
        self.opening_losses: list[Tensor] = []
        self.sums: dict[str, Tensor | float] = defaultdict(float)
        self.rates: list[float] = []
        self.batches = self.images = 0

    def add_batch(self, output: StageOutput, images: int) -> None:
        for name, value in (*output.losses.items(), *output.watch.items()):
            self.sums[name] += value.detach()
        self.batches += 1
        self.images += images
        if len(self.opening_losses) < self.opening_batches:
            self.opening_losses.append(output.losses["total"].detach())

    def add_step(self, norms: Mapping[str, Tensor], rate: float) -> None:
        for name, norm in norms.items():
            self.sums[f"grad_norm/{name}"] += norm
        self.rates.append(rate)

    def row(self, accelerator: Accelerator, seconds: float) -> dict[str, float]:
        """The means over batches and steps, as plain numbers that are the same in all processes."""
        steps = len(self.rates)
        sums = {name: float(accelerator.reduce(torch.as_tensor(total), "mean")) for name, total in self.sums.items()}
        norms = {name: total / steps for name, total in sums.items() if name.startswith("grad_norm/")}
        losses = {
            "loss" if name == "total" else name: total / self.batches
            for name, total in sums.items()
            if name not in norms and name not in WATCHED
        }
        return {
            **losses,
            **(norms or {"grad_norm/total": math.nan}),
            "abnormal_inside": _ratio(sums["inside_sum"], sums["inside_pixels"]),
            "abnormal_outside": _ratio(sums["outside_sum"], sums["outside_pixels"]),
            "steps": steps,
            "images": self.images,
            "seconds": seconds,
            "images_per_second": self.images / seconds,
            "opening_loss": float(accelerator.reduce(torch.stack(self.opening_losses).mean(), "mean")),
            "lr": math.fsum(self.rates) / max(1, steps),
        }


@dataclass(frozen=True)
class Trainer:
    """The training of one phase.

    stage: as accelerate prepared it; components: the trained ones; accumulate: batches in a step, fewer in an epoch's
    last; max_norm: limit of the gradient norm, None for no clipping.
    """

    stage: nn.Module
    components: Mapping[str, nn.Module]
    loader: DataLoader
    schedule: Schedule
    accelerator: Accelerator
    accumulate: int = 1
    max_norm: float | None = None

    def train_epoch(
        self, description: str, should_stop: Callable[[], bool] = lambda: False, shares: Sequence[Share] | None = None
    ) -> dict[str, float] | None:
        """One pass over the loader.

        Args:
            description: Names the epoch in the progress bar and in errors.
            should_stop: Whether this process was asked to stop; all processes then stop at the same step.
            shares: This process's share of the images of each batch, if there are several processes.

        Returns:
            The epoch's means as plain numbers (gradient norms before clipping), or None if it was stopped early.

        Raises:
            NotFiniteError: In all processes, before the step of a loss or gradient that is not finite.
        """
        batches = len(self.loader)
        totals = EpochTotals(max(1, batches // 10))
        start = time.perf_counter()
        stopping = False
        bar = progress_bar(batches, description)
        for index, batch in enumerate(self.loader):
            share = shares[index] if shares else Share.of(len(batch["label"]))
            first = index - index % self.accumulate
            step_batches = min(self.accumulate, batches - first)
            completes_step = index + 1 == first + step_batches
            with nullcontext() if completes_step else self.accelerator.no_sync(self.stage):
                output = self._forward(batch, share)
                self.accelerator.backward(output.losses["total"] / step_batches)
            if completes_step:
                stopping = self._step(output.losses["total"], totals, description, should_stop)
            totals.add_batch(output, share.total)
            bar.update()
            if should_stop() if self.accelerator.num_processes == 1 else stopping:
                bar.close()
                return None
        bar.close()
        self._check_last_step(batch, share, description)
        row = totals.row(self.accelerator, time.perf_counter() - start)
        row["memory_gib"] = _memory(self.accelerator.device)
        return row

    def _forward(self, batch: dict[str, Any], share: Share) -> StageOutput:
        """The losses of this process's images, weighted so that the mean over processes is that of the whole step."""
        if share.processes == 1:
            return self.stage(batch)
        output = self.stage({**batch, "share": share})
        return StageOutput(
            {name: share.weight * value for name, value in output.losses.items()},
            {name: value * (share.size > 0) for name, value in output.watch.items()},
        )

    def _step(self, loss: Tensor, totals: EpochTotals, description: str, should_stop: Callable[[], bool]) -> bool:
        """Take one optimizer step; returns whether any process was asked to stop."""
        scaler = self.accelerator.scaler
        if scaler is not None:
            for optimizer in self.schedule.rates:
                scaler.unscale_(optimizer)
        norms = gradient_norms(self.components)
        loss_value, norm, stopping = self._fetch(loss, norms["total"], should_stop)
        if not math.isfinite(loss_value) or (scaler is None and not math.isfinite(norm)):
            raise NotFiniteError(
                f"{description}: loss {loss_value:.4g}, gradient norm {norm:.4g}; the step was not taken"
            )
        # The gradient scaler of fp16 finds its scale by letting gradients overflow: such a step is not taken.
        if math.isfinite(norm):
            if self.max_norm is not None:
                parameters = [parameter for part in self.components.values() for parameter in part.parameters()]
                clip_grads_with_norm_(parameters, self.max_norm, norms["total"])
            totals.add_step(norms, next(iter(self.schedule.rates)).param_groups[0]["lr"])
            for optimizer in self.schedule.rates:
                optimizer.step()
            self.schedule.advance()
        if scaler is not None:
            scaler.update()
        for optimizer in self.schedule.rates:
            optimizer.zero_grad()
        return stopping

    def _fetch(self, loss: Tensor, norm: Tensor, should_stop: Callable[[], bool]) -> tuple[float, float, bool]:
        """The loss, the gradient norm, and whether any process was asked to stop, in one transfer from the device."""
        own = loss.detach()[None]
        if self.accelerator.num_processes > 1:
            own = self.accelerator.reduce(torch.cat([own, torch.full_like(own, should_stop())]), "mean")
        loss_value, norm_value, *stopping = torch.cat([own[:1], norm[None], own[1:]]).tolist()
        return loss_value, norm_value, any(stopping)

    @torch.no_grad()
    def _check_last_step(self, batch: dict[str, Any], share: Share, description: str) -> None:
        """Raise `NotFiniteError` if an epoch's last step ruined the weights, which no later step would notice."""
        loss = self.accelerator.reduce(self._forward(batch, share).losses["total"], "mean").item()
        if not math.isfinite(loss):
            raise NotFiniteError(f"{description}: loss {loss:.4g} after its last step, which is discarded")


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _memory(device: torch.device) -> float:
    """GiB: the peak on the GPU, or the process's memory on the CPU."""
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return used / 2**30
