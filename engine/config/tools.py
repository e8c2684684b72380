"""The options of the tools: page, export, sharing, gradient test, pre-training and studies."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from dataset.prompts import NAMES
from engine.config.common import DataArguments, MachineArguments
from engine.config.evaluation import (
    ASSUMED,
    DEFAULT_CLASS,
    REFERENCES,
    InferenceArguments,
    ReferenceArguments,
    TestingArguments,
    TrainedModelArguments,
)
from engine.config.presets import FEEDBACK_PRESETS, PRESETS
from engine.config.training import CrossAttentionArguments, RunConfig
from engine.detector.hub import NO_CHECKPOINT, check_repository
from model.config import CrossAttentionConfig
from utils.arguments import Arguments, path
from utils.errors import UserError
from utils.fields import POSITIONAL, changed, setting

DEFAULT_WEIGHT = CrossAttentionConfig.image_cross_attn_weight
PORT = 7860
ONNX, TORCH = "onnx", "torch"
INT8 = "int8"
ENDINGS = {ONNX: ".onnx", TORCH: ".pt2"}
# Names of modules; requirements-export.txt has the versions.
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Config = TypeVar("Config", bound="GradientTest")

_task, _data = partial(setting, group="task"), partial(setting, group="data")
_output = partial(setting, group="output")
_cross = partial(changed, CrossAttentionArguments, default=None)


@dataclass(frozen=True, kw_only=True)
class AppArguments(TrainedModelArguments):
    """Options of `app.py`."""

    less_memory: ClassVar = "a smaller --img_size, or --device cpu"

    checkpoint: tuple[str, ...] | None = _task(
        None,
        "models to select from: files, folders (all epochs or loops), models on the hub, or none for unadapted CLIP",
        unset="the demo's models",
    )
    domain: str = changed(InferenceArguments, "domain")
    tiles: str | None = changed(InferenceArguments, "tiles")
    surgery: str | None = changed(TestingArguments, "surgery")
    surgery_until_layer: int | None = changed(TestingArguments, "surgery_until_layer")
    device: str = changed(MachineArguments, "device", "cpu")
    host: str = setting(
        "127.0.0.1",
        "address to listen on; with 0.0.0.0, everyone who can reach this machine has access, without a password",
        "machine",
    )
    port: int = setting(PORT, "port to listen on", "machine", between=(1, 65535))
    root_path: str | None = setting(
        None,
        "path of the page behind a reverse proxy that removes it, such as /anomalies, or the page's full address",
        "machine",
        unset="no reverse proxy, or one that does not change paths",
    )

    def check(self) -> None:
        if self.root_path is not None and not self.root_path.startswith(("/", "http://", "https://")):
            raise UserError(f"--root_path {self.root_path}: must begin with / or https://")
        if find_spec("gradio") is None:
            raise UserError("Gradio is missing: pip install -r requirements-app.txt, or start with python run.py app")


@dataclass(frozen=True, kw_only=True)
class ExportArguments(ReferenceArguments, TrainedModelArguments):
    """Options of `export.py`."""

    less_memory: ClassVar = "a smaller --img_size"

    checkpoint: str = _task(MISSING, "checkpoint, folder (its latest), model on the hub, or none for unadapted CLIP")
    class_name: tuple[str, ...] = _task((DEFAULT_CLASS,), 'classes, such as "metal screw"; one file for each')
    format: str = _task(ONNX, "onnx, or a program of torch.export", choices=tuple(ENDINGS))
    precision: str = _task(
        "fp32",
        "type of weights and products; fp16 halves the file size, int8 (onnx alone) divides it by four",
        choices=("fp32", "fp16", INT8),
    )
    calibrate: Path | None = _task(None, "folder of normal images, which --precision int8 needs")
    tolerance: float = _task(0.01, "share of decisions on them that --precision int8 may change", between=(0, 1))
    domain: str = changed(InferenceArguments, "domain")
    class_names: str | None = _task(
        None, "names in prompts: catalog, or published (of AA-CLIP)", choices=NAMES, unset=f"{ASSUMED} the catalog's"
    )
    reference_shots: int | None = changed(
        ReferenceArguments, "reference_shots", help="number of --references, the same for all classes"
    )
    calibration: Path | None = changed(
        InferenceArguments, "calibration", unset="calibration.json next to the checkpoint, if it contains this model"
    )
    max_megapixels: int = changed(DataArguments, "max_megapixels")
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
        if self.precision == INT8 and (self.format != ONNX or self.calibrate is None):
            raise UserError("--precision int8 needs --format onnx and --calibrate FOLDER")
        for name in self.not_default(("calibrate", "tolerance")) if self.precision != INT8 else ():
            raise UserError(f"--{name} needs --precision int8")
        missing = [name for name in ONNX_PACKAGES if find_spec(name) is None] if self.format == ONNX else []
        if missing:
            raise UserError(
                f"--format onnx needs {', '.join(missing)}: pip install -r requirements-export.txt, or give "
                "--format torch"
            )


@dataclass(frozen=True, kw_only=True)
class SharingArguments(TrainedModelArguments):
    """Options of `python -m engine.cli.share`."""

    checkpoint: str = _task(MISSING, "checkpoint file, or folder of a run (its latest checkpoint)")
    output: Path = _output(MISSING, "folder to write, new or written by this script")
    licence: str | None = _output(None, "licence of the trained components, such as apache-2.0", unset="not stated")
    push: str | None = _output(None, "also upload to the hub, as ORG/NAME; a new repository is private", unset="no")

    def check(self) -> None:
        if self.checkpoint == NO_CHECKPOINT:
            raise UserError("--checkpoint none: unadapted CLIP has nothing trained to share")
        if self.push is not None:
            check_repository(self.push)


@dataclass(frozen=True, kw_only=True)
class GradientTest(TrainedModelArguments):
    """Options of `test_stage2_gradients.py`; None means not given."""

    presets: ClassVar = PRESETS
    not_options: ClassVar = ("det_score", "image_feature")
    less_memory: ClassVar = "a smaller --batch_size or --img_size"

    model_name: str | None = changed(TestingArguments, "model_name", unset=f"{ASSUMED} toy")
    checkpoint: Path | None = setting(None, "file or run folder of a model, with or without cross-attention", "model")
    preset: str | None = setting(
        None,
        "feedback preset whose cross-attention is measured",
        "cross-attention",
        choices=FEEDBACK_PRESETS,
        unset="that of train_cross_attention.py",
    )
    image_cross_attn_weight: float | None = _cross("image_cross_attn_weight", unset=f"{ASSUMED} {DEFAULT_WEIGHT}")
    text_cross_attn_weight: float | None = _cross("text_cross_attn_weight", unset=f"{ASSUMED} {DEFAULT_WEIGHT}")
    context_norm: str | None = _cross("context_norm", unset=f"{ASSUMED} layer")
    cross_attn_residual: str | None = _cross("cross_attn_residual", unset=f"{ASSUMED} matched")
    dataset: str = changed(DataArguments, "dataset", "toy_train")
    data_root: Path | None = changed(DataArguments, "data_root")
    max_megapixels: int = changed(DataArguments, "max_megapixels")
    batches: int = _data(1, "batches to average over", between=(1, 1_000_000))
    batch_size: int = _data(8, "images in a batch", between=(1, 100_000))
    seed: int = changed(RunConfig, "seed", help="seed of fresh weights and of the batches", group="data")
    device: str = changed(MachineArguments, "device")
    component: bool = _task(False, "list the gradient norm of each component in both stages")
    allow: bool = _task(False, "exit with status 0 even for [CAUTION]")

    @classmethod
    def of(cls: type[Config], **explicit: Any) -> Config:
        """The explicit options alone: a preset's values are not options, so that options can be told from them."""
        return cls(**explicit)


@dataclass(frozen=True, kw_only=True)
class StudyArguments(Arguments):
    """Options of `run_study.py`."""

    study: Path = setting(MISSING, "file such as studies/smoke.toml", POSITIONAL, type=path, metavar="STUDY.toml")
    seeds: tuple[int, ...] | None = _task(None, "seeds, instead of those of the study file", unset="those of the file")
    report_only: bool = _task(False, "only report the finished evaluations")
    dry_run: bool = _task(False, "only list the commands and missing data")
    jobs: int = setting(
        1, "number of cells that run at the same time, each on its own GPUs, if available", "machine", between=(1, 4096)
    )
    save_path: Path = _output(Path("runs/studies"), "folder of all studies; each has its own folder in it")

    def unused(self) -> dict[str, str]:
        if self.dry_run:
            return dict.fromkeys(("report_only", "jobs"), "with --dry_run")
        return {"jobs": "with --report_only"} if self.report_only else {}
