"""The one training loop: an epoch of any stage, and what is measured and said about it (docs/method.md, "Training")."""

from __future__ import annotations

import logging
import math
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from engine.training.schedules import Together
from engine.training.stages import Stage, StageOutput
from engine.training.verdicts import epoch_warnings
from utils.errors import NotFiniteError
from utils.logging import progress_bar
from utils.processes import Share
from utils.script import ignore_ended_workers

logger = logging.getLogger(__name__)


class StopRequest:
    """Remembers SIGINT or SIGTERM, so that a stage ends between two steps; a second SIGINT ends it at once."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python lets the main thread alone handle signals; elsewhere a run cannot be asked to stop.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number
        ignore_ended_workers()


def gradient_norms(components: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """L2 norm of the gradients of each component, and of all together as "total"."""
    norms = {
        name: get_total_norm([parameter.grad for parameter in part.parameters() if parameter.grad is not None])
        for name, part in components.items()
    }
    return {**norms, "total": torch.stack(list(norms.values())).norm()}


def train_epoch(
    stage: nn.Module,
    components: Mapping[str, nn.Module],
    loader: DataLoader,
    optimizer: torch.optim.Optimizer | Together,
    schedule: LRScheduler | Together,
    accelerator: Accelerator,
    description: str,
    max_norm: float | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    shares: Sequence[Share] | None = None,
) -> dict[str, float] | None:
    """One pass over `loader`: every step's losses and gradient norms, averaged over steps.

    stage: a `Stage` as accelerate prepared it; components: what it trains. max_norm clips the gradient's norm; the
    norms returned are those before clipping. shares: which images of each step are in the loader's batches, where
    several processes share them.
    Returns a row of plain numbers (the learning rate is the mean over steps), or None where `should_stop` ended the
    epoch early, in whatever process.
    Raises `NotFiniteError`, in all processes, before the step that a loss or gradient that is not finite would have led
    to.
    """
    sums: dict[str, Tensor | float] = defaultdict(float)
    steps = batches = images = 0
    opening: list[Tensor] = []
    rates: list[float] = []
    parameters = [parameter for part in components.values() for parameter in part.parameters()]
    start, compiled = time.perf_counter(), _seconds_compiling()
    alone, stopping = accelerator.num_processes == 1, False
    bar = progress_bar(len(loader), description)
    for batch, share in zip(loader, shares or [None] * len(loader), strict=True):
        share = share or Share.of(len(batch["label"]))
        with accelerator.accumulate(stage):
            output = _share_of_step(stage, batch, share)
            total = output.losses["total"]
            accelerator.backward(total)
            if accelerator.sync_gradients:
                norms, stopping = _finite_norms(components, total, optimizer, accelerator, description, should_stop)
                if max_norm is not None:
                    clip_grads_with_norm_(parameters, max_norm, norms["total"])
                for name, norm in norms.items():
                    sums[f"grad_norm/{name}"] += norm
                rates.append(optimizer.param_groups[0]["lr"])
                steps += 1
            optimizer.step()
            if accelerator.sync_gradients and not optimizer.step_was_skipped:
                schedule.step()
            optimizer.zero_grad()
        for name, value in (*output.losses.items(), *output.watch.items()):
            sums[name] += value.detach()
        batches += 1
        images += share.total
        if len(opening) < max(1, len(loader) // 10):
            opening.append(total.detach())
        bar.update()
        if should_stop() if alone else stopping:
            bar.close()
            return None
    bar.close()
    _check_last_step(stage, batch, share, accelerator, description)
    seconds = time.perf_counter() - start
    sums = {name: float(accelerator.reduce(torch.as_tensor(value), "mean")) for name, value in sums.items()}
    return _epoch_row(sums, steps, batches, images, seconds) | {
        "opening_loss": float(accelerator.reduce(torch.stack(opening).mean(), "mean")),
        "lr": math.fsum(rates) / max(1, len(rates)),
        "memory_gib": _memory(accelerator.device),
        **({"compile_seconds": spent} if (spent := _seconds_compiling() - compiled) else {}),
    }


def _share_of_step(stage: nn.Module, batch: dict[str, Any], share: Share) -> StageOutput:
    """A stage's output for this process's images, so weighed that the mean over processes is that of the whole step."""
    if share.processes == 1:
        return stage(batch)
    output = stage({**batch, "share": share})
    weight = 1.0 if output.weighed else share.weight
    return StageOutput(
        {name: weight * value for name, value in output.losses.items()},
        {name: value * (share.count > 0) for name, value in output.watch.items()},
    )


@torch.no_grad()
def _check_last_step(
    stage: nn.Module, batch: dict[str, Any], share: Share, accelerator: Accelerator, description: str
) -> None:
    """`NotFiniteError` where an epoch's last step has ruined the weights, which no later step is there to notice."""
    loss = accelerator.reduce(_share_of_step(stage, batch, share).losses["total"], "mean").item()
    if not math.isfinite(loss):
        raise NotFiniteError(f"{description}: loss {loss:.4g} after its last step, which is not kept")


def _finite_norms(
    components: Mapping[str, nn.Module],
    loss: Tensor,
    optimizer: torch.optim.Optimizer | Together,
    accelerator: Accelerator,
    description: str,
    should_stop: Callable[[], bool],
) -> tuple[dict[str, Tensor], bool]:
    """The norms of a step's gradients, and whether a process is asked to stop: all know it, and stop at one step."""
    accelerator.unscale_gradients(optimizer)
    norms = gradient_norms(components)
    told = loss.detach()[None]
    if accelerator.num_processes > 1:
        told = accelerator.reduce(torch.cat([told, torch.full_like(told, should_stop())]), "mean")
    values = torch.cat([told[:1], norms["total"][None], told[1:]]).tolist()
    # The scaler of fp16 looks for its scale by letting gradients overflow and skips those steps itself.
    if not math.isfinite(values[0]) or (accelerator.scaler is None and not math.isfinite(values[1])):
        raise NotFiniteError(
            f"{description}: loss {values[0]:.4g}, gradient norm {values[1]:.4g}; the step was not taken"
        )
    return norms, any(values[2:])


def _epoch_row(sums: Mapping[str, float], steps: int, batches: int, images: int, seconds: float) -> dict[str, float]:
    norms = {name: value / max(1, steps) for name, value in sums.items() if name.startswith("grad_norm/")}
    watched = ("inside_sum", "inside_pixels", "outside_sum", "outside_pixels")
    losses = {
        name if name != "total" else "loss": value / batches
        for name, value in sums.items()
        if name not in norms and name not in watched
    }
    return {
        **losses,
        **norms,
        "abnormal_inside": _ratio(sums["inside_sum"], sums["inside_pixels"]),
        "abnormal_outside": _ratio(sums["outside_sum"], sums["outside_pixels"]),
        "steps": steps,
        "images": images,
        "seconds": seconds,
        "images_per_second": images / seconds,
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def _seconds_compiling() -> float:
    """What `torch.compile` has taken in this process so far."""
    if "torch._dynamo" not in sys.modules:
        return 0.0
    return torch._dynamo.utils.calculate_time_spent().get("total_wall_time", 0.0)


def _memory(device: torch.device) -> float:
    """GiB: the peak on the GPU, or what the process holds on the CPU."""
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return used / 2**30


def log_epoch(row: Mapping[str, Any], epochs: int) -> None:
    """Say what an epoch did: the loss with its parts, the gradient's norm, speed, and whether it looks healthy."""
    stage: str = row["stage"]
    parts = [name for name in ("focal", "dice_normal", "dice_abnormal", "classification", "overlap") if name in row]
    logger.info(
        "Loop %d - %s loss: %.4f  (%s)",
        row["loop"],
        stage,
        row["loss"],
        ", ".join(f"{name} {row[name]:.4f}" for name in parts),
    )
    each = [name for name in row if name.startswith("grad_norm/") and name != "grad_norm/total"]
    logger.info(
        "  Average Grad Norm: %.4f  (%s)",
        row["grad_norm/total"],
        ", ".join(f"{name.removeprefix('grad_norm/')} {row[name]:.4f}" for name in each),
    )
    left = (epochs - row["epoch"]) * row["seconds"]
    # Not there where no masks are looked at.
    inside, outside = row["abnormal_inside"], row["abnormal_outside"]
    nothing = math.isnan(inside) and math.isnan(outside)
    watched = "" if nothing else f"p_abnormal {inside:.3f} inside masks and {outside:.3f} outside, "
    logger.info(
        "  epoch %d of %d, lr %.3g, %s%.1f images/s, %.2f GiB, %s left",
        row["epoch"],
        epochs,
        row["lr"],
        watched,
        row["images_per_second"],
        row["memory_gib"],
        readable_time(left),
    )
    if "compile_seconds" in row:
        logger.info("  compiling took %s of %s", *map(readable_time, (row["compile_seconds"], row["seconds"])))
    for warning in epoch_warnings(row):
        logger.warning("  %s", warning)


def readable_time(seconds: float) -> str:
    """Seconds as "2 h 05 min", "3 min 20 s" or "12 s"."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def stage_name(stage: Stage, loop: int, epoch: int) -> str:
    """What progress bars and errors call an epoch."""
    return f"loop {loop}, {stage.name} epoch {epoch}"
