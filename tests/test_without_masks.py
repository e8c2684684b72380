"""Image labels without masks: image metrics, and training without masks (docs/datasets.md)."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from engine.config.training import BaseConfig, CrossAttentionRunConfig
from engine.data.task import load_task, load_two_folders, mask_notes
from engine.evaluation.image_heatmaps import read_dataset_image
from engine.evaluation.results import Evaluation
from engine.training.base import train_base
from engine.training.cross_attention import train_cross_attention
from engine.training.feedback import train_feedback
from tests.evaluating import compare_feedback_loops, evaluate_checkpoints, score_images
from tests.helpers import equal
from tests.scripts import base_arguments, read_csv, small_runs, train_small_runs
from utils.errors import UserError
from utils.logging import set_up_logging
from utils.metrics import IMAGE_METRICS, PIXEL_METRICS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained base and feedback, and the dataset `test` with all masks, with those of one class, and without."""
    folder = train_small_runs(tmp_path_factory.mktemp("world"))
    for name in ("some", "none"):
        shutil.copytree(folder / "test", folder / name, ignore=shutil.ignore_patterns("*.jsonl"))
    shutil.copytree(folder / "train", folder / "train_none", ignore=shutil.ignore_patterns("*.jsonl"))
    for masks in [*(folder / "none").glob("*/ground_truth"), *(folder / "train_none").glob("*/ground_truth")]:
        shutil.rmtree(masks)
    (folder / "some/cork/ground_truth/spot/001_mask.png").unlink()
    return folder


def evaluated(world: Path, dataset: str | None, tmp_path: Path, **more: Any) -> Evaluation:
    asked = None if dataset is None else str(world / dataset)
    (found,) = evaluate_checkpoints(
        str(world / "base/image_adapter.pth"), asked, output_dir=tmp_path / "out", device="cpu", **more
    )
    return found


def log_of(folder: Path, name: str = "train.log") -> str:
    return (folder / name).read_text(encoding="utf-8")


def test_image_metrics_need_no_masks(world: Path, tmp_path: Path) -> None:
    with_masks = evaluated(world, "test", tmp_path)
    without = evaluated(world, "none", tmp_path)
    for mine, theirs in zip(without.classes, with_masks.classes, strict=True):
        assert {name: mine.values[name] for name in PIXEL_METRICS} == dict.fromkeys(PIXEL_METRICS)
        assert [mine.values[name] for name in IMAGE_METRICS] == [theirs.values[name] for name in IMAGE_METRICS]
        assert mine.scores == theirs.scores
    assert "Pixel metrics are n/a: none of the 6 anomalous images has a mask" in log_of(
        tmp_path / "out", "inference.log"
    )
    rows = read_csv(tmp_path / "out/evaluation_none.csv")
    assert {row[name] for row in rows for name in PIXEL_METRICS} == {"n/a"}


def test_a_class_that_lacks_one_mask_has_no_pixel_metrics(world: Path, tmp_path: Path) -> None:
    with_masks = evaluated(world, "test", tmp_path)
    cork, reed = evaluated(world, "some", tmp_path).classes
    assert cork.values["pixel_auroc"] is None and cork.values["image_auroc"] is not None
    assert reed.values == with_masks.classes[1].values
    assert "n/a for cork: 1 of 3 anomalous images have no mask, such as cork/test/spot/001.png" in log_of(
        tmp_path / "out", "inference.log"
    )


def test_masks_added_later_are_found(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "some", tmp_path / "some")
    data = load_task(str(tmp_path / "some"))
    assert mask_notes(data)
    masks = "cork/ground_truth/spot"
    shutil.copy(world / "test" / masks / "001_mask.png", tmp_path / "some" / masks / "001_mask.png")
    assert not mask_notes(load_task(str(tmp_path / "some")))


def test_two_folders_are_tested_as_one_class(world: Path, tmp_path: Path) -> None:
    test = world / "test" / "cork" / "test"
    folders = {"normal": test / "good", "anomalous": test / "spot", "class_name": "cork"}
    (found,) = evaluated(world, None, tmp_path, **folders, visualize=1).classes
    expected = evaluated(world, "none", tmp_path).classes[0]
    assert found.values == expected.values and found.class_name == "cork"
    assert (found.images, found.anomalous) == (6, 3)
    assert "none of the 3 anomalous images has a mask" in log_of(tmp_path / "out", "inference.log")
    assert (tmp_path / "out/evaluation_good_and_spot.csv").is_file()
    assert len(list((tmp_path / "out/pictures_good_and_spot").rglob("*.png"))) == 1
    data = load_task(str(world / "none"))
    assert read_dataset_image(data, data.records[-1]).title == "reed, spot (no mask)"


@pytest.mark.parametrize("references", [False, True])
def test_the_reported_image_metrics_are_those_of_the_scores_that_decide(
    world: Path, tmp_path: Path, references: bool
) -> None:
    """`--normal/--anomalous`, an own dataset and the scores in the file of `--image`."""
    checkpoint, test = world / "base/image_adapter.pth", world / "test" / "cork" / "test"
    more = {"references": next((world / "train").glob("*/test/good")), "reference_shots": 2} if references else {}
    reported = evaluated(
        world, None, tmp_path, normal=test / "good", anomalous=test / "spot", class_name="cork", **more
    )
    score_images(checkpoint, test, "cork", output_dir=tmp_path / "scored", **more)
    (file,) = (tmp_path / "scored").glob("scores*.csv")
    rows = read_csv(file)
    labels, scores = ["spot" in row["path"] for row in rows], [float(row["score"]) for row in rows]
    assert reported.classes[0].values["image_auroc"] == 100 * roc_auc_score(labels, scores)
    assert reported.classes[0].values["image_ap"] == 100 * average_precision_score(labels, scores)
    ours = {Path(image.path).name + str(image.anomalous): image.score for image in reported.classes[0].scores}
    theirs = {Path(row["path"]).name + str("spot" in row["path"]): float(row["score"]) for row in rows}
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_two_folders_that_share_images_are_refused(world: Path) -> None:
    test = world / "test" / "cork" / "test"
    with pytest.raises(UserError, match="share 3 images"):
        load_two_folders(test, test / "spot", "cork")
    with pytest.raises(UserError, match=r"--anomalous .*: no such file or folder"):
        load_two_folders(test / "good", test / "nothing", "cork")


def test_a_comparison_without_masks_tells_the_reason(world: Path, tmp_path: Path) -> None:
    asked = {"base_path": world / "base", "device": "cpu", "report": True, "output_dir": tmp_path}
    assert compare_feedback_loops(world / "feedback", str(world / "none"), **asked) == 0
    for page in ("report.html", "comparison.md"):
        assert "Pixel metrics are n/a: none of the 6" in (tmp_path / page).read_text(encoding="utf-8")


@pytest.fixture
def config(world: Path, tmp_path: Path) -> BaseConfig:
    """The image loss on images without masks."""
    base, _ = small_runs(world)
    changes = {"dataset": str(world / "train_none"), "image_epoch": 2, "image_lr": 0.01, "save_path": tmp_path / "run"}
    values = {name: value for name, value in vars(base).items() if name not in ("text_epoch", "text_side")}
    return BaseConfig.of(**{**values, **changes, "image_loss_only": True})


def weights(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["image_adapter"]


def test_training_without_masks_names_the_stage(world: Path, config: BaseConfig) -> None:
    feedback = replace(small_runs(world)[1], dataset=config.dataset)
    for train, asked in ((train_base, replace(config, image_loss_only=False)), (train_feedback, feedback)):
        with pytest.raises(
            UserError, match=r"12 of 12 .* have no mask, .*Stage 1 .*Stage 2 need them.*--image_loss_on"
        ):
            train(asked)
    assert not config.save_path.exists()


@pytest.mark.parametrize("case", ["black", "no anomalies"])
def test_training_without_an_anomalous_pixel_is_refused(
    case: str, world: Path, config: BaseConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = shutil.copytree(world / "train", tmp_path / "data", ignore=shutil.ignore_patterns("*.jsonl"))
    if case == "black":
        for mask in data.rglob("ground_truth/*/*.png"):
            Image.new("L", Image.open(mask).size).save(mask)
    else:
        for folder in [*data.glob("*/ground_truth"), *data.glob("*/test/spot")]:
            shutil.rmtree(folder)
    config = replace(config, dataset=str(data), training_mode="full_shot", image_epoch=1)
    with pytest.raises(UserError, match=r"training images is anomalous|images have no mask"):
        train_base(replace(config, image_loss_only=False))
    assert not config.save_path.exists()
    train_base(config)
    assert ("learns nothing" in caplog.text) == (case == "no anomalies")


def test_the_image_loss_trains_adapters_and_det_proj_only(config: BaseConfig, tmp_path: Path) -> None:
    assert config.text_epoch == 0
    set_up_logging()  # as scripts begin; what is said before there is a folder comes first in the log
    train_base(replace(config, image_epoch=1))
    assert "without Stage 1" in log_of(config.save_path) and "the projectors of the maps remain random" in log_of(
        config.save_path
    )
    assert "nan" not in log_of(config.save_path)
    first = weights(config.save_path / "image_adapter_1.pth")
    train_base(config)  # goes on for another epoch
    fresh = replace(config, save_path=tmp_path / "fresh")
    train_base(fresh)
    second, straight = weights(config.save_path / "image_adapter.pth"), weights(fresh.save_path / "image_adapter.pth")
    assert equal(second, straight)
    changed = {name.split(".")[0] for name in first if not torch.equal(first[name], second[name])}
    assert changed == {"layer_adapters", "det_proj"}
    row = json.loads(log_of(config.save_path, "history.jsonl").splitlines()[0])
    norms = {f"grad_norm/{part}" for part in ("layer_adapters", "det_proj", "total")}
    assert {name for name in row if name.startswith("grad_norm/")} == norms
    saved = torch.load(config.save_path / "image_adapter.pth", weights_only=True)["config"]
    assert saved["arguments"]["image_loss_only"] is True and not saved["model"]["text_adapted"]
    with pytest.raises(UserError, match="image_loss_only was True, now False"):
        train_base(replace(config, image_loss_only=False, dataset=config.dataset.removesuffix("_none")))


def test_cross_attention_with_the_image_loss_starts_from_a_base(world: Path, config: BaseConfig) -> None:
    values = {name: value for name, value in vars(config).items() if name not in ("text_epoch", "text_side")}
    set_up_logging()
    train_cross_attention(CrossAttentionRunConfig.of(**values, **base_arguments(world)))
    assert "the projectors of the maps remain those of the base" in log_of(config.save_path)
    before, after = (weights(world / "base/image_adapter.pth"), weights(config.save_path / "image_adapter.pth"))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"layer_adapters", "det_proj"}


def test_the_image_loss_is_refused_by_other_options(config: BaseConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="leave --text_epoch out"):
        BaseConfig.of(image_loss_only=True, text_epoch=3)
    assert BaseConfig.of(image_loss_only=True, text_epoch=0).text_epoch == 0
    data = load_task(config.dataset)
    medical = replace(data, located=replace(data.located, spec=replace(data.located.spec, domain="medical")))
    monkeypatch.setattr("engine.training.setup.load_task", lambda *_, **__: medical)
    with pytest.raises(UserError, match="scored by their maps alone"):
        train_base(config)
