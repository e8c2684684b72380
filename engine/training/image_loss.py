"""Stage 2 from labels of whole images: its classification term alone (docs/training.md, "Without masks")."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch.nn.functional as F
from torch import nn

from engine.config.training import RunConfig
from engine.data.task import TaskData, check_masks
from engine.training.stage2 import ImageStage
from engine.training.stages import StageOutput, class_rows
from model.scoring import DOMAINS
from utils.errors import UserError

logger = logging.getLogger(__name__)


class ImageLossStage(ImageStage):
    """Trains what the classification reaches: the projectors of the levels' maps stay as they are."""

    @property
    def trained(self) -> dict[str, nn.Module]:
        trained = super().trained
        parts = cast(nn.ModuleDict, trained.pop("image_adapter", nn.ModuleDict()))
        return {**{name: part for name, part in parts.items() if name != "seg_proj"}, **trained}

    def forward(self, batch: dict[str, Any]) -> StageOutput:
        """A batch of samples -> Stage 2's classification loss; nothing is watched, since there may be no masks."""
        outputs = self.model(batch["image"], self.text_side, class_rows(batch, self.order))
        loss = F.cross_entropy(outputs.det, batch["label"])
        nothing = loss.new_zeros(())
        watch = dict.fromkeys(("inside_sum", "inside_pixels", "outside_sum", "outside_pixels"), nothing)
        return StageOutput({"classification": loss, "total": loss}, watch)


def check_labels(config: RunConfig, data: TaskData) -> None:
    """Raise `UserError` where a run's losses need masks that are not there, or would train what no score looks at.

    data: all images of the dataset. Says in the log what a run without the losses of pixels gives up.
    """
    if not getattr(config, "image_loss_only", False):
        check_masks(
            data,
            "Stage 1 and the focal and Dice losses of Stage 2 need them: add them, or train Stage 2's classification "
            "alone with --image_loss_only (train.py, train_cross_attention.py)",
        )
        return
    if not DOMAINS[data.located.spec.domain].uses_det:
        raise UserError(
            f"--image_loss_only: images of {data.located.spec.name} are scored by their maps alone, which Stage 2's "
            "classification does not train: leave it out"
        )
    logger.warning(
        "--image_loss_only: Stage 2's classification alone is trained, so Stage 1 is left out and the anchors stay as "
        "they are. Nothing learns where an anomaly is: the projectors of the maps %s, so heatmaps and pixel metrics "
        "say little, and half of an image's score comes from its map",
        "stay those of the base" if getattr(config, "load_base_image_adapter", None) else "stay random",
    )
