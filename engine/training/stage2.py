"""Stage 2: image adapters and projectors align patches with the anchors that Stage 1 left (docs/method.md)."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from engine.config.training import RunConfig
from engine.training.stages import Stage, StageOutput, class_rows, present_classes, square_mask, watch_abnormal
from model.adapter import AdaptedCLIP
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.config import SIDES, LoopForward
from model.losses import stage2_losses
from model.text import Prompts


class ImageStage(Stage):
    """Trains the image side through the model's own forward, the one that evaluation uses."""

    name = "image"
    number = 2

    def __init__(
        self,
        model: AdaptedCLIP,
        prompts: Prompts,
        classes: Sequence[str],
        config: RunConfig,
        loop: LoopForward | None = None,
    ) -> None:
        super().__init__(model, prompts, classes, config, loop)
        self.text_side = model.text_side(prompts, loop)

    def forward(self, batch: dict[str, Any]) -> StageOutput:
        """A batch of samples -> Stage 2's losses."""
        mask = square_mask(batch)
        outputs = self.model(batch["image"], self.text_side, class_rows(batch, self.order))
        losses, abnormal = stage2_losses(outputs, mask, batch["label"], self.config.focal_smoothing)
        return StageOutput(losses, watch_abnormal(abnormal, mask))


class JointStage(Stage):
    """Stage 2 that trains the text side as well, through the anchors and the image side's context (`--order joint`)."""

    name = "both"
    number = 3
    model: AdaptedCLIPWithCrossAttention
    loop: LoopForward

    @property
    def trained(self) -> dict[str, nn.Module]:
        return {name: part for side in SIDES for name, part in self.trained_on(side).items()}

    def forward(self, batch: dict[str, Any]) -> StageOutput:
        """A batch of samples -> Stage 2's losses; the classes that occur in it share one text pass."""
        mask = square_mask(batch)
        present, rows = present_classes(batch, self.order)
        outputs = self.model.joint_forward(batch["image"], self.prompts.of_classes(present), rows, self.loop)
        losses, abnormal = stage2_losses(outputs, mask, batch["label"], self.config.focal_smoothing)
        return StageOutput(losses, watch_abnormal(abnormal, mask))
