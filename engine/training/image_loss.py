"""Stage 2 from labels of whole images: its classification term alone (docs/training.md, "Without masks")."""

import logging
from typing import Any, cast

import torch.nn.functional as F
from torch import nn

from dataset.images import read_mask
from engine.config.training import RunConfig
from engine.data.task import TaskData, check_masks
from engine.training.stage2 import ImageStage
from engine.training.stages import WATCHED, StageOutput, class_rows
from model.scoring import DOMAINS
from utils.errors import UserError

logger = logging.getLogger(__name__)


class ImageLossStage(ImageStage):
    """Trains the components that the classification depends on; the projectors of the maps are not trained."""

    @property
    def trained(self) -> dict[str, nn.Module]:
        trained = super().trained
        parts = cast(nn.ModuleDict, trained.pop("image_adapter", nn.ModuleDict()))
        return {**{name: part for name, part in parts.items() if name != "seg_proj"}, **trained}

    def forward(self, batch: dict[str, Any]) -> StageOutput:
        """A batch of samples -> Stage 2's classification loss, without p_abnormal, because there may be no masks."""
        outputs = self.model(batch["image"], self.text_side, class_rows(batch, self.order))
        loss = F.cross_entropy(outputs.det, batch["label"])
        nothing = loss.new_zeros(())
        watch = dict.fromkeys(WATCHED, nothing)
        return StageOutput({"classification": loss, "total": loss}, watch)


def check_labels(config: RunConfig, data: TaskData) -> None:
    """Raise `UserError` if the losses need masks that are missing, or if no score uses what would be trained.

    data: all images of the dataset. Logs the limits of training without pixel losses.
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
            "classification does not train: leave this option out"
        )
    logger.warning(
        "--image_loss_only: only Stage 2's classification is trained, without Stage 1, so the anchors do not change. "
        "Nothing learns to locate anomalies: the projectors of the maps %s, so heatmaps and pixel metrics are not "
        "meaningful, and half of an image's score comes from its map",
        "remain those of the base" if getattr(config, "load_base_image_adapter", None) else "remain random",
    )


def check_anomalies(config: RunConfig, data: TaskData) -> None:
    """Raise `UserError` if no training image has an anomalous pixel; only a warning if the loss uses labels alone.

    Reads masks until one is not black.
    """
    labels_only = getattr(config, "image_loss_only", False)
    masks = [data.located.root / record.mask_path for record in data.records if record.label and record.mask_path]
    if data.anomalous and (labels_only or any(read_mask(mask, data.mask_threshold).getbbox() for mask in masks)):
        return
    problem = f"{data.located.spec.name}: none of the {len(data.records)} training images is anomalous"
    if data.anomalous:
        problem = f"{data.located.spec.name}: the masks of all {data.anomalous} anomalous training images are black"
    if not labels_only:
        raise UserError(f"{problem}; training needs anomalous images with masks")
    logger.warning("%s, so the classification learns nothing but to call every image normal", problem)
