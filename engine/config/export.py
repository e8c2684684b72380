"""Arguments of `export.py`."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from importlib.util import find_spec
from pathlib import Path

from dataset.options import NAMES
from engine.config.common import Arguments, ModelArguments
from engine.config.evaluation import DEFAULT_CLASS, REFERENCES, InferenceArguments, TestingArguments
from utils.errors import UserError
from utils.fields import changed, setting

ONNX, TORCH = "onnx", "torch"
ENDINGS = {ONNX: ".onnx", TORCH: ".pt2"}
# By the names that are imported; requirements-export.txt has their versions.
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class ExportArguments(Arguments):
    """Arguments of `export.py`."""

    checkpoint: str = setting(
        MISSING, "file, folder (its latest counts), model on the hub, or none for unadapted CLIP", "what to do"
    )
    class_name: tuple[str, ...] = setting(
        (DEFAULT_CLASS,),
        'what images show, such as "metal screw"; of several names, each gets a file',
        "what to do",
        several=True,
    )
    format: str = setting(ONNX, "ONNX, or a program of torch.export", "what to do", choices=tuple(ENDINGS))
    precision: str = setting(
        "fp32", "of weights and matrix products; fp16 halves the file", "what to do", choices=("fp32", "fp16")
    )
    domain: str = changed(InferenceArguments, "domain")
    det_score: str | None = changed(TestingArguments, "det_score")
    class_names: str | None = changed(
        TestingArguments,
        "class_names",
        choices=NAMES,
        kind=None,
        help="names in prompts: catalog, or published (those of AA-CLIP's code)",
        group="what to do",
    )
    references: Path | None = changed(InferenceArguments, "references")
    reference_shots: int | None = changed(
        InferenceArguments, "reference_shots", help="how many of --references, the same for all classes"
    )
    reference_seed: int = changed(InferenceArguments, "reference_seed")
    reference_weight: float = changed(InferenceArguments, "reference_weight")
    reference_features: str = changed(InferenceArguments, "reference_features")
    calibration: Path | None = changed(
        InferenceArguments, "calibration", unset="calibration.json beside the checkpoint, where it is of this model"
    )
    model_name: str | None = changed(TestingArguments, "model_name")
    clip_weights: str | None = changed(ModelArguments, "clip_weights", unset="those trained with, else from the hub")
    img_size: int | None = changed(TestingArguments, "img_size")
    activation: str | None = changed(TestingArguments, "activation")
    output: Path | None = setting(
        None,
        "file to write, where there is one class",
        "output",
        unset="CHECKPOINT_CLASS.onnx or .pt2 in the checkpoint's folder",
    )


def check_export(arguments: ExportArguments) -> None:
    """Refuse arguments that do not go together, and packages that are not there."""
    ending = ENDINGS[arguments.format]
    for name in arguments.not_default(REFERENCES) if arguments.references is None else ():
        raise UserError(f"--{name} is about --references FOLDER: give it too")
    if arguments.output is not None and len(arguments.class_name) > 1:
        raise UserError("--output names one file: give one --class_name, or leave --output out")
    if arguments.output is not None and arguments.output.suffix.lower() != ending:
        raise UserError(f"--output {arguments.output}: a file of --format {arguments.format} ends in {ending}")
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None] if arguments.format == ONNX else []
    if missing:
        raise UserError(
            f"--format onnx needs {', '.join(missing)}: pip install -r requirements-export.txt, or take --format torch"
        )
