"""Cross-attention on a trained base: both stages once (docs/method.md, "Cross-attention")."""

from engine.config.training import CrossAttentionRunConfig
from engine.training.base import train_two_stages
from engine.training.setup import prepare
from engine.training.start import read_base
from utils.errors import UserError


def train_cross_attention(config: CrossAttentionRunConfig) -> None:
    """Train both stages with cross-attention, on a trained base or from scratch; raises as `train_base` does."""
    start = read_base(config)
    setup = prepare(config, "train_cross_attention.py", start, config.text_epoch > 0 or start.text is not None)
    for side, epochs in (("text", config.text_epoch), ("image", config.image_epoch)):
        if epochs and not set(setup.model.trained_components(side)) - set(config.frozen):
            raise UserError(f"--freeze_base leaves the {side} stage nothing to train; give --{side}_epoch 0")
    train_two_stages(setup)
