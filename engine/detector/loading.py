"""A checkpoint as a detector: which CLIP it needs, which forward it was trained with, and what files leave open."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.detector.detector import UNADAPTED, Detector, arguments_of
from engine.detector.hub import local_path
from engine.runtime.device import check_device
from engine.runtime.run_folder import find_checkpoints
from model.adapter import AdaptedCLIP
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.checkpoint import Checkpoint, infer_choices, load_component, read_checkpoint
from model.clip import FrozenCLIP
from model.clip_loading import is_tag, load_clip
from model.config import CLIP_OVERRIDES, CROSS_ATTENTION_OVERRIDES, FORWARD_OVERRIDES, CrossAttentionConfig, ModelConfig
from model.frozen import UnadaptedCLIP
from utils.errors import UserError

logger = logging.getLogger(__name__)

PUBLISHED_MODEL = "ViT-L-14-336"


def load_model(
    path: str | Path,
    *,
    clip_weights: str | Path | None = None,
    device: str = "auto",
    clip: FrozenCLIP | None = None,
    calibration: str | Path | None = None,
    **overrides: Any,
) -> Detector:
    """Load a checkpoint as a detector that is ready to predict.

        model = load_model("ckpt/base")
        prediction = model.predict("image.png", class_name="metal screw")

    Args:
        path: a checkpoint file, a run's folder (its latest checkpoint), a folder written by
            `Detector.save_pretrained`, or one on the Hugging Face hub, `hf://ORG/NAME` or `hf://ORG/NAME@REVISION`.
        clip_weights: CLIP's weights file. Default: the file used in training, else the hub.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        clip: a CLIP that is already loaded, in place of `clip_weights`.
        calibration: a `calibration.json` with thresholds of this model. Default: the file next to the checkpoint, if
            it has thresholds of this model.
        **overrides: `model_name`, `img_size`, `activation`, `surgery`, `surgery_until_layer` (needed for files without
            `config`, such as AA-CLIP's published files), `image_feature`, those of `CROSS_ATTENTION_OVERRIDES` for a
            model with cross-attention, `det_score` and `tiles` (see `Detector`). Values that differ from training are
            logged.

    Returns:
        The model in evaluation mode on `device`.

    Raises:
        UserError: the file, CLIP's weights, the calibration or the device is missing, damaged, or does not fit.
    """
    local = local_path(path)
    file = find_checkpoints(local)[-1] if local.is_dir() else local
    checkpoint = read_checkpoint(file)
    device = check_device(device, "fp32")
    clip = clip or load_clip_for(checkpoint, clip_weights, **overrides)
    detector = build_detector(checkpoint, clip, **overrides).to(device)
    detector.find_calibration(path, None if calibration is None else Path(calibration))
    return detector


def load_clip_for(checkpoint: Checkpoint, clip_weights: str | Path | None = None, **overrides: Any) -> FrozenCLIP:
    """The CLIP that a checkpoint was trained on, unless `overrides` name another one."""
    chosen = _explicit(checkpoint, overrides)
    if checkpoint.config is None:
        name = chosen.get("model_name", PUBLISHED_MODEL)
        activation = chosen.get("activation", arguments_of(checkpoint).get("activation"))
        clip = load_clip(name, clip_weights, chosen.get("img_size"), activation)
        logger.info("%s has no config: assumed %s at %d px", checkpoint.path, name, clip.img_size)
        log_activation(checkpoint, clip.activation, explicit="activation" in chosen)
        return clip
    config = checkpoint.model_config()
    name = chosen.get("model_name", config.model_name)
    # The folder of a local model may have moved; the digest shows whether its weights are the same.
    if name != config.model_name and not all(each.startswith("local-dir:") for each in (name, config.model_name)):
        raise UserError(f"{checkpoint.path} was trained on {config.model_name}, not on {name}")
    warn_of_changes(checkpoint, config, _select(("img_size", "activation"), chosen))
    recorded = checkpoint.config.get("arguments", {}).get("clip_weights")
    if clip_weights is None and recorded and (Path(recorded).exists() or is_tag(name, recorded)):
        clip_weights = recorded
    return load_clip(
        name, clip_weights, chosen.get("img_size", config.img_size), chosen.get("activation", config.activation)
    )


def build_detector(checkpoint: Checkpoint, clip: FrozenCLIP, **overrides: Any) -> Detector:
    """A checkpoint's weights on a CLIP that is already loaded.

    Raises `UserError` for a checkpoint that does not fit the CLIP or lacks a component.
    """
    config = checkpoint_config(checkpoint, clip, **overrides)
    cross = cross_attention_choices(checkpoint, **overrides)
    try:
        model = AdaptedCLIPWithCrossAttention(clip, config, cross=cross) if cross else AdaptedCLIP(clip, config)
    except UserError as error:
        raise UserError(f"{checkpoint.path}: {error}") from error
    for name, component in model.components.items():
        if name in checkpoint.components:
            load_component(component, checkpoint.components[name], name, checkpoint.path)
        elif (config.text_adapted or not name.startswith("text")) and not (
            checkpoint.config is None and name.endswith("cross_attn")
        ):
            raise UserError(f"{checkpoint.path}: has no '{name}', which a model of its config needs; it is damaged")
    epochs = "an unknown number of" if checkpoint.epoch is None else checkpoint.epoch
    logger.info("%s: %s epochs", checkpoint.path, epochs)
    chosen = _select(("det_score", "tiles"), _explicit(checkpoint, overrides))
    return Detector(model, checkpoint.name, checkpoint, **chosen)


def unadapted_detector(clip: FrozenCLIP, det_score: str | None = None, tiles: str | None = None) -> Detector:
    """Unadapted CLIP, the baseline, with the same prompts and scoring."""
    model = UnadaptedCLIP(clip, clip.model_config(text_adapted=False))
    return Detector(model, UNADAPTED, det_score=det_score, tiles=tiles)


def checkpoint_config(checkpoint: Checkpoint, clip: FrozenCLIP, **overrides: Any) -> ModelConfig:
    """The forward of a checkpoint on `clip`; `UserError` if it was trained on other weights."""
    chosen = _select(FORWARD_OVERRIDES, _explicit(checkpoint, overrides))
    trained = checkpoint.model_config() if checkpoint.config else checkpoint.shared and checkpoint.shared.model
    if trained and trained.weights_digest != clip.weights_digest:
        raise UserError(
            f"{checkpoint.path} was trained on other weights of {trained.model_name} ({trained.weights_digest}) "
            f"than those loaded ({clip.weights_digest}); give the file it was trained on with --clip_weights"
        )
    if checkpoint.config is None:
        return _assumed_config(checkpoint, clip, chosen)
    config = checkpoint.model_config()
    warn_of_changes(checkpoint, config, chosen)
    return replace(config, img_size=clip.img_size, activation=clip.activation, **chosen)


def cross_attention_choices(checkpoint: Checkpoint, **overrides: Any) -> CrossAttentionConfig | None:
    """A checkpoint's cross-attention with `overrides` applied; None if it has none.

    For a file without config these are assumptions, which are logged. Raises `UserError` for an override that the
    checkpoint has no use for.
    """
    chosen = _select(CROSS_ATTENTION_OVERRIDES, _explicit(checkpoint, overrides))
    trained = checkpoint.cross_attention()
    if trained is None:
        if chosen:
            raise UserError(f"{checkpoint.path}: has no cross-attention, so --{next(iter(chosen))} has no effect")
        return None
    for side in ("text", "image"):
        name = f"{side}_cross_attn_weight"
        if name in chosen and f"{side}_cross_attn" not in checkpoint.components:
            raise UserError(f"{checkpoint.path}: has no {side}_cross_attn, so --{name} has no effect")
    cross = replace(trained, **chosen)
    if checkpoint.config is not None:
        warn_of_changes(checkpoint, trained, chosen)
    else:
        assumed = ", ".join(f"{name} {getattr(cross, name)}" for name in CROSS_ATTENTION_OVERRIDES)
        logger.warning("%s has no config: assumed %s (options of the same names)", checkpoint.path, assumed)
    return cross


def log_activation(checkpoint: Checkpoint, activation: str, explicit: bool) -> None:
    """Log the activation that a file without config is assumed to need; explicit: it was set by an option."""
    names = "published" if checkpoint.is_published else "catalog's"
    assumed = f"assumed trained with {activation} and the {names} class names"
    # The weights of a fork's file may have been trained with another activation than CLIP's own.
    uncertain = not (explicit or checkpoint.is_published or activation == "gelu")
    level = logging.WARNING if uncertain else logging.INFO
    logger.log(level, "%s has no config: %s (--activation, --class_names)", checkpoint.path, assumed)


def _assumed_config(checkpoint: Checkpoint, clip: FrozenCLIP, chosen: dict[str, Any]) -> ModelConfig:
    """The forward of a file without config: what its keys show, and AA-CLIP's choices for the rest."""
    for name in ("text_adapter", "image_adapter"):
        if name not in checkpoint.components:
            raise UserError(f"{checkpoint.path}: has no '{name}'")
    choices = infer_choices(checkpoint.components)
    levels = clip.defaults["levels"]
    if (count := choices.pop("n_levels")) != len(levels):
        raise UserError(f"{checkpoint.path}: has {count} levels, {clip.model_name} {len(levels)}; check --model_name")
    # AA-CLIP's own code, which writes such files, puts V-V attention inside the blocks.
    assumed = {"surgery": "sequential", **choices, **chosen}
    config = clip.model_config(**assumed)
    logger.info("%s has no config: assumed surgery %s, adapters %s", checkpoint.path, config.surgery, config.adapter)
    return config


def _explicit(checkpoint: Checkpoint, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Choices that replace a checkpoint's own: those that a shared model was saved with, then `overrides`."""
    explicit = {name: value for name, value in overrides.items() if value is not None}
    if checkpoint.shared is None:
        return explicit
    _, model, cross, det_score = checkpoint.shared
    # It keeps its forward unless that is overridden.
    saved = {"det_score": det_score, **{name: getattr(model, name) for name in (*CLIP_OVERRIDES, *FORWARD_OVERRIDES)}}
    trained = checkpoint.cross_attention()
    if trained and cross:
        values = {name: getattr(cross, name) for name in CROSS_ATTENTION_OVERRIDES}
        saved |= {name: value for name, value in values.items() if value != getattr(trained, name)}
    return {**saved, **explicit}


def _select(names: Iterable[str], values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def warn_of_changes(checkpoint: Checkpoint, trained: object, chosen: Mapping[str, Any]) -> None:
    """Warn of choices that differ from those in training."""
    for name, value in chosen.items():
        if value != getattr(trained, name):
            logger.warning("%s was trained with %s %s, now %s", checkpoint.path, name, getattr(trained, name), value)
