"""Learning rates over the steps of a stage, as factors of its first rate (docs/method.md, "Training")."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

Factor = Callable[[int], float]


def halved_at(milestones: Sequence[int]) -> Factor:
    """Times 0.5 from each of these steps on; without any, constant."""
    return lambda step: 0.5 ** sum(step >= milestone for milestone in milestones)


def warmup_cosine(steps: int, warmup: int) -> Factor:
    """Linear from 1 / warmup to 1 over `warmup` steps (at most half of all), then a half cosine to 0 at `steps`."""
    warmup = min(warmup, steps // 2)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    return factor


class Together:
    """Optimizers, or their schedules, that take every step together: one for each side that a stage trains."""

    def __init__(self, members: Sequence[Any]) -> None:
        self.members = list(members)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for member in self.members for group in member.param_groups]

    @property
    def step_was_skipped(self) -> bool:
        return any(member.step_was_skipped for member in self.members)

    def step(self) -> None:
        for member in self.members:
            member.step()

    def zero_grad(self) -> None:
        for member in self.members:
            member.zero_grad()


def make_schedule(
    optimizer: torch.optim.Optimizer, rate: float, factor: Factor, saved: Mapping[str, Any] | None = None
) -> LRScheduler:
    """A schedule that starts at its first step, whatever rate an earlier one has left in `optimizer`.

    saved: the state of a schedule of the same factor, to go on from its step.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = rate
    schedule = LambdaLR(optimizer, factor)
    if saved is not None:
        schedule.load_state_dict({**saved, "base_lrs": schedule.base_lrs})
        for group in optimizer.param_groups:
            group["lr"] = rate * factor(schedule.last_epoch)
    return schedule
