"""Cross-attention on a trained base: both stages once (docs/method.md, "Cross-attention")."""

from __future__ import annotations

import logging

from engine.config.training import CrossAttentionRunConfig
from engine.training.base import two_phases
from engine.training.opening import open_run, prepare
from engine.training.start import check_something_to_train, read_base

logger = logging.getLogger(__name__)


def train_cross_attention(config: CrossAttentionRunConfig) -> None:
    """Train both stages with cross-attention, from a trained base where one is given.

    Raises `UserError` for whatever the arguments ask for in vain, `NotFiniteError`, and `Stopped` on a signal.
    """
    start = read_base(config)
    text_adapted = config.text_epoch > 0 or start.text is not None
    opening = prepare(config, "train_cross_attention.py", start, text_adapted)
    for side, epochs in (("text", config.text_epoch), ("image", config.image_epoch)):
        check_something_to_train(opening.model, side, config.frozen, epochs, f"give --{side}_epoch 0")
    with open_run(opening) as run:
        run.run(two_phases(config, run, opening.data))
        logger.info(
            "Complete: %d text and %d image epochs, in %s", config.text_epoch, config.image_epoch, config.save_path
        )
