"""The start of a run with cross-attention, checked and loaded: a trained base, any checkpoint, or nothing."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.config.training import CrossAttentionArguments
from engine.detector.detector import PUBLISHED_ARGUMENTS, arguments_of
from engine.detector.loading import cross_attention_choices, log_activation, warn_of_changes
from engine.training.optimizers import transfer_moments
from model.adapter import AdaptedCLIP
from model.checkpoint import Checkpoint, file_digest, load_component, read_any
from model.config import COMPONENTS, CROSS_ATTENTION_OVERRIDES, SIDES, CrossAttentionConfig, ModelConfig
from utils.errors import UserError

logger = logging.getLogger(__name__)

FRESH = "newly initialised"
FEEDBACK_SCRIPT = "train_cross_attention_feedback_v2.py"


@dataclass(frozen=True)
class Start:
    """The checkpoints that a run starts from, by side; None for a newly initialised side.

    whole: one file of `--init_from`, whose cross-attentions are loaded too; otherwise the files of a base.
    """

    text: Checkpoint | None = None
    image: Checkpoint | None = None
    whole: bool = False

    def side(self, name: str) -> Checkpoint | None:
        return self.text if name == "text" else self.image

    def source(self, component: str) -> Checkpoint | None:
        """The checkpoint that a component is loaded from."""
        checkpoint = self.side(component.partition("_")[0])
        if checkpoint is None or component not in checkpoint.components:
            return None
        return checkpoint if self.whole or component.endswith("_adapter") else None

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The arguments of the run that the image side, or else the text side, comes from."""
        return next((values for side in (self.image, self.text) if side and (values := arguments_of(side))), {})

    def model_config(self) -> ModelConfig | None:
        """The model of the image side, or else the text side; None for files without config."""
        with_config = (side for side in (self.image, self.text) if side and side.config)
        return next((checkpoint.model_config() for checkpoint in with_config), None)

    @property
    def activation(self) -> str | None:
        """The activation that published files were trained with; None if the weights decide."""
        published = any(checkpoint.is_published for checkpoint in (self.text, self.image) if checkpoint)
        return PUBLISHED_ARGUMENTS["activation"] if published else None

    def signature(self) -> dict[str, Any]:
        """Digests of the files: a restart must start from the same ones."""
        digests = {side: file_digest(checkpoint.path) if (checkpoint := self.side(side)) else None for side in SIDES}
        return {
            f"{kind}_{side}": digest if (kind == "init") == self.whole else None
            for kind in ("base", "init")
            for side, digest in digests.items()
        }

    def steps(self) -> dict[str, int | None]:
        """Optimizer steps of each side so far; None if its file does not say."""
        return {
            side: 0 if (checkpoint := self.side(side)) is None else (checkpoint.steps or {}).get(side) for side in SIDES
        }

    def origins(self) -> dict[str, str | None]:
        """The origin of each side."""
        return {side: describe_origin(checkpoint) if (checkpoint := self.side(side)) else None for side in SIDES}


def read_base(config: CrossAttentionArguments) -> Start:
    """The base files that the arguments name; `UserError` for one side only, without `--allow_partial_base`."""
    files = (config.load_base_text_adapter, config.load_base_image_adapter)
    if len([file for file in files if file]) == 1 and not config.allow_partial_base:
        missing = "--load_base_image_adapter" if files[0] else "--load_base_text_adapter"
        raise UserError(f"only one side of a base is given: add {missing} FILE, or --allow_partial_base")
    text, image = (read_any(file) if file else None for file in files)
    start = Start(text, image)
    for side in SIDES:
        if (checkpoint := start.side(side)) is not None:
            _check_is_base(checkpoint, side)
    return start


def read_whole(file: Path) -> Start:
    """The file of `--init_from`: a checkpoint with both sides, or the state of a run."""
    checkpoint = read_any(file)
    for name in ("text_adapter", "image_adapter"):
        if name not in checkpoint.components:
            raise UserError(f"--init_from {file}: has no '{name}'; give a file that holds both sides, or --load_base_*")
    return Start(checkpoint, checkpoint, whole=True)


def _check_is_base(checkpoint: Checkpoint, side: str) -> None:
    """`UserError` for a file that is not a trained base of this side."""
    flag = f"--load_base_{side}_adapter"
    if checkpoint.loop is not None or (checkpoint.config and checkpoint.config.get("feedback")):
        raise UserError(
            f"{flag} {checkpoint.path}: this is a feedback checkpoint, not a base; {FEEDBACK_SCRIPT} takes it as "
            "--init_from"
        )
    crossed = [name for name in checkpoint.components if name.endswith("cross_attn")]
    if crossed or (checkpoint.config and checkpoint.config.get("cross_attention")):
        raise UserError(
            f"{flag} {checkpoint.path}: this is a cross-attention checkpoint, not a base; "
            f"give the files that train.py wrote, or this one to {FEEDBACK_SCRIPT} as --init_from"
        )
    if f"{side}_adapter" not in checkpoint.components:
        has = ", ".join(checkpoint.components)
        raise UserError(f"{flag} {checkpoint.path}: has no '{side}_adapter' but {has}; give the {side} side's file")
    if checkpoint.epoch == 0:
        raise UserError(f"{flag} {checkpoint.path}: was trained for 0 epochs; train the base first (train.py)")


def check_start(start: Start, model: ModelConfig, run: CrossAttentionArguments, names: Mapping[str, str]) -> None:
    """`UserError` if a checkpoint was trained with another model; other weights and class names are only warned of.

    names: the readable names of the classes.
    """
    # A file of both sides is checked once, for the image side needs more.
    for side in ("image",) if start.whole else SIDES:
        checkpoint = start.side(side)
        if checkpoint is not None and checkpoint.config is not None:
            _check_config(checkpoint, side, model, run)
            _warn_of_other_names(checkpoint, checkpoint.config["prompt_names"], names)
        elif checkpoint is not None:
            assumed = f"assumed trained on these weights of {model.model_name} at {model.img_size} px"
            logger.info("%s has no config: %s", checkpoint.path, assumed)
            log_activation(checkpoint, model.activation, explicit=run.activation is not None)
    _warn_of_other_text_side(start)
    if start.whole and start.image is not None:
        _check_cross_attention(start.image, run.cross_attention())


def _check_config(checkpoint: Checkpoint, side: str, model: ModelConfig, run: CrossAttentionArguments) -> None:
    before = checkpoint.model_config()
    if side == "image" and not before.text_adapted and not run.allow_partial_base:
        raise UserError(
            f"{checkpoint.path}: its text side was not trained (--text_epoch 0); train a base with both stages, "
            "or give --allow_partial_base"
        )
    if before.text_side == "vectors":
        raise UserError(f"{checkpoint.path}: was trained with --text_side vectors, without language; give another base")
    for name in ("weights_digest", "activation", "adapter", "relu", "levels", "img_size"):
        was, now = getattr(before, name), getattr(model, name)
        if was != now:
            flag = "--clip_weights" if name == "weights_digest" else f"--{name}"
            raise UserError(
                f"{checkpoint.path}: this checkpoint was trained with {name} {was}, not {now}; set {flag} to match"
            )
    weights = ("text_adapt_weight", "image_adapt_weight")
    warn_of_changes(checkpoint, before, {name: getattr(model, name) for name in weights})


def _warn_of_other_names(checkpoint: Checkpoint, before: Mapping[str, str], names: Mapping[str, str]) -> None:
    changed = [name for name in names if before.get(name, names[name]) != names[name]]
    if changed:
        differences = ", ".join(f"{name} was {before[name]!r}, now {names[name]!r}" for name in changed)
        logger.warning("%s was trained with other names in its prompts: %s", checkpoint.path, differences)


def _warn_of_other_text_side(start: Start) -> None:
    """Warn if the text side is not the one that the image side was trained with."""
    trained_with = start.image.components.get("text_adapter") if start.text and start.image else None
    if start.text is None or start.image is None or trained_with is None:
        return
    text = start.text.components["text_adapter"]
    if not all(key in text and torch.equal(value, text[key]) for key, value in trained_with.items()):
        logger.warning(
            "%s is not the text side stored in %s: the image adapter was trained against different anchors",
            start.text.path,
            start.image.path,
        )


def _check_cross_attention(checkpoint: Checkpoint, now: CrossAttentionConfig) -> None:
    was = cross_attention_choices(checkpoint)
    if was is None:
        return
    if checkpoint.config is not None and was.cross_attn_heads != now.cross_attn_heads:
        raise UserError(
            f"--init_from {checkpoint.path}: was trained with cross_attn_heads {was.cross_attn_heads}, not "
            f"{now.cross_attn_heads}; set --cross_attn_heads to match"
        )
    names = [name for name in CROSS_ATTENTION_OVERRIDES if name != "text_context"]  # which each loop chooses
    warn_of_changes(checkpoint, was, {name: getattr(now, name) for name in names})


def load_start(model: AdaptedCLIP, start: Start) -> None:
    """Load the components that the run starts from; `UserError` if they do not fit."""
    for name, part in model.components.items():
        checkpoint = start.source(name)
        if checkpoint is not None:
            load_component(part, checkpoint.components[name], name, checkpoint.path)


def describe_origin(checkpoint: Checkpoint) -> str:
    """A checkpoint's file, epochs and dataset."""
    epochs = "an unknown number of" if checkpoint.epoch is None else checkpoint.epoch
    dataset = checkpoint.config["dataset"] if checkpoint.config else "an unknown dataset"
    return f"{checkpoint.path}, {epochs} epochs on {dataset}"


def log_initialisation(components: dict[str, nn.Module], start: Start, from_base: bool = True) -> None:
    """Log the origin, size and mean weight of every component.

    from_base: whether a base is expected, without which a comparison is unfair.
    """
    logger.info("WEIGHT INITIALIZATION VERIFICATION")
    for name, part in components.items():
        weights = torch.cat([parameter.detach().flatten() for parameter in part.parameters()])
        checkpoint = start.source(name)
        origin = FRESH
        if checkpoint is not None:
            origin = f"from the {'checkpoint' if start.whole else 'base'}: {describe_origin(checkpoint)}"
            kind = "" if start.whole else "Base "
            logger.info("%s loaded successfully!", f"{kind}{name.replace('_', ' ')}")
        described = f"{weights.numel():,} parameters, {origin}"
        logger.info("%s mean weight magnitude: %.6f (%s)", name, weights.abs().mean().item(), described)
    for name in COMPONENTS if from_base else ():
        if name not in components:
            logger.info("%s: off (weight 0)", name)
    if from_base and start.text is None and start.image is None:
        logger.warning(
            "Training from scratch, without a base: compared with runs that start from a trained base, this is unfair"
        )


def carry_over_moments(optimizers: dict[str, torch.optim.Optimizer], start: Start) -> None:
    """Load the checkpoints' optimizer moments of the components that come from them."""
    for side, optimizer in optimizers.items():
        checkpoint = start.side(side)
        saved = checkpoint.optimizers.get(f"{side}_optimizer") if checkpoint else None
        if checkpoint and saved:
            carried = transfer_moments(optimizer, saved)
            logger.info("%s optimizer: moments of %d tensors loaded from %s", side, carried, checkpoint.path)
