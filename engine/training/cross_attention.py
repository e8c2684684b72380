"""Cross-attention on a trained base: both stages once (docs/method.md, "Cross-attention")."""

from __future__ import annotations

import logging

from engine.config.training import CrossAttentionRunConfig
from engine.training.base import two_phases
from engine.training.setup import open_run, prepare
from engine.training.start import read_base
from utils.errors import UserError

logger = logging.getLogger(__name__)


def train_cross_attention(config: CrossAttentionRunConfig) -> None:
    """Train both stages with cross-attention, on a trained base or from scratch; raises as `train_base` does."""
    start = read_base(config)
    setup = prepare(config, "train_cross_attention.py", start, config.text_epoch > 0 or start.text is not None)
    for side, epochs in (("text", config.text_epoch), ("image", config.image_epoch)):
        if epochs and not set(setup.model.trained_components(side)) - set(config.frozen):
            raise UserError(f"--freeze_base leaves the {side} stage nothing to train; give --{side}_epoch 0")
    with open_run(setup) as run:
        run.run(two_phases(config, run, setup.data))
        logger.info(
            "Complete: %d text and %d image epochs, in %s", config.text_epoch, config.image_epoch, config.save_path
        )
