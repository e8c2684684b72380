"""What `compare_feedback_loops.py` does: evaluate the loops of a feedback run beside the runs that it should beat."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dataset.metadata import metadata_digest
from engine.config import check_device
from engine.data import TaskData, load_task
from engine.detector import Detector, build_detector, load_clip_for, unadapted_detector
from engine.evaluate import (
    METRICS,
    ClassResult,
    Evaluation,
    ImageScore,
    csv_rows,
    evaluate,
    format_value,
    write_csv_rows,
)
from engine.inference import warn_unless_zero_shot
from model.checkpoint import COMPONENTS, TEXT_FILE, Checkpoint, file_digest, read_checkpoint
from model.clip import FrozenCLIP
from model.config import CrossAttentionConfig
from utils.errors import UserError
from utils.files import write_json, write_text
from utils.logging import set_up_logging
from utils.plots import loop_curves
from utils.tables import format_table

logger = logging.getLogger(__name__)

COLUMNS = {
    "pixel_auroc": "Pixel AUC",
    "pixel_ap": "Pixel AP",
    "pixel_f1_max": "Pixel F1",
    "aupro": "AUPRO",
    "image_auroc": "Image AUC",
    "image_ap": "Image AP",
    "image_f1_max": "Image F1",
}
# The panels of `comparison.png`, row by row: pixels to the left, images to the right.
PANELS = ("pixel_auroc", "image_auroc", "pixel_ap", "image_ap", "pixel_f1_max", "image_f1_max", "aupro")
LOOP_FILE = re.compile(r"loop_([1-9][0-9]*)_final\.pth")
# The rows beside the loops: the flag that asks for each, and the file that a run's folder keeps it in.
BASE, CROSS_ATTENTION, UNADAPTED = "base", "cross-attention", "unadapted"
REFERENCES = {BASE: ("--base_path", "image_adapter"), CROSS_ATTENTION: ("--cross_path", "image_adapter_cross_attn")}
UNREADABLE = "unreadable"
CONFIG_KEYS = ("model", "arguments", "dataset", "metadata_digest", "training_mode", "seed")
CLIP_SETTINGS = ("model_name", "weights_digest", "img_size", "activation")
# What makes a comparison unfair where it differs.
TRAINING_FACTS = (DATA, HELD_OUT, SEED, TEXT_STEPS, IMAGE_STEPS) = (
    "training data",
    "share of the training images held out",
    "seed",
    "optimizer steps of the text side",
    "optimizer steps of the image side",
)
CACHE_FILE = "comparison_cache.json"
# Another number makes earlier caches void: raise it when scoring or metrics change.
CACHE_SCHEMA = 2
Results = dict[str, list[ClassResult]]


@dataclass(frozen=True)
class Row:
    """A row of the comparison.

    loop: None beside the loops; checkpoint: None for unadapted CLIP, and where `problem` says why there is none.
    """

    name: str
    loop: int | None = None
    checkpoint: Checkpoint | None = None
    problem: str | None = None

    @property
    def config(self) -> dict[str, Any] | None:
        return self.checkpoint.config if self.checkpoint else None


@dataclass(frozen=True)
class Comparison:
    """What was found: rows in the order of the table, metrics by a row's name, and what a reader must know."""

    dataset: str
    rows: list[Row]
    evaluations: dict[str, Evaluation]
    notes: list[str]

    @property
    def loops(self) -> list[Row]:
        """The loops that have figures, in order."""
        return [row for row in self.rows if row.loop is not None and row.name in self.evaluations]

    @property
    def references(self) -> list[Row]:
        """The rows beside the loops that have figures."""
        return [row for row in self.rows if row.loop is None and row.name in self.evaluations]

    def average(self, row: Row, metric: str) -> float | None:
        """A metric of a row that has figures, averaged over classes, in percent."""
        return self.evaluations[row.name].average(metric)[0]


@dataclass(frozen=True)
class Setting:
    """What all rows are evaluated with; overrides: of the model, as `load_model` takes them."""

    data: TaskData
    device: str
    precision: str
    batch_size: int
    num_workers: int
    clip_weights: str | None
    overrides: Mapping[str, Any]


def compare_feedback_loops(
    save_path: Path,
    dataset: str | None,
    *,
    base_path: Path | None = None,
    cross_path: Path | None = None,
    unadapted: bool = False,
    output_dir: Path | None = None,
    data_root: Path | None = None,
    metadata: Path | None = None,
    class_names: Path | None = None,
    skip_bad_images: bool = False,
    batch_size: int = 8,
    num_workers: int = 0,
    device: str = "auto",
    precision: str = "fp32",
    clip_weights: str | None = None,
    **overrides: Any,
) -> int:
    """Evaluate every loop of a run, and what it is compared with, on the same images: table, `comparison.*` files.

    What `comparison_cache.json` holds of the same checkpoint and images is not evaluated again. Returns the exit
    status: 1 where a loop's file cannot be read, else 0. Raises `UserError` for a folder without loops, for a base or
    cross-attention run that cannot be read, and for data, weights and devices that are not there or do not fit.
    """
    if dataset is None:
        raise UserError("--dataset is needed: the dataset to test on, other than the one trained on")
    device = check_device(device, precision)
    files = find_loops(save_path)
    references = [
        Row(name, checkpoint=read_sound(find_reference(name, path)))
        for name, path in zip(REFERENCES, (base_path, cross_path), strict=True)
        if path is not None
    ]
    loops = [read_loop(number, file) for number, file in files.items()]
    rows = [*([Row(UNADAPTED)] if unadapted else []), *references, *loops]
    data = load_task(dataset, data_root, metadata, class_names, skip_bad_images)
    folder = output_dir or save_path
    if folder.is_file():
        raise UserError(f"--output_dir {folder}: is a file; give a folder")
    set_up_logging(folder / "comparison.log")
    warn_unless_zero_shot([row for row in rows if row.checkpoint], data)
    setting = Setting(data, device, precision, batch_size, num_workers, clip_weights, overrides)
    clip = share_clip(rows, setting)
    if clip is None:
        logger.warning("No loop can be read, and nothing else says on which CLIP to compare: there are no figures")
        rows, evaluations, notes = loops, {}, []
    else:
        rows, evaluations = evaluate_rows(rows, clip, setting, folder / CACHE_FILE)
        notes = [*unfair_notes(rows), *setting_notes(rows, clip.settings)]
    notes = [*broken_notes(save_path, rows), *notes]
    report(Comparison(data.located.spec.name, rows, evaluations, notes), save_path, folder)
    return int(any(row.problem for row in rows))


def find_loops(save_path: Path) -> dict[int, Path]:
    """The final checkpoints of a run's loops, by number and in order; `UserError` where there are none."""
    if not save_path.is_dir():
        what = "is a file; give its folder" if save_path.is_file() else "no such folder"
        raise UserError(f"--save_path {save_path}: {what}")
    found = {}
    for file in save_path.iterdir():
        match = LOOP_FILE.fullmatch(file.name)
        if match and file.is_file():
            found[int(match.group(1))] = file
    if not found:
        raise UserError(
            f"--save_path {save_path}: no loop_*_final.pth in this folder; it holds {checkpoints_in(save_path)}"
        )
    return dict(sorted(found.items()))


def checkpoints_in(folder: Path, most: int = 8) -> str:
    """The checkpoint files of a folder in words, for the message that another one is missing."""
    names = sorted(file.name for file in folder.glob("*.pth"))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more or "no checkpoints"


def find_reference(name: str, path: Path) -> Path:
    """The image checkpoint of a base or cross-attention run: the file given, or the latest in a folder."""
    flag, stem = REFERENCES[name]
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{flag} {path}: no such file or folder")
    latest = path / f"{stem}.pth"
    if latest.is_file():
        return latest
    matches = (re.fullmatch(rf"{stem}_([0-9]+)\.pth", file.name) for file in path.iterdir())
    epochs = [int(match.group(1)) for match in matches if match]
    if not epochs:
        raise UserError(f"{flag} {path}: no {latest.name} in this folder; it holds {checkpoints_in(path)}")
    return path / f"{stem}_{max(epochs)}.pth"


def read_loop(number: int, file: Path) -> Row:
    """A loop's row; a file that cannot be read, or that is no loop's, gives one that says why."""
    name = f"Loop {number}"
    try:
        checkpoint = read_sound(file)
        missing = [part for part in COMPONENTS if part not in checkpoint.components]
        if not (checkpoint.config or {}).get("cross_attention"):
            missing.append("cross_attention in its config")
        if missing:
            raise UserError(f"{file}: not a feedback checkpoint (has no {missing[0]})")
    except UserError as error:
        return Row(name, number, problem=str(error))
    return Row(name, number, checkpoint)


def read_sound(file: Path) -> Checkpoint:
    """A checkpoint without its optimizers; `UserError` for one that is damaged, its config or its values included."""
    try:
        checkpoint = read_checkpoint(file)
        if checkpoint.config is not None:
            missing = [key for key in CONFIG_KEYS if key not in checkpoint.config]
            if missing:
                raise UserError(f"{file}: its config has no '{missing[0]}', so it is damaged")
            checkpoint.model_config()
            CrossAttentionConfig(**(checkpoint.config.get("cross_attention") or {}))
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{file}: its config is damaged ({error!r})") from error
    for name, state in checkpoint.components.items():
        for key, value in state.items():
            if not torch.isfinite(value).all():
                raise UserError(f"{file}: {name} '{key}' holds values that are not finite")
    return replace(checkpoint, optimizers={})


class SharedClip:
    """The one CLIP under all rows: what its host was trained on, or as asked for; loaded when it is first needed.

    settings: model name, weights' digest, image size and activation, which a host with a config tells beforehand.
    """

    def __init__(self, host: Checkpoint, setting: Setting) -> None:
        self.host = host
        self._setting = setting
        self._clip: FrozenCLIP | None = None
        if host.config is None:
            self.settings = {name: getattr(self.get(), name) for name in CLIP_SETTINGS}
        else:
            trained = host.model_config()
            asked = {name: setting.overrides.get(name) for name in ("img_size", "activation")}
            self.settings = {name: asked.get(name) or getattr(trained, name) for name in CLIP_SETTINGS}

    def get(self) -> FrozenCLIP:
        """The CLIP; `UserError` where it cannot be had, or is not the one that the host was trained on."""
        if self._clip is None:
            self._clip = load_clip_for(self.host, self._setting.clip_weights, **self._setting.overrides)
            if self.host.config is not None:
                advice = "give the file it was trained on with --clip_weights"
                check_weights(self.host, self._clip.weights_digest, "those loaded", advice)
        return self._clip


def share_clip(rows: Sequence[Row], setting: Setting) -> SharedClip | None:
    """The CLIP that all rows are evaluated on, which the first loop decides; None where nothing can be read.

    Raises `UserError` where the rows were trained on different weights.
    """
    readable = [row for row in rows if row.checkpoint]
    if not readable:
        return None
    # A base of a file without config says nothing of its CLIP: it is taken to be the others'.
    host = min(readable, key=lambda row: (row.config is None, row.loop is None)).checkpoint
    clip = SharedClip(host, setting)
    for row in readable:
        if row.config is not None:
            check_weights(row.checkpoint, clip.settings["weights_digest"], str(host.path), "the two do not compare")
    return clip


def check_weights(checkpoint: Checkpoint, digest: str, source: str, advice: str) -> None:
    """`UserError` for a checkpoint that was trained on other CLIP weights than those of `digest`, from `source`."""
    config = checkpoint.model_config()
    if config.weights_digest != digest:
        raise UserError(
            f"{checkpoint.path} was trained on other weights of {config.model_name} ({config.weights_digest}) than "
            f"{source} ({digest}); {advice}"
        )


def evaluate_rows(
    rows: Sequence[Row], clip: SharedClip, setting: Setting, cache_file: Path
) -> tuple[list[Row], dict[str, Evaluation]]:
    """Evaluate rows on one CLIP and one reading of the images, but for what the cache holds.

    Returns the rows, some of which may have turned out to be unreadable, and the metrics of the others by name. Raises
    `UserError` for a base or cross-attention checkpoint that does not fit the CLIP.
    """
    keys = cache_keys(rows, clip.settings, setting)
    cache = read_cache(cache_file)
    if cached := [name for name, key in keys.items() if key in cache]:
        logger.info("Taken from %s, not evaluated again: %s", cache_file, ", ".join(cached))
    # By key, so that content which two rows share is evaluated once.
    pending = {keys[row.name]: row for row in rows if not row.problem and keys[row.name] not in cache}
    if pending:
        detectors, problems = build_detectors(pending, clip.get(), setting)
        rows = [
            replace(row, checkpoint=None, problem=problems[keys[row.name]]) if keys.get(row.name) in problems else row
            for row in rows
        ]
        if detectors:
            found = evaluate(
                detectors, setting.data, setting.device, setting.batch_size, setting.num_workers, setting.precision
            )
            cache |= {key: evaluation.classes for key, evaluation in found.items()}
            write_cache(cache_file, cache)
    dataset = setting.data.located.spec.name
    return list(rows), {
        row.name: Evaluation(row.name, dataset, cache[keys[row.name]]) for row in rows if not row.problem
    }


def build_detectors(
    pending: Mapping[str, Row], clip: FrozenCLIP, setting: Setting
) -> tuple[dict[str, Detector], dict[str, str]]:
    """Models by key, and by key what is wrong with the loops whose weights do not fit."""
    detectors: dict[str, Detector] = {}
    problems: dict[str, str] = {}
    for key, row in pending.items():
        if row.checkpoint is None:
            detectors[key] = unadapted_detector(clip).to(setting.device)
            continue
        try:
            detectors[key] = build_detector(row.checkpoint, clip, **setting.overrides).to(setting.device)
        except UserError as error:
            if row.loop is None:
                raise
            problems[key] = str(error)
    return detectors, problems


def cache_keys(rows: Sequence[Row], clip_settings: Mapping[str, Any], setting: Setting) -> dict[str, str]:
    """By a row's name, a digest of all that its figures depend on; a row that cannot be read has none."""
    in_clip_settings = ("img_size", "activation")
    shared = {
        "clip": clip_settings,
        "images": image_digest(setting.data),
        "prompt_names": setting.data.names,
        "domain": setting.data.located.spec.domain,
        "precision": setting.precision,
        "overrides": {
            name: value
            for name, value in setting.overrides.items()
            if value is not None and name not in in_clip_settings
        },
    }
    return {row.name: digest_of({**shared, "files": file_digests(row)}) for row in rows if not row.problem}


def file_digests(row: Row) -> list[str]:
    """SHA-256 of a row's checkpoint file, and of the text side beside it where it may have been taken from there."""
    if row.checkpoint is None:
        return []
    beside = row.checkpoint.path.with_name(TEXT_FILE)
    files = [row.checkpoint.path, *([beside] if row.config is None and beside.is_file() else [])]
    return [file_digest(file) for file in files]


def image_digest(data: TaskData) -> str:
    """A digest of the images' list, and of what the file system tells of the files: reading them all would take long.

    The list alone says too little: images of other content may have the same names and labels.
    """
    paths = [path for record in data.records for path in (record.image_path, record.mask_path) if path]
    found = []
    for path in paths:
        try:
            status = (data.located.root / path).stat()
        except OSError:  # whoever reads it will say so, with its path
            continue
        found.append([path, status.st_size, status.st_mtime_ns])
    return digest_of([metadata_digest(data.records), found])


def digest_of(value: Any) -> str:
    """SHA-256 of plain data, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("ascii")).hexdigest()


def read_cache(path: Path) -> Results:
    """Metrics per class of what was evaluated before, by key; a file that cannot be read is ignored with a warning."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != CACHE_SCHEMA:
            raise ValueError(f"schema {content['schema']}")
        return {key: [_class_result(item) for item in classes] for key, classes in content["results"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        logger.warning("%s cannot be used (%r): everything is evaluated again", path, error)
        return {}


def _class_result(item: Mapping[str, Any]) -> ClassResult:
    values = {metric: None if item[metric] is None else float(item[metric]) for metric in METRICS}
    scores = tuple(ImageScore(str(path), bool(anomalous), float(score)) for path, anomalous, score in item["scores"])
    return ClassResult(str(item["class"]), values, scores)


def write_cache(path: Path, results: Results) -> None:
    """Keep metrics per class and scores per image by key, in full precision."""
    rows = {
        key: [
            {"class": r.class_name, **r.values, "scores": [[s.path, s.anomalous, s.score] for s in r.scores]}
            for r in classes
        ]
        for key, classes in results.items()
    }
    write_json(path, {"schema": CACHE_SCHEMA, "results": rows})


def broken_notes(save_path: Path, rows: Sequence[Row]) -> list[str]:
    """What is wrong with the run's files: loops that cannot be read, and loops that are not there."""
    notes = [f"{row.name} is unreadable: {row.problem}" for row in rows if row.problem]
    numbers = {row.loop for row in rows if row.loop is not None}
    planned = planned_loops(save_path, rows)
    missing = [number for number in range(1, max(*numbers, planned) + 1) if number not in numbers]
    if missing:
        files = ", ".join(f"loop_{number}_final.pth" for number in missing)
        plan = f" (the run planned {planned} loops)" if planned else ""
        notes.append(f"Missing in {save_path}: {files}{plan}; the others are compared")
    return notes


def planned_loops(save_path: Path, rows: Sequence[Row]) -> int:
    """How many loops the run was to have, by its checkpoints and its `args.json`; 0 where nothing tells."""
    arguments = [row.config["arguments"] for row in rows if row.loop is not None and row.config]
    file = save_path / "args.json"
    try:
        arguments.append(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s): the checkpoints alone say how many loops were planned", file, error)
    counts = [item.get("num_feedback_loops") for item in arguments if isinstance(item, dict)]
    return max((count for count in counts if isinstance(count, int)), default=0)


def unfair_notes(rows: Sequence[Row]) -> list[str]:
    """In what the last loop's training differs from that of the base, of cross-attention, and of the other loops."""
    loops = [row for row in rows if row.loop is not None and row.checkpoint]
    if not loops:
        return []
    *others, last = loops
    references = [row for row in rows if row.loop is None and row.checkpoint]
    # Loops of one run differ in steps by nature.
    return [
        *(note for row in references for note in differences(last, row, {**training(row), **steps(row)})),
        *(note for row in others for note in differences(last, row, training(row))),
    ]


def differences(last: Row, other: Row, facts: Mapping[str, Any]) -> list[str]:
    """The facts of `other` that are not those of the last loop, each in a sentence with both values."""
    mine = {**training(last), **steps(last)}
    notes = []
    for fact, value in facts.items():
        if None in (value, mine[fact]):
            said = " against ".join("unknown" if item is None else str(item) for item in (mine[fact], value))
            notes.append(f"Perhaps an unfair comparison: {last.name} and {other.name} may differ in {fact}: {said}")
        elif value != mine[fact]:
            notes.append(
                f"Unfair comparison: {last.name} and {other.name} differ in {fact}: {mine[fact]} against {value}"
            )
    return notes


def training(row: Row) -> dict[str, Any]:
    """On what, and from which seed, a row was trained, by names of `TRAINING_FACTS`; None where its file is silent."""
    config = row.config
    if config is None:
        return dict.fromkeys((DATA, HELD_OUT, SEED))
    shot = config.get("shot")
    images = config["training_mode"] if shot is None else f"{config['training_mode']} with {shot} images per class"
    return {
        DATA: f"{config['dataset']} (image list {config['metadata_digest'][:12]}), {images}",
        HELD_OUT: config["arguments"].get("val_fraction") or 0.0,
        SEED: config["seed"],
    }


def steps(row: Row) -> dict[str, Any]:
    """Optimizer steps that a row's weights have seen, those of the run that it started from included."""
    known = row.checkpoint.steps or {}
    return {TEXT_STEPS: known.get("text"), IMAGE_STEPS: known.get("image")}


def setting_notes(rows: Sequence[Row], used: Mapping[str, Any]) -> list[str]:
    """Rows that are not what their name says, or were trained at another image size or activation than `used`."""
    notes = []
    for row in rows:
        if row.config is None:
            continue
        crossed = bool(row.config.get("cross_attention"))
        if row.loop is None and crossed != (row.name == CROSS_ATTENTION):
            has = "has" if crossed else "has no"
            notes.append(f"{row.name} is not what its name says: {row.checkpoint.path} {has} cross-attention")
        for name in ("img_size", "activation"):
            trained = row.config["model"][name]
            if trained != used[name]:
                notes.append(
                    f"{row.name} was trained with {name} {trained}, and is tested with {used[name]} as all are"
                )
    return notes


def report(comparison: Comparison, save_path: Path, folder: Path) -> None:
    """Say what was found, and write `comparison.csv`, `comparison.md` and `comparison.png` to `folder`."""
    cells = table_cells(comparison)
    lines = [*best_lines(comparison), *improvement_lines(comparison)]
    logger.info("\nFeedback loops of %s on %s, in percent\n\n%s\n", save_path, comparison.dataset, format_table(*cells))
    for line in lines:
        logger.info("%s", line)
    for note in comparison.notes:
        logger.warning("%s", note)
    write_csv_rows([line for row in comparison.rows for line in csv_lines(comparison, row)], folder / "comparison.csv")
    write_text(folder / "comparison.md", markdown(comparison, cells, lines, save_path))
    draw(comparison, folder / "comparison.png")
    logger.info("Written to %s, comparison.md and comparison.png", folder / "comparison.csv")


def table_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The header and rows of the summary: averages over classes in percent."""
    rows = []
    for row in comparison.rows:
        figures = [UNREADABLE] * len(METRICS)
        if row.name in comparison.evaluations:
            figures = [format_value(comparison.average(row, metric)) for metric in METRICS]
        rows.append([row.name, *figures])
    return ["Loop", *(COLUMNS[metric] for metric in METRICS)], rows


def csv_lines(comparison: Comparison, row: Row) -> list[Sequence[object]]:
    """A row's lines in `comparison.csv`: each class, then the average; one line for a row that cannot be read."""
    if row.name in comparison.evaluations:
        return csv_rows(comparison.evaluations[row.name])
    return [[row.name, comparison.dataset, "average", "n/a", "n/a", *[UNREADABLE] * len(METRICS)]]


def best_lines(comparison: Comparison) -> list[str]:
    """The loop with the highest pixel and image AUC, the earliest of equals."""
    lines = []
    for metric in ("pixel_auroc", "image_auroc"):
        best = best_loop(comparison, metric)
        said = f"{best.name} ({format_value(comparison.average(best, metric))})" if best else "n/a"
        lines.append(f"Best {COLUMNS[metric]}: {said}")
    return lines


def best_loop(comparison: Comparison, metric: str) -> Row | None:
    """The loop with the highest average of a metric, the earliest of equals; None where no loop has one."""
    known = [row for row in comparison.loops if comparison.average(row, metric) is not None]
    return max(known, key=lambda row: comparison.average(row, metric), default=None)


def improvement_lines(comparison: Comparison) -> list[str]:
    """What the last loop has gained on the first, and on each of the other rows, in points."""
    loops = comparison.loops
    starts = [*loops[:1], *comparison.references] if len(loops) > 1 else comparison.references if loops else []
    return [f"Improvement from {row.name} to {loops[-1].name}: {gains(comparison, row, loops[-1])}" for row in starts]


def gains(comparison: Comparison, before: Row, after: Row) -> str:
    """The differences of all metrics between two rows, in points."""
    said = []
    for metric in METRICS:
        old, new = (comparison.average(row, metric) for row in (before, after))
        # Adding 0 takes the sign from a zero that was negative before it was rounded.
        points = "n/a" if old is None or new is None else f"{round(new - old, 2) + 0:+.2f}"
        said.append(f"{COLUMNS[metric]} {points}")
    return f"{', '.join(said)} points"


def markdown(
    comparison: Comparison, cells: tuple[list[str], list[list[str]]], lines: Sequence[str], save_path: Path
) -> str:
    """The comparison as a page: the table, what follows from it, and what a reader must know before believing it."""
    facts = [[row.name, *trained_in_words(row)] for row in comparison.rows if row.checkpoint]
    parts = [
        f"# Feedback loops of `{save_path.as_posix()}` on {comparison.dataset}",
        "Metrics in percent, averaged over classes; of each class in `comparison.csv`.",
        markdown_table(*cells),
        "\n".join(f"- {line}" for line in lines),
    ]
    if comparison.notes:
        parts += ["## Before comparing", "\n".join(f"- {note}" for note in comparison.notes)]
    if facts:
        parts += ["## Training", markdown_table(["", *TRAINING_FACTS], facts)]
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column stands to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def trained_in_words(row: Row) -> list[str]:
    """The values of `TRAINING_FACTS` of a row that has a checkpoint."""
    facts = {**training(row), **steps(row)}
    return ["unknown" if facts[name] is None else str(facts[name]) for name in TRAINING_FACTS]


def draw(comparison: Comparison, path: Path) -> None:
    """`comparison.png`: a panel per metric."""
    loops = comparison.loops
    panels = {}
    for metric in PANELS:
        best, title = best_loop(comparison, metric), COLUMNS[metric]
        heading = title if best is None else f"{title} (best: {best.name}, {comparison.average(best, metric):.2f})"
        panels[heading] = (
            {row.loop: comparison.average(row, metric) for row in loops},
            {row.name: comparison.average(row, metric) for row in comparison.references},
        )
    loop_curves(panels, path, f"Feedback loops on {comparison.dataset}, in percent")
