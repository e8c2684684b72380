"""int8 files: what is quantised, how they are compared with the float32 file, and when they are refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine import load_model
from engine.detector.detector import Detector
from engine.export import export, int8
from tests.test_export import CLASS, TARGET, images_of, onnx, session_of, world
from utils.errors import UserError

__all__ = ["world"]


@pytest.fixture(scope="module")
def model(world: Path) -> Detector:
    return load_model(world / "base", device="cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    files = [tmp_path_factory.mktemp("good") / f"{index}.png" for index in range(8)]
    for file, pixels in zip(files, images_of(50, 61, len(files)), strict=True):
        Image.fromarray(pixels).save(file)
    return files


def quantised_products(file: Path) -> int:
    """The products whose weight is dequantised from int8."""
    graph = onnx.load(file).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    sources = {node.output[0]: node for node in graph.node}
    products = [node for node in graph.node if node.op_type in int8.MATRIX_PRODUCTS]
    dequantised = [sources[node.input[1]] for node in products if node.input[1] in sources]
    return sum(
        node.op_type == "DequantizeLinear" and kinds.get(node.input[0]) == onnx.TensorProto.INT8 for node in dequantised
    )


def test_an_int8_file_is_small_and_close_to_the_model(model: Detector, images: list[Path], tmp_path: Path) -> None:
    export.export(model, TARGET, tmp_path / "float.onnx")
    export.export(model, TARGET, tmp_path / "int8.onnx", precision="int8", images=images, tolerance=0.2)
    products = int8.matrix_products(onnx.load(tmp_path / "float.onnx").graph)
    assert quantised_products(tmp_path / "int8.onnx") == len(products)
    assert Counter("resblocks" in weight for weight in products.values()) == {True: 3 * 4, False: 4 + 3}
    kinds: Counter[str] = Counter()
    for tensor in onnx.load(tmp_path / "int8.onnx").graph.initializer:
        kinds[onnx.TensorProto.DataType.Name(tensor.data_type)] += int(np.prod(tensor.dims))
    assert kinds["INT8"] > 2 * kinds["FLOAT"]
    session = session_of(tmp_path / "int8.onnx")
    assert session.get_modelmeta().custom_metadata_map["precision"] == "int8"
    for file in images:
        maps, scores = session.run(None, {"images": np.asarray(Image.open(file))[None]})
        expected = model.predict(file, CLASS)
        assert scores[0] == pytest.approx(expected.score, abs=0.05) and scores[0] != expected.score
        assert np.abs(maps[0, 0] - expected.anomaly_map).mean() < 0.05


@pytest.mark.parametrize("changed", [[0.5, 0.0], [0.5, 0.5]])
def test_sensitive_layers_stay_in_float_or_the_file_is_refused(
    changed: list[float], model: Detector, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = iter(changed)
    monkeypatch.setattr(int8, "compare", lambda *_: int8.Differences(0.1, 0.01, 0.9, next(shares)))
    options: dict[str, Any] = {"precision": "int8", "images": images}
    if changed[-1]:
        with pytest.raises(
            UserError, match=r"more than 1.0% of decisions .*all layers in int8: 50.0%.*in float: 50.0%"
        ):
            export.export(model, TARGET, tmp_path / "int8.onnx", **options)
        assert not list(tmp_path.iterdir())
    else:
        export.export(model, TARGET, tmp_path / "int8.onnx", **options)
        # Of three blocks the inner one, and the adapters.
        assert quantised_products(tmp_path / "int8.onnx") == 4 + 4


def test_differences() -> None:
    scores, others = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.1, 0.35, 0.3, 0.2])
    maps = np.zeros((4, 2, 2))
    moved = maps.copy()
    moved[1, 0, 0] = 0.8
    found = int8.compare((maps, scores), (moved, others), 0.25)
    assert found == pytest.approx((0.8, 0.05, 0.2, 0.5))
    # Without a threshold: at the score that a tenth exceeds.
    assert int8.compare((maps, scores), (moved, others), None).changed == 0.25
    assert int8.compare((maps[:1], scores[:1]), (moved[:1], others[:1]), None) == (0.0, 0.0, 1.0, 0.0)
