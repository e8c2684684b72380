"""Learning rates over the steps of a stage, as factors of its first rate (docs/method.md, "Training")."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch

Factor = Callable[[int], float]


def halved_at(milestones: Sequence[int]) -> Factor:
    """Times 0.5 from each of these steps on; constant without any."""
    return lambda step: 0.5 ** sum(step >= milestone for milestone in milestones)


def warmup_cosine(steps: int, warmup: int) -> Factor:
    """Linear from 1 / warmup to 1 over `warmup` steps (at most half of all), then a half cosine to 0 at `steps`."""
    warmup = min(warmup, steps // 2)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    return factor


class Schedule:
    """The learning rates of one phase: each optimizer's rate times `factor` at the current step.

    Sets the rates at once, whatever an earlier phase has left in the optimizers.
    """

    def __init__(self, rates: Mapping[torch.optim.Optimizer, float], factor: Factor, step: int = 0) -> None:
        self.rates = rates
        self.factor = factor
        self.step = step
        self._set_rates()

    def advance(self) -> None:
        """Set the rates of the next step."""
        self.step += 1
        self._set_rates()

    def _set_rates(self) -> None:
        for optimizer, rate in self.rates.items():
            for group in optimizer.param_groups:
                group["lr"] = rate * self.factor(self.step)
