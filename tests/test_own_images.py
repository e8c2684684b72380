"""`inference.py --image`: any folder of images, and its report."""

from __future__ import annotations

import csv
import logging
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser
from scipy import ndimage

from dataset.folders import FoundImages, images_below
from dataset.images import read_image
from engine.config.evaluation import InferenceArguments
from engine.detector.loading import unadapted_detector
from engine.detector.prediction import as_image
from engine.evaluation import gallery as module
from engine.evaluation import own_images
from engine.evaluation.gallery import Finding, Gallery, scale_of
from engine.evaluation.own_images import class_of, find_own_images
from model.clip_loading import load_clip
from tests.browser import browser  # noqa: F401
from tests.evaluating import score_images
from tests.scripts import save, write_clip
from utils.errors import UserError
from utils.heatmaps import OPACITY, overlay
from utils.regions import Region, worst_region

RNG = np.random.default_rng(7)
FORMATS = ("png", "jpg", "bmp", "tiff", "webp", "gif", "ppm", "tga", "PNG")


def noise(width: int = 30, height: int = 20) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"local-dir:{write_clip(tmp_path_factory.mktemp('world') / 'clip')}"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of many formats and sizes in nested folders, two broken files, and other files."""
    folder = tmp_path_factory.mktemp("mixed")
    for index, ending in enumerate(FORMATS):
        path = folder / ("nut" if index % 2 else "metal_screw/monday") / f"{index} <b>.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(17 + 9 * index, 40 - 3 * index).save(path)
    noise().save(folder / "no_ending", format="PNG")
    (folder / "nut/cut.png").write_bytes((folder / "nut/1 <b>.jpg").read_bytes()[:300])
    (folder / "nut/text.jpg").write_text("no image", encoding="utf-8")
    (folder / "notes.txt").write_text("text", encoding="utf-8")
    (folder / "README").write_text("text", encoding="utf-8")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / ".git").mkdir()
    noise().save(folder / ".git" / "x.png")
    if os.name != "nt":
        (folder / "nut/again").symlink_to(folder, target_is_directory=True)
        (folder / "self").symlink_to("self")
    return folder


def score(clip: str, image: Path | list[Path], output_dir: Path, **more: Any) -> list[Finding]:
    return score_images("none", image, model_name=clip, output_dir=output_dir, device="cpu", **more)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "scores.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_any_folder_gives_scores_heatmaps_and_a_report(
    clip: str, mixed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    findings = score(clip, mixed, tmp_path / "out", class_from_folder=True)
    assert len(findings) == len(FORMATS) + 1
    left_out = [line for line in caplog.messages if line.startswith("left out")]
    assert len(left_out) == 2 and all("\n" not in line for line in left_out)
    assert "scored by unadapted, 2 could not be read" in caplog.text
    rows = rows_of(tmp_path / "out")
    columns = ["path", "class_name", "score", "decision", "rank", "regions"]
    assert list(rows[0]) == [*columns, *(f"region_{name}" for name in Region._fields)] and len(rows) == len(findings)
    for row, found in zip(rows, findings, strict=True):
        assert Path(row["path"]) == found.path
        assert row["decision"] == row["rank"] == row["regions"] == ""
        assert float(row["score"]) == pytest.approx(found.score, abs=1e-6)
        with Image.open(found.path) as image:
            width, height = image.size
        left, top, right, bottom, area = (int(row[f"region_{name}"]) for name in Region._fields)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert 0 < area <= (right - left) * (bottom - top)
    assert {found.class_name for found in findings} == {"metal_screw", "nut", mixed.name}
    heatmaps = {path.stem: path for path in (tmp_path / "out/heatmaps").rglob("*.png")}
    assert len(heatmaps) == len(findings)
    with Image.open(next(path for stem, path in heatmaps.items() if stem.startswith("3 "))) as heatmap:
        assert heatmap.size == (44, 31)
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert page.count('loading="lazy"') == 2 * len(findings)
    assert "<b>" not in page and "2 could not be read" in page
    shown = [float(value) for value in re.findall(r'data-score="([0-9.]+)"', page)]
    assert shown == sorted(shown, reverse=True) and len(shown) == len(findings)
    # One file, which asks for nothing.
    assert set(re.findall(r'(?:src|href)="([a-z]+:)', page)) == {"data:"}
    assert not re.findall(r'(?:src|href)="(?!data:)', page)


def test_results_in_the_folder_are_not_scored_again(clip: str, tmp_path: Path) -> None:
    for name, output in (("one", "."), ("two", "results")):
        folder = tmp_path / name
        save(folder / "a" / "x.png", RNG.integers(0, 255, (20, 20, 3)))
        for _ in range(2):
            assert len(score(clip, folder, folder / output)) == 1
        assert len(images_below(folder).images) == 1


def test_a_folder_without_readable_images_gives_no_files(clip: str, tmp_path: Path) -> None:
    for name in ("a.png", "b.gif"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text("no image", encoding="utf-8")
    with pytest.raises(UserError, match="none of its 2 images can be read"):
        score(clip, tmp_path / "in", tmp_path / "out")
    with pytest.raises(UserError, match=r"a\.png cannot be read"):
        score(clip, tmp_path / "in" / "a.png", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_first_folder_below_the_input_is_the_class(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    assert class_of(parts / "screw/monday/1.png", parts) == "screw"
    assert class_of(parts / "screw/1.png", parts / "screw") == "screw"
    assert class_of(parts / "screw/monday/1.png", parts / "screw") == "monday"
    save(parts / "screw" / "1.png", np.zeros((4, 4, 3)))
    assert class_of(parts / "screw/1.png", parts / "screw/1.png") == "screw"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image": Path("a"), "dataset": "x"}, "leave --dataset out"),
        ({"image": Path("a"), "normal": Path("b")}, "leave --normal out"),
        ({"normal": Path("b")}, "--anomalous"),
        ({"anomalous": Path("b")}, "--normal"),
        ({"normal": Path("b"), "anomalous": Path("c"), "metadata": Path("d")}, "leave --metadata out"),
        ({"class_from_folder": True}, "leave --class_from_folder out"),
        ({"image": (Path("a"),), "metadata": Path("b")}, "leave --metadata out"),
        ({"calibrate": Path("a"), "batch_size": 2}, "leave --batch_size out"),
        ({"image": (Path("a"),), "precision": "bf16"}, "leave --precision out"),
        ({"normal": Path("a"), "anomalous": Path("b"), "mask_threshold": 0.3}, "leave --mask_threshold out"),
        ({"dataset": "VisA", "surgery": "sequential"}, "leave --surgery out"),
    ],
)
def test_incompatible_arguments(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        InferenceArguments.of(checkpoint="none", **changes).check()


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32, "LA", "P", "RGBA", "CMYK"])
def test_an_opened_image_equals_its_file(kind: Any, tmp_path: Path) -> None:
    """Inputs of `predict` in a notebook: paths and images."""
    values = np.asarray(noise().convert("L")).astype(np.float64)
    scale = {np.uint16: 257, np.float32: 1 / 255}.get(kind, 1)
    image = noise().convert(kind) if isinstance(kind, str) else Image.fromarray((values * scale).astype(kind))
    image.save(tmp_path / "image.tif")
    with Image.open(tmp_path / "image.tif") as opened:
        np.testing.assert_array_equal(as_image(opened), read_image(tmp_path / "image.tif"))


def turned(tmp_path: Path, ending: str) -> tuple[Path, Image.Image]:
    """A file on its side with the tag that says so, and its image upright."""
    upright, tag = noise(24, 16), Image.Exif()
    tag[0x0112] = 6
    path = tmp_path / f"turned.{ending}"
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=tag)
    return path, upright


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_an_image_in_any_form_is_upright(ending: str, tmp_path: Path) -> None:
    path, upright = turned(tmp_path, ending)
    for image in (str(path), path, Image.open(path), Image.open(path).convert("RGBA"), read_image(path), upright):
        np.testing.assert_array_equal(as_image(image), upright)
    np.testing.assert_array_equal(as_image(np.asarray(upright)), upright)


@pytest.mark.parametrize("image", [None, b"png", np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8, 3)), torch.zeros(3, 8)])
def test_what_is_no_image_is_refused_in_one_line(image: Any) -> None:
    with pytest.raises(UserError, match=r"^an image cannot be .*: give a path, [^\n]*$"):
        as_image(image)


def test_a_list_of_images_gives_a_list_of_predictions(clip: str, tmp_path: Path) -> None:
    path, upright = turned(tmp_path, "png")
    model = unadapted_detector(load_clip(clip))
    forms = [path, Image.open(path), np.asarray(upright)]
    expected = model.predict(upright, "nut").score
    for size in (1, 2, 8):
        assert [found.score for found in model.predict(forms, "nut", batch_size=size)] == pytest.approx([expected] * 3)
    assert model.predict([]) == []


def test_several_images_and_folders(clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/x.png", "a/nut/x.png", "b/x.png"):
        save(tmp_path / "in" / name, RNG.integers(0, 255, (20, 20, 3)))
    (tmp_path / "in/b/broken.png").write_text("no image", encoding="utf-8")
    places = [tmp_path / "in" / name for name in ("a", "b/x.png", "b/../a/x.png", "b/broken.png")]
    findings = score(clip, places, tmp_path / "out", class_from_folder=True)
    classes = {found.path.relative_to(tmp_path / "in").as_posix(): found.class_name for found in findings}
    assert classes == {"a/nut/x.png": "nut", "a/x.png": "a", "b/x.png": "b"}
    drawn = sorted(path.relative_to(tmp_path / "out").as_posix() for path in tmp_path.rglob("*_heatmap.png"))
    assert drawn == [f"heatmaps/{name}_heatmap.png" for name in ("a/nut/x", "a/x", "b/x")]
    monkeypatch.setattr(own_images, "find_images", lambda place, _: FoundImages([place], problems=["locked"]))
    found = find_own_images([places[1]] * 2, "--image", None, False)
    assert (found.place, found.problems) == (places[1].parent, ["locked"] * 2)


def bumps(*places: tuple[int, int, float], size: int = 40) -> np.ndarray:
    values = np.zeros((size, size), np.float32)
    for row, column, height in places:
        values[row, column] = height
    return ndimage.gaussian_filter(values, 2.0)


def test_the_worst_region_contains_the_maximum_of_the_map() -> None:
    """The higher of two peaks, down to half of its height."""
    two = bumps((10, 12, 1.0), (30, 25, 0.8))
    found = worst_region(two, (40, 40))
    ys, xs = np.mgrid[:40, :40]
    near = (np.hypot(ys - 10, xs - 12) < 10) & (two >= two.max() / 2)
    assert found == (xs[near].min(), ys[near].min(), xs[near].max() + 1, ys[near].max() + 1, near.sum())
    assert worst_region(np.zeros((8, 8), np.float32), (8, 8)) is None
    # In pixels of the image, whose sides need not be those of the map.
    wide = worst_region(two, (400, 80))
    assert wide.left == pytest.approx(10 * found.left, abs=10) and wide.top == pytest.approx(2 * found.top, abs=2)
    assert wide.area == pytest.approx(20 * found.area, rel=0.15)


def test_a_heatmap_blended_in_bands_equals_the_whole() -> None:
    image, values = noise(20, 700), RNG.random((40, 40), dtype=np.float32)
    heat = Image.fromarray((values * 255).astype(np.uint8)).resize(image.size, Image.Resampling.BILINEAR)
    coloured = matplotlib.colormaps["turbo"](np.asarray(heat))[..., :3]
    expected = (OPACITY * coloured * 255 + (1 - OPACITY) * np.asarray(image)).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(overlay(image, values)), expected)


@pytest.mark.parametrize("scores", [[0.5], [0.2, 0.9], [0.41234, 0.41240], [0.0, 1.0]])
def test_the_slider_reaches_all_scores_in_fine_steps(scores: list[float]) -> None:
    scale = scale_of(scores)
    assert scale.low <= min(scores) and max(scores) <= scale.high
    assert scale.step <= max(max(scores) - min(scores), 1e-4) / 100
    assert round(scale.step * 10**scale.digits) == 1


def fill(gallery: Gallery, count: int) -> None:
    for index in range(count):
        values, path = bumps((10, 10, 1.0)) * index / count, f"folder/{index}.png"
        finding = Finding(Path(path), "nut", index / count, Region(1, 2, 30, 40, 500))
        gallery.add(noise(200, 150), values, finding, path, (200, 150))


def test_a_long_report_is_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IN_MEMORY", 2**16)
    with Gallery() as gallery:
        fill(gallery, 150)
        tracemalloc.start()
        gallery.write(tmp_path / "report.html", "Long", [], [], None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    size = (tmp_path / "report.html").stat().st_size
    assert size > 2**21 and peak < size / 2


def test_the_slider_marks_images_above_it(tmp_path: Path, browser: Browser) -> None:  # noqa: F811
    with Gallery() as gallery:
        fill(gallery, 10)
        gallery.write(tmp_path / "report.html", "Ten", [("Images", "10")], ["x.png cannot be read"], None)
    for width in (1280, 390):
        page = browser.new_page(viewport={"width": width, "height": 800})
        complaints: list[str] = []
        page.on("pageerror", lambda error, said=complaints: said.append(str(error)))
        page.goto((tmp_path / "report.html").as_uri())
        # Without a calibration nothing is rejected until somebody moves the slider.
        assert page.locator("li.rejected").count() == 0
        move = "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})); }"
        page.locator("#slider").evaluate(move, 0.65)
        assert page.locator("li.rejected").count() == 3
        assert "3 of 10 rejected" in page.locator("output").inner_text()
        page.locator("#only").check()
        assert page.locator("#images li:visible").count() == 3
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert complaints == []
        page.close()
    plain = browser.new_context(java_script_enabled=False).new_page()
    plain.goto((tmp_path / "report.html").as_uri())
    assert plain.locator("#images li:visible").count() == 10 and not plain.locator("#threshold").is_visible()
    assert "folder/9.png" in plain.locator("#images li").first.inner_text()
