"""The work of `export.py`: write a model as one file that runs without this repository, and check the file."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from dataset.folders import find_images
from dataset.prompts import build_prompts, readable_name
from engine.config.tools import ENDINGS, INT8, ONNX, ExportArguments
from engine.detector.calibration import Entry
from engine.detector.detector import Detector
from engine.detector.hub import NO_CHECKPOINT, is_address
from engine.detector.loading import load_model
from engine.detector.sharing import clip_licence, without_folders
from engine.evaluation.inference import load_detectors
from engine.evaluation.references import ReferenceChoice, add_image_references, image_references
from engine.export.int8 import write_int8
from model.graph import ScoringGraph, Thresholds, resize
from model.text import Prompts
from utils.errors import UserError
from utils.files import check_folder, replacing
from utils.paths import safe_name
from utils.version import PROJECT, project_version

logger = logging.getLogger(__name__)

# Largest accepted difference of a file from the model, in maps and scores, both from 0 to 1.
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, INT8: 1e-3}
INPUT, AXES = "images", ("batch", "height", "width")
METADATA = "metadata.json"
# A protocol buffer, such as an ONNX file, has at most 2 GiB.
MAX_ONNX_BYTES = 2**31 - 2**24
# Runs a file: uint8 images (B, H, W, 3) -> the outputs of the graph.
Run = Callable[[np.ndarray], Sequence[np.ndarray]]


class ExportTarget(NamedTuple):
    """The class that a file is made for; the fields are arguments of `Detector.predict`."""

    class_name: str
    domain: str = "industrial"
    class_names: str | None = None


def export_checkpoint(arguments: ExportArguments) -> list[Path]:
    """Export a checkpoint, one file for each class, and return the files.

    Raises:
        UserError: The checkpoint, references or output folder are invalid, or a file would differ from the model.
    """
    checkpoint = arguments.checkpoint
    options = arguments.overrides()
    if checkpoint == NO_CHECKPOINT:
        (detector,) = load_detectors(checkpoint, arguments.clip_weights, "cpu", **options)
        detector.find_calibration(checkpoint, arguments.calibration)
    else:
        detector = load_model(
            checkpoint, clip_weights=arguments.clip_weights, device="cpu", calibration=arguments.calibration, **options
        )
    folder = Path() if detector.source is None or is_address(checkpoint) else detector.source.path.parent
    classes = list(dict.fromkeys(arguments.class_name))
    choice = ReferenceChoice.of(arguments)
    add_image_references(detector, image_references(choice, classes), choice, arguments.class_names)
    images = find_images(arguments.calibrate, "--calibrate").images if arguments.calibrate else ()
    files = []
    for class_name in classes:
        name = safe_name(f"{detector.name}_{class_name}") + ENDINGS[arguments.format]
        path = arguments.output or folder / name
        check_folder(path.parent, "--output")
        target = ExportTarget(class_name, arguments.domain, arguments.class_names)
        export(detector, target, path, arguments.format, arguments.precision, images, arguments.tolerance)
        files.append(path)
    return files


def export(
    detector: Detector,
    target: ExportTarget,
    path: Path,
    kind: str = ONNX,
    precision: str = "fp32",
    images: Sequence[Path] = (),
    tolerance: float = 0.01,
) -> tuple[float, float]:
    """Write a model for one class as ONNX or as a program of torch.export.

    A model that is calibrated for the class also decides in the file. References of the class are part of the file.

    Args:
        detector: The model.
        target: The class.
        path: The file; it is replaced only if the new file passes the check.
        kind: `onnx` or `torch`.
        precision: `fp32`, `fp16` or `int8`.
        images: Normal images, for int8.
        tolerance: The largest share of decisions on `images` that int8 may change.

    Returns:
        The largest differences of the file, for int8 before quantisation, from the model on several images, in maps and
        in scores.

    Raises:
        UserError: The difference exceeds `TOLERANCE`, int8 changes too many decisions, or the model is too large for
            ONNX.
    """
    detector = detector.cpu()
    name = detector.name_in_prompts(target.class_name, target.class_names)
    key = detector.calibration_key(target.class_name, target.domain, class_names=target.class_names)
    entry = detector.thresholds(key)
    references = detector.references.get(readable_name(target.class_name))
    decides = f"decides {entry}" if entry else "has no thresholds, so it does not decide"
    logger.info("%s for '%s' %s", detector.name, name, decides)
    logger.info("Exporting as %s, %s: this may take minutes", kind, precision)
    with torch.no_grad():
        graph = scoring_graph(detector, target, name, entry, half=precision == "fp16")
        program = trace(graph)
    content = metadata(detector, name, target.domain, precision, entry, graph)
    content["references"] = f"{len(references.images)} images ({references.digest})" if references else "none"
    if path.exists():
        logger.warning("%s is replaced", path)
    with replacing(path) as temporary:
        if kind == ONNX:
            temporary.write_bytes(to_onnx(program, graph, content))
        else:
            with temporary.open("wb") as file:
                torch.export.save(program, file, extra_files={METADATA: json.dumps(content)})
        largest = compare_with_model(load_run(temporary, kind), detector, target, graph.one_by_one)
        summary = f"map {largest[0]:.1e}, score {largest[1]:.1e} (allowed: {TOLERANCE[precision]:g})"
        if not max(largest) <= TOLERANCE[precision]:
            raise UserError(f"{path}: not written, because it would differ from the model ({summary})")
        if precision == INT8:
            write_int8(temporary, images, entry.image_threshold if entry else None, tolerance)
    logger.info("Largest difference from the model on images of several sizes: %s", summary)
    logger.info("%s: %.1f MB", path, path.stat().st_size / 1e6)
    return largest


def scoring_graph(detector: Detector, target: ExportTarget, name: str, entry: Entry | None, half: bool) -> ScoringGraph:
    """The whole path of an image of a class, whose name in prompts is `name`, with its thresholds and references."""
    references = detector.references.get(readable_name(target.class_name))
    # A file cannot contain views.
    views = Prompts.from_texts(detector.clip, [build_prompts(name)])
    prompts = Prompts(views.tokens.clone(memory_format=torch.contiguous_format), views.normal, views.tree)
    return ScoringGraph(
        detector.model,
        detector.text_side(prompts),
        target.domain,
        detector.det_score,
        Thresholds(entry.image_threshold, entry.pixel_threshold) if entry else None,
        references,
        half=half,
    ).eval()


def trace(graph: ScoringGraph) -> ExportedProgram:
    """The graph as a program for any number and size of images."""
    sizes: dict[int, Any] = {1: Dim("height", min=1), 2: Dim("width", min=1)}
    count = 1 if graph.one_by_one else 2
    if not graph.one_by_one:
        sizes[0] = Dim("batch", min=1)
    example = torch.zeros(count, graph.size + 3, graph.size + 7, 3, dtype=torch.uint8)
    program = torch.export.export(graph, (example,), dynamic_shapes={INPUT: sizes})
    if graph.half_precision or graph.references is not None:
        # Resolves autocast regions to casts, which a program needs.
        program = program.run_decompositions({})
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            # Source lines with folders of this machine.
            node.meta.pop("stack_trace", None)
    return program


def to_onnx(program: ExportedProgram, graph: ScoringGraph, content: Mapping[str, str]) -> bytes:
    """A program as ONNX with metadata; `UserError` if it is too large for one file."""
    import onnx  # optional requirement

    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    if size > MAX_ONNX_BYTES:
        raise UserError(
            f"the model has {size / 2**30:.1f} GiB of weights, but an ONNX file is limited to 2: use --precision fp16, "
            "which halves them, or --format torch"
        )
    names = list(graph.names)
    axes = {INPUT: dict(enumerate(AXES))}
    exported = torch.onnx.export(
        program, dynamo=True, input_names=[INPUT], output_names=names, dynamic_shapes=axes, verbose=False
    )
    assert exported is not None  # with dynamo
    model = exported.model_proto
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        del node.metadata_props[:]  # the trace, which is large
    onnx.helper.set_model_props(model, dict(content))
    return model.SerializeToString()


def load_run(file: Path, kind: str) -> Run:
    """Load an exported file to run it on the CPU."""
    if kind == ONNX:
        import onnxruntime  # optional requirement

        session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {INPUT: images})
    with file.open("rb") as content:
        module = torch.export.load(io.BytesIO(content.read())).module()
    return lambda images: [output.numpy() for output in module(torch.tensor(images))]


def metadata(
    detector: Detector, name: str, domain: str, precision: str, entry: Entry | None, graph: ScoringGraph
) -> dict[str, str]:
    """The metadata of a file: class, model, weights and their licence, scoring, libraries."""
    clip, arguments = detector.clip, detector.arguments
    weights = arguments.get("clip_weights")
    libraries = ("torch", "open_clip_torch", "numpy", "pillow")
    return {
        "class_name": name,
        "domain": domain,
        "det_score": detector.det_score,
        "outputs": ", ".join(graph.names),
        "image_size": str(clip.img_size),
        "precision": precision,
        "model": detector.name,
        "model_digest": detector.digest,
        "clip": without_folders(clip.model_name),
        "clip_digest": clip.weights_digest,
        "clip_activation": clip.activation,
        "limits": clip.limits or "unknown",
        "clip_licence": clip_licence(clip.model_name, weights),
        "calibration": str(entry or "none"),
        "versions": ", ".join([f"{PROJECT} {project_version()}", *(f"{name} {version(name)}" for name in libraries)]),
    }


def pictures(size: int) -> list[np.ndarray]:
    """Test images, uint8 (H, W, 3), with smooth colours, edges and noise, of several sizes around `size`."""
    shapes = ((size, size), (size // 2 + 3, 2 * size + 5), (2 * size + 1, size - 7), (17, 23))
    rng = np.random.default_rng(0)
    images = []
    for height, width in shapes:
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        values = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
        values[height // 3 : height // 2, width // 4 : width // 2] += 60
        values += rng.normal(0, 8, values.shape)
        images.append(values.clip(0, 255).astype(np.uint8))
    return images


def compare_with_model(
    run: Run, detector: Detector, target: ExportTarget, one_by_one: bool = False
) -> tuple[float, float]:
    """The largest differences of a file from the model, on images that are resized as in the graph."""
    size = detector.clip.img_size
    largest = np.zeros(2)
    for picture in pictures(size):
        flipped = np.ascontiguousarray(picture[:, ::-1])
        for batch in (picture[None], flipped[None]) if one_by_one else (np.stack([picture, flipped]),):
            maps, scores, *_ = run(batch)
            for image, anomaly_map, score in zip(batch, maps, scores, strict=True):
                pixels = resized(image, size)
                expected = detector.predict(pixels, target.class_name, target.domain, class_names=target.class_names)
                difference = (np.abs(anomaly_map[0] - expected.anomaly_map).max(), abs(float(score) - expected.score))
                # Unlike `max`, this keeps NaN.
                largest = np.maximum(largest, difference)
    return largest[0], largest[1]


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """An image as the graph resizes it, uint8 (size, size, 3)."""
    return resize(torch.tensor(image)[None], size)[0].permute(1, 2, 0).numpy().astype(np.uint8)
