"""Thresholds from normal images, and decisions by them (docs/method.md, "Calibration")."""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser
from scipy.stats import betabinom

import engine.detector.calibration
from dataset.toy_world import draw_toy_class
from engine import load_model
from engine.detector.calibration import (
    CalibrationKey,
    Entry,
    add_entry,
    check_enough,
    false_alarm_interval,
    images_needed,
    make_entry,
    mismatch_reason,
    order_of_threshold,
    read_calibration,
)
from engine.detector.detector import Detector
from engine.detector.loading import unadapted_detector
from engine.evaluation.calibrate import score_and_peak
from engine.evaluation.gallery import Finding
from engine.evaluation.own_images import drift_notes
from engine.training.base import train_base
from model.clip_loading import load_clip
from tests.browser import browser  # noqa: F401
from tests.evaluating import calibrate_images, score_images
from tests.helpers import adapted_clip, tiny_clip
from tests.scripts import SIZE, read_csv, save, small_runs, write_world
from utils.errors import UserError
from utils.regions import regions_of

RNG = np.random.default_rng(3)
KEY = CalibrationKey("c0ffee", "cork", "industrial", "abnormal")


@pytest.mark.parametrize(("rate", "images"), [(0.05, 19), (0.01, 99), (0.1, 9), (0.03, 33), (0.001, 999), (0.5, 1)])
def test_too_few_images_are_refused_with_the_required_number(rate: float, images: int) -> None:
    assert images_needed(rate) == images
    assert order_of_threshold(images, rate) == images
    check_enough(images, rate, "here")
    with pytest.raises(UserError, match=rf"{images - 1} normal images are too few .* need {images}: add 1") as refused:
        check_enough(images - 1, rate, "here")
    # What it offers in place of more images is enough.
    for offered in re.findall(r"--false_alarms ([0-9.]+)", str(refused.value)):
        check_enough(images - 1, float(offered), "here")


@pytest.mark.parametrize(("count", "rate"), [(19, 0.05), (30, 0.1), (99, 0.01), (250, 0.03)])
def test_the_false_alarm_rate_holds_for_any_scores(count: int, rate: float) -> None:
    """The mean rate over calibrations is just below the requested rate; the interval has its coverage."""
    k = order_of_threshold(count, rate)
    true_rates = []
    for _ in range(1500):
        entry = make_entry(KEY, "m", RNG.exponential(size=count), RNG.random(count), rate)
        true_rates.append(np.exp(-entry.image_threshold))  # of an exponential distribution, the share above
        assert entry.image_threshold == entry.scores[k - 1] and entry.pixel_threshold == entry.peaks[k - 1]
    expected = (count + 1 - k) / (count + 1)
    assert rate - 1 / (count + 1) < expected <= rate
    assert np.mean(true_rates) == pytest.approx(expected, rel=0.05)
    low, high = false_alarm_interval(count, rate)
    assert np.mean([low <= found <= high for found in true_rates]) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(
    ("shift", "count", "says"), [(0.0, 40, ""), (0.2, 40, "higher"), (-0.2, 40, "lower"), (0.2, 19, "")]
)
def test_scores_unlike_those_of_the_calibration_are_reported(shift: float, count: int, says: str) -> None:
    rng = np.random.default_rng(0)
    entry = make_entry(KEY, "m", rng.normal(0.5, 0.05, 100), rng.random(100), 0.05)
    found = [Finding(Path("a.png"), "cork", score, None) for score in rng.normal(0.5 + shift, 0.05, count)]
    notes = drift_notes(found, {"cork": entry})
    assert [says in note for note in notes] == ([True] if says else [])


def test_entries_are_found_by_their_subject_only(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    values = RNG.random(19).tolist()
    others = [KEY._replace(**{name: "another"}) for name in CalibrationKey._fields]
    for key in (KEY, *others, KEY):
        add_entry(file, make_entry(key, "m", values, values, 0.05))
    entries = read_calibration(file)
    assert {entry.key for entry in entries} == {KEY, *others} and len(entries) == 1 + len(others)
    (alone,) = (entry for entry in entries if entry.key == KEY)
    assert alone == make_entry(KEY, "m", values, values, 0.05) and alone.pillow == PIL.__version__
    for key, says in zip(
        others, ("model", "of 'cork'", "domain", "det score", "references", "--tiles off, not"), strict=True
    ):
        assert says in mismatch_reason([alone], key)


def test_calibrations_at_the_same_time_lose_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading, changing and writing the file is one atomic step."""
    file, values = tmp_path / "calibration.json", RNG.random(19).tolist()
    read, gate = engine.detector.calibration.read_calibration, threading.Barrier(6)

    def slowly(path: Path) -> list[Entry]:
        entries = read(path)
        time.sleep(0.05)
        return entries

    def add(class_name: str) -> None:
        gate.wait()
        add_entry(file, make_entry(KEY._replace(class_name=class_name), "m", values, values, 0.05))

    monkeypatch.setattr(engine.detector.calibration, "read_calibration", slowly)
    threads = [threading.Thread(target=add, args=[f"class {number}"]) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {entry.class_name for entry in read(file)} == {f"class {number}" for number in range(6)}
    assert [path.name for path in tmp_path.iterdir()] == [file.name], "no lock is left behind"


@pytest.mark.parametrize(
    "change",
    [{"interval": [0.1]}, {"scores": "x"}, {"pixel_threshold": float("nan")}, {"unknown": 1}, {"images": None}],
)
def test_a_changed_file_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    file = tmp_path / "calibration.json"
    values = RNG.random(19).tolist()
    add_entry(file, make_entry(KEY, "m", values, values, 0.05))
    content = json.loads(file.read_text(encoding="utf-8"))
    content["entries"][0] |= change
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(str(file))):
        read_calibration(file)


def test_regions_of_a_mask_lie_in_the_image() -> None:
    values = np.zeros((10, 10), np.float32)
    values[1:3, 2:5], values[7, 7], values[8, 8] = 0.5, 0.9, 0.6
    found = regions_of(values > 0.3, values, (20, 30))
    assert found == ((14, 21, 18, 27, 12), (4, 3, 10, 9, 36))
    assert regions_of(values > 1, values, (20, 30)) == ()
    # No region is lost in an image that is smaller than its map.
    assert regions_of(values > 0.3, values, (3, 3)) == ((2, 2, 3, 3, 1), (0, 0, 2, 1, 1))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and folders of normal images of two classes."""
    folder = write_world(tmp_path_factory.mktemp("world"), ("cork", "tile"))
    train_base(small_runs(folder)[0])
    rng = np.random.default_rng(8)
    for name, count in (("cork", 24), ("tile", 20)):
        for index in range(count):
            save(folder / "normal" / name / f"{index}.png", rng.integers(60, 120, (SIZE, SIZE, 3)))
    (folder / "normal" / "cork" / "broken.png").write_text("no image", encoding="utf-8")
    return folder


def calibrated(world: Path, **more: Any) -> list[Entry]:
    folder = more.pop("folder", world / "normal" / "cork")
    return calibrate_images(world / "base", folder, **{"false_alarms": 0.05, "class_name": "cork", **more})


@pytest.fixture
def model(world: Path) -> Detector:
    (world / "base" / "calibration.json").unlink(missing_ok=True)
    calibrated(world)
    return load_model(world / "base" / "image_adapter.pth", device="cpu")


def test_predict_returns_decisions_after_calibration(world: Path, model: Detector) -> None:
    (entry,) = read_calibration(world / "base" / "calibration.json")
    assert entry.images == 24 and entry.model == "image_adapter_1" and entry.class_name == "cork"
    for index in range(24):
        found = model.predict(world / "normal" / "cork" / f"{index}.png", "cork")
        anomaly_map, score, _ = found
        assert found.decision == ("anomalous" if score > entry.image_threshold else "normal")
        assert found.rank == pytest.approx(entry.scores.index(score) / 25)
        assert (found.mask == (anomaly_map > entry.pixel_threshold)).all()
        assert bool(found.regions) == found.mask.any()
    # Of any other class, domain or det score nothing is known.
    image = world / "normal" / "cork" / "0.png"
    for asked in (("tile",), ("cork", "medical")):
        assert model.predict(image, *asked).decision is None
    assert model.predict(image, "cork", det_score="difference").decision is None
    assert load_model(world / "base" / "image_adapter.pth", device="cpu", det_score="difference").digest == model.digest


@pytest.mark.parametrize(("side", "text_adapted"), [("text", True), ("image", True), ("text", False)])
def test_the_digest_covers_the_trained_sides(side: str, text_adapted: bool) -> None:
    model = adapted_clip(tiny_clip(), text_adapted=text_adapted)
    before = Detector(model, "any").digest
    assert before == Detector(model, "another name").digest
    with torch.no_grad():
        for parameter in model.components[f"{side}_adapter"].parameters():
            parameter.add_(1)
    # The adapters of a text side that was not trained are new at each loading.
    assert (before == Detector(model, "any").digest) == (not text_adapted)


def test_thresholds_of_another_model_or_class_are_refused(world: Path, model: Detector, tmp_path: Path) -> None:
    file = world / "base" / "calibration.json"
    same = load_model(world / "base" / "image_adapter_1.pth", device="cpu", calibration=file)
    image = world / "normal" / "tile" / "0.png"
    with pytest.raises(UserError, match="thresholds are of 'cork', not of 'tile'"):
        same.predict(image, "tile")
    other = unadapted_detector(model.clip)
    with pytest.raises(UserError, match="no thresholds of unadapted"):
        other.find_calibration("none", file)
    other = unadapted_detector(model.clip)
    other.find_calibration(world / "base")
    assert other.predict(image, "cork").decision is None
    for changes in ({"surgery": "batch_axis"}, {"img_size": 48}):
        assert load_model(world / "base" / "image_adapter.pth", device="cpu", **changes).digest != model.digest
    with pytest.raises(UserError, match="no such file"):
        load_model(world / "base" / "image_adapter.pth", device="cpu", calibration=tmp_path / "gone.json")


def test_images_count_once_and_broken_ones_do_not_count(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "normal"
    folder.mkdir()
    for index in range(18):
        (folder / f"{index}.png").write_bytes((world / "normal/cork" / f"{index}.png").read_bytes())
    Image.open(folder / "3.png").save(folder / "again.bmp")
    with pytest.raises(UserError, match=r"18 normal images are too few for 5 %.* need 19: add 1"):
        calibrated(world, folder=folder, calibration=tmp_path / "c.json")
    assert "again.bmp is the same image as" in caplog.text or "3.png is the same image as" in caplog.text
    assert not (tmp_path / "c.json").exists()
    # Under another name it is another's image.
    for name in ("cork", "light cork"):
        shutil.copytree(world / "normal/cork", tmp_path / "both" / name)
    both = calibrated(
        world, folder=tmp_path / "both", class_name=None, class_from_folder=True, calibration=tmp_path / "c.json"
    )
    assert [entry.images for entry in both] == [24, 24]


def test_each_class_of_a_folder_gets_its_thresholds_and_all_outputs_show_them(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    file = tmp_path / "c.json"
    entries = calibrated(
        world, folder=world / "normal", class_name=None, class_from_folder=True, calibration=file, false_alarms=0.05
    )
    assert {entry.class_name: entry.images for entry in entries} == {"cork": 24, "tile": 20}
    out = tmp_path / "out"
    where = (str(world / "base"), world / "test")
    findings = score_images(*where, class_from_folder=True, output_dir=out, calibration=file, device="cpu")
    of_class = {entry.class_name: entry for entry in entries}
    for row, found in zip(read_csv(out / "scores.csv"), findings, strict=True):
        entry = of_class[found.class_name]
        assert row["decision"] == ("anomalous" if found.score > entry.image_threshold else "normal")
        below = sum(score < found.score for score in entry.scores)
        assert float(row["rank"]) == pytest.approx(below / (entry.images + 1), abs=1e-6)
        assert (int(row["regions"]) > 0) == bool(row["region_area"])
    assert "of 24 anomalous" in caplog.text
    # Beside a checkpoint that is calibrated for another class alone there is no decision, and a line that says why.
    calibrated(world)
    alone = score_images(str(world / "base"), world / "normal/tile", "tile", output_dir=out, device="cpu")
    assert {found.decision for found in alone} == {""}
    assert "calibration.json: its thresholds are of 'cork', not of 'tile'; no decision for tile" in caplog.text


def test_the_slider_of_the_page_starts_at_the_threshold(
    world: Path,
    model: Detector,
    tmp_path: Path,
    browser: Browser,  # noqa: F811
) -> None:
    findings = score_images(str(world / "base"), world / "test", "cork", output_dir=tmp_path, device="cpu")
    page = browser.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    rejected = page.locator("li.rejected").count()
    assert rejected == sum(found.decision == "anomalous" for found in findings)
    assert f"{rejected} of {len(findings)} rejected" in page.locator("output").inner_text()
    assert "from 24 normal images for 5 % false alarms" in page.locator("body").inner_text()
    highest = max(findings, key=lambda found: found.score)
    assert f"higher than {100 * highest.rank:.1f} % of normal images" in page.locator("li").first.inner_text()


@pytest.mark.parametrize(("tiles", "size"), [("off", 96), ("auto", 192)])
def test_false_alarms_on_new_images_lie_in_the_interval(tiles: str, size: int) -> None:
    """100 splits of 160 normal images of a toy class: 59 to calibrate on, the others to count false alarms.

    The number of alarms among m images is beta-binomial; 95 % of splits lie in its interval, were they independent.
    """
    detector = unadapted_detector(load_clip("toy"), tiles=tiles)
    drawn = (draw_toy_class("toy_test", "cup", None, 5000 + index, size=size)[0] for index in range(160))
    numbers = np.array([score_and_peak(detector, Image.fromarray(image), "cup") for image in drawn])
    rng = np.random.default_rng(0)
    rate, count = 0.05, 59
    k = order_of_threshold(count, rate)
    spread = betabinom(160 - count, count + 1 - k, k)
    low, high = spread.ppf(0.025), spread.ppf(0.975)
    inside = np.zeros(2)
    alarms = np.zeros(2)
    for _ in range(100):
        order = rng.permutation(160)
        known, new = numbers[order[:count]], numbers[order[count:]]
        entry = make_entry(KEY, "m", known[:, 0].tolist(), known[:, 1].tolist(), rate)
        found = (new > (entry.image_threshold, entry.pixel_threshold)).sum(axis=0)
        inside += (low <= found) & (found <= high)
        alarms += found
    assert (inside >= 90).all()
    assert alarms / (100 * (160 - count)) == pytest.approx((count + 1 - k) / (count + 1), abs=0.01)
