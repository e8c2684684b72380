"""Cross-attention on a trained base: both stages once, from what is loaded to what is written (docs/method.md)."""

from __future__ import annotations

import logging

import torch

from engine.run_folder import STATE_FILE
from engine.training.arguments import CrossAttentionArguments, CrossAttentionRunConfig
from engine.training.base import BETAS, describe_run, open_run, set_up, two_phases
from engine.training.run import TrainingRun
from engine.training.start import (
    carry_over_moments,
    check_start,
    load_start,
    log_initialisation,
    named_groups,
    read_base,
)
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.config import check_cross_attention
from utils.errors import UserError

logger = logging.getLogger(__name__)


def train_cross_attention(config: CrossAttentionRunConfig) -> None:
    """Train both stages with cross-attention, from a trained base where one is given (docs/method.md).

    Raises `UserError` for whatever the arguments ask for in vain, `NotFiniteError`, and `Stopped` on a signal.
    """
    start = read_base(config)
    text_adapted = config.text_epoch > 0 or start.text is not None
    setup = set_up(config, "train_cross_attention.py", start.signature(), text_adapted)
    check_cross_attention(config.cross_attention(), setup.clip.text_width)
    check_start(start, setup.model_config, config)
    model = AdaptedCLIPWithCrossAttention(setup.clip, setup.model_config, **config.cross_attention().to_dict())
    frozen = frozen_components(config)
    for side, epochs in (("text", config.text_epoch), ("image", config.image_epoch)):
        check_something_to_train(model, side, frozen, epochs, f"give --{side}_epoch 0")
    load_start(model, start)
    open_run(setup, config)
    log_initialisation(model.components, start)
    model = model.to(setup.accelerator.device)
    optimizers = {
        side: torch.optim.Adam(named_groups(model, side), lr=rate, betas=BETAS)
        for side, rate in (("text", config.text_lr), ("image", config.image_lr))
    }
    if not config.reset_base_optimizer and not (config.save_path / STATE_FILE).is_file():
        carry_over_moments(optimizers, start)
    described = describe_run(config, setup) | {
        "cross_attention": model.cross_config.to_dict(),
        "base": start.stories(),
    }
    run = TrainingRun(
        model, optimizers, setup.accelerator, config.save_path, config.seed, setup.signature, lambda: described,
        start.steps(),
    )  # fmt: skip
    run.run(two_phases(config, model, setup.data, run, frozen))
    logger.info("Complete: %d text and %d image epochs, in %s", config.text_epoch, config.image_epoch, config.save_path)


def frozen_components(config: CrossAttentionArguments) -> tuple[str, ...]:
    """Components that are not trained."""
    return ("text_adapter", "image_adapter") if config.freeze_base else ()


def check_something_to_train(
    model: AdaptedCLIPWithCrossAttention, side: str, frozen: tuple[str, ...], epochs: int, remedy: str
) -> None:
    """`UserError` where a stage with epochs has no component to train."""
    if epochs and not set(model.trained_components(side)) - set(frozen):
        raise UserError(f"--freeze_base leaves the {side} stage nothing to train; {remedy}")
