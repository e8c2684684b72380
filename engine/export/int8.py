"""int8: static quantisation of an exported ONNX file by onnxruntime, checked on images against the float32 file."""

import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

from dataset.images import read_image
from utils.errors import UserError

# onnx and onnxruntime are optional requirements, so they are imported in functions.
logger = logging.getLogger(__name__)

# Images whose activations set the ranges of int8; more add little.
MOST_RANGE_IMAGES = 64
MATRIX_PRODUCTS = ("Gemm", "MatMul")
BLOCK, PROJECTOR = re.compile(r"resblocks\.(\d+)\."), re.compile(r"(seg|det)_proj\.")
# Without calibrated thresholds, decisions are compared at the score that this share of the images exceeds.
SHARE_ABOVE = 0.1


class Differences(NamedTuple):
    """An int8 file compared with the float32 file on n images.

    largest, mean: differences of the maps; rank_correlation: Spearman's, of the scores; changed: the share of images on
    the other side of the threshold.
    """

    largest: float
    mean: float
    rank_correlation: float
    changed: float

    def __str__(self) -> str:
        return (
            f"{self.changed:.1%} of decisions changed, rank correlation of scores {self.rank_correlation:.4f}, "
            f"maps differ by {self.largest:.3f} at most, {self.mean:.5f} on average"
        )


def write_int8(file: Path, images: Sequence[Path], threshold: float | None, tolerance: float) -> None:
    """Replace a float32 ONNX file by its int8 version if decisions agree.

    Weights and inputs of matrix products become int8. If too many decisions change, the first and last block and the
    projectors stay in float32.

    Args:
        file: The ONNX file.
        images: Normal images, for the ranges of activations and for the check.
        threshold: Of the image scores; None without calibration.
        tolerance: The largest share of changed decisions.

    Raises:
        UserError: Too many decisions change in both versions, or an image cannot be read.
    """
    expected = _outputs(file, images)
    attempts = []
    for keep_sensitive, kept in ((False, "all layers in int8"), (True, "first and last block and projectors in float")):
        content = _quantised(file, images[:: -(-len(images) // MOST_RANGE_IMAGES)], keep_sensitive)
        differences = compare(expected, _outputs(content, images), threshold)
        attempts.append(f"{kept}: {differences}")
        logger.info("int8 on %d images, %s", len(images), attempts[-1])
        if differences.changed <= tolerance:
            file.write_bytes(content)
            return
    raise UserError(f"not written, because int8 changes more than {tolerance:.1%} of decisions ({'; '.join(attempts)})")


def _outputs(model: Path | bytes, images: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Maps (n, S, S) and scores (n,) of a file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    results = [session.run(["anomaly_map", "pred_score"], {"images": pixels}) for pixels in _pixels(images)]
    return np.concatenate([maps[:, 0] for maps, _ in results]), np.concatenate([scores for _, scores in results])


def _pixels(images: Sequence[Path]) -> Iterator[np.ndarray]:
    """Images as input of a file, uint8 (1, H, W, 3)."""
    return (np.asarray(read_image(image))[None] for image in images)


def compare(
    expected: tuple[np.ndarray, np.ndarray], outputs: tuple[np.ndarray, np.ndarray], threshold: float | None
) -> Differences:
    """Compare maps (n, S, S) and scores (n,) with those of the float32 file."""
    (maps, scores), (other_maps, other_scores) = expected, outputs
    if threshold is None:
        threshold = float(np.quantile(scores, 1 - SHARE_ABOVE))
    changed = ((scores > threshold) != (other_scores > threshold)).mean()
    # The correlation of a single image, or of equal scores, is undefined.
    correlation = spearmanr(scores, other_scores).statistic if np.ptp(scores) and np.ptp(other_scores) else 1.0
    apart = np.abs(maps - other_maps)
    return Differences(float(apart.max()), float(apart.mean()), float(correlation), float(changed))


def _quantised(file: Path, images: Sequence[Path], keep_sensitive: bool) -> bytes:
    """The file with matrix products in int8."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    class Reader(CalibrationDataReader):
        pixels = _pixels(images)

        def get_next(self) -> Any:
            return next(({"images": each} for each in self.pixels), None)

    model = onnx.load(file)
    add_pre_process_metadata(model)  # the exporter has optimised it
    nodes = matrix_products(model.graph)
    if keep_sensitive:
        blocks = [int(match[1]) for weight in nodes.values() if (match := BLOCK.search(weight))]
        nodes = {name: weight for name, weight in nodes.items() if not is_sensitive(weight, blocks)}
    with tempfile.TemporaryDirectory() as folder:
        quantised = Path(folder) / "int8.onnx"
        quantize_static(
            model,
            quantised,
            Reader(),
            op_types_to_quantize=list(MATRIX_PRODUCTS),
            nodes_to_quantize=list(nodes),
            per_channel=True,
            # 7 bits: processors without int8 dot products add two products in 16 bits.
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )
        return quantised.read_bytes()


def matrix_products(graph: Any) -> dict[str, str]:
    """The products of activations with parameters: names of the nodes and of the parameters.

    Constants of the graph, such as anchors, have no parameter's name: scoring stays in float32.
    """
    weights = {tensor.name for tensor in graph.initializer if tensor.name.startswith("model.")}
    products = (node for node in graph.node if node.op_type in MATRIX_PRODUCTS)
    return {node.name: node.input[1] for node in products if node.input[1] in weights}


def is_sensitive(weight: str, blocks: Sequence[int]) -> bool:
    """Whether a weight belongs to a projector, or to the first or last of these blocks."""
    match = BLOCK.search(weight)
    return bool(PROJECTOR.search(weight)) or (match is not None and int(match[1]) in (min(blocks), max(blocks)))
