"""The options of the scripts that test, compare and visualise models."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from dataset.catalog import GROUPS
from dataset.prompts import NAMES
from dataset.records import HALF
from engine.config.common import DataArguments, ImageArguments, MachineArguments, ModelArguments
from engine.config.training import CrossAttentionArguments
from engine.detector.hub import NO_CHECKPOINT
from model.config import (
    ADAPTED,
    DET_SCORES,
    IMAGE_FEATURES,
    OVERRIDES,
    REFERENCE_FEATURES,
    REFERENCE_WEIGHT,
    TILES,
    CrossAttentionConfig,
    tiles_choice,
)
from utils.arguments import Arguments, number, path
from utils.errors import UserError
from utils.fields import POSITIONAL, changed, setting
from utils.processes import check_single_process

ALL, ORIGINAL = "all", "original"
TRAINED = "as trained"
# In a file without a config.
ASSUMED = f"{TRAINED}, else"
TEST_DATASET = "dataset to test on: a catalog name, or a folder in MVTec's layout"
TEST_ROOT = "the run's while it exists, $ANOMALY_DATA_ROOT, else data"
# Image and pixel threshold.
Thresholds = tuple[float, float]
# The class of images if none is given.
DEFAULT_CLASS = "object"
# Options of `ProtocolArguments`.
PROTOCOL = ("aupro_limit", "map_size", "threshold", "escape_rate", "overkill_rate")
# Options that `inference.py` rejects, with the reason, by mode.
_NO_FALSE_ALARMS = {"false_alarms": "--false_alarms needs --calibrate"}
_NO_DATASET = {
    **dict.fromkeys((*PROTOCOL, "save_maps"), "metrics need images that are known to be normal or anomalous"),
    **dict.fromkeys(("metadata", "mask_threshold"), "without a dataset there are no masks and lists"),
    **dict.fromkeys(("batch_size", "compile"), "images that are not in a dataset are processed one at a time"),
}
_REJECTED = {
    "calibrate": {
        **_NO_DATASET,
        **dict.fromkeys(("dataset", "image", "normal", "anomalous"), "--calibrate takes only normal images"),
        **dict.fromkeys(("visualize", "output_dir", "json"), "--calibrate writes only thresholds, to --calibration"),
    },
    "image": {
        **_NO_DATASET,
        **dict.fromkeys(("dataset", "normal", "anomalous"), "--image scores images that are not in a dataset"),
        "visualize": "--image draws a heatmap of each image anyway",
        **_NO_FALSE_ALARMS,
    },
    "two folders": {
        **_NO_FALSE_ALARMS,
        **dict.fromkeys(
            ("dataset", "metadata", "class_names", "mask_threshold"), "--normal and --anomalous replace a dataset"
        ),
        "class_from_folder": "--normal and --anomalous contain images of one class",
        **dict.fromkeys(("aupro_limit", "map_size"), "without masks there are no pixel metrics"),
    },
    "dataset": {
        **_NO_FALSE_ALARMS,
        "class_from_folder": "--class_from_folder needs --image or --calibrate",
        "class_name": "all classes of a dataset are tested, and --class_names FILE renames them",
        "domain": "a dataset has its own domain",
    },
}
# Options of `engine.evaluation.references.ReferenceChoice`.
REFERENCES = ("references", "reference_shots", "reference_seed", "reference_weight", "reference_features")

_task, _references = partial(setting, group="task"), partial(setting, group="references")
_metrics = partial(setting, group="metrics")
_as_trained = partial(changed, ModelArguments, default=None, unset=TRAINED)
_cross = partial(changed, CrossAttentionArguments, default=None)


def all_or_number(text: str) -> str | int:
    """The word all, or a positive number."""
    return text if text == ALL else number(int, (1, 1_000_000))(text)


def original_or_side(text: str) -> str | int:
    """The word original, or the side of a square in pixels."""
    return text if text == ORIGINAL else number(int, (1, 8192))(text)


def all_or_index(text: str) -> str | int:
    """The word all, or an index from 0."""
    return text if text == ALL else number(int, (0, 1_000_000))(text)


@dataclass(frozen=True, kw_only=True)
class TrainedModelArguments(Arguments):
    """The model of a checkpoint: it runs as it was trained unless an option replaces that."""

    model_name: str | None = _as_trained("model_name")
    clip_weights: str | None = _as_trained("clip_weights", unset=f"{ASSUMED} from the hub")
    img_size: int | None = _as_trained("img_size")
    activation: str | None = _as_trained("activation")
    det_score: str | None = _task(
        None,
        "image score: similarity to the abnormal anchor, or difference of the similarities to both anchors",
        choices=DET_SCORES,
        unset=DET_SCORES[0],
    )
    image_feature: str | None = _task(
        None,
        "image score: the trained projector of the patches, or CLIP's own class token (a second forward pass)",
        choices=IMAGE_FEATURES,
        unset=TRAINED,
    )

    def overrides(self) -> dict[str, Any]:
        """The choices that replace those of a checkpoint, for `load_model`."""
        names = (item.name for item in fields(self))
        return {name: value for name in names if name in OVERRIDES and (value := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True)
class TestingArguments(MachineArguments, ImageArguments, TrainedModelArguments):
    """Options of all testing."""

    less_memory: ClassVar = "a smaller --batch_size, --precision bf16, a smaller --img_size"

    surgery: str | None = _as_trained("surgery")
    surgery_until_layer: int | None = _as_trained("surgery_until_layer")
    data_root: Path | None = changed(ImageArguments, "data_root", unset=TEST_ROOT)
    class_names: str | None = changed(ImageArguments, "class_names", unset=f"{ASSUMED} the catalog's")
    mask_threshold: str | float | None = changed(ImageArguments, "mask_threshold", None, unset=f"{ASSUMED} {HALF}")
    batch_size: int = setting(8, "images in a forward pass", "machine", between=(1, 100_000))


@dataclass(frozen=True, kw_only=True)
class ReferenceArguments(Arguments):
    """Normal references (`engine.evaluation.references.ReferenceChoice`)."""

    references: Path | None = _references(
        None, "folder of a few normal images to compare with; with several classes, a folder for each"
    )
    reference_shots: int | None = _references(
        None,
        "number of references of each class; without --references, from the dataset's train/good or --calibrate",
        between=(1, 100_000),
        unset="all of --references",
    )
    reference_seed: int = _references(0, "seed of the choice of --reference_shots", between=(0, 2**31))
    reference_weight: float = _references(
        REFERENCE_WEIGHT, "share of references in the anomaly map; the text has the rest", between=(0, 1)
    )
    reference_features: str = _references(
        REFERENCE_FEATURES[0],
        "patch features to compare: trained, frozen, or both (the last two need a second forward pass)",
        choices=REFERENCE_FEATURES,
    )

    def check(self) -> None:
        for name in () if self.references or self.reference_shots else self.not_default(REFERENCES):
            raise UserError(f"--{name} needs --references or --reference_shots: give one, or leave --{name} out")


@dataclass(frozen=True, kw_only=True)
class ProtocolArguments(Arguments):
    """How metrics are computed."""

    aupro_limit: float = _metrics(0.3, "false positive rate up to which AUPRO is integrated", between=(1e-6, 1))
    map_size: str | int | None = _metrics(
        None,
        "size of maps and masks: original (each image's own), or the side of a square",
        type=original_or_side,
        unset="the model's input",
    )
    threshold: tuple[float, ...] | None = _metrics(
        None,
        "thresholds of scores and calibrated maps, or one for both",
        between=(-1e30, 1e30),
        unset="those of a calibration, if any",
    )
    escape_rate: float | None = _metrics(None, "share of missed anomalous images for the overkill", between=(0, 1))
    overkill_rate: float | None = _metrics(None, "share of rejected normal images for the escapes", between=(0, 1))

    @property
    def note(self) -> str:
        """Added to a heading if pixel metrics are not the usual ones."""
        limit = "" if self.aupro_limit == ProtocolArguments.aupro_limit else f", AUPRO up to {self.aupro_limit:g}"
        return limit + ("" if self.map_size is None else f", map size {self.map_size}")

    @property
    def thresholds(self) -> Thresholds | None:
        """One threshold applies to images and pixels."""
        return None if self.threshold is None else (self.threshold[0], self.threshold[-1])

    def check(self) -> None:
        if self.threshold is not None and len(self.threshold) > 2:
            raise UserError(f"--threshold {' '.join(map(str, self.threshold))}: give one or two numbers")
        super().check()


@dataclass(frozen=True, kw_only=True)
class RescoreArguments(ProtocolArguments, ImageArguments):
    """Options of `python -m engine.evaluation.rescore`."""

    not_options: ClassVar = ("class_names", "max_megapixels")

    maps: Path = setting(
        MISSING, "folder of maps (.npy, .npz, .tiff, 16-bit .png) with the images' paths", POSITIONAL, type=path
    )
    dataset: str = _task(MISSING, TEST_DATASET)
    scores: Path | None = _task(
        None, "CSV file with columns path and score", unset="scores.csv in MAPS, else the maximum of each map"
    )
    name: str | None = _task(None, "name of the method in reports", unset="the name of MAPS")
    map_size: str | int | None = changed(ProtocolArguments, "map_size", unset="both the size of each map, and original")
    output_dir: Path | None = setting(None, "folder of the results", "output", unset="MAPS")


@dataclass(frozen=True, kw_only=True)
class InferenceArguments(ProtocolArguments, ReferenceArguments, TestingArguments):
    """Options of `inference.py`."""

    dataset: tuple[str, ...] | None = changed(
        DataArguments,
        "dataset",
        None,
        unset="the training dataset, which is not zero-shot",
        help=f"datasets to test on: catalog names, folders in MVTec's layout, or a group ({', '.join(GROUPS)})",
    )
    checkpoint: str = _task(MISSING, "checkpoint file, folder (all its epochs, in order), or none for unadapted CLIP")
    image: tuple[Path, ...] | None = _task(None, "images, or folders in any layout, to score instead of a dataset")
    calibrate: Path | None = _task(None, "folder of normal images, whose scores set the threshold of anomalous images")
    false_alarms: float | None = _task(
        None,
        "share of normal images that may be called anomalous; --calibrate needs 99 images for 0.01, 19 for 0.05",
        between=(0.0001, 0.5),
        unset="0.01",
    )
    calibration: Path | None = _task(
        None, "thresholds, with an entry for this model and class", unset="calibration.json next to the checkpoint"
    )
    normal: Path | None = _task(None, "folder of normal images, to test on with --anomalous instead of a dataset")
    anomalous: Path | None = _task(None, "folder of anomalous images, without masks, for image metrics")
    class_name: str | None = _task(None, 'class of these images, such as "metal screw"', unset=DEFAULT_CLASS)
    class_from_folder: bool = _task(False, "the class of an image is the first folder below --image or --calibrate")
    domain: str = _task("industrial", "kind of images, which decides the scoring", choices=("industrial", "medical"))
    tiles: str | None = _task(
        None,
        "overlapping square tiles in addition to the whole image: off, their number along the shorter side, or auto "
        "(from twice the input size on)",
        type=tiles_choice,
        metavar="auto|N|off",
        unset=TILES[0],
    )
    visualize: str | int | None = _task(
        None,
        "draw heatmaps of N images of each class, or of all images; with several checkpoints, those of the last",
        type=all_or_number,
        nargs="?",
        const=ALL,
    )
    save_maps: bool = setting(False, "also write anomaly maps and scores, for engine.evaluation.rescore", "output")
    output_dir: Path | None = setting(None, "folder of the results", "output", unset="results next to the checkpoint")
    json: bool = setting(False, "also write the CSV file as JSON lines, with the ending .jsonl", "output")
    text_conditioning: str | None = _cross("text_conditioning", unset=TRAINED)
    text_context: str | None = changed(
        CrossAttentionConfig,
        "text_context",
        None,
        help="image features that the text cross-attention attends to: of the frozen branch, the trained branch, or "
        "its projectors on frozen tokens",
        group="cross-attention",
        unset=TRAINED,
    )
    text_cross_attn_weight: float | None = _cross("text_cross_attn_weight", unset=f"{ASSUMED} 1")
    image_cross_attn_weight: float | None = _cross("image_cross_attn_weight", unset=f"{ASSUMED} 1")
    context_norm: str | None = _cross("context_norm", unset=f"{ASSUMED} none")
    cross_attn_residual: str | None = _cross("cross_attn_residual", unset=f"{ASSUMED} add")
    cross_attn_heads: int | None = _cross("cross_attn_heads", unset=f"{ASSUMED} 8")

    def mode(self) -> str:
        """Which images are used, and for what: "calibrate", "image", "two folders" or "dataset"."""
        folders = {"calibrate": self.calibrate, "image": self.image, "two folders": self.normal or self.anomalous}
        return next((name for name, folder in folders.items() if folder), "dataset")

    def tests_several(self) -> bool:
        """Whether `--dataset` names several datasets or a group; then missing ones are skipped."""
        return len(self.dataset or ()) > 1 or any(name.lower() in GROUPS for name in self.dataset or ())

    def check(self) -> None:
        mode = self.mode()
        if self.tests_several() and (self.metadata or self.class_names not in (None, *NAMES)):
            raise UserError("--metadata and --class_names FILE are for a single --dataset: leave them out")
        for name in self.not_default(_REJECTED[mode]):
            raise UserError(f"{_REJECTED[mode][name]}: leave --{name} out")
        for name in self.not_default(ADAPTED) if self.checkpoint == NO_CHECKPOINT else ():
            raise UserError(f"--checkpoint none is unadapted CLIP, which has no adapters to change: leave --{name} out")
        if mode in ("image", "calibrate") and self.precision not in ("auto", "fp32"):
            raise UserError(f"--{mode} computes in fp32: leave --precision out")
        if mode in ("image", "calibrate") and self.class_names not in (None, *NAMES):
            raise UserError(f"--{mode} takes the class's name as --class_name: --class_names FILE is for a dataset")
        if mode == "two folders" and None in (self.normal, self.anomalous):
            missing = "anomalous" if self.normal else "normal"
            raise UserError(f"--{missing} is needed too: the metrics compare normal images with anomalous ones")
        if mode not in ("dataset", "calibrate") and self.reference_shots and not self.references:
            raise UserError("--reference_shots takes images from a dataset's train/good: give --references FOLDER here")
        if mode in ("image", "calibrate"):
            check_single_process(f"--{mode}")
        super().check()


@dataclass(frozen=True, kw_only=True)
class ComparisonArguments(ReferenceArguments, TestingArguments):
    """Options of `compare_feedback_loops.py`."""

    save_path: Path = _task(MISSING, "folder of the feedback run, with its loop_*_final.pth")
    dataset: str | None = changed(DataArguments, "dataset", None, unset="none; required", help=TEST_DATASET)
    base_path: Path | None = _task(None, "folder or image checkpoint of a base run")
    cross_path: Path | None = _task(None, "folder or image checkpoint of a cross-attention run")
    unadapted: bool = _task(False, "evaluate unadapted CLIP as well")
    report: bool = _task(False, "also write report.html, a page with all results")
    output_dir: Path | None = setting(None, "folder of the results", "output", unset="the save path")


@dataclass(frozen=True, kw_only=True)
class VisualizationArguments(DataArguments):
    """Options of `visualize_comparison.py`."""

    not_options: ClassVar = ("skip_bad_images",)

    class_name: str = _task(MISSING, "class of the dataset")
    image_idx: tuple[str | int, ...] = _task(
        (0,), "indices of the class's anomalous images, counted from 0, or all", type=all_or_index
    )
    worst: int | None = _task(
        None, "N images with the lowest scores of the last model", between=(1, 1_000_000), unset="those of --image_idx"
    )
    list_images: bool = _task(False, "list the class's anomalous images, and stop")
    attention: bool = _task(False, "add the attention maps of the cross-attentions")
    base_path: Path | None = changed(ComparisonArguments, "base_path", group="model")
    cross_path: Path | None = changed(ComparisonArguments, "cross_path", group="model")
    feedback_path: Path | None = setting(None, "folder of a feedback run", "model")
    feedback_loop: int | None = setting(None, "loop of the feedback run", "model", between=(1, 1000), unset="the last")
    clip_weights: str | None = changed(TestingArguments, "clip_weights")
    dataset: str | None = changed(
        DataArguments, "dataset", None, unset="the training dataset, which is not zero-shot", help=TEST_DATASET
    )
    data_root: Path | None = changed(TestingArguments, "data_root")
    mask_threshold: str | float | None = changed(TestingArguments, "mask_threshold")
    device: str = changed(MachineArguments, "device")
    output_dir: Path | None = setting(None, "folder of the figures", "output", unset="results/visualize")

    def unused(self) -> dict[str, str]:
        reasons = {} if self.worst is None else {"image_idx": "with --worst"}
        if self.list_images:
            reasons |= dict.fromkeys(("image_idx", "worst", "attention"), "with --list_images")
        if self.feedback_path is None:
            reasons["feedback_loop"] = "without --feedback_path"
        return reasons

    def check(self) -> None:
        if ALL in self.image_idx and len(self.image_idx) > 1:
            raise UserError(f"--image_idx {' '.join(map(str, self.image_idx))}: give indices, or {ALL}")
        if self.list_images and self.dataset is None:
            raise UserError("--list_images needs --dataset")
        if not (self.list_images or self.base_path or self.cross_path or self.feedback_path):
            raise UserError("give at least one of --base_path, --cross_path and --feedback_path")
