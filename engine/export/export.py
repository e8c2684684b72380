"""What `export.py` does: a model as one file that runs without this repository, checked against the model itself."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from dataset.catalog import readable_name
from dataset.prompts import build_prompts
from engine.config.evaluation import NO_CHECKPOINT
from engine.config.export import ENDINGS, ONNX, ExportArguments
from engine.detector.calibration import Entry, in_words
from engine.detector.detector import Detector, Prediction, load_model
from engine.detector.hub import is_address
from engine.detector.references import ReferenceChoice
from engine.detector.sharing import clip_licence, without_folders
from engine.evaluation.inference import load_detectors
from engine.evaluation.references import remember_for_images
from model.graph import Memory, ScoringGraph, Thresholds, resize
from model.text import Prompts
from utils.errors import UserError
from utils.files import check_folder, replacing
from utils.paths import safe_name

logger = logging.getLogger(__name__)

# What a file may differ by from the model, in maps and scores, both between 0 and 1.
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2}
INPUT = "images"
METADATA = "metadata.json"
# What one ONNX file, a protocol buffer, can hold.
LARGEST_ONNX = 2**31 - 2**24
# Bytes of a file: uint8 images (B, H, W, 3) -> the graph's outputs, in their order.
Run = Callable[[np.ndarray], Sequence[np.ndarray]]


class Difference(NamedTuple):
    """The largest difference of maps, and of scores, over some images."""

    map: float
    score: float


class Subject(NamedTuple):
    """What a file is made for; the fields are as for `Detector.predict`."""

    class_name: str
    domain: str = "industrial"
    class_names: str | None = None

    def prediction(self, detector: Detector, image: np.ndarray) -> Prediction:
        return detector.predict(image, self.class_name, self.domain, class_names=self.class_names)


def export_checkpoint(arguments: ExportArguments) -> list[Path]:
    """Export what `--checkpoint` means, a file for each class; returns the files.

    Raises `UserError` where something is not there or does not fit, and where a file would not compute what the model
    does; then it is not written.
    """
    checkpoint = arguments.checkpoint
    chosen = {name: getattr(arguments, name) for name in ("model_name", "img_size", "activation", "det_score")}
    if checkpoint == NO_CHECKPOINT:
        (detector,) = load_detectors(checkpoint, arguments.clip_weights, "cpu", **chosen)
        detector.find_calibration(checkpoint, arguments.calibration)
    else:
        detector = load_model(
            checkpoint, clip_weights=arguments.clip_weights, device="cpu", calibration=arguments.calibration, **chosen
        )
    folder = Path() if detector.source is None or is_address(checkpoint) else detector.source.path.parent
    classes = list(dict.fromkeys(arguments.class_name))
    choice = ReferenceChoice.of(arguments)
    if choice is not None:
        remember_for_images(detector, classes, choice, class_names=arguments.class_names)
    files = []
    for class_name in classes:
        made = safe_name(f"{detector.name}_{class_name}") + ENDINGS[arguments.format]
        path = arguments.output or folder / made
        check_folder(path.parent, "--output")
        subject = Subject(class_name, arguments.domain, arguments.class_names)
        export(detector, subject, path, arguments.format, arguments.precision)
        files.append(path)
    return files


def export(detector: Detector, subject: Subject, path: Path, kind: str = ONNX, precision: str = "fp32") -> Difference:
    """Write a model for one class as ONNX or as a program of torch.export; returns its difference from the model.

    Calibrated for the class, the file decides as well; references that the model remembers of the class are in it.
    Raises `UserError` where the difference is more than `TOLERANCE`: nothing is left then, and what `path` held stays.
    """
    detector = detector.cpu()
    name = detector.name_in_prompts(subject.class_name, subject.class_names)
    entry = detector.thresholds(detector.subject(subject.class_name, subject.domain, class_names=subject.class_names))
    references = detector.references.get(readable_name(subject.class_name))
    cut = Prompts.from_texts(detector.clip, [build_prompts(name)])
    prompts = replace(cut, tokens=cut.tokens.clone(memory_format=torch.contiguous_format))  # a file takes no views
    with torch.no_grad():
        graph = ScoringGraph(
            detector.model,
            detector.text_side(prompts),
            subject.domain,
            detector.det_score,
            entry and Thresholds(entry.image_threshold, entry.pixel_threshold),
            references and Memory(references.memory, references.weight, references.features),
            half=precision == "fp16",
        ).eval()
        decides = f"decides {in_words(entry)}" if entry else "has no thresholds, so it does not decide"
        logger.info("%s for '%s' %s", detector.name, name, decides)
        logger.info("Exporting as %s, %s: this may take minutes", kind, precision)
        program = trace(graph)
    about = metadata(detector, name, subject.domain, precision, entry, graph)
    about["references"] = f"{len(references.images)} images ({references.digest})" if references else "none"
    if path.exists():
        logger.warning("%s is replaced", path)
    with replacing(path) as temporary:
        if kind == ONNX:
            temporary.write_bytes(to_onnx(program, graph, about))
        else:
            with temporary.open("wb") as file:
                torch.export.save(program, file, extra_files={METADATA: json.dumps(about)})
        found = compare_with_model(run_of(temporary, kind), detector, subject, graph.one_by_one)
        said = f"map {found.map:.1e}, score {found.score:.1e} (allowed: {TOLERANCE[precision]:g})"
        if not max(found) <= TOLERANCE[precision]:
            raise UserError(f"{path}: would not compute what the model does, so it is not written ({said})")
    logger.info("Largest difference from the model on images of several sizes: %s", said)
    logger.info("%s", said_of_resize(detector, subject))
    logger.info("%s: %.1f MB", path, path.stat().st_size / 1e6)
    return found


def trace(graph: ScoringGraph) -> ExportedProgram:
    """The graph as a program for images of any number and size."""
    sizes: dict[int, Any] = {1: Dim("height", min=1), 2: Dim("width", min=1)}
    count = 1 if graph.one_by_one else 2
    if not graph.one_by_one:
        sizes[0] = Dim("batch", min=1)
    example = torch.zeros(count, graph.size + 3, graph.size + 7, 3, dtype=torch.uint8)
    program = torch.export.export(graph, (example,), dynamic_shapes={INPUT: sizes})
    if graph.half_precision or graph.memory is not None:
        # What autocast decides is no part of a program before its regions are resolved to casts.
        program = program.run_decompositions({})
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            # The lines of source that it came from, with their folders on this machine.
            node.meta.pop("stack_trace", None)
    return program


def to_onnx(program: ExportedProgram, graph: ScoringGraph, about: Mapping[str, str]) -> bytes:
    """A program as ONNX, with what it is about among its properties; `UserError` where it is too large for one file."""
    import onnx  # an extra, for this format alone

    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    if size > LARGEST_ONNX:
        raise UserError(
            f"the model has {size / 2**30:.1f} GiB of weights, and an ONNX file holds 2: --precision fp16 halves them, "
            "--format torch holds any"
        )
    exported = torch.onnx.export(
        program, dynamo=True, input_names=[INPUT], output_names=list(graph.names), verbose=False
    )
    model = exported.model_proto
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        del node.metadata_props[:]  # how it was traced, which is as large as a small model
    onnx.helper.set_model_props(model, dict(about))
    return model.SerializeToString()


def run_of(file: Path, kind: str) -> Run:
    """An exported file, ready to run on the CPU."""
    if kind == ONNX:
        import onnxruntime  # as above

        session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {INPUT: images})
    with file.open("rb") as content:
        module = torch.export.load(io.BytesIO(content.read())).module()
    return lambda images: [output.numpy() for output in module(torch.tensor(images))]


def metadata(
    detector: Detector, name: str, domain: str, precision: str, entry: Entry | None, graph: ScoringGraph
) -> dict[str, str]:
    """What a file says of itself: class, model, weights and their licence, scoring, libraries."""
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
        "clip_licence": clip_licence(clip.model_name, weights),
        "calibration": in_words(entry) if entry else "none",
        "versions": ", ".join(f"{library} {version(library)}" for library in libraries),
    }


def pictures(size: int) -> list[np.ndarray]:
    """Images to compare on, uint8 (H, W, 3): smooth colours, edges and noise, of sizes near to `size` and far off."""
    shapes = ((size, size), (size // 2 + 3, 2 * size + 5), (2 * size + 1, size - 7), (17, 23))
    rng = np.random.default_rng(0)
    drawn = []
    for height, width in shapes:
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        values = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
        values[height // 3 : height // 2, width // 4 : width // 2] += 60
        values += rng.normal(0, 8, values.shape)
        drawn.append(values.clip(0, 255).astype(np.uint8))
    return drawn


def compare_with_model(run: Run, detector: Detector, subject: Subject, one_by_one: bool = False) -> Difference:
    """The largest differences of a file from the model, which gets the images as the graph resizes them."""
    worst = Difference(0.0, 0.0)
    for picture in pictures(detector.clip.img_size):
        flipped = np.ascontiguousarray(picture[:, ::-1])
        batches = [picture[None], flipped[None]] if one_by_one else [np.stack([picture, flipped])]
        for batch in batches:
            maps, scores, *_ = run(batch)
            for image, anomaly_map, score in zip(batch, maps, scores, strict=True):
                expected = subject.prediction(detector, resized(image, detector.clip.img_size))
                found = difference(anomaly_map[0], float(score), expected)
                # Not `max`, to which what is no number is not more than anything.
                worst = Difference(*(np.maximum(worst, found).tolist()))
    return worst


def difference(anomaly_map: np.ndarray, score: float, expected: Prediction) -> Difference:
    return Difference(float(np.abs(anomaly_map - expected.anomaly_map).max()), abs(score - expected.score))


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """An image as the graph resizes it, uint8 (S, S, 3)."""
    return resize(torch.tensor(image)[None], size)[0].permute(1, 2, 0).numpy().astype(np.uint8)


def said_of_resize(detector: Detector, subject: Subject) -> str:
    """How the graph's resize differs from Pillow's, which the model itself uses, in grey levels and in what follows."""
    size = detector.clip.img_size
    levels, share, worst = 0, 0.0, Difference(0.0, 0.0)
    for picture in pictures(size):
        pillow = np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC))
        ours = resized(picture, size)
        off = np.abs(ours.astype(int) - pillow)
        levels, share = max(levels, int(off.max())), max(share, float((off > 0).mean()))
        expected = subject.prediction(detector, pillow)
        found = subject.prediction(detector, ours)
        worst = Difference(*map(max, worst, difference(found.anomaly_map, found.score, expected)))
    return (
        f"Its resize differs from Pillow's by up to {levels} of 255 grey levels, in up to {100 * share:.2g} % of an "
        f"image's values; for map and score that means up to {worst.map:.1e} and {worst.score:.1e}"
    )
