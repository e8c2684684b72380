"""The options of the tools: page, export, sharing, gradient test, pre-training and studies."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from dataset.prompts import NAMES
from engine.config.common import DataArguments, MachineArguments, ModelArguments
from engine.config.evaluation import ASSUMED, DEFAULT_CLASS, REFERENCES, InferenceArguments, TestingArguments
from engine.config.presets import PRESETS
from engine.config.training import CrossAttentionArguments, FeedbackConfig, RunConfig
from engine.detector.hub import NO_CHECKPOINT, check_repository
from model.config import CrossAttentionConfig
from utils.arguments import Arguments, path
from utils.errors import UserError
from utils.fields import POSITIONAL, changed, setting

DEFAULT_WEIGHT = CrossAttentionConfig.image_cross_attn_weight
PORT = 7860
ONNX, TORCH = "onnx", "torch"
ENDINGS = {ONNX: ".onnx", TORCH: ".pt2"}
# Names of modules; requirements-export.txt has the versions.
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Config = TypeVar("Config", bound="GradientTest")


@dataclass(frozen=True, kw_only=True)
class AppArguments(Arguments):
    """Options of `app.py`."""

    less_memory: ClassVar = "a smaller --img_size, or --device cpu"

    checkpoint: tuple[str, ...] | None = setting(
        None,
        "models to select from: files, folders (all epochs or loops), models on the hub, or none for unadapted CLIP",
        "what to do",
        unset="the demo's models",
    )
    domain: str = changed(InferenceArguments, "domain", help="scoring of the images")
    det_score: str | None = changed(TestingArguments, "det_score")
    model_name: str | None = changed(TestingArguments, "model_name")
    clip_weights: str | None = changed(TestingArguments, "clip_weights")
    img_size: int | None = changed(TestingArguments, "img_size")
    activation: str | None = changed(TestingArguments, "activation")
    surgery: str | None = changed(TestingArguments, "surgery")
    surgery_until_layer: int | None = changed(TestingArguments, "surgery_until_layer")
    device: str = changed(MachineArguments, "device", "cpu")
    host: str = setting(
        "127.0.0.1",
        "address to listen on; with 0.0.0.0, everyone who can reach this machine has access, without a password",
        "machine",
    )
    port: int = setting(PORT, "port to listen on", "machine", between=(1, 65535))

    def check(self) -> None:
        if find_spec("gradio") is None:
            raise UserError(
                "Gradio is not installed: pip install -r requirements-app.txt, or start with python run.py app"
            )


@dataclass(frozen=True, kw_only=True)
class ExportArguments(Arguments):
    """Options of `export.py`."""

    less_memory: ClassVar = "a smaller --img_size"

    checkpoint: str = setting(
        MISSING,
        "checkpoint file, folder (its latest checkpoint), model on the hub, or none for unadapted CLIP",
        "what to do",
    )
    class_name: tuple[str, ...] = setting(
        (DEFAULT_CLASS,), 'class of the images, such as "metal screw"; one file for each class', "what to do"
    )
    format: str = setting(ONNX, "onnx, or a program of torch.export", "what to do", choices=tuple(ENDINGS))
    precision: str = setting(
        "fp32", "of weights and matrix products; fp16 halves the file", "what to do", choices=("fp32", "fp16")
    )
    domain: str = changed(InferenceArguments, "domain", help="scoring of the images")
    det_score: str | None = changed(TestingArguments, "det_score")
    class_names: str | None = changed(
        TestingArguments,
        "class_names",
        choices=NAMES,
        argparse={},
        help="class names in prompts: catalog, or published (of AA-CLIP's code)",
        group="what to do",
    )
    references: Path | None = changed(InferenceArguments, "references")
    reference_shots: int | None = changed(
        InferenceArguments, "reference_shots", help="number of --references, the same for all classes"
    )
    reference_seed: int = changed(InferenceArguments, "reference_seed")
    reference_weight: float = changed(InferenceArguments, "reference_weight")
    reference_features: str = changed(InferenceArguments, "reference_features")
    calibration: Path | None = changed(
        InferenceArguments, "calibration", unset="calibration.json next to the checkpoint, if it contains this model"
    )
    model_name: str | None = changed(TestingArguments, "model_name")
    clip_weights: str | None = changed(TestingArguments, "clip_weights")
    img_size: int | None = changed(TestingArguments, "img_size")
    activation: str | None = changed(TestingArguments, "activation")
    output: Path | None = setting(
        None, "file to write, for one class", "output", unset="CHECKPOINT_CLASS.onnx or .pt2 in the checkpoint's folder"
    )

    def check(self) -> None:
        ending = ENDINGS[self.format]
        for name in self.not_default(REFERENCES) if self.references is None else ():
            raise UserError(f"--{name} needs --references FOLDER")
        if self.output is not None and len(self.class_name) > 1:
            raise UserError("--output names one file: give one --class_name, or leave --output out")
        if self.output is not None and self.output.suffix.lower() != ending:
            raise UserError(f"--output {self.output}: a file of --format {self.format} ends in {ending}")
        missing = [name for name in ONNX_PACKAGES if find_spec(name) is None] if self.format == ONNX else []
        if missing:
            raise UserError(
                f"--format onnx needs {', '.join(missing)}: pip install -r requirements-export.txt, or give "
                "--format torch"
            )


@dataclass(frozen=True, kw_only=True)
class SharingArguments(Arguments):
    """Options of `python -m engine.cli.share`."""

    checkpoint: str = setting(MISSING, "checkpoint file, or folder of a run (its latest checkpoint)", "what to do")
    output: Path = setting(MISSING, "folder to write, new or written by this script", "output")
    licence: str | None = setting(
        None, "licence of the trained components, such as apache-2.0", "output", unset="not stated"
    )
    push: str | None = setting(
        None, "also upload to the Hugging Face hub, as ORG/NAME; a new repository is private", "output", unset="no"
    )
    model_name: str | None = changed(TestingArguments, "model_name")
    clip_weights: str | None = changed(TestingArguments, "clip_weights")
    img_size: int | None = changed(TestingArguments, "img_size")
    activation: str | None = changed(TestingArguments, "activation")
    det_score: str | None = changed(TestingArguments, "det_score")

    def check(self) -> None:
        if self.checkpoint == NO_CHECKPOINT:
            raise UserError("--checkpoint none: unadapted CLIP has nothing trained to share")
        if self.push is not None:
            check_repository(self.push)


@dataclass(frozen=True, kw_only=True)
class GradientTest(Arguments):
    """Options of `test_stage2_gradients.py`; None means not given."""

    presets: ClassVar = PRESETS
    less_memory: ClassVar = "a smaller --batch_size or --img_size"

    model_name: str | None = changed(ModelArguments, "model_name", None, unset=f"{ASSUMED} toy")
    clip_weights: str | None = changed(TestingArguments, "clip_weights")
    activation: str | None = changed(TestingArguments, "activation")
    img_size: int | None = changed(TestingArguments, "img_size")
    checkpoint: Path | None = setting(
        None, "file or run folder of a trained model, with or without cross-attention", "model", unset="none"
    )
    preset: str | None = changed(
        FeedbackConfig,
        "preset",
        None,
        help="feedback preset whose cross-attention is measured",
        unset="that of train_cross_attention.py",
        group="cross-attention",
    )
    image_cross_attn_weight: float | None = changed(
        CrossAttentionArguments, "image_cross_attn_weight", None, unset=f"{ASSUMED} {DEFAULT_WEIGHT}"
    )
    text_cross_attn_weight: float | None = changed(
        CrossAttentionArguments, "text_cross_attn_weight", None, unset=f"{ASSUMED} {DEFAULT_WEIGHT}"
    )
    context_norm: str | None = changed(CrossAttentionArguments, "context_norm", None, unset=f"{ASSUMED} layer")
    cross_attn_residual: str | None = changed(
        CrossAttentionArguments, "cross_attn_residual", None, unset=f"{ASSUMED} matched"
    )
    dataset: str = changed(DataArguments, "dataset", "toy_train")
    data_root: Path | None = changed(DataArguments, "data_root")
    batches: int = setting(1, "batches to average over", "data", between=(1, 1_000_000))
    batch_size: int = setting(8, "images in a batch", "data", between=(1, 100_000))
    seed: int = changed(RunConfig, "seed", help="seed of fresh weights and of the batches", group="data")
    device: str = changed(MachineArguments, "device")
    component: bool = setting(False, "list the gradient norm of each component in both stages", "what to do")
    allow: bool = setting(False, "exit with status 0 even for [CAUTION]", "what to do")

    @classmethod
    def of(cls: type[Config], **explicit: Any) -> Config:
        """The explicit options alone: a preset's values are not options, so that options can be told from them."""
        return cls(**explicit)

    def given(self, *names: str) -> dict[str, Any]:
        """The fields among `names` that are not None."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True)
class StudyArguments(Arguments):
    """Options of `run_study.py`."""

    study: Path = setting(
        MISSING, "file of the study, such as studies/smoke.toml", POSITIONAL, type=path, metavar="STUDY.toml"
    )
    seeds: tuple[int, ...] | None = setting(
        None, "seeds, instead of those of the study file", "what to do", unset="those of the file"
    )
    report_only: bool = setting(False, "only report the finished evaluations", "what to do")
    dry_run: bool = setting(False, "only list the commands and missing data", "what to do")
    jobs: int = setting(
        1, "number of cells that run at the same time, each on its own GPUs, if available", "machine", between=(1, 4096)
    )
    save_path: Path = setting(Path("runs/studies"), "folder of all studies; each has its own folder in it", "output")
