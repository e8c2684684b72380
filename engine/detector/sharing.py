"""A model as a folder to share: trained components, training choices, thresholds, and a model card."""

import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from string import Template
from typing import Any

from dataset.prompts import NAMES
from engine.detector.calibration import CALIBRATION_FILE, Entry, add_entry
from engine.detector.hub import CARD_FILE, SHARED_FILES
from model.checkpoint import Checkpoint
from model.clip_loading import DEFAULT_TAG, is_tag
from model.config import TOY, limits_of
from model.shared import POSITION, Shared, is_shared, write_shared
from utils.errors import UserError
from utils.files import check_folder, write_text
from utils.reading import read_table
from utils.text import markdown_table

logger = logging.getLogger(__name__)

CARD = Path(__file__).with_name("card.md")

# Common licences under the hub's names; others are "other" with a name.
HUB_LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0")
NOT_STATED = "not stated"
# CLIP models trained by OpenAI, under MIT.
OPENAI_MODELS = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336")
_LOCAL = "local-dir:"
# Training arguments that are paths of the training machine.
PATH_ARGUMENTS = (
    "data_root",
    "metadata",
    "save_path",
    "load_base_text_adapter",
    "load_base_image_adapter",
    "init_from",
)


def write_pretrained(
    checkpoint: Checkpoint,
    shared: Shared,
    entries: Sequence[Entry],
    folder: Path,
    licence: str | None,
    address: str | None,
) -> Path:
    """Write what `Detector.save_pretrained` writes, with the forward of `shared`; returns the folder."""
    check_target(folder)
    shared = shared._replace(model=replace(shared.model, model_name=without_folders(shared.model.model_name)))
    weights = (checkpoint.config or {}).get("arguments", {}).get("clip_weights")
    config = None if checkpoint.config is None else public_config(checkpoint.config)
    checkpoint = replace(checkpoint, config=config)
    position = {name: getattr(checkpoint, name) for name in POSITION}
    write_shared(folder, shared, checkpoint.components, position)
    thresholds = folder / CALIBRATION_FILE
    thresholds.unlink(missing_ok=True)
    for entry in entries:
        add_entry(thresholds, entry)
    licences = (licence, clip_licence(shared.model.model_name, weights))
    text = model_card(checkpoint, shared, licences, address or folder.resolve().name)
    write_text(folder / CARD_FILE, text)
    return folder


def check_target(folder: Path, flag: str = "") -> None:
    """Raise `UserError` for a folder that cannot be written, or that holds something other than a shared model."""
    check_folder(folder, flag or "the folder")
    existing = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if existing and not is_shared(folder):
        raise UserError(f"{flag} {folder}: holds {existing[0]}, and no shared model; give a new folder".strip())
    if existing:
        logger.warning("%s already holds a model: its %s are replaced", folder, ", ".join(SHARED_FILES))


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's config without paths of the training machine; names of datasets and CLIP folders stay."""
    model_name, arguments = config["model"]["model_name"], dict(config["arguments"])
    for name, value in arguments.items():
        is_file = (name == "class_names" and value not in NAMES) or (
            name == "clip_weights" and value is not None and not is_tag(model_name, value)
        )
        if is_file or name in PATH_ARGUMENTS:
            arguments[name] = None
        elif name in ("dataset", "eval_dataset", "model_name") and isinstance(value, str):
            arguments[name] = without_folders(value)
    model = {**config["model"], "model_name": without_folders(model_name)}
    return {**config, "dataset": without_folders(config["dataset"]), "model": model, "arguments": arguments}


def without_folders(text: str) -> str:
    """The last part of a path of any system, or of the folder of a local CLIP; other text unchanged."""
    prefix = _LOCAL if text.startswith(_LOCAL) else ""
    return prefix + PurePosixPath(PureWindowsPath(text.removeprefix(_LOCAL)).as_posix()).name


def read_metrics(checkpoint: Path, names: Collection[str]) -> list[dict[str, str]]:
    """The averages for a model with one of `names` in the CSV files next to its checkpoint."""
    averages = []
    folder = checkpoint.parent
    for file in [*sorted(folder.glob("results/evaluation_*.csv")), *sorted(folder.glob("comparison*.csv"))]:
        if file.stat().st_mtime < checkpoint.stat().st_mtime:
            logger.warning("%s is older than the checkpoint and is not included in the model card", file)
            continue
        rows = [row for _, row in read_table(file) if row.pop("class", None) == "average"]
        averages += [row for row in rows if row.pop("model", None) in names]
    return averages


def clip_licence(model_name: str, clip_weights: str | None) -> str:
    """The licence of CLIP's own weights, as far as their name shows it."""
    if model_name == TOY:
        return "this project's, which trained it"
    openai = model_name.removesuffix("-quickgelu") in OPENAI_MODELS and clip_weights in (None, DEFAULT_TAG)
    return "MIT, if they are OpenAI's" if openai else NOT_STATED


def model_card(checkpoint: Checkpoint, shared: Shared, licences: tuple[str | None, str], address: str) -> str:
    """The README of a shared model; licences: of the trained components, and of CLIP's weights."""
    licence, licence_of_clip = licences
    model, tag = shared.model, ""
    if licence:
        known = licence.lower() in HUB_LICENCES
        tag = f"license: {licence.lower()}\n" if known else f"license: other\nlicense_name: {json.dumps(licence)}\n"
    return Template(CARD.read_text(encoding="utf-8")).substitute(
        licence_tag=tag,
        name=shared.name,
        components="adapters and cross-attention" if shared.cross_attention else "adapters",
        address=json.dumps(address),
        clip=model.model_name,
        limits=f"\n{limits}." if (limits := limits_of(model.model_name)) else "",
        img_size=model.img_size,
        activation=model.activation,
        digest=model.weights_digest,
        training=_describe_training(checkpoint),
        metrics=_describe_metrics(checkpoint, {shared.name, f"Loop {checkpoint.loop}"}),
        licence=licence or NOT_STATED,
        clip_licence=licence_of_clip,
    )


def _describe_training(checkpoint: Checkpoint) -> str:
    config = checkpoint.config
    epochs = "An unknown number of" if checkpoint.epoch is None else checkpoint.epoch
    text = f"{epochs} image epochs" + (f", feedback loop {checkpoint.loop}" if checkpoint.loop else "")
    if config is None:
        return f"{text}; the original file does not name the training data."
    images = f"{config['shot']} images per class" if config.get("shot") else "all images"
    return f"{text} on {config['dataset']} ({images}), seed {config['seed']}."


def _describe_metrics(checkpoint: Checkpoint, names: Collection[str]) -> str:
    """The metrics next to a checkpoint, as a table, with a note if they are not zero-shot."""
    metrics = read_metrics(checkpoint.path, names)
    if not metrics:
        return "Not measured before this folder was written."
    rows = [[_cell(row.get(column) or "") for column in metrics[0]] for row in metrics]
    text = markdown_table(list(metrics[0]), rows) + "\n\nAverages over classes, in percent."
    trained_on = checkpoint.config and checkpoint.config["dataset"]
    if all(row.get("dataset") != trained_on for row in metrics):
        return text
    note = "the model was trained on it, so these metrics do not apply to unseen data."
    return f"{text}\n\n**Not zero-shot on {trained_on}:** {note}"


def _cell(value: str) -> str:
    """A cell of a Markdown table: metrics with two decimals, text escaped."""
    return f"{float(value):.2f}" if re.fullmatch(r"\d+\.\d+", value) else value.replace("|", "\\|")
