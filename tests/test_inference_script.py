"""`inference.py` as a user runs it, and `load_model` as a notebook does (docs/method.md, "Scores")."""

import io
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.folders import find_images
from dataset.images import read_image
from engine import load_model
from engine.config.evaluation import ALL
from engine.evaluation.gallery import Finding
from tests.evaluating import calibrate_images, evaluate_checkpoints, score_images
from tests.scripts import common_arguments, error_line, flags, read_csv, run, save, write_world
from utils.errors import UserError
from utils.logging import set_up_logging


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_world(tmp_path_factory.mktemp("world"), ("cork", "tile"))
    (folder / "test" / "tile" / "test" / "good").rename(folder / "no_normal_images")
    epochs = {"text_epoch": 1, "image_epoch": 10}
    run("train.py", *flags(**common_arguments(folder, shot=8, image_lr=0.01), **epochs, save_path=folder / "run"))
    return folder


def test_a_folder_means_all_its_epochs_in_numeric_order(world: Path, tmp_path: Path) -> None:
    options = ("--dataset", world / "test", "--output_dir", tmp_path, "--device", "cpu", "--num_workers", 0)
    errors = run("inference.py", "--checkpoint", world / "run", *options, apart=True)
    rows = read_csv(tmp_path / "evaluation_test.csv")
    assert [row["model"] for row in rows[::3]] == [f"image_adapter_{epoch}" for epoch in range(1, 11)]
    assert "NOT ZERO-SHOT" not in errors
    last = {row["class"]: row for row in rows[-3:]}
    assert set(last) == {"cork", "tile", "average"}
    # Bright squares on noise: a trained model must find most of them, or the whole path from file to figure is broken.
    assert float(last["cork"]["pixel_auroc"]) > 80
    # A class without normal images has no image AUROC: not 0, and not part of the average.
    assert last["tile"]["image_auroc"] == last["tile"]["image_ap"] == "n/a"
    assert last["average"]["image_auroc"] == last["cork"]["image_auroc"]
    log = (tmp_path / "inference.log").read_text(encoding="utf-8")
    assert "average of 2" in log
    assert "1 classes" in log


def test_unadapted_clip_is_scored_the_same_way(world: Path, tmp_path: Path) -> None:
    options = ("--model_name", f"local-dir:{world / 'clip'}", "--output_dir", tmp_path, "--num_workers", 0)
    run("inference.py", "--checkpoint", "none", "--dataset", world / "test", *options)
    rows = read_csv(tmp_path / "unadapted_evaluation_test.csv")
    assert [row["class"] for row in rows] == ["cork", "tile", "average"]


def test_visualize_draws_evaluated_images(world: Path, tmp_path: Path) -> None:
    asked = ("--dataset", world / "test", "--output_dir", tmp_path, "--num_workers", 0)
    errors = run("inference.py", "--checkpoint", world / "run", *asked, "--visualize", 3)
    folder = tmp_path / "pictures_test"
    drawn = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    # Anomalous and normal ones in turn where there are both.
    of_cork = {"cork/test/spot/000.png", "cork/test/good/000.png", "cork/test/spot/001.png"}
    assert drawn == of_cork | {f"tile/test/spot/00{index}.png" for index in range(3)}
    assert f"6 heatmaps of image_adapter_10 in {folder}" in errors
    with Image.open(folder / "cork/test/spot/000.png") as picture:
        assert picture.width > 2 * picture.height


def test_visualize_without_number_draws_all_images(world: Path, tmp_path: Path) -> None:
    asked = {"output_dir": tmp_path, "device": "cpu", "visualize": ALL}
    evaluate_checkpoints(str(world / "run" / "image_adapter_2.pth"), str(world / "test"), **asked)
    assert len(list((tmp_path / "pictures_test").rglob("*.png"))) == 18
    asked = ("inference.py", "--checkpoint", world / "run", "--image", world / "test", "--visualize")
    assert "leave --visualize out" in error_line(*asked)
    assert "0 is not between 1 and" in error_line(*asked[:3], "--visualize", 0)


def test_the_default_is_the_training_dataset_with_a_warning(world: Path) -> None:
    errors = run("inference.py", "--checkpoint", world / "run" / "image_adapter_2.pth", "--num_workers", 0)
    assert "NOT ZERO-SHOT" in errors
    assert (world / "run" / "results" / "evaluation_train.csv").is_file()


def test_own_images_get_a_heatmap_and_a_score(world: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    rng = np.random.default_rng(5)
    save(pictures / "plain.png", rng.integers(60, 120, (60, 80, 3)))
    spotted = rng.integers(60, 120, (60, 80, 3))
    spotted[10:40, 20:60] += 130
    save(pictures / "spotted.png", spotted)
    options = ("--image", pictures, "--class_name", "metal screw", "--output_dir", tmp_path / "out")
    run("inference.py", "--checkpoint", world / "run", *options)
    scores = {Path(row["path"]).stem: float(row["score"]) for row in read_csv(tmp_path / "out" / "scores.csv")}
    assert 0 <= scores["plain"] < scores["spotted"] <= 1
    with Image.open(tmp_path / "out" / "heatmaps" / "spotted_heatmap.png") as heatmap:
        assert heatmap.size == (80, 60)


@pytest.fixture(scope="module")
def score_folder(world: Path) -> Callable[..., list[Finding]]:
    """Score a folder of images with the last checkpoint."""

    def score(images: Path, output_dir: Path, class_name: str = "cork") -> list[Finding]:
        return score_images(str(world / "run"), images, class_name, output_dir=output_dir, device="cpu")

    return score


def test_images_that_differ_in_extension_only_get_two_heatmaps(
    score_folder: Callable[..., object], tmp_path: Path
) -> None:
    for name in ("a.png", "a.jpg", "A.png", "con.png"):
        save(tmp_path / "in" / name, np.zeros((20, 20, 3)))
    score_folder(tmp_path / "in", tmp_path / "out")
    drawn = {path.name for path in (tmp_path / "out" / "heatmaps").iterdir()}
    assert {"A_heatmap.png", "a.jpg_heatmap.png"} <= drawn and len(drawn) == 4
    # Windows has no files of that name.
    assert not any(name.startswith("con") for name in drawn)


@pytest.mark.skipif(os.name == "nt", reason="files that Windows does not have")
def test_other_files_of_a_folder_are_skipped(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.zeros((20, 20, 3)))
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    save(tmp_path / "._a.png", np.zeros((20, 20, 3)))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket.png"))
        found = find_images(tmp_path, "--image")
    assert found.images == [tmp_path / "a.png"]
    assert found.skipped["other than regular files"] == 2
    with pytest.raises(UserError, match="neither a file nor a folder"):
        find_images(tmp_path / "pipe.png", "--image")
    with pytest.raises(UserError, match="cannot be read as an image: it is not a regular file"):
        read_image(tmp_path / "pipe.png")


@pytest.mark.skipif(os.name == "nt", reason="names that Windows does not have")
def test_file_names_that_are_not_utf8_work(
    world: Path, score_folder: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As Python opens it; pytest's own takes UTF-8 only.
    screen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    monkeypatch.setattr("sys.stderr", screen)
    name = os.fsdecode(b"caf\xe9$")
    data = tmp_path / "data" / name
    shutil.copytree(world / "test" / "cork", data)
    (data / "test" / "spot").rename(data / "test" / name)
    (data / "ground_truth" / "spot").rename(data / "ground_truth" / name)
    (data / "test" / "good" / "000.png").rename(data / "test" / "good" / f"{name}.png")
    asked = {"output_dir": tmp_path / "out", "device": "cpu", "visualize": 2}
    try:
        evaluate_checkpoints(str(world / "run" / "image_adapter_2.pth"), str(tmp_path / "data"), **asked)
        score_folder(data / "test" / "good", tmp_path / "scores")
    finally:
        set_up_logging()
    said = screen.buffer.getvalue().decode("utf-8")
    assert "Logging error" not in said and "caf\\udce9$.png" in said
    assert {row["class"] for row in read_csv(tmp_path / "out" / "evaluation_data.csv")} == {"caf\\udce9$", "average"}
    assert "caf\\udce9$.png" in (tmp_path / "scores" / "scores.csv").read_text(encoding="utf-8")
    figures = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.png")]
    assert len(figures) == 2 and all(str(figure).isascii() for figure in figures)


@pytest.mark.parametrize(
    ("class_name", "expected"),
    [
        ("", "a class needs a name"),
        ("_ \n", "a class needs a name"),
        ("x" * 100_000, "has 100000 characters; the limit is 200"),
        ("q1 " * 60, "fills CLIP's 77 tokens"),
    ],
)
def test_class_names_that_do_not_fit_a_prompt(
    score_folder: Callable[..., object], tmp_path: Path, class_name: str, expected: str
) -> None:
    save(tmp_path / "a.png", np.zeros((20, 20, 3)))
    with pytest.raises(UserError, match=expected):
        score_folder(tmp_path / "a.png", tmp_path / "out", class_name)
    assert not (tmp_path / "out").exists()


def test_another_det_score_has_separate_files(world: Path, tmp_path: Path) -> None:
    file, test = str(world / "run" / "image_adapter_2.pth"), world / "test"
    images = {}
    for det_score in (None, "difference"):
        asked = {"output_dir": tmp_path, "device": "cpu", "det_score": det_score}
        evaluate_checkpoints(file, str(test), visualize=1, **asked)
        evaluate_checkpoints("none", str(test), model_name=f"local-dir:{world / 'clip'}", **asked)
        images[det_score] = score_images(file, test / "cork" / "test" / "spot", "cork", **asked)
    for suffix, det_score in (("", "abnormal"), ("_det_difference", "difference")):
        for name in ("evaluation_test", "unadapted_evaluation_test"):
            rows = read_csv(tmp_path / f"{name}{suffix}.csv")
            assert {row["det_score"] for row in rows} == {det_score}
        assert (tmp_path / f"pictures_test{suffix}").is_dir() and (tmp_path / f"scores{suffix}.csv").is_file()
        assert (tmp_path / f"report{suffix}.html").is_file()
    assert "image scores with det score difference" in (tmp_path / "inference.log").read_text(encoding="utf-8")
    model = load_model(file, device="cpu", det_score="difference")
    for one, other in zip(images[None], images["difference"], strict=True):
        path, published, asked_for = one.path, one.score, other.score
        assert published != asked_for and 0 <= asked_for <= 1
        assert model.predict(path, "cork").score == asked_for
        assert model.predict(path, "cork", det_score="abnormal").score == published
        medical = model.predict(path, "cork", "medical")
        assert medical.score == pytest.approx(float(medical.anomaly_map.max())), "the maximum alone"
    with pytest.raises(UserError, match="--det_score nonsense"):
        model.predict(images[None][0].path, "cork", det_score="nonsense")


def test_clips_class_token_replaces_the_projectors_feature(world: Path, tmp_path: Path) -> None:
    file, images = world / "run" / "image_adapter_2.pth", world / "test" / "cork" / "test" / "spot"
    plain, model = load_model(file, device="cpu"), load_model(file, device="cpu", image_feature="class_token")
    for finding in score_images(file, images, "cork", output_dir=tmp_path, device="cpu", image_feature="class_token"):
        pixels = model.as_input(read_image(Path(finding.path)))
        side = model._encode_class("cork", None)
        token = model.clip.clip.encode_image(pixels, normalize=True)
        probability = (100 * token @ side[0]).softmax(dim=1)[0, 1].item()
        other = plain.predict(finding.path, "cork")
        assert finding.score == pytest.approx(0.5 * float(other.anomaly_map.max()) + 0.5 * probability, abs=1e-5)
        assert finding.score != other.score
        assert model.predict(finding.path, "cork", det_score="difference").score == pytest.approx(
            finding.score, abs=1e-6
        )
    assert model.digest != plain.digest, "thresholds belong to one feature"


def test_a_missing_epoch_is_an_error_that_lists_the_others(world: Path) -> None:
    there = error_line("inference.py", "--checkpoint", world / "run" / "image_adapter_99.pth")
    assert "image_adapter_10.pth" in there


def published_form(world: Path, folder: Path, relu: bool) -> Path:
    """An AA-CLIP checkpoint as published: linear adapters, one file per side, no config."""
    folder.mkdir()
    torch.manual_seed(3)
    middle = ".fc.0.weight" if relu else ".fc.weight"
    text = {"0.fc.0.weight": torch.randn(32, 32), "1.fc.0.weight": torch.randn(40, 32)}
    image = {f"layer_adapters.{index}.fc.0.weight": torch.randn(48, 48) for index in range(2)}
    image |= {f"seg_proj.{index}{middle}": torch.randn(40, 48) for index in range(4)}
    image[f"det_proj{middle}"] = torch.randn(40, 48)
    torch.save({"epoch": 5, "text_adapter": text, "text_optimizer": {}}, folder / "text_adapter.pth")
    torch.save({"epoch": 20, "image_adapter": image, "image_optimizer": {}}, folder / "image_adapter_20.pth")
    return folder / "image_adapter_20.pth"


@pytest.mark.parametrize("relu", [False, True])
def test_a_published_checkpoint_loads_into_the_script_and_the_notebook(world: Path, tmp_path: Path, relu: bool) -> None:
    file = published_form(world, tmp_path / "published", relu)
    name = f"local-dir:{world / 'clip'}"
    errors = run(
        "inference.py", "--checkpoint", file, "--dataset", world / "test", "--model_name", name, "--num_workers", 0
    )
    assert "assumed surgery sequential, adapters linear" in errors
    assert "assumed trained with gelu and the published class names" in errors
    model = load_model(file, model_name=name, device="cpu")
    assert model.epoch == 20
    assert model.model.config.adapter == "linear"
    assert model.model.config.relu is relu
    assert torch.equal(
        model.model.text_adapter[0].fc[0].weight,
        torch.load(file.with_name("text_adapter.pth"))["text_adapter"]["0.fc.0.weight"],
    )
    # It is calibrated and compares with references as any other.
    good = world / "test" / "cork" / "test" / "good"
    calibrate_images(str(file), good, "cork", false_alarms=0.3, model_name=name, device="cpu")
    model = load_model(file, model_name=name, device="cpu")
    assert {model.predict(path, "cork").decision for path in good.iterdir()} == {"normal", "anomalous"}
    model.add_references([good / "000.png"], "cork", weight=1.0)
    assert model.predict(good / "000.png", "cork").anomaly_map.max() < 1e-5


def test_load_model_predicts_from_path_image_and_array(world: Path) -> None:
    model = load_model(world / "run" / "image_adapter.pth", device="cpu")
    path = world / "test" / "cork" / "test" / "spot" / "000.png"
    first = model.predict(path, class_name="cork")
    assert first.anomaly_map.shape == (40, 40)
    assert first.level_maps.shape == (4, 40, 40)
    assert 0 <= first.anomaly_map.min() <= first.anomaly_map.max() <= 1
    np.testing.assert_allclose(first.anomaly_map, first.level_maps.mean(axis=0), atol=1e-6)
    with Image.open(path) as picture:
        for same in (picture, np.asarray(picture)):
            again = model.predict(same, class_name="cork")
            np.testing.assert_array_equal(again.anomaly_map, first.anomaly_map)
            assert again.score == first.score
    assert model.predict(path, "cork", domain="medical").score == pytest.approx(float(first.anomaly_map.max()))


def test_load_model_imports_neither_training_nor_options() -> None:
    code = "import sys; from engine import load_model; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    own = {name for name in modules if name.split(".")[0] in ("engine", "model", "dataset", "utils")}
    assert "engine.detector.loading" in own and len(own) <= 42
    assert not [name for name in own if name.startswith(("engine.training", "engine.config", "engine.evaluation"))]
