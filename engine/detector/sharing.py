"""A model as a folder to share: trained components, what they were trained on and with, and a card for people."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, get_args

from dataset.options import NAMES
from engine.config.training import FeedbackConfig
from engine.detector.calibration import CALIBRATION_FILE, add_entry
from engine.detector.hub import CARD_FILE, SHARED_FILES
from model.checkpoint import state_of
from model.clip_loading import DEFAULT_TAG, is_tag
from model.config import ModelConfig
from model.shared import Shared, is_shared, write_shared
from utils.errors import UserError
from utils.files import check_folder, write_text
from utils.schema import type_hints

if TYPE_CHECKING:
    from engine.detector.detector import Detector

logger = logging.getLogger(__name__)

# The hub knows these by name; any other is given to it as "other", with its name.
HUB_LICENCES = (
    "apache-2.0",
    "mit",
    "bsd-2-clause",
    "bsd-3-clause",
    "gpl-3.0",
    "agpl-3.0",
    "lgpl-3.0",
    "mpl-2.0",
    "cc0-1.0",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
    "openrail",
    "unknown",
)
NOT_STATED = "not stated"
# CLIP models that OpenAI trained: its code, and the weights with it, are under MIT.
OPENAI_MODELS = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336")
_LOCAL = "local-dir:"


def save_pretrained(detector: Detector, folder: Path, licence: str | None = None, address: str | None = None) -> Path:
    """Write `model.safetensors`, `config.json` and the card `README.md` to a folder that `load_model` takes.

    Thresholds that the model was calibrated to go along. CLIP's weights are named with their digest, not written; paths
    of this machine are left out. The card has the metrics that testing or a comparison of loops has left beside the
    checkpoint. licence: of the trained components; address: where the card says that the model is loaded from, the
    folder's name without it.
    Raises `UserError` for unadapted CLIP, and for a folder that holds something else.
    """
    if detector.source is None:
        raise UserError(f"{detector.name} has nothing trained that could be shared; give a checkpoint")
    check_target(folder)
    model, source = detector.model, detector.source
    crossed = getattr(model, "cross_config", None)
    shared = Shared(detector.name, _without_folder(model.config), crossed, detector.det_score)
    components = {name: state_of(part) for name, part in model.components.items() if name in source.components}
    config = None if source.config is None else public_config(source.config)
    position = {"epoch": source.epoch, "loop": source.loop, "steps": source.steps, "config": config}
    write_shared(folder, shared, components, position)
    thresholds = folder / CALIBRATION_FILE
    thresholds.unlink(missing_ok=True)
    for entry in detector.calibration:
        if entry.checkpoint == detector.digest:
            add_entry(thresholds, entry)
    metrics = measured(source.path, {detector.name, f"Loop {source.loop}"})
    write_text(folder / CARD_FILE, card(detector, metrics, licence, address or folder.resolve().name))
    return folder


def check_target(folder: Path, flag: str = "") -> None:
    """Refuse a folder that cannot be written to, or that holds anything but a model that was shared before."""
    check_folder(folder, flag or "the folder")
    there = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if there and not is_shared(folder):
        raise UserError(f"{flag} {folder}: holds {there[0]}, and no model to share; give a new folder".strip())
    if there:
        logger.warning("%s holds a model already: its %s are replaced", folder, ", ".join(SHARED_FILES))


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's config without paths of the machine that trained it; names of datasets and CLIP folders stay."""
    hints = type_hints(FeedbackConfig)
    model_name, arguments = config["model"]["model_name"], dict(config["arguments"])
    for name, value in arguments.items():
        is_path = Path in (hints.get(name), *get_args(hints.get(name)))
        is_file = (name == "class_names" and value not in NAMES) or (
            name == "clip_weights" and value is not None and not is_tag(model_name, value)
        )
        if is_path or is_file:
            arguments[name] = None
        elif name in ("dataset", "model_name") and isinstance(value, str):
            arguments[name] = without_folders(value)
    model = {**config["model"], "model_name": without_folders(model_name)}
    return {**config, "dataset": without_folders(config["dataset"]), "model": model, "arguments": arguments}


def _without_folder(config: ModelConfig) -> ModelConfig:
    return replace(config, model_name=without_folders(config.model_name))


def without_folders(text: str) -> str:
    """The last part of a path of any system, and of a CLIP's folder; any other text as it is."""
    prefix = _LOCAL if text.startswith(_LOCAL) else ""
    return prefix + PurePosixPath(PureWindowsPath(text.removeprefix(_LOCAL)).as_posix()).name


def measured(checkpoint: Path, names: Collection[str]) -> list[dict[str, str]]:
    """The averages that tests left beside a checkpoint, under one of its `names`; a row for dataset and det score."""
    rows = []
    folder = checkpoint.parent
    for file in [*sorted(folder.glob("results/evaluation_*.csv")), *sorted(folder.glob("comparison*.csv"))]:
        if file.stat().st_mtime < checkpoint.stat().st_mtime:
            logger.warning("%s is older than the checkpoint, and is left out of the card", file)
            continue
        with file.open(encoding="utf-8", newline="") as lines:
            found = [
                row for row in csv.DictReader(lines) if row.get("model") in names and row.get("class") == "average"
            ]
        rows += [{key: value or "" for key, value in row.items() if key not in ("model", "class")} for row in found]
    return rows


def clip_licence(model_name: str, clip_weights: str | None) -> str:
    """The licence of CLIP's own weights, as far as their name tells it."""
    if model_name == "toy":
        return "this project's, which trained it"
    openai = model_name.removesuffix("-quickgelu") in OPENAI_MODELS and clip_weights in (None, DEFAULT_TAG)
    return "MIT, where they are OpenAI's" if openai else NOT_STATED


def card(detector: Detector, metrics: Sequence[Mapping[str, str]], licence: str | None, address: str) -> str:
    """The README of a shared model: what it is, how to load it, training, metrics, licences."""
    config, source = detector.config or {}, detector.source
    model, clip = detector.model.config, detector.clip
    crossed = getattr(detector.model, "cross_config", None)
    clip_name = without_folders(model.model_name)
    kind = "adapters and cross-attention" if crossed else "adapters"
    head = ["tags: [anomaly-detection, zero-shot, clip]"]
    if licence:
        known = licence.lower() in HUB_LICENCES
        head += [f"license: {licence.lower()}"] if known else ["license: other", f"license_name: {json.dumps(licence)}"]
    loop = f", loop {source.loop} of feedback" if source.loop else ""
    epochs = "an unknown number of" if source.epoch is None else source.epoch
    trained = f"{epochs} image epochs{loop}"
    if config:
        shots = f"{config['shot']} images per class" if config.get("shot") else "all images"
        trained += f" on {without_folders(config['dataset'])} ({shots}), seed {config['seed']}"
    else:
        trained += "; the file that it came from does not say on what"
    lines = [
        "---",
        *head,
        "---",
        "",
        f"# {detector.name}",
        "",
        f"Zero-shot anomaly detection: {kind} for a frozen CLIP. This folder holds what was trained, not CLIP.",
        "",
        "## How to load it",
        "",
        "In a checkout of the code that made it:",
        "",
        "```python",
        "from engine import load_model",
        "",
        f"model = load_model({json.dumps(address)})",
        'anomaly_map, score, level_maps = model.predict("image.png", class_name="metal screw")',
        "```",
        "",
        f"CLIP's weights are loaded by name: {clip_name} at {model.img_size} px under {model.activation}, digest "
        f'`{clip.weights_digest}`. `load_model(..., clip_weights="FILE")` takes them from a file; other weights than '
        "these are refused.",
        "",
        "## Training",
        "",
        f"{trained[0].upper()}{trained[1:]}.",
        "",
        "## Metrics",
        "",
    ]
    if metrics:
        seen = without_folders(config["dataset"]) if config else None
        columns = list(metrics[0])
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(_shown(row.get(column, '')) for column in columns)} |" for row in metrics]
        lines += ["", "Averages over classes, in percent."]
        if any(row.get("dataset") == seen for row in metrics):
            lines += ["", f"**Not zero-shot:** on {seen} it was trained, so these figures say nothing of unseen data."]
    else:
        lines += ["None were measured where this was saved."]
    weights = (config.get("arguments") or {}).get("clip_weights")
    lines += [
        "",
        "## Licence",
        "",
        f"Trained components: {licence or NOT_STATED}. CLIP's weights: {clip_licence(clip_name, weights)}.",
        "",
    ]
    return "\n".join(lines)


def _shown(value: str) -> str:
    """A cell of a table: figures with two decimals, text without what would end the cell."""
    try:
        return f"{float(value):.2f}" if "." in value else value
    except ValueError:
        return value.replace("|", "\\|").replace("\n", " ")
