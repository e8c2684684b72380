"""The models on the page."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.config.tools import AppArguments
from engine.detector.detector import UNADAPTED, Detector
from engine.detector.hub import NO_CHECKPOINT, local_path
from engine.detector.loading import build_detector, load_clip_for, unadapted_detector
from engine.evaluation.inference import load_detectors
from engine.runtime.device import check_device
from engine.runtime.run_folder import DEMO_FOLDER, demo_checkpoints, find_checkpoints
from model.checkpoint import Checkpoint, read_checkpoint
from model.clip import FrozenCLIP
from model.config import TOY
from utils.errors import UserError

logger = logging.getLogger(__name__)


def load_models(arguments: AppArguments) -> dict[str, Detector]:
    """Load the models of `--checkpoint`, by default those of the demo, with the calibrations next to them.

    If the demo has not run, unadapted CLIP alone is loaded, by default the toy CLIP. Checkpoints of the same CLIP share
    it. Raises `UserError` as `load_model` does.
    """
    device = check_device(arguments.device, "fp32")
    overrides = arguments.overrides()
    options: dict[Path, str] = {}
    if arguments.checkpoint is None:
        files, with_unadapted = {}, True
        try:
            files = demo_checkpoints(DEMO_FOLDER)
        except UserError as error:
            overrides["model_name"] = arguments.model_name or TOY
            logger.warning("%s. Until then, the page shows unadapted CLIP (%s) alone", error, overrides["model_name"])
    else:
        with_unadapted = NO_CHECKPOINT in arguments.checkpoint
        for option in filter(NO_CHECKPOINT.__ne__, arguments.checkpoint):
            options |= {path.absolute(): option for path in find_checkpoints(local_path(option))}
        files = short_names(options)
    clips: dict[Any, FrozenCLIP] = {}
    models = {}
    for name, path in files.items():
        checkpoint = read_checkpoint(path)
        key = _clip_key(checkpoint)
        clips[key] = clips.get(key) or load_clip_for(checkpoint, arguments.clip_weights, **overrides)
        models[name] = build_detector(checkpoint, clips[key], **overrides).to(device)
        models[name].name = name
        models[name].find_calibration(options.get(path, path))
    if not with_unadapted:
        return models
    # Published files have their own activation, which unadapted CLIP should not use.
    own = next((model.clip for model in models.values() if model.config is not None), None)
    if own is not None:
        unadapted = unadapted_detector(own, arguments.det_score, arguments.tiles).to(device)
    else:
        overrides["model_name"] = next((clip.model_name for clip in clips.values()), overrides.get("model_name"))
        (unadapted,) = load_detectors(NO_CHECKPOINT, arguments.clip_weights, device, **overrides)
    unadapted.find_calibration(NO_CHECKPOINT)
    return {UNADAPTED: unadapted, **models}


def short_names(paths: Iterable[Path]) -> dict[str, Path]:
    """Files by the shortest distinct ends of their paths, without endings; each file counts once."""
    # Other suffixes are part of a name, as in `epoch_1.5`.
    parts = {
        path: (path.with_suffix("") if path.suffix in (".pth", ".safetensors") else path).parts
        for path in map(Path.absolute, paths)
    }
    names = {}
    for path, own in parts.items():
        lengths = range(1, len(own))
        length = next((n for n in lengths if sum(p[-n:] == own[-n:] for p in parts.values()) == 1), len(own))
        names["/".join(own[-length:])] = path
    return names


def _clip_key(checkpoint: Checkpoint) -> Any:
    """What determines the CLIP of a checkpoint; all files without a config have the same."""
    if checkpoint.config is None and checkpoint.shared is None:
        return checkpoint.is_published
    # A shared model runs as when it was shared.
    config = checkpoint.shared.model if checkpoint.shared else checkpoint.model_config()
    weights = (checkpoint.config or {}).get("arguments", {}).get("clip_weights")
    return config.model_name, config.weights_digest, config.img_size, config.activation, weights
