"""Means over all images of a data-parallel step, for loss terms that are not a mean over images (docs/scaling.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from utils.processes import Share

# One process has all images.
ALONE = Share.of(1)


def step_mean(own: Tensor, share: Share) -> Tensor:
    """The mean over all images of a step, from the mean `own` over this process's; its gradient is that of `own`."""
    if share.processes == 1:
        return own
    everywhere = share.weight * own.detach()
    torch.distributed.all_reduce(everywhere)
    return everywhere / share.processes + (own - own.detach())
