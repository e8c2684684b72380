"""Arguments of the scripts that test, compare and draw."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from dataset.options import NAMES
from engine.config.common import Arguments, DataArguments, MachineArguments, ModelArguments
from model.config import DET_SCORES, REFERENCE_FEATURES, REFERENCE_WEIGHT, CrossAttentionConfig
from utils.cli import number
from utils.errors import UserError
from utils.fields import changed, setting

ALL = "all"
# What `--checkpoint` takes for unadapted CLIP.
NO_CHECKPOINT = "none"
LESS_MEMORY = "a smaller --batch_size, --precision bf16, a smaller --img_size"
TRAINED = "as trained"
# What `inference.py` does not take, with the reason, for each kind of images that it tests on.
_NO_DECISION = {
    "false_alarms": "--false_alarms is for --calibrate",
    "calibration": "--calibration goes with --image, which decides by it, and --calibrate, which writes it",
}
_OUT_OF_PLACE = {
    "calibrate": {
        **dict.fromkeys(("dataset", "image", "normal", "anomalous"), "--calibrate takes normal images alone"),
        **dict.fromkeys(("visualize", "output_dir"), "--calibrate writes thresholds alone, to --calibration"),
    },
    "image": {
        **dict.fromkeys(("dataset", "normal", "anomalous"), "--image scores images that belong to no dataset"),
        "visualize": "--image draws a heatmap over each image as it is",
        "false_alarms": _NO_DECISION["false_alarms"],
    },
    "two folders": {
        **_NO_DECISION,
        **dict.fromkeys(("dataset", "metadata", "class_names"), "--normal and --anomalous stand in place of a dataset"),
        "class_from_folder": "--normal and --anomalous hold images of one class",
    },
    "dataset": {
        **_NO_DECISION,
        "class_from_folder": "--class_from_folder goes with --image and --calibrate",
        "class_name": "a dataset has classes of its own, all of which are tested, and --class_names FILE renames them",
        "domain": "a dataset has a domain of its own",
    },
}
# What replaces a choice that a checkpoint was trained with.
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
    "text_cross_attn_at",
    "cross_attn_heads",
)
# Which normal images are compared with.
REFERENCES = ("references", "reference_shots", "reference_seed", "reference_weight", "reference_features")
# What images show of which nothing is said.
DEFAULT_CLASS = "object"
# What a file that says nothing of it is taken to have been trained with.
UNTOLD = f"{TRAINED}, else 1"


def all_or_number(text: str) -> str | int:
    """The word all, or a positive number."""
    return text if text == ALL else number(int, (1, 1_000_000))(text)


def image_numbers(text: str) -> str | int:
    """The word all, or an index from 0."""
    return text if text == ALL else number(int, (0, 1_000_000))(text)


@dataclass(frozen=True, kw_only=True)
class TestingArguments(MachineArguments, DataArguments, ModelArguments):
    """What all testing takes: a model as it was trained unless it is asked for otherwise."""

    model_name: str | None = changed(ModelArguments, "model_name", None, unset=TRAINED)
    img_size: int | None = changed(ModelArguments, "img_size", unset=TRAINED)
    activation: str | None = changed(ModelArguments, "activation", unset=TRAINED)
    surgery: str | None = changed(ModelArguments, "surgery", None, unset=TRAINED)
    surgery_until_layer: int | None = changed(ModelArguments, "surgery_until_layer", unset=TRAINED)
    dataset: str | None = changed(
        DataArguments,
        "dataset",
        None,
        unset="the one trained on, which is not zero-shot",
        help="dataset to test on: a catalog name, or a folder in MVTec's layout",
    )
    data_root: Path | None = changed(
        DataArguments, "data_root", unset="the run's own while it is there, $ANOMALY_DATA_ROOT, else data"
    )
    det_score: str | None = setting(
        None,
        "in image scores: likeness to the abnormal anchor, or its difference from that to the normal one",
        "what to do",
        choices=DET_SCORES,
        unset=f"{DET_SCORES[0]}, as published",
    )
    class_names: str | None = changed(DataArguments, "class_names", unset=f"{TRAINED}, else the catalog's")
    batch_size: int = setting(8, "images in a forward", "machine", between=(1, 100_000))

    def overrides(self) -> dict[str, Any]:
        """What is asked of a model in place of what it was trained with, as `load_model` takes it."""
        names = (item.name for item in fields(self))
        return {name: value for name in names if name in OVERRIDES and (value := getattr(self, name)) is not None}

    def image_choices(self) -> tuple[Path | None, Path | None, str | None, bool, str | float]:
        """How images are located and read, as `load_task` takes it."""
        return self.data_root, self.metadata, self.class_names, self.skip_bad_images, self.mask_threshold


@dataclass(frozen=True, kw_only=True)
class ReferenceArguments(TestingArguments):
    """Options of testing with normal references (`engine.detector.references.ReferenceChoice`)."""

    references: Path | None = setting(
        None,
        "folder of a few normal images to compare with; of several classes, a folder of each",
        "references",
        unset="none",
    )
    reference_shots: int | None = setting(
        None,
        "how many of these images of each class; without --references, of the dataset's train/good",
        "references",
        between=(1, 100_000),
        unset="all of --references",
    )
    reference_seed: int = setting(0, "which of them --reference_shots takes", "references", between=(0, 2**31))
    reference_weight: float = setting(
        REFERENCE_WEIGHT,
        "share of the distance to references in the map, the rest is the words'",
        "references",
        between=(0, 1),
    )
    reference_features: str = setting(
        REFERENCE_FEATURES[0],
        "patches compared by the features that words are, by the frozen CLIP's, or by both; the "
        "last two take a second pass",
        "references",
        choices=REFERENCE_FEATURES,
    )

    def check_references(self) -> None:
        """Refuse what is said of references where there are none."""
        for name in () if self.references or self.reference_shots else self.not_default(REFERENCES):
            raise UserError(f"there are no --references, and no --reference_shots: leave --{name} out")


@dataclass(frozen=True, kw_only=True)
class InferenceArguments(ReferenceArguments):
    """Arguments of `inference.py`."""

    checkpoint: str = setting(
        MISSING, "file, folder (all its epochs, in order), or none for unadapted CLIP", "what to do"
    )
    image: Path | None = setting(
        None, "image, or folder of images in any layout, to score in place of a dataset", "what to do", unset="none"
    )
    calibrate: Path | None = setting(
        None,
        "folder of normal images that decides from which score on an image is anomalous",
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
        "file of thresholds; one that is given must hold some of this model and class",
        "what to do",
        unset="calibration.json beside the checkpoint",
    )
    normal: Path | None = setting(
        None, "folder of normal images, to test on with --anomalous in place of a dataset", "what to do", unset="none"
    )
    anomalous: Path | None = setting(
        None, "folder of anomalous images, which need no masks, for image metrics", "what to do", unset="none"
    )
    class_name: str | None = setting(
        None, 'what these images show, such as "metal screw"', "what to do", unset=DEFAULT_CLASS
    )
    class_from_folder: bool = setting(
        False, "the first folder below --image or --calibrate that an image lies in says what it shows", "what to do"
    )
    domain: str = setting("industrial", "how these images are scored", "what to do", choices=("industrial", "medical"))
    visualize: str | int | None = setting(
        None,
        "draw N images of each class with their heatmaps, or all; of several checkpoints, as the last sees them",
        "what to do",
        kind=all_or_number,
        alone=ALL,
        unset="none",
    )
    output_dir: Path | None = setting(None, "folder of the results", "output", unset="results beside the checkpoint")
    text_conditioning: str | None = changed(CrossAttentionConfig, "text_conditioning", None, unset=TRAINED)
    text_context: str | None = changed(CrossAttentionConfig, "text_context", None, unset=TRAINED)
    text_cross_attn_weight: float | None = changed(CrossAttentionConfig, "text_cross_attn_weight", None, unset=UNTOLD)
    image_cross_attn_weight: float | None = changed(CrossAttentionConfig, "image_cross_attn_weight", None, unset=UNTOLD)
    context_norm: str | None = changed(CrossAttentionConfig, "context_norm", None, unset=f"{TRAINED}, else none")
    cross_attn_residual: str | None = changed(
        CrossAttentionConfig, "cross_attn_residual", None, unset=f"{TRAINED}, else add"
    )
    cross_attn_heads: int | None = changed(CrossAttentionConfig, "cross_attn_heads", None, unset=f"{TRAINED}, else 8")

    def mode(self) -> str:
        """What is done: "calibrate", or tested: "image", "two folders" or "dataset".

        Raises `UserError` for arguments that do not go together.
        """
        given = {"calibrate": self.calibrate, "image": self.image, "two folders": self.normal or self.anomalous}
        mode = next((name for name, folder in given.items() if folder), "dataset")
        for name in self.not_default(_OUT_OF_PLACE[mode]):
            raise UserError(f"{_OUT_OF_PLACE[mode][name]}: leave --{name} out")
        if mode in ("image", "calibrate") and self.class_names not in (None, *NAMES):
            raise UserError(f"--{mode} takes the class's name by --class_name: --class_names FILE is for a dataset")
        if mode == "two folders" and None in (self.normal, self.anomalous):
            missing = "anomalous" if self.normal else "normal"
            raise UserError(f"--{missing} is needed too: the metrics compare normal images with anomalous ones")
        if mode != "dataset" and self.reference_shots and not self.references:
            raise UserError("--reference_shots takes them from a dataset's train/good: give --references FOLDER here")
        return mode


@dataclass(frozen=True, kw_only=True)
class ComparisonArguments(ReferenceArguments):
    """Arguments of `compare_feedback_loops.py`."""

    save_path: Path = setting(MISSING, "folder of the feedback run, with its loop_*_final.pth", "what to do")
    dataset: str | None = changed(TestingArguments, "dataset", unset="none, it must be given")
    base_path: Path | None = setting(None, "folder or image checkpoint of a base run", "what to do", unset="none")
    cross_path: Path | None = setting(
        None, "folder or image checkpoint of a cross-attention run", "what to do", unset="none"
    )
    unadapted: bool = setting(False, "evaluate unadapted CLIP as well", "what to do")
    report: bool = setting(False, "also write report.html: all of it on one page", "what to do")
    output_dir: Path | None = setting(None, "folder of the results", "output", unset="the save path")


@dataclass(frozen=True, kw_only=True)
class VisualizationArguments(Arguments):
    """Arguments of `visualize_comparison.py`."""

    class_name: str = setting(MISSING, "class of the dataset", "what to do")
    image_idx: tuple[str | int, ...] = setting(
        (0,),
        "which of the class's anomalous images, counted from 0, or all",
        "what to do",
        several=True,
        kind=image_numbers,
    )
    worst: int | None = setting(
        None,
        "the N images that the last of the models gives the lowest scores",
        "what to do",
        between=(1, 1_000_000),
        unset="those of --image_idx",
    )
    list_images: bool = setting(False, "list the class's anomalous images, and stop", "what to do")
    attention: bool = setting(False, "add what the cross-attentions look at", "what to do")
    base_path: Path | None = changed(ComparisonArguments, "base_path", group="model")
    cross_path: Path | None = changed(ComparisonArguments, "cross_path", group="model")
    feedback_path: Path | None = setting(None, "folder of a feedback run", "model", unset="none")
    feedback_loop: int | None = setting(None, "loop of that run", "model", between=(1, 1000), unset="the last")
    clip_weights: str | None = changed(ModelArguments, "clip_weights", unset="those trained with, else from the hub")
    dataset: str | None = changed(TestingArguments, "dataset")
    data_root: Path | None = changed(TestingArguments, "data_root")
    metadata: Path | None = changed(DataArguments, "metadata")
    class_names: str | None = changed(DataArguments, "class_names")
    mask_threshold: str | float = changed(DataArguments, "mask_threshold")
    device: str = changed(MachineArguments, "device")
    output_dir: Path | None = setting(None, "folder of the figures", "output", unset="results/visualize")
