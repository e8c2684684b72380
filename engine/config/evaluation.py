"""The options of the scripts that test, compare and visualise models."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from dataset.prompts import NAMES
from engine.config.common import DataArguments, MachineArguments, ModelArguments
from engine.config.training import CrossAttentionArguments
from model.config import DET_SCORES, REFERENCE_FEATURES, REFERENCE_WEIGHT, CrossAttentionConfig
from utils.arguments import Arguments, number
from utils.errors import UserError
from utils.fields import changed, setting
from utils.processes import check_single_process

ALL = "all"
TRAINED = "as trained"
# In a file without a config.
ASSUMED = f"{TRAINED}, else"
# The class of images if none is given.
DEFAULT_CLASS = "object"
# Options that `inference.py` rejects, with the reason, by mode.
_NO_DECISION = {
    "false_alarms": "--false_alarms needs --calibrate",
    "calibration": "--calibration needs --image, which reads it, or --calibrate, which writes it",
}
_REJECTED = {
    "calibrate": {
        **dict.fromkeys(("dataset", "image", "normal", "anomalous"), "--calibrate takes only normal images"),
        **dict.fromkeys(("visualize", "output_dir"), "--calibrate writes only thresholds, to --calibration"),
    },
    "image": {
        **dict.fromkeys(("dataset", "normal", "anomalous"), "--image scores images that are not in a dataset"),
        "visualize": "--image draws a heatmap of each image anyway",
        "false_alarms": _NO_DECISION["false_alarms"],
    },
    "two folders": {
        **_NO_DECISION,
        **dict.fromkeys(("dataset", "metadata", "class_names"), "--normal and --anomalous replace a dataset"),
        "class_from_folder": "--normal and --anomalous contain images of one class",
    },
    "dataset": {
        **_NO_DECISION,
        "class_from_folder": "--class_from_folder needs --image or --calibrate",
        "class_name": "all classes of a dataset are tested, and --class_names FILE renames them",
        "domain": "a dataset has its own domain",
    },
}
# Choices of a checkpoint that these options replace.
OVERRIDES = (
    "model_name",
    "img_size",
    "activation",
    "surgery",
    "surgery_until_layer",
    "det_score",
    "text_conditioning",
    "text_context",
    "text_cross_attn_weight",
    "image_cross_attn_weight",
    "context_norm",
    "cross_attn_residual",
    "cross_attn_heads",
)
# Options of `engine.evaluation.references.ReferenceChoice`.
REFERENCES = ("references", "reference_shots", "reference_seed", "reference_weight", "reference_features")


def all_or_number(text: str) -> str | int:
    """The word all, or a positive number."""
    return text if text == ALL else number(int, (1, 1_000_000))(text)


def all_or_index(text: str) -> str | int:
    """The word all, or an index from 0."""
    return text if text == ALL else number(int, (0, 1_000_000))(text)


@dataclass(frozen=True, kw_only=True)
class TestingArguments(MachineArguments, DataArguments, ModelArguments):
    """Options of all testing; a model runs as it was trained unless an option replaces that."""

    less_memory: ClassVar = "a smaller --batch_size, --precision bf16, a smaller --img_size"

    model_name: str | None = changed(ModelArguments, "model_name", None, unset=TRAINED)
    clip_weights: str | None = changed(ModelArguments, "clip_weights", unset=f"{ASSUMED} from the hub")
    img_size: int | None = changed(ModelArguments, "img_size", unset=TRAINED)
    activation: str | None = changed(ModelArguments, "activation", unset=TRAINED)
    surgery: str | None = changed(ModelArguments, "surgery", None, unset=TRAINED)
    surgery_until_layer: int | None = changed(ModelArguments, "surgery_until_layer", unset=TRAINED)
    dataset: str | None = changed(
        DataArguments,
        "dataset",
        None,
        unset="the training dataset, which is not zero-shot",
        help="dataset to test on: a catalog name, or a folder in MVTec's layout",
    )
    data_root: Path | None = changed(
        DataArguments, "data_root", unset="the run's while it exists, $ANOMALY_DATA_ROOT, else data"
    )
    det_score: str | None = setting(
        None,
        "term of the image score: similarity to the abnormal anchor, or its difference from the similarity to the "
        "normal one",
        "what to do",
        choices=DET_SCORES,
        unset=f"{DET_SCORES[0]}, as published",
    )
    class_names: str | None = changed(DataArguments, "class_names", unset=f"{ASSUMED} the catalog's")
    batch_size: int = setting(8, "images in a forward pass", "machine", between=(1, 100_000))

    def overrides(self) -> dict[str, Any]:
        """The choices that replace those of a checkpoint, for `load_model`."""
        names = (item.name for item in fields(self))
        return {name: value for name in names if name in OVERRIDES and (value := getattr(self, name)) is not None}

    def image_choices(self) -> tuple[Path | None, Path | None, str | None, bool, str | float]:
        """Where images are and how they are read, for `load_task`."""
        return self.data_root, self.metadata, self.class_names, self.skip_bad_images, self.mask_threshold


@dataclass(frozen=True, kw_only=True)
class ReferenceArguments(TestingArguments):
    """Options of testing with normal references (`engine.evaluation.references.ReferenceChoice`)."""

    references: Path | None = setting(
        None,
        "folder of a few normal images to compare with; with several classes, a folder for each",
        "references",
        unset="none",
    )
    reference_shots: int | None = setting(
        None,
        "number of references of each class; without --references, from the dataset's train/good",
        "references",
        between=(1, 100_000),
        unset="all of --references",
    )
    reference_seed: int = setting(0, "seed of the choice of --reference_shots", "references", between=(0, 2**31))
    reference_weight: float = setting(
        REFERENCE_WEIGHT,
        "share of the distance to references in the anomaly map; the text has the rest",
        "references",
        between=(0, 1),
    )
    reference_features: str = setting(
        REFERENCE_FEATURES[0],
        "patch features to compare: trained, frozen, or both (the last two need a second forward pass)",
        "references",
        choices=REFERENCE_FEATURES,
    )

    def check(self) -> None:
        for name in () if self.references or self.reference_shots else self.not_default(REFERENCES):
            raise UserError(f"--{name} needs --references or --reference_shots: give one, or leave --{name} out")


@dataclass(frozen=True, kw_only=True)
class InferenceArguments(ReferenceArguments):
    """Options of `inference.py`."""

    checkpoint: str = setting(
        MISSING, "checkpoint file, folder (all its epochs, in order), or none for unadapted CLIP", "what to do"
    )
    image: Path | None = setting(
        None, "image, or folder of images in any layout, to score instead of a dataset", "what to do", unset="none"
    )
    calibrate: Path | None = setting(
        None,
        "folder of normal images; their scores set the threshold above which an image is anomalous",
        "what to do",
        unset="none",
    )
    false_alarms: float | None = setting(
        None,
        "share of normal images that may be called anomalous; --calibrate needs 99 images for 0.01, 19 for 0.05",
        "what to do",
        between=(0.0001, 0.5),
        unset="0.01",
    )
    calibration: Path | None = setting(
        None,
        "file of thresholds, which must contain this model and class",
        "what to do",
        unset="calibration.json next to the checkpoint",
    )
    normal: Path | None = setting(
        None, "folder of normal images, to test on with --anomalous instead of a dataset", "what to do", unset="none"
    )
    anomalous: Path | None = setting(
        None, "folder of anomalous images, without masks, for image metrics", "what to do", unset="none"
    )
    class_name: str | None = setting(
        None, 'class of these images, such as "metal screw"', "what to do", unset=DEFAULT_CLASS
    )
    class_from_folder: bool = setting(
        False, "the class of an image is the first folder below --image or --calibrate", "what to do"
    )
    domain: str = setting("industrial", "scoring of these images", "what to do", choices=("industrial", "medical"))
    visualize: str | int | None = setting(
        None,
        "draw heatmaps of N images of each class, or of all; of several checkpoints, with the last",
        "what to do",
        unset="none",
        type=all_or_number,
        nargs="?",
        const=ALL,
    )
    output_dir: Path | None = setting(None, "folder of the results", "output", unset="results next to the checkpoint")
    text_conditioning: str | None = changed(CrossAttentionArguments, "text_conditioning", None, unset=TRAINED)
    text_context: str | None = changed(
        CrossAttentionConfig,
        "text_context",
        None,
        help="image features that the text cross-attention attends to: of the frozen branch, the trained branch, or "
        "its projectors on frozen tokens",
        group="cross-attention",
        unset=TRAINED,
    )
    text_cross_attn_weight: float | None = changed(
        CrossAttentionArguments, "text_cross_attn_weight", None, unset=f"{ASSUMED} 1"
    )
    image_cross_attn_weight: float | None = changed(
        CrossAttentionArguments, "image_cross_attn_weight", None, unset=f"{ASSUMED} 1"
    )
    context_norm: str | None = changed(CrossAttentionArguments, "context_norm", None, unset=f"{ASSUMED} none")
    cross_attn_residual: str | None = changed(
        CrossAttentionArguments, "cross_attn_residual", None, unset=f"{ASSUMED} add"
    )
    cross_attn_heads: int | None = changed(CrossAttentionArguments, "cross_attn_heads", None, unset=f"{ASSUMED} 8")

    def mode(self) -> str:
        """Which images are used, and for what: "calibrate", "image", "two folders" or "dataset"."""
        folders = {"calibrate": self.calibrate, "image": self.image, "two folders": self.normal or self.anomalous}
        return next((name for name, folder in folders.items() if folder), "dataset")

    def check(self) -> None:
        mode = self.mode()
        for name in self.not_default(_REJECTED[mode]):
            raise UserError(f"{_REJECTED[mode][name]}: leave --{name} out")
        if mode in ("image", "calibrate") and self.class_names not in (None, *NAMES):
            raise UserError(f"--{mode} takes the class's name as --class_name: --class_names FILE is for a dataset")
        if mode == "two folders" and None in (self.normal, self.anomalous):
            missing = "anomalous" if self.normal else "normal"
            raise UserError(f"--{missing} is needed too: the metrics compare normal images with anomalous ones")
        if mode != "dataset" and self.reference_shots and not self.references:
            raise UserError("--reference_shots takes images from a dataset's train/good: give --references FOLDER here")
        if mode in ("image", "calibrate"):
            check_single_process(f"--{mode}")
        super().check()


@dataclass(frozen=True, kw_only=True)
class ComparisonArguments(ReferenceArguments):
    """Options of `compare_feedback_loops.py`."""

    save_path: Path = setting(MISSING, "folder of the feedback run, with its loop_*_final.pth", "what to do")
    dataset: str | None = changed(TestingArguments, "dataset", unset="none, it must be given")
    base_path: Path | None = setting(None, "folder or image checkpoint of a base run", "what to do", unset="none")
    cross_path: Path | None = setting(
        None, "folder or image checkpoint of a cross-attention run", "what to do", unset="none"
    )
    unadapted: bool = setting(False, "evaluate unadapted CLIP as well", "what to do")
    report: bool = setting(False, "also write report.html, a page with all results", "what to do")
    output_dir: Path | None = setting(None, "folder of the results", "output", unset="the save path")


@dataclass(frozen=True, kw_only=True)
class VisualizationArguments(Arguments):
    """Options of `visualize_comparison.py`."""

    class_name: str = setting(MISSING, "class of the dataset", "what to do")
    image_idx: tuple[str | int, ...] = setting(
        (0,), "indices of the class's anomalous images, counted from 0, or all", "what to do", type=all_or_index
    )
    worst: int | None = setting(
        None,
        "draw the N images with the lowest scores of the last model",
        "what to do",
        between=(1, 1_000_000),
        unset="those of --image_idx",
    )
    list_images: bool = setting(False, "list the class's anomalous images, and stop", "what to do")
    attention: bool = setting(False, "add the attention maps of the cross-attentions", "what to do")
    base_path: Path | None = changed(ComparisonArguments, "base_path", group="model")
    cross_path: Path | None = changed(ComparisonArguments, "cross_path", group="model")
    feedback_path: Path | None = setting(None, "folder of a feedback run", "model", unset="none")
    feedback_loop: int | None = setting(None, "loop of the feedback run", "model", between=(1, 1000), unset="the last")
    clip_weights: str | None = changed(TestingArguments, "clip_weights")
    dataset: str | None = changed(TestingArguments, "dataset")
    data_root: Path | None = changed(TestingArguments, "data_root")
    metadata: Path | None = changed(DataArguments, "metadata")
    class_names: str | None = changed(DataArguments, "class_names")
    mask_threshold: str | float = changed(DataArguments, "mask_threshold")
    device: str = changed(MachineArguments, "device")
    output_dir: Path | None = setting(None, "folder of the figures", "output", unset="results/visualize")
