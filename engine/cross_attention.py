"""Cross-attention on a trained base: what is loaded, how it is verified, and how both stages train it (DESIGN 4, 5)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.base import BETAS, describe_run, open_run, set_up, two_phases
from engine.config import BaseConfig, free
from engine.optimizers import transfer_moments
from engine.run import STATE_FILE, TrainingRun
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.checkpoint import Checkpoint, file_digest, load_component, read_any
from model.config import CrossAttentionConfig, ModelConfig, check_cross_attention
from utils.errors import UserError

logger = logging.getLogger(__name__)

SUFFIX = "_cross_attn"


@dataclass(frozen=True)
class CrossAttentionRunConfig(BaseConfig):
    """Arguments of `train_cross_attention.py`, by the same names and with their defaults."""

    text_cross_attn_weight: float = 0.1
    image_cross_attn_weight: float = 0.1
    cross_attn_heads: int = 8
    cross_attn_dropout: float = 0.1
    context_norm: str = "unit"
    cross_attn_init: str = "xavier"
    cross_attn_scale: str = "fixed"
    text_conditioning: str = "image"
    load_base_text_adapter: Path | None = free(None)
    load_base_image_adapter: Path | None = free(None)
    reset_base_optimizer: bool = False
    allow_partial_base: bool = free(False)
    freeze_base: bool = False
    save_path: Path = free(Path("ckpt/cross_attention"))

    def cross_attention(self) -> CrossAttentionConfig:
        """The choices that the forward depends on."""
        names = {item.name for item in fields(CrossAttentionConfig)} - {"text_context"}
        return CrossAttentionConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Base:
    """The base checkpoints that a run starts from, by side; None where a side starts fresh."""

    text: Checkpoint | None
    image: Checkpoint | None

    def side(self, name: str) -> Checkpoint | None:
        return self.text if name == "text" else self.image

    def signature(self) -> dict[str, Any]:
        """The contents of the files, so that a restart from others is noticed."""
        return {
            f"base_{name}": file_digest(checkpoint.path) if checkpoint else None
            for name, checkpoint in (("text", self.text), ("image", self.image))
        }


def train_cross_attention(config: CrossAttentionRunConfig) -> None:
    """Train both stages with cross-attention, from a trained base where one is given (DESIGN 1, 4).

    Raises `UserError` for whatever the arguments ask for in vain, `NotFiniteError`, and `Stopped` on a signal.
    """
    base = read_base(config)
    setup = set_up(config, "train_cross_attention.py", base.signature())
    check_cross_attention(config.cross_attention(), setup.clip.text_width)
    check_base(base, setup.model_config, config)
    model = AdaptedCLIPWithCrossAttention(setup.clip, setup.model_config, **config.cross_attention().to_dict())
    origins = load_base(model, base)
    frozen = ("text_adapter", "image_adapter") if config.freeze_base else ()
    for side, epochs in (("text", config.text_epoch), ("image", config.image_epoch)):
        if epochs and not set(model.trained_components(side)) - set(frozen):
            raise UserError(f"--freeze_base leaves the {side} stage nothing to train; give --{side}_epoch 0")
    open_run(setup, config)
    model = model.to(setup.accelerator.device)
    log_initialisation(model.components, origins)
    optimizers = {
        side: two_group_adam(model, side, rate) for side, rate in (("text", config.text_lr), ("image", config.image_lr))
    }
    if not config.reset_base_optimizer and not (config.save_path / STATE_FILE).is_file():
        for side, optimizer in optimizers.items():
            carry_over_moments(optimizer, base.side(side), side)
    run = TrainingRun(model, optimizers, setup.accelerator, config.save_path, config.seed, setup.signature)
    described = describe_run(config, setup.model_config, setup.data) | {
        "cross_attention": model.cross_config.to_dict(),
        "base": {name: checkpoint_story(base.side(name)) for name in ("text", "image")},
    }
    run.run(two_phases(config, model, setup.data, run, described, SUFFIX, frozen))
    logger.info("Complete: %d text and %d image epochs, in %s", config.text_epoch, config.image_epoch, config.save_path)


def read_base(config: CrossAttentionRunConfig) -> Base:
    """The base files that the arguments name; `UserError` for one side only, unless that is asked for."""
    files = (config.load_base_text_adapter, config.load_base_image_adapter)
    if len([file for file in files if file]) == 1 and not config.allow_partial_base:
        missing = "--load_base_image_adapter" if files[0] else "--load_base_text_adapter"
        raise UserError(
            f"only one side of a base is given: add {missing} FILE, or --allow_partial_base if that is meant"
        )
    checkpoints = [read_any(file) if file else None for file in files]
    for checkpoint, side in zip(checkpoints, ("text", "image"), strict=True):
        if checkpoint is not None:
            check_is_base(checkpoint, side)
    return Base(*checkpoints)


def check_is_base(checkpoint: Checkpoint, side: str) -> None:
    """`UserError` for a file that is no trained base of this side, with what it is instead."""
    flag = f"--load_base_{side}_adapter"
    if checkpoint.loop is not None or (checkpoint.config and checkpoint.config.get("feedback")):
        raise UserError(f"{flag} {checkpoint.path}: this is a feedback checkpoint, not a base; give it as --init_from")
    crossed = [name for name in checkpoint.components if name.endswith("cross_attn")]
    if crossed or (checkpoint.config and checkpoint.config.get("cross_attention")):
        raise UserError(
            f"{flag} {checkpoint.path}: this is a cross-attention checkpoint, not a base; "
            "give the files that train.py wrote"
        )
    if f"{side}_adapter" not in checkpoint.components:
        has = ", ".join(checkpoint.components)
        raise UserError(f"{flag} {checkpoint.path}: has no '{side}_adapter' but {has}; give the {side} side's file")
    if checkpoint.epoch == 0:
        raise UserError(f"{flag} {checkpoint.path}: was trained for 0 epochs; train the base first (train.py)")


def check_base(base: Base, config: ModelConfig, run: CrossAttentionRunConfig) -> None:
    """`UserError` where a base was trained as another model than the one now asked for."""
    for side in ("text", "image"):
        checkpoint = base.side(side)
        if checkpoint is None or checkpoint.config is None:
            continue
        before = checkpoint.model_config()
        if side == "image" and not before.text_adapted and not run.allow_partial_base:
            raise UserError(
                f"{checkpoint.path}: its text side was not trained (--text_epoch 0); train a base with both stages, "
                "or give --allow_partial_base if that is meant"
            )
        for name in ("weights_digest", "activation", "adapter", "relu", "levels", "img_size"):
            was, now = getattr(before, name), getattr(config, name)
            if was != now:
                flag = "--clip_weights" if name == "weights_digest" else f"--{name}"
                raise UserError(
                    f"{checkpoint.path}: the base was trained with {name} {was}, not {now}; set {flag} to match"
                )
        for name in ("text_adapt_weight", "image_adapt_weight"):
            if getattr(before, name) != getattr(config, name):
                logger.warning("%s was trained with %s %s", checkpoint.path, name, getattr(before, name))


def load_base(model: AdaptedCLIPWithCrossAttention, base: Base) -> dict[str, str]:
    """Load the base's adapters into the model; returns where each component comes from, in words."""
    origins = dict.fromkeys(model.components, "newly initialised")
    for side in ("text", "image"):
        checkpoint = base.side(side)
        if checkpoint is not None:
            name = f"{side}_adapter"
            load_component(model.components[name], checkpoint.components[name], name, checkpoint.path)
            origins[name] = f"from the base: {checkpoint_story(checkpoint)}"
    return origins


def checkpoint_story(checkpoint: Checkpoint | None) -> str | None:
    """A checkpoint's file, epochs and dataset, in words."""
    if checkpoint is None:
        return None
    epochs = "an unknown number of" if checkpoint.epoch is None else checkpoint.epoch
    dataset = checkpoint.config["dataset"] if checkpoint.config else "an unknown dataset"
    return f"{checkpoint.path}, {epochs} epochs on {dataset}"


def log_initialisation(components: dict[str, nn.Module], origins: dict[str, str]) -> None:
    """Say what every component starts from, before anything is trained."""
    logger.info("WEIGHT INITIALIZATION VERIFICATION")
    for name, part in components.items():
        weights = torch.cat([parameter.detach().flatten() for parameter in part.parameters()])
        if origins[name] != "newly initialised":
            logger.info("Base %s loaded successfully!", name.replace("_", " "))
        logger.info(
            "%s mean weight magnitude: %.6f (%s parameters, %s)",
            name,
            weights.abs().mean().item(),
            f"{weights.numel():,}",
            origins[name],
        )
    if all(origin == "newly initialised" for origin in origins.values()):
        logger.warning(
            "Training from scratch, without a base: compared with runs that start from a trained base, this is unfair"
        )


def two_group_adam(model: AdaptedCLIPWithCrossAttention, side: str, rate: float) -> torch.optim.Adam:
    """One optimizer for a side: its adapter is the first group, its cross-attention the second."""
    groups = [
        {"params": list(model.components[f"{side}_{kind}"].named_parameters())} for kind in ("adapter", "cross_attn")
    ]
    return torch.optim.Adam(groups, lr=rate, betas=BETAS)


def carry_over_moments(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint | None, side: str) -> None:
    """Take a base checkpoint's optimizer moments along, where it has them, and say so."""
    saved = checkpoint.optimizers.get(f"{side}_optimizer") if checkpoint else None
    if saved:
        carried = transfer_moments(optimizer, saved)
        logger.info("%s optimizer: moments of %d tensors taken from %s", side, carried, checkpoint.path)
