"""Tiles: their geometry, maps without seams, bounded memory, thresholds, references, and all ways to use them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from engine.app.session import Session
from engine.app.uploads import Upload
from engine.config.evaluation import InferenceArguments
from engine.data.task import load_task
from engine.detector.detector import Detector
from engine.detector.loading import unadapted_detector
from engine.detector.views import tiling_of
from engine.evaluation.evaluate import evaluate
from model.config import tiles_choice
from tests.evaluating import calibrate_images, evaluate_checkpoints, score_images
from tests.helpers import tiny_clip
from tests.scripts import SIZE, read_csv, save, write_world
from utils.errors import UserError
from utils.tiles import LONGEST, OVERLAP, WHOLE_WEIGHT, Blend, Tiling


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("size", [(400, 300), (300, 400), (777, 100), (64, 64), (5, 9), (4000, 10)])
def test_tiles_cover_the_image_and_overlap(size: tuple[int, int], count: int) -> None:
    tiling = Tiling(size, count, 64)
    if max(tiling.size) < LONGEST * 64:
        # Rounded to whole pixels.
        assert tiling.size[0] / tiling.size[1] == pytest.approx(size[0] / size[1], rel=1 / 64)
    assert max(tiling.size) <= LONGEST * 64
    starts = [sorted({corner[axis] for corner in tiling.corners}) for axis in (0, 1)]
    assert len(tiling.corners) == len(starts[0]) * len(starts[1]) and min(map(len, starts)) == count
    for length, places in zip(tiling.size, starts, strict=True):
        assert places[0] == 0 and places[-1] + 64 == length
        assert all(second - first <= (1 - OVERLAP) * 64 + 1 for first, second in pairwise(places))


def blended(tiling: Tiling, maps: list[Tensor], whole: Tensor) -> Tensor:
    blend = Blend(tiling)
    for corner, values in zip(tiling.corners, maps, strict=True):
        blend.add(corner, values)
    return blend.result(whole)


def crops(values: Tensor, tiling: Tiling) -> list[Tensor]:
    side = tiling.side
    return [values[:, top : top + side, left : left + side] for left, top in tiling.corners]


def test_maps_are_put_together_without_seams() -> None:
    tiling = Tiling((150, 100), 3, 32)
    width, height = tiling.size
    constant = torch.full((2, height, width), 0.3)
    result = blended(tiling, crops(constant, tiling), torch.full((2, 32, 32), 0.3))
    torch.testing.assert_close(result, constant)
    values = torch.rand(2, height, width)
    result = blended(tiling, crops(values, tiling), torch.zeros(2, 32, 32))
    torch.testing.assert_close(result, (1 - WHOLE_WEIGHT) * values)
    # Tiles that disagree give a gradual change over their overlap, also where four of them meet.
    different = [torch.full((1, 32, 32), float(index % 2)) for index in range(len(tiling.corners))]
    result = blended(tiling, different, torch.zeros(1, 32, 32)) / (1 - WHOLE_WEIGHT)
    steps = [result.diff(dim=axis).abs().max() for axis in (1, 2)]
    assert result.min() < 0.01 and result.max() > 0.99 and max(steps) <= 1.5 / (OVERLAP * 32)


@pytest.mark.parametrize(
    ("tiles", "size", "count"),
    [
        ("off", (900, 900), 0),
        ("auto", (900, 79), 0),
        ("auto", (90, 80), 6),
        ("auto", (160, 160), 16),
        ("auto", (400, 400), 64),
        ("1", (50, 50), 0),
        ("1", (50, 100), 3),
        ("2", (50, 50), 4),
    ],
)
def test_the_number_of_tiles(tiles: str, size: tuple[int, int], count: int) -> None:
    tiling = tiling_of(Image.new("RGB", size), tiles, 40)
    assert (len(tiling.corners) if tiling else 0) == count


@pytest.mark.parametrize("tiles", ["0", "9", "all", "", -1, "²"])
def test_unknown_tiles_are_refused(tiles: Any) -> None:
    with pytest.raises(UserError, match="choose off, auto, or a number from 1 to 8"):
        tiles_choice(tiles)


@pytest.fixture
def model() -> Detector:
    return unadapted_detector(tiny_clip())


@pytest.fixture
def brightness(model: Detector, monkeypatch: pytest.MonkeyPatch) -> Detector:
    """A detector whose maps are the brightness of what it sees, from 0 to 1."""

    def maps(self: Detector, outputs: Any, pixels: Tensor, references: Any) -> Tensor:
        clip = self.clip
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (clip.mean, clip.std))
        return (pixels * std + mean).mean(dim=1)[None]

    monkeypatch.setattr(Detector, "_level_maps", maps)
    return model


@pytest.mark.parametrize("tiles", ["auto", 1, 3])
def test_a_defect_across_a_seam_is_one_region(brightness: Detector, tiles: Any) -> None:
    image = np.full((200, 300, 3), 51, np.uint8)
    constant = brightness.predict(image, tiles=tiles).anomaly_map
    np.testing.assert_allclose(constant, 0.2, atol=1e-6)
    assert constant.shape[1] / constant.shape[0] == pytest.approx(1.5, rel=0.02)
    image[60:140, 100:200] = 204
    prediction = brightness.predict(image, tiles=tiles)
    inside = prediction.anomaly_map > 0.5
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    assert inside.sum() == len(rows) * len(columns)
    scale = 200 / len(inside)
    edges = scale * np.array([rows[0], rows[-1] + 1, columns[0], columns[-1] + 1])
    assert edges == pytest.approx([60, 140, 100, 200], abs=8)


def test_no_pass_has_more_than_a_batch_of_tiles(model: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = model._forward
    monkeypatch.setattr(model, "_forward", lambda pixels, side: (sizes.append(len(pixels)), forward(pixels, side))[1])
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, size, dtype=np.uint8) for size in ((120, 160, 3), (60, 60, 3), (90, 90, 3))]
    together = model.predict(images, "nut", tiles="auto", batch_size=5)
    assert sizes == [5, 5, 5, 5, 2]  # 1 + 3 * 5 views, 1, and 1 + 2 * 2
    for image, prediction in zip(images, together, strict=True):
        alone = model.predict(image, "nut", tiles="auto", batch_size=1)
        assert alone.score == pytest.approx(prediction.score, abs=1e-5)
        np.testing.assert_allclose(prediction.level_maps, alone.level_maps, atol=1e-5)
    sizes.clear()
    model.tiles = "3"
    model.add_references(images[:1], "nut")
    assert sizes == [8, 8] and len(model.references["nut"].memory[0]) == 16 * 25
    assert json.loads(json.dumps(together[0].to_dict())) == {
        "score": together[0].score,
        "decision": None,
        "rank": None,
        "regions": None,
    }


def test_references_belong_to_their_tiles(model: Detector) -> None:
    image = np.random.default_rng(0).integers(0, 255, (100, 90, 3), dtype=np.uint8)
    model.tiles = "2"
    model.add_references([image], "nut", weight=1.0)
    assert model.predict(image, "nut").anomaly_map.max() < 1e-5
    with pytest.raises(UserError, match="added with tiles 2, not off"):
        model.predict(image, "nut", tiles="off")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of larger images than the model's input, and normal images."""
    folder = write_world(tmp_path_factory.mktemp("world"), ("cork",))
    rng = np.random.default_rng(8)
    for path in sorted((folder / "test").rglob("*.png")):
        with Image.open(path) as image:
            image.resize((3 * SIZE, 2 * SIZE), Image.Resampling.NEAREST).save(path)
    for index in range(20):
        save(folder / "normal" / f"{index}.png", rng.integers(60, 120, (2 * SIZE, 2 * SIZE, 3)))
    return folder


def options(world: Path, tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {"model_name": f"local-dir:{world / 'clip'}", "output_dir": tmp_path / "out", **more}


def test_thresholds_belong_to_their_tiles(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "c.json"
    asked = options(world, tmp_path)
    calibration = {name: value for name, value in asked.items() if name != "output_dir"}
    (entry,) = calibrate_images(
        "none", world / "normal", calibration=file, false_alarms=0.05, tiles="auto", **calibration
    )
    assert entry.tiles == "auto"
    image = world / "test/cork/test/spot"
    found = score_images("none", image, calibration=file, tiles="auto", json=True, **asked)
    assert {finding.decision for finding in found} <= {"normal", "anomalous"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "heatmaps_tiles_auto",
        "report_tiles_auto.html",
        "scores_tiles_auto.csv",
        "scores_tiles_auto.jsonl",
    }
    with pytest.raises(UserError, match="are for --tiles auto, not for --tiles off"):
        score_images("none", image, calibration=file, **asked)
    assert_json_is_csv(tmp_path / "out" / "scores_tiles_auto.csv")
    session = Session({"m": unadapted_detector(tiny_clip(), tiles="auto")}, tiles="2")
    session.uploads = [Upload("a.png", next(image.iterdir()))]
    session.compare_with([Upload("b.png", world / "normal" / "0.png")], "m", "object")
    for tiles, size in (("2", 5), ("off", 1)):
        session.tiles = tiles
        session.analyze("m", "object")
        references = session._detectors["m"].references["object"]
        assert references.tiles == tiles and len(references.memory[0]) == 25 * size and not session.problems


def assert_json_is_csv(path: Path) -> None:
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
    rows = read_csv(path)
    assert [list(line) for line in lines] == [list(row) for row in rows] and rows
    for line, row in zip(lines, rows, strict=True):
        for name, value in line.items():
            assert row[name] in ("", "n/a") if value is None else type(value)(row[name]) == value


def test_evaluation_with_tiles_has_the_scores_of_predict(world: Path, tmp_path: Path) -> None:
    (evaluation,) = evaluate_checkpoints(
        "none", world / "test", tiles="2", json=True, visualize=1, **options(world, tmp_path)
    )
    (plain,) = evaluate_checkpoints("none", world / "test", **options(world, tmp_path))
    assert_json_is_csv(tmp_path / "out" / "unadapted_evaluation_test_tiles_2.csv")
    model = unadapted_detector(tiny_clip(), tiles="2")
    data = load_task(str(world / "test"))
    alone = evaluate({"m": model}, data, "cpu", batch_size=3)["m"].classes[0]
    assert alone.values != evaluate({"m": unadapted_detector(tiny_clip())}, data, "cpu")["m"].classes[0].values
    predicted = [model.predict(world / "test" / image.path, "cork").score for image in alone.scores]
    assert [image.score for image in alone.scores] == pytest.approx(predicted, abs=1e-5)
    assert evaluation.classes[0].values != plain.classes[0].values
    assert InferenceArguments.of(checkpoint="none", tiles="2").overrides() == {"tiles": "2"}
