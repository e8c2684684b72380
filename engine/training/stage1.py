"""Stage 1: text adapters learn anchors that separate normal from abnormal image features (docs/method.md)."""

from typing import Any

from engine.training.stages import Stage, StageOutput, present_classes, square_mask, watch_abnormal
from model.losses import stage1_losses
from model.scoring import similarities
from utils.processes import WHOLE_STEP


class TextStage(Stage):
    """Trains the text side on image features without gradient: frozen ones, or in feedback those of Stage 2."""

    name = "text"
    number = 1

    def forward(self, batch: dict[str, Any]) -> StageOutput:
        """A batch of samples -> Stage 1's losses; the classes that occur in it share one text pass."""
        mask = square_mask(batch)
        present, rows = present_classes(batch, self.order)
        prompts = self.prompts.of_classes(present)
        features = self.model.stage1_features(batch["image"], prompts, rows, self.loop)
        share = batch.get("share", WHOLE_STEP)
        anchors = self.model.batch_anchors(prompts, rows, features, self.loop)  # (B, D, 2)
        levels, config = similarities(features.levels, anchors), self.config
        losses, abnormal = stage1_losses(
            levels, anchors, mask, config.text_norm_weight, config.stage1_levels, config.focal_smoothing, share
        )
        return StageOutput(losses, watch_abnormal(abnormal, mask))
