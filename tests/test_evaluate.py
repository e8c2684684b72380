"""Evaluation of datasets: a whole pass against scikit-learn on the full arrays."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    average_precision_score,
    jaccard_score,
    precision_recall_curve,
    precision_recall_fscore_support,
    roc_auc_score,
)

from engine.config.evaluation import ProtocolArguments
from engine.data.loaders import evaluation_loader, make_dataset
from engine.data.task import TaskData, load_task
from engine.detector.calibration import make_entry
from engine.detector.detector import Detector
from engine.detector.loading import unadapted_detector
from engine.evaluation import evaluate as module
from engine.evaluation.evaluate import evaluate
from engine.evaluation.results import METRICS, evaluation_table
from model import frozen
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.clip_loading import load_clip
from model.scoring import anomaly_map, calibrated_maps, class_image_scores, det_scores
from tests.helpers import adapted_clip
from tests.scripts import write_clip, write_dataset
from tests.test_metrics import plain_aupro
from utils.errors import UserError
from utils.metrics import DECISION_METRICS, FPR_LIMIT, IMAGE_METRICS

BATCH = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, classes=("cork", "reed"), count=3)
    (folder / "reed" / "test" / "good").rename(folder / "no_normal_images")
    return load_task(str(folder))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Detector]:
    clip = load_clip(f"local-dir:{write_clip(tmp_path_factory.mktemp('world') / 'clip')}")
    return {f"model {seed}": Detector(adapted_clip(clip, seed), f"model {seed}") for seed in (1, 2)}


def test_models_share_frozen_features(
    models: dict[str, Detector], data: TaskData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unadapted CLIP and two models conditioned on frozen features: one pass for all gives the same values."""
    passes, taken = [], frozen.surgery_stream
    monkeypatch.setattr(frozen, "surgery_stream", lambda *given: passes.append(given) or taken(*given))
    clip = next(iter(models.values())).clip
    several: dict[str, Detector] = {"unadapted": unadapted_detector(clip)}
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = AdaptedCLIPWithCrossAttention(clip, clip.model_config())
        several[f"cross {seed}"] = Detector(model, f"cross {seed}")
    other = AdaptedCLIPWithCrossAttention(clip, clip.model_config(surgery="sequential"))
    several["other features"] = Detector(other, "other features")
    together, count = evaluate(several, data, "cpu", BATCH), len(passes)
    for name, detector in several.items():
        passes.clear()
        assert evaluate({name: detector}, data, "cpu", BATCH)[name] == together[name]
    assert count == 2 * len(passes) > 0


@torch.inference_mode()
def full_arrays(detector: Detector, data: TaskData, class_name: str) -> tuple[np.ndarray, ...]:
    """All published maps (n, S, S), masks, labels (n,), scores, published scores, and maps of `predict`, of a class.

    In batches as `evaluate` takes them: others round in another way, and may order scores that are nearly equal so.
    """
    row, prompts = data.classes.index(class_name), data.prompts(detector.clip)
    side = detector.model.text_side(prompts)
    maps, masks, labels, det, calibrated, scores = [], [], [], [], [], []
    for batch in evaluation_loader(make_dataset(data, detector.clip, "none"), BATCH, 0):
        if batch["class_name"][0] == class_name:
            outputs = detector.model(batch["image"], side, torch.full((len(batch["label"]),), row))
            maps.append(anomaly_map(outputs, batch["mask"].shape[-1], "industrial"))
            masks.append(batch["mask"][:, 0] > 0.5)
            labels.append(batch["label"])
            det.append(det_scores(outputs))
            calibrated.append(calibrated_maps(outputs, batch["mask"].shape[-1]).mean(dim=0))
            scores.append(0.5 * calibrated[-1].amax(dim=(1, 2)) + 0.5 * det[-1])
    parts = (maps, masks, labels, det, calibrated, scores)
    maps, masks, labels, det, calibrated, scores = (torch.cat(part) for part in parts)
    published = class_image_scores(maps.amax(dim=(1, 2)), maps.amin(dim=(1, 2)), det, "industrial")
    return tuple(values.numpy() for values in (maps, masks, labels, scores, published, calibrated))


def f1_max(labels: np.ndarray, scores: np.ndarray) -> float:
    precision, recall, _ = precision_recall_curve(labels, scores)
    return float((2 * precision * recall / np.maximum(precision + recall, 1e-12)).max())


@pytest.mark.parametrize("published", [True, False])
def test_metrics_equal_scikit_learn_on_full_arrays(
    data: TaskData, models: dict[str, Detector], published: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "in_catalog", lambda _: published)
    found = evaluate(models, data, "cpu", batch_size=BATCH)
    assert found["model 1"].classes[0].values != found["model 2"].classes[0].values
    for name, detector in models.items():
        result = found[name].classes[0]
        of_class, masks, labels, scores, normalised, of_image = full_arrays(detector, data, "cork")
        maps = of_class if published else of_image
        kinds = [("pixel", masks, maps), ("image", labels, scores), ("published_image", labels, normalised)]
        expected = {
            f"{kind}_{metric}": 100 * function(truth.ravel(), values.ravel())
            for kind, truth, values in kinds
            for metric, function in (("auroc", roc_auc_score), ("ap", average_precision_score), ("f1_max", f1_max))
        }
        expected["aupro"] = plain_aupro(maps, masks)
        if not published:
            expected |= {metric: None for metric in METRICS if metric.startswith("published")}
        assert {metric: result.values[metric] for metric in expected} == pytest.approx(expected, abs=0.01)
        assert [image.score for image in result.scores] == pytest.approx(scores.tolist(), abs=1e-6)
        assert [image.anomalous for image in result.scores] == labels.astype(bool).tolist()
        assert [image.path for image in result.scores] == [r.image_path for r in data.records[: len(labels)]]


@pytest.mark.parametrize("calibrated", [True, False])
def test_decisions_of_thresholds_equal_scikit_learn(
    data: TaskData, models: dict[str, Detector], calibrated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thresholds apply to the maps of `predict`, also if metrics are those of published maps."""
    monkeypatch.setattr(module, "in_catalog", lambda _: True)
    detector = models["model 1"]
    _, masks, labels, scores, _, maps = full_arrays(detector, data, "cork")
    image, pixel = float(np.median(scores)), float(np.quantile(maps, 0.9))
    protocol = ProtocolArguments(threshold=None if calibrated else (image, pixel))
    if calibrated:
        key = detector.calibration_key(data.names["cork"], "industrial", class_names="catalog")
        detector = Detector(detector.model, "calibrated")
        detector.calibration = [make_entry(key, "calibrated", [image], [pixel], 0.5)]
    cork, reed = evaluate({"m": detector}, data, "cpu", BATCH, protocol=protocol)["m"].classes
    for kind, truth, called in (("image", labels, scores > image), ("pixel", masks, maps > pixel)):
        truth, called = truth.ravel().astype(bool), called.ravel()
        expected = [*precision_recall_fscore_support(truth, called, average="binary")[:3], jaccard_score(truth, called)]
        values = [cork.values[f"{kind}_{name}"] for name in DECISION_METRICS]
        assert values == pytest.approx([100 * value for value in expected], abs=1e-6)
    # Without an entry there are no decisions; without normal images they are undefined.
    assert reed.values.get("image_f1") is None
    assert ("pixel_f1" in reed.values) is not calibrated


def test_another_det_score_changes_image_scores_only_and_is_named(data: TaskData, models: dict[str, Detector]) -> None:
    detector = models["model 1"]
    asked = Detector(detector.model, "asked", det_score="difference")
    found = evaluate({"model 1": detector, "asked": asked}, data, "cpu", batch_size=BATCH)
    published, difference = found["model 1"], found["asked"]
    assert (published.det_score, difference.det_score) == ("abnormal", "difference")
    for one, other in zip(published.classes, difference.classes, strict=True):
        pixels = [metric for metric in METRICS if "image" not in metric]
        assert [one.values[metric] for metric in pixels] == [other.values[metric] for metric in pixels]
        assert [image.score for image in one.scores] != [image.score for image in other.scores]
    *_, maps = full_arrays(detector, data, "cork")
    side, rows = detector.model.text_side(data.prompts(detector.clip)), data.classes.index("cork")
    with torch.inference_mode():
        batches = [
            batch["image"]
            for batch in evaluation_loader(make_dataset(data, detector.clip, "none"), BATCH, 0)
            if batch["class_name"][0] == "cork"
        ]
        det = torch.cat([detector.model(images, side, torch.full((len(images),), rows)).det for images in batches])
    expected = 0.5 * maps.max(axis=(1, 2)) + 0.5 * (det[:, 1] - det[:, 0] + 2).numpy() / 4
    assert [image.score for image in difference.classes[0].scores] == pytest.approx(expected.tolist(), abs=1e-4)
    with pytest.raises(UserError, match="--det_score nonsense: choose one of abnormal, difference"):
        Detector(detector.model, "asked", det_score="nonsense")


def test_image_metrics_are_undefined_without_normal_images(data: TaskData, models: dict[str, Detector]) -> None:
    _, reed = evaluate(models, data, "cpu")["model 1"].classes
    published = {f"published_{name}" for name in IMAGE_METRICS}
    assert {name for name, value in reed.values.items() if value is None} == published | {"aupimo", *IMAGE_METRICS}
    assert (reed.images, reed.anomalous) == (3, 3)


def test_a_non_finite_map_is_reported_with_its_image(
    data: TaskData, models: dict[str, Detector], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(*arguments: object) -> torch.Tensor:
        maps = calibrated_maps(*arguments)
        maps[:, 1, 3, 3] = float("nan")
        return maps

    monkeypatch.setattr(module, "calibrated_maps", spoiled)
    with pytest.raises(UserError, match=data.records[1].image_path):
        evaluate(models, data, "cpu")


def test_averages_state_the_number_of_classes(
    data: TaskData, models: dict[str, Detector], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    evaluation = evaluate(models, data, "cpu")["model 1"]
    cork, reed = (result.values for result in evaluation.classes)
    assert evaluation.average("aupro") == (pytest.approx((cork["aupro"] + reed["aupro"]) / 2), 2)
    assert evaluation.average("image_f1_max") == (cork["image_f1_max"], 1)
    table = evaluation_table(evaluation)
    assert "average of 2" in table
    assert [line.split()[2::2] for line in table.splitlines() if "defined in" in line] == [
        [str(evaluation.average(metric)[1]) for metric in evaluation.metrics]
    ]


def test_the_usual_protocol_is_that_of_the_metrics() -> None:
    assert ProtocolArguments().aupro_limit == FPR_LIMIT
