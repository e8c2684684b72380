"""The base class of the stages: a module that computes losses from a batch, and the components that it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.config.training import RunConfig
from model.adapter import AdaptedCLIP
from model.config import LoopForward
from model.text import Prompts

# Sums and numbers of pixels of p_abnormal inside and outside the masks.
WATCHED = ("inside_sum", "inside_pixels", "outside_sum", "outside_pixels")


class StageOutput(NamedTuple):
    """The losses by name, of which "total" is minimised; and sums and counts for the mean p_abnormal."""

    losses: dict[str, Tensor]
    watch: dict[str, Tensor]


class Stage(nn.Module):
    """A stage of training on the run's one model; only trained components require gradients and are in train mode.

    Args:
        model: The model.
        prompts: Those of all classes.
        classes: The classes in the order of the prompts.
        config: Has the weights of the loss terms and the frozen components.
        loop: A feedback loop's choices for the forward; None without loops.
    """

    name: str
    number: int

    def __init__(
        self,
        model: AdaptedCLIP,
        prompts: Prompts,
        classes: Sequence[str],
        config: RunConfig,
        loop: LoopForward | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.prompts = prompts
        self.order = {name: row for row, name in enumerate(classes)}
        self.config = config
        self.loop = loop

    @property
    def trained(self) -> dict[str, nn.Module]:
        """The components that this stage trains, by name."""
        return self.trained_on(self.name)

    def trained_on(self, side: str) -> dict[str, nn.Module]:
        """The components of a side that are trained, by name."""
        names = self.model.trained_components(side, self.loop)
        return {name: self.model.components[name] for name in names if name not in self.config.frozen}

    def begin(self) -> None:
        """Require gradients in the trained components alone, and enter train mode."""
        self.model.requires_grad_(False)
        for component in self.trained.values():
            component.requires_grad_(True)
        self.train()

    def train(self, mode: bool = True) -> Stage:
        self.training = mode
        self.model.eval()
        for component in self.trained.values():
            component.train(mode)
        return self


def watch_abnormal(abnormal: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Sums of p_abnormal (B, S, S) inside and outside the masks, with the numbers of pixels."""
    watched = []
    for pixels in (mask > 0.5, mask <= 0.5):
        # Boolean indexing would wait for the device.
        watched += [abnormal.where(pixels, 0).sum(), pixels.sum().to(abnormal.dtype)]
    return dict(zip(WATCHED, watched, strict=True))


def square_mask(batch: dict[str, Any]) -> Tensor:
    """The batch's masks without their channel axis, (B, S, S)."""
    return batch["mask"].flatten(0, 1)


def class_rows(batch: dict[str, Any], order: dict[str, int]) -> Tensor:
    """The row of each image's class, (B,), on the batch's device."""
    return as_rows([order[name] for name in batch["class_name"]], batch["image"].device)


def present_classes(batch: dict[str, Any], order: dict[str, int]) -> tuple[Tensor, Tensor]:
    """The classes that occur in a batch, as rows in ascending order (C,), and each image's among these (B,)."""
    present = sorted({order[name] for name in batch["class_name"]})
    position = {row: index for index, row in enumerate(present)}
    device = batch["image"].device
    return as_rows(present, device), as_rows([position[order[name]] for name in batch["class_name"]], device)


def as_rows(rows: Sequence[int], device: torch.device) -> Tensor:
    """Numbers as a tensor on a device; pinned memory, so that the copy to a GPU need not be waited for."""
    numbers = torch.tensor(rows)
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)
