"""Learning rates over the steps of a stage, as factors of its first rate (docs/method.md, "Training")."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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


def make_schedule(optimizer: torch.optim.Optimizer, rate: float, factor: Factor) -> LRScheduler:
    """A schedule that starts at its first step, whatever rate an earlier one has left in `optimizer`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = rate
    return LambdaLR(optimizer, factor)
