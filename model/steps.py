"""A step whose images several processes share, where it is more than the mean of what each of them computes.

Most of a loss is a mean over images, which needs nothing but the shares' weights (docs/scaling.md, "How processes share
a step").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

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


class StepDropout(TorchFunctionMode):
    """Attention's dropout drawn for all images of a step, of which this process keeps its share: as one process draws.

    All processes have the same seed. For the CPU, where attention draws a number for each weight in their order.
    """

    def __init__(self, share: Share) -> None:
        super().__init__()
        self.share = share

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        arguments: Sequence[Any] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        named = named or {}
        drops = function is F.scaled_dot_product_attention and named.get("dropout_p")
        # What is not of this share's images, such as classes, draws for itself.
        if drops and len(arguments[0]) == max(1, self.share.count):
            return self._attend(*arguments, **named)
        return function(*arguments, **named)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float) -> Tensor:
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        drawn = F.dropout(scores.new_ones(self.share.total, *scores.shape[1:]), dropout_p)
        return (scores.softmax(dim=-1) * drawn[self.share.first :][: len(q)]) @ v
