"""A few normal images to compare with (docs/method.md, "References")."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from dataset.locate import locate_dataset
from dataset.normals import choose_normals, normals_of_classes, training_normals
from dataset.toy_world import GOOD_IMAGES, write_toy_normals
from engine import load_model
from engine.config.evaluation import InferenceArguments
from engine.data.loaders import make_dataset
from engine.data.task import load_task
from engine.detector.calibration import read_calibration
from engine.detector.detector import Detector
from engine.detector.loading import unadapted_detector
from engine.evaluation import evaluate as evaluate_module
from engine.evaluation.evaluate import evaluate
from engine.training.base import train_base
from model.references import joined_anomaly_map, joined_calibrated_maps, nearest_distances, reference_maps
from model.scoring import Outputs, anomaly_map, calibrated_maps, class_image_scores, det_scores, enlarge
from tests.evaluating import calibrate_images, evaluate_checkpoints, score_images
from tests.scripts import SIZE, save, small_runs, write_world
from utils.errors import UserError


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values / values.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("most", [1, 100, None])
def test_the_distance_to_the_nearest_patch_does_not_depend_on_chunks(most: int | None) -> None:
    features, memory = unit(3, 16, 8), unit(40, 8, seed=1)
    found = nearest_distances(features, memory, most)
    for image in range(3):
        for patch in range(16):
            cosines = [float(features[image, patch] @ other) for other in memory]
            assert float(found[image, patch]) == pytest.approx(1 - max(cosines), abs=1e-6)
    assert nearest_distances(memory[None], memory).max() < 1e-6
    assert nearest_distances(-memory[None, :1], memory[:1]) == pytest.approx(2)


def test_text_and_references_are_combined_on_one_scale() -> None:
    features, memory = [unit(2, 36, 8, seed=n) for n in (0, 1)], [unit(20, 8, seed=n) for n in (2, 3)]
    found = reference_maps(features, memory, 12)
    for level, pair in enumerate(zip(features, memory, strict=True)):
        torch.testing.assert_close(found[level], enlarge(nearest_distances(*pair).reshape(2, 1, 6, 6), 12)[:, 0])
    outputs = Outputs([5 * torch.randn(2, 36, 2) for _ in range(2)], torch.zeros(2, 2))
    calibrated, published = calibrated_maps(outputs, 12), anomaly_map(outputs, 12, "industrial")
    torch.testing.assert_close(joined_calibrated_maps(outputs, found, 0.25), 0.75 * calibrated + 0.125 * found)
    joined = joined_anomaly_map(outputs, found, 0.25, "industrial")
    torch.testing.assert_close(joined, 0.75 * published + 1.25 * found.sum(dim=0))
    # Without weight everything is as without references.
    assert joined_calibrated_maps(outputs, found, 0.0).equal(calibrated)
    assert joined_anomaly_map(outputs, found, 0.0, "industrial").equal(published)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a dataset whose classes have train/good, and a folder of normal images of each."""
    folder = write_world(tmp_path_factory.mktemp("world"), ("cork", "tile"))
    train_base(small_runs(folder)[0])
    rng = np.random.default_rng(8)
    for name in ("cork", "tile"):
        for index in range(10):
            pixels = rng.integers(60, 120, (SIZE, SIZE, 3))
            save(folder / "test" / name / "train" / "good" / f"{index}.png", pixels)
            save(folder / "normal" / name / f"{index}.png", pixels)
    return folder


@pytest.fixture
def model(world: Path) -> Detector:
    return load_model(world / "base" / "image_adapter.pth", device="cpu")


def paths_of(folder: Path, count: int = 4) -> list[Path]:
    return [folder / f"{index}.png" for index in range(count)]


@pytest.mark.parametrize("features", ["trained", "frozen", "both"])
def test_a_reference_image_has_distance_0(world: Path, model: Detector, features: str) -> None:
    paths = paths_of(world / "normal" / "cork")
    plain = model.predict(paths[0], "cork")
    references = model.add_references(paths, "cork", weight=1.0, features=features)
    assert len(references.memory) == 4 * (1 + (features == "both"))
    assert all(level.shape == (4 * 25, 40) for level in references.memory)
    assert model.predict(paths[0], "cork").anomaly_map.max() < 1e-5
    far = model.predict(world / "test/cork/test/spot/000.png", "cork")
    assert far.anomaly_map.max() > 1e-3 and 0 <= far.score <= 1
    # Another class stays what it is.
    assert model.predict(paths[0], "tile").anomaly_map.max() > 1e-3
    model.add_references(paths, "cork", weight=0.0, features=features)
    again = model.predict(paths[0], "cork")
    assert (again.anomaly_map == plain.anomaly_map).all() and again.score == plain.score


def test_unadapted_clip_accepts_references(world: Path, model: Detector) -> None:
    detector = unadapted_detector(model.clip)
    path = world / "normal/cork/0.png"
    detector.add_references([path], "cork", weight=1.0)
    frozen = detector.references["cork"].memory
    assert detector.predict(path, "cork").anomaly_map.max() < 1e-5
    assert all((level.norm(dim=-1) - 1).abs().max() < 1e-4 for level in frozen)
    model.add_references([path], "cork", features="frozen")
    for one, other in zip(frozen, model.references["cork"].memory, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_evaluation_uses_the_combined_map(world: Path, model: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_task(str(world / "test"))
    before = evaluate({"m": model}, data, "cpu")["m"].classes[0]
    found = model.add_references(paths_of(world / "normal" / "cork"), "cork", class_names=data.names)
    after, unchanged = evaluate({"m": model}, data, "cpu")["m"].classes
    assert after.values != before.values
    side, highest, lowest, det = model.text_side(data.prompts(model.clip)), [], [], []
    with torch.inference_mode():
        for sample in make_dataset(data, model.clip):
            if sample["class_name"] == "cork":
                image = sample["image"][None]
                outputs = model.model(image, side, torch.tensor([data.classes.index("cork")]))
                distances = reference_maps(outputs.features, found.memory, SIZE)
                joined = joined_anomaly_map(outputs, distances, found.weight, "industrial")
                highest.append(joined.max())
                lowest.append(joined.min())
                det.append(det_scores(outputs)[0])
    expected = class_image_scores(*map(torch.stack, (highest, lowest, det)), "industrial")
    predicted = [model.predict(world / "test" / image.path, "cork").score for image in after.scores]
    assert [image.score for image in after.scores] == pytest.approx(predicted, abs=1e-5)
    monkeypatch.setattr(evaluate_module, "in_catalog", lambda _: True)
    published = evaluate({"m": model}, data, "cpu")["m"].classes[0]
    labels = [image.anomalous for image in published.scores]
    assert published.values["published_image_auroc"] == pytest.approx(100 * roc_auc_score(labels, expected))
    monkeypatch.undo()
    model.references.clear()
    assert evaluate({"m": model}, data, "cpu")["m"].classes[1].values == unchanged.values


def test_shots_come_from_the_datasets_training_images(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = (str(world / "base"), str(world / "test"))
    asked = {"output_dir": tmp_path, "device": "cpu"}
    evaluate_checkpoints(*where, reference_shots=2, visualize=1, **asked)
    assert (tmp_path / "evaluation_test_2_references.csv").is_file()
    assert (tmp_path / "pictures_test_2_references").is_dir()
    said = capsys.readouterr().err
    assert "cork: compared with 2 normal images" in said and "tile: compared with 2" in said
    with pytest.raises(UserError, match="--reference_shots 11: there are 10 normal images of 'cork'"):
        evaluate_checkpoints(*where, reference_shots=11, **asked)
    with pytest.raises(UserError, match="class 'bolt' has no train/good"):
        evaluate_checkpoints(where[0], str(world / "train"), reference_shots=1, **asked)


def test_a_reference_among_the_test_images_is_refused(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "normal"
    shutil.copytree(world / "normal", folder)
    shutil.copy(world / "test/cork/test/good/000.png", folder / "cork" / "another_name.png")
    where = (str(world / "base"), str(world / "test"))
    with pytest.raises(UserError, match=r"another_name\.png is also the image .*000\.png"):
        evaluate_checkpoints(*where, references=folder, output_dir=tmp_path, device="cpu")
    with pytest.raises(UserError, match="no folder 'cork'"):
        evaluate_checkpoints(*where, references=folder / "cork", output_dir=tmp_path, device="cpu")


def test_more_shots_contain_the_references_of_fewer(tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(12)]
    chosen = [choose_normals(paths, shots, 3, "cork") for shots in (1, 2, 4, 8)]
    assert all(set(few) < set(more) for few, more in pairwise(chosen))
    assert choose_normals(paths, 4, 4, "cork") != chosen[2]
    elsewhere = [tmp_path / "b" / path.name for path in paths]
    assert [path.name for path in choose_normals(elsewhere, 4, 3, "cork")] == [path.name for path in chosen[2]]


def test_references_and_calibration(world: Path, tmp_path: Path) -> None:
    """Thresholds belong to a model with its references; no image may be used for both."""
    rng = np.random.default_rng(9)
    for index in range(20):
        save(tmp_path / "new" / f"{index}.png", rng.integers(60, 120, (SIZE, SIZE, 3)))
    checkpoint, file = str(world / "base"), tmp_path / "c.json"
    normal = world / "normal" / "cork"
    asked: dict[str, Any] = {"calibration": file, "device": "cpu", "references": normal, "reference_shots": 4}
    calibrate_images(checkpoint, tmp_path / "new", "cork", false_alarms=0.05, **asked)
    (entry,) = read_calibration(file)
    assert entry.references is not None
    where = (checkpoint, world / "test/cork/test", "cork")
    found = score_images(*where, output_dir=tmp_path / "out", **asked)
    assert {finding.decision for finding in found} == {"normal", "anomalous"}
    assert (tmp_path / "out" / "scores_4_references.csv").is_file()
    for other in ({"references": None, "reference_shots": None}, {"reference_seed": 1}, {"reference_weight": 0.3}):
        with pytest.raises(UserError, match="another domain, det score or set of references"):
            score_images(*where, output_dir=tmp_path / "out", **{**asked, **other})
    # By content, whatever the file is called.
    Image.open(choose_normals(paths_of(normal, 10), 4, 0, "cork")[0]).save(tmp_path / "new" / "copy.bmp")
    with pytest.raises(UserError, match=r"copy\.bmp is also a reference"):
        calibrate_images(checkpoint, tmp_path / "new", "cork", false_alarms=0.05, **asked)


def test_references_and_calibration_share_a_folder(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """References are separated first; too few remaining images are refused."""
    rng = np.random.default_rng(9)
    for index in range(21):
        save(tmp_path / "new" / f"{index}.png", rng.integers(60, 120, (SIZE, SIZE, 3)))
    asked: dict[str, Any] = {"calibration": tmp_path / "c.json", "reference_shots": 2, "false_alarms": 0.05}
    (entry,) = calibrate_images(world / "base", tmp_path / "new", "cork", **asked)
    assert len(entry.scores) == 19 and entry.references is not None
    same = {"references": tmp_path / "new", "reference_shots": 2, "calibration": tmp_path / "c.json"}
    assert score_images(world / "base", world / "test/cork/test", "cork", output_dir=tmp_path / "out", **same)[
        0
    ].decision
    monkeypatch.setattr(Detector, "predict", None)
    for folder in (None, tmp_path / "new"):
        with pytest.raises(UserError, match="18 normal images are too few"):
            calibrate_images(
                world / "base", tmp_path / "new", "cork", **{**asked, "reference_shots": 3, "references": folder}
            )
    shutil.copy(tmp_path / "new/0.png", tmp_path / "copy.png")
    with pytest.raises(UserError, match=r"copy\.png is also the image .*0\.png"):
        calibrate_images(world / "base", tmp_path / "new", "cork", false_alarms=0.05, references=tmp_path / "copy.png")


def test_each_class_of_a_folder_has_its_references(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = {"class_from_folder": True, "output_dir": tmp_path, "device": "cpu"}
    where = (str(world / "base"), world / "normal")
    plain = score_images(*where, **asked)
    compared = score_images(*where, references=world / "normal", reference_weight=1.0, **asked)
    # Every image is among the references of its own class, so that half of the score is gone.
    assert all(found.score < 0.51 < before.score for found, before in zip(compared, plain, strict=True))
    assert "20 images are also references" in caplog.text
    assert "10 normal images of each class" in (tmp_path / "report_references.html").read_text(encoding="utf-8")


def test_a_toy_dataset_draws_its_normal_images_on_first_use(tmp_path: Path) -> None:
    for name in ("cup", "brick"):
        (tmp_path / "toy_test" / name / "test" / "good").mkdir(parents=True)
        Image.new("RGB", (96, 96)).save(tmp_path / "toy_test" / name / "test" / "good" / "000.png")
    located = locate_dataset("toy_test", tmp_path)
    write_toy_normals("toy_test", located.root / "cup", count=2)
    assert len(training_normals(located, "cup")) == 2
    assert not (located.root / "brick" / "train").exists()
    assert GOOD_IMAGES["toy_test"] < 10_000  # those drawn anew come after them


def test_a_single_image_can_be_the_reference(tmp_path: Path) -> None:
    image = tmp_path / "0.png"
    save(image, np.zeros((4, 4, 3)))
    assert normals_of_classes(image, [""]) == {"": [image]}
    assert normals_of_classes(image, ["cork"]) == {"cork": [image]}


def test_shots_need_a_dataset_or_a_folder() -> None:
    with pytest.raises(UserError, match="give --references FOLDER here"):
        InferenceArguments.of(checkpoint="none", reference_shots=4, image=Path("a")).check()
