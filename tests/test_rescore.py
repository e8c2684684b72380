"""Maps that `inference.py --save_maps` or other methods write give the same metrics as an evaluation."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataset.records import Record
from engine.config.evaluation import RescoreArguments
from engine.evaluation import evaluate as evaluate_module
from engine.evaluation import rescore as module
from engine.evaluation.maps import match_paths, read_map
from engine.evaluation.rescore import rescore
from tests.evaluating import evaluate_checkpoints
from tests.scripts import error_line, read_csv, save, write_clip, write_dataset
from utils.errors import UserError
from utils.metrics import PixelCounter, image_metrics

LARGE = (52, 60)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP of 40 px, and images of 52 x 60 of two classes, one without masks."""
    folder = tmp_path_factory.mktemp("world")
    write_clip(folder / "clip")
    write_dataset(folder / "test", classes=("cork", "reed"), count=3)
    for path in (folder / "test").rglob("*.png"):
        with Image.open(path) as image:
            image.resize(LARGE, Image.Resampling.NEAREST).save(path)
    (folder / "test/reed/ground_truth/spot/001_mask.png").unlink()
    return folder


def evaluated(world: Path, folder: Path, **options: Any) -> list[dict[str, str]]:
    """The rows of an evaluation of unadapted CLIP."""
    name = f"local-dir:{world / 'clip'}"
    common = {"model_name": name, "output_dir": folder, "device": "cpu", "batch_size": 2, "num_workers": 0}
    evaluate_checkpoints("none", str(world / "test"), **common, **options)
    (file,) = folder.glob("*.csv")
    return figures(file)


def figures(file: Path) -> list[dict[str, str]]:
    rows = read_csv(file)
    assert {row.pop("model") for row in rows} and {row.pop("det_score") for row in rows}
    return rows


def rescored(world: Path, maps: Path, **options: Any) -> list[dict[str, str]]:
    for file in maps.glob("rescored*.csv"):
        file.unlink()
    rescore(RescoreArguments.of(maps=maps, dataset=str(world / "test"), **options))
    (file,) = maps.glob("rescored*.csv")
    return figures(file)


@pytest.mark.parametrize(
    ("published", "options"),
    [
        (True, {}),
        (False, {"map_size": "original"}),
        (True, {"map_size": 24, "aupro_limit": 0.05, "escape_rate": 0.34, "overkill_rate": 0.1}),
        (False, {"threshold": (0.45, 0.5)}),
    ],
)
def test_saved_maps_reproduce_an_evaluation(
    world: Path, tmp_path: Path, published: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in (evaluate_module, module):
        monkeypatch.setattr(each, "in_catalog", lambda _: published)
    expected = evaluated(world, tmp_path, save_maps=True, **options)
    (maps,) = tmp_path.glob("unadapted_maps_test*")
    found = rescored(world, maps, **options)
    if "map_size" not in options:
        # By default both sizes are compared.
        original = evaluated(world, tmp_path / "original", map_size="original", **options)
        assert found[3:] == original != expected
        assert {row["map_size"] for row in found} == {"model", "original"}
        found = found[:3]
    assert found == expected
    assert (expected[0]["published_image_ap"] == "n/a") is not published
    assert expected[1]["pixel_ap"] == "n/a" and float(expected[0]["pixel_ap"]) > 0
    assert {"overkill", "escape"} <= expected[0].keys() or "escape_rate" not in options
    assert "pixel_iou" in expected[0] or "threshold" not in options


def test_maps_of_another_method(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another root, size and ending; without scores an image's is the maximum of its map; missing maps are listed."""
    caplog.set_level(logging.INFO)
    rng = np.random.default_rng(0)
    maps, labels, scores, counter = tmp_path / "maps", [], [], PixelCounter()
    for kind, count in (("good", 3), ("spot", 2)):
        for index in range(count):
            anomaly_map = rng.integers(0, 50, (60, 52)).astype(np.uint16)
            path = maps / "mirror" / "cork" / "test" / kind / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(anomaly_map).save(path)
            mask = np.zeros((60, 52), dtype=bool)
            if kind == "spot":
                with Image.open(world / f"test/cork/ground_truth/spot/{index:03d}_mask.png") as image:
                    mask = np.asarray(image) > 0
            counter.update(as_tensor(anomaly_map), as_tensor(mask), ["image"])
            labels.append(kind == "spot")
            scores.append(float(anomaly_map.max()))
    save(maps / "mirror" / "cork" / "test" / "good" / "009.png", np.zeros((4, 4)))
    rows = rescored(world, maps, name="theirs", map_size="original")
    assert [row["class"] for row in rows] == ["cork", "average"]
    expected = {**counter.result(), **image_metrics(np.array(labels), np.array(scores), ["image"] * 5)}
    assert {name: float(rows[0][name]) for name in expected} == pytest.approx(expected, abs=1e-6)
    log = caplog.text
    assert "5 of 12 images have a map, such as cork/test/good/000.png: mirror/cork/test/good/000.png" in log
    assert "7 images without a map are left out: cork/test/spot/002.png" in log
    assert "1 match no image: mirror/cork/test/good/009.png" in log
    # With scores, also of other images; they are matched in the same way.
    names = [f"root/cork/test/{kind}/{index:03d}" for kind in ("good", "spot") for index in range(3)]
    lines = [f"{name}.jpg,{index}" for index, name in enumerate(names)]
    (tmp_path / "scores.csv").write_text("\n".join(["path,score", *lines]), encoding="utf-8")
    rows = rescored(world, maps, scores=tmp_path / "scores.csv", map_size="original")
    assert rows[0]["image_auroc"] == "100.000000"
    for text, message in (
        ("path,score\n" + lines[0], "--scores has no score of cork/test/good/001.png"),
        ("path,score\ncork/test/good/000.png,high", r"scores.csv:2: 'high' is not a number"),
        ("path\nx", "lacks the column score"),
    ):
        (tmp_path / "scores.csv").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            rescored(world, maps, scores=tmp_path / "scores.csv")


def as_tensor(values: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(values.astype(np.float32))[None]


def test_errors_of_the_script_are_one_line(world: Path, tmp_path: Path) -> None:
    script = "engine/evaluation/rescore.py"
    assert "no map (.npy .npz" in error_line(script, tmp_path, "--dataset", world / "test")
    assert "the following arguments are required" in error_line(script, tmp_path)
    assert "give one or two numbers" in error_line(
        script, tmp_path, "--dataset", world / "test", "--threshold", 1, 2, 3
    )


RECORDS = [
    Record(f"{root}/{name}/test/{kind}", int("good" not in kind), name)
    for root, name, kind in [
        ("mirror", "cup", "good/000.png"),
        ("mirror", "cup", "bent/000.png"),
        ("mirror", "pin", "good/000.png"),
        ("mirror", "pin", "good/001.png"),
        ("mirror", "pin", "good/001.jpg"),
    ]
]
CUP = "mirror/cup/test/good/000.png"


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("mirror/cup/test/good/000.npy", CUP),
        ("cup/test/good/000.tiff", CUP),
        ("other/root/cup/test/good/000.png.npy", CUP),
        ("bent/000.npz", "mirror/cup/test/bent/000.png"),
        ("pin/test/good/001.jpg.npy", "mirror/pin/test/good/001.jpg"),
        ("other/cup/good/000.npy", None),
        ("other/bent/000.npy", None),
        ("cup/test/good/002.npy", None),
    ],
)
def test_paths_are_matched_by_their_ends(name: str, image: str | None) -> None:
    assert match_paths([name], RECORDS, "MAPS") == ({} if image is None else {image: name})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["good/000.npy"], "good/000.npy fits several images"),
        (["pin/test/good/001.npy"], "fits several images"),
        (["cup/test/good/000.npy", "cup/test/good/000.png"], "are both of mirror/cup/test/good/000.png"),
    ],
)
def test_ambiguous_paths_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        match_paths(names, RECORDS, "MAPS")


VALUES = np.arange(6).reshape(2, 3)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("x.npy", lambda path: np.save(path, VALUES[None, :, :, None].astype(np.float16))),
        ("x.npz", lambda path: np.savez_compressed(path, any_name=VALUES)),
        ("x.tif", lambda path: Image.fromarray(VALUES.astype(np.float32)).save(path)),
        ("x.TIFF", lambda path: Image.fromarray(VALUES.astype(np.uint16)).save(path)),
        ("x.png", lambda path: Image.fromarray(VALUES.astype(np.uint16)).save(path)),
    ],
)
def test_formats_of_maps(tmp_path: Path, name: str, write: Any) -> None:
    write(tmp_path / name)
    found = read_map(tmp_path / name)
    assert found.dtype == np.float32
    assert np.array_equal(found, VALUES)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("x.png", lambda path: Image.new("RGB", (3, 2)).save(path), "picture of mode RGB"),
        ("x.png", lambda path: Image.new("L", (3, 2)).save(path), "picture of mode L"),
        ("x.npy", lambda path: np.save(path, np.zeros((3, 4, 5))), r"array \(3, 4, 5\)"),
        ("x.npy", lambda path: np.save(path, np.array([[object()]])), "cannot be read"),
        ("x.npz", lambda path: np.savez(path, a=VALUES, b=VALUES), "must contain one array"),
        ("x.tif", lambda path: path.write_bytes(b"nothing"), "cannot be read"),
        ("x.npy", lambda path: path.touch(), "cannot be read"),
        ("x.npz", lambda path: path.write_bytes(b"PK nothing"), "cannot be read"),
    ],
)
def test_other_files_are_no_maps(tmp_path: Path, name: str, write: Any, message: str) -> None:
    write(tmp_path / name)
    with pytest.raises(UserError, match=message) as error:
        read_map(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
