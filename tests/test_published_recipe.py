"""The published recipe, `--preset published` (docs/method.md, "Deviations from the published code").

tests/data/published_loss_reference.npz was computed by the published code's own segmentation loss, in float64; what its
arrays are stands in it, under `about`.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image, ImageFilter
from torch import Tensor

from dataset.catalog import CATALOG
from dataset.class_names import class_display_names, published_name
from dataset.images import image_tensor
from dataset.prompts import build_prompts
from engine import load_model
from engine.config.training import BaseConfig, CrossAttentionRunConfig
from engine.data.loaders import make_dataset, training_loader
from engine.data.task import load_task
from engine.evaluation.image_heatmaps import read_dataset_image
from engine.training.base import train_base
from engine.training.setup import RunSetup, prepare
from engine.training.stage1 import TextStage
from engine.training.stage2 import ImageStage
from engine.training.start import read_base
from model.adapter import AdaptedCLIP
from model.losses import focal_loss, segmentation_loss
from model.scoring import similarities
from tests import reference
from tests.evaluating import evaluate_checkpoints
from tests.helpers import (
    Batch,
    assert_agrees,
    assert_all_agree,
    assert_gradients_agree,
    gradients_by_sides,
    relative_error,
    tiny_open_clip,
    trainable,
)
from tests.scripts import ROOT, common_arguments, write_clip, write_dataset
from utils.arguments import make_parser

REFERENCE = Path(__file__).parent / "data" / "published_loss_reference.npz"


@pytest.mark.parametrize("case", ["small", "large"])
@pytest.mark.parametrize(("dtype", "loss", "gradient"), [(torch.float64, 1e-7, 1e-6), (torch.float32, 1e-5, 1e-3)])
def test_the_segmentation_loss_is_the_published_one(
    case: str, dtype: torch.dtype, loss: float, gradient: float
) -> None:
    with np.load(REFERENCE) as file:
        known = {
            name: torch.from_numpy(file[f"{case}_{name}"])
            for name in ("features", "anchors", "mask", "loss", "gradient", "p_abnormal_mean")
        }
    features = known["features"].to(dtype).requires_grad_()
    (similarity,) = similarities([features], known["anchors"].to(dtype))
    found = segmentation_loss(similarity, known["mask"].to(dtype), smoothing=1e-5)
    found.total.backward()
    assert_agrees(found.total, known["loss"], loss)
    assert_agrees(features.grad, known["gradient"], gradient)
    assert_agrees(found.abnormal.mean(), known["p_abnormal_mean"], loss)
    if case == "large":
        # Confident errors are what the smoothing is about: an exact loss is another one.
        assert abs(segmentation_loss(similarity, known["mask"].to(dtype)).total.item() - known["loss"].item()) > 0.01


def test_smoothing_limits_the_loss_of_a_confident_error_and_removes_its_gradient() -> None:
    def loss_and_gradient(margin: float, smoothing: float) -> tuple[float, float]:
        logits = torch.tensor([margin, 0.0], dtype=torch.float64).reshape(1, 2, 1, 1).requires_grad_()
        loss = focal_loss(logits, torch.ones(1, 1, 1), smoothing=smoothing)
        loss.backward()
        return loss.item(), logits.grad.abs().max().item()

    assert loss_and_gradient(30.0, 1e-5)[0] == pytest.approx(10.8, abs=0.05)
    assert loss_and_gradient(30.0, 1e-5)[1] < 1e-6
    assert loss_and_gradient(30.0, 0.0) == pytest.approx((30.0, 1.0), abs=1e-6)
    assert loss_and_gradient(0.1, 1e-5)[0] == pytest.approx(loss_and_gradient(0.1, 0.0)[0], rel=1e-4)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP that states QuickGELU, a dataset that has published names, and one that has none."""
    folder = tmp_path_factory.mktemp("world")
    write_clip(folder / "clip")
    write_dataset(folder / "data" / "MPDD", classes=("tubes", "connector"), count=3)
    write_dataset(folder / "own", classes=("felt", "cork"), count=2, seed=1)
    return folder


def on_mpdd(world: Path) -> dict[str, Any]:
    values = common_arguments(world, dataset="MPDD", data_root=world / "data")
    return {name: value for name, value in values.items() if name not in ("shot", "text_batch_size")}


def published_run(world: Path, save_path: Path, **changes: Any) -> BaseConfig:
    given = {"preset": "published", **on_mpdd(world), "save_path": save_path}
    return BaseConfig.of(**{**given, **changes})


@pytest.fixture
def opening(world: Path, tmp_path: Path) -> RunSetup:
    return prepare(published_run(world, tmp_path / "run"), "train.py")


def first_batch(opening: RunSetup, augment: str, size: int, stage: int) -> dict[str, Any]:
    choices = opening.config.augmentation()
    samples = make_dataset(opening.data, opening.model.clip, augment, choices)
    loader = training_loader(samples, size, stage, 0)
    return next(iter(loader))


def published_reference(opening: RunSetup) -> reference.Reference:
    """With new weights and GELU."""
    clip = tiny_open_clip(quick_gelu=False)
    clip.load_state_dict(opening.model.clip.clip.state_dict())
    weights = {name: value.detach().double().requires_grad_() for name, value in trainable(opening.model).items()}
    return reference.Reference(clip.double(), weights, opening.model.config)


def published_anchors(ref: reference.Reference, opening: RunSetup, classes: list[str]) -> list[Tensor]:
    """Of each image, by the published names of the classes."""
    pairs = {}
    for name in dict.fromkeys(classes):
        words = {"tubes": "scattered metal objects", "connector": "metal clamps with black adjustment knobs"}[name]
        normal, abnormal = (opening.model.clip.tokenize(prompts) for prompts in build_prompts(words))
        pairs[name] = reference.anchor_pair(ref, list(normal), list(abnormal))
    return [pairs[name] for name in classes]


@pytest.mark.parametrize(("side", "augment", "size"), [("text", "geometric", 6), ("image", "full", 4)])
def test_a_step_equals_the_published_code(opening: RunSetup, side: str, augment: str, size: int) -> None:
    number, stage_of = {"text": (1, TextStage), "image": (2, ImageStage)}[side]
    batch = first_batch(opening, augment, size, number)
    ref = published_reference(opening)
    anchors = published_anchors(ref, opening, batch["class_name"])
    images, masks = batch["image"].double(), batch["mask"][:, 0].double()
    if side == "text":
        expected = reference.published_stage1_loss(ref, images, anchors, masks)
    else:
        expected = reference.published_stage2_loss(ref, images, anchors, masks, batch["label"])

    def loss_of(model: AdaptedCLIP, of_batch: Batch) -> Tensor:
        stage = stage_of(model, opening.data.prompts(model.clip), opening.data.classes, opening.config)
        return stage({**batch, "image": of_batch.images, "mask": of_batch.masks[:, None]}).losses["total"]

    check_step(opening.model, batch, loss_of, expected, ref, f"{side}_adapter")


def check_step(
    model: AdaptedCLIP, batch: dict[str, Any], loss_of: Any, expected: Tensor, ref: reference.Reference, part: str
) -> None:
    """The loss to 1e-5 and gradients to 1e-3 in float32, and closer on the same sides of LeakyReLU's kink."""
    assert len(batch["label"].unique()) == 2, "the batch shows no anomaly, or nothing else"
    of_batch = Batch(batch["image"], batch["mask"][:, 0], batch["label"], batch["label"])
    names = [name for name in ref.weights if name.startswith(part)]
    found = torch.autograd.grad(expected, [ref.weights[name] for name in names])
    gradients = dict(zip(names, found, strict=True))
    assert_agrees(loss_of(model, of_batch), expected, 1e-5, "loss")
    assert_all_agree(gradients_by_sides(model, lambda: loss_of(model, of_batch))[0], gradients, 1e-3)
    assert_gradients_agree(model, of_batch, loss_of, gradients)


@pytest.mark.parametrize(
    "change",
    [
        {"surgery": "sequential"},
        {"surgery": "dual"},
        {"stage1_levels": "all"},
        {"activation": "quick_gelu"},
        {"class_names": "catalog"},
        {"focal_smoothing": 0.0},
        {"focal_smoothing": 1e-3},
    ],
    ids=str,
)
def test_explicit_options_override_the_preset_and_change_the_step(
    change: dict[str, Any], opening: RunSetup, world: Path, tmp_path: Path
) -> None:
    """Each deviation is large enough for the comparisons above."""
    batch = first_batch(opening, "geometric", 6, 1)

    def loss_of(other: RunSetup) -> Tensor:
        prompts = other.data.prompts(other.model.clip)
        return TextStage(other.model, prompts, other.data.classes, other.config)(batch).losses["total"]

    changed = prepare(published_run(world, tmp_path / "run", **change), "train.py")
    assert relative_error(loss_of(changed), loss_of(opening)) > 1e-5


def test_presets_combine_and_explicit_options_win() -> None:
    assert BaseConfig.of() == BaseConfig() == BaseConfig.of(preset="recommended")
    toy = BaseConfig.of(preset="published", recipe="toy")
    assert (toy.model_name, toy.image_lr, toy.text_adapt_weight, toy.text_norm_weight) == ("toy", 1e-3, 0.3, 3.0)
    assert (toy.adapter, toy.surgery, toy.activation, toy.augment_moves) == ("linear", "batch_axis", "gelu", "separate")
    assert BaseConfig.of(preset="published", keep_label=False, class_names="catalog").keep_label is False
    assert CrossAttentionRunConfig.of(preset="published").surgery == "batch_axis"


def test_a_complete_published_run_without_published_names(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    config = published_run(world, tmp_path / "run", dataset=str(world / "own"), text_epoch=1, image_epoch=1)
    train_base(config)
    said = [record.getMessage() for record in caplog.records if "published names" in record.getMessage()]
    assert said == ["own: there are no published names of its classes; the catalog's are used"]
    assert any("runs with gelu" in record.getMessage() for record in caplog.records)
    trained = load_model(tmp_path / "run" / "image_adapter.pth", device="cpu")
    assert trained.model.config.surgery == "batch_axis" and trained.clip.activation == "gelu"
    assert trained.config["prompt_names"] == {"cork": "cork", "felt": "felt"}
    assert trained.config["arguments"]["mask_threshold"] == "nonzero"
    # A dataset that has published names is tested by them, as the run was told.
    evaluate_checkpoints(
        str(tmp_path / "run"), "MPDD", data_root=world / "data", output_dir=tmp_path / "out", device="cpu"
    )
    log = capsys.readouterr().err
    assert "--class_names is that of the run: published" in log
    assert "--mask_threshold is that of the run: nonzero" in log
    run = {"mask_threshold": "nonzero"}
    assert load_task(str(world / "own"), run=run).mask_threshold == "nonzero"
    assert load_task(str(world / "own"), run=run, mask_threshold=0.5).mask_threshold == 0.5


# A checkpoint in the published form.


def write_published_form(folder: Path, opening: RunSetup, adapter: str = "linear") -> Path:
    """The weights of a fresh model as the published code writes them: a file for each side, and no config."""
    folder.mkdir(parents=True)
    torch.manual_seed(5)
    parts = AdaptedCLIP(opening.model.clip, replace(opening.model.config, adapter=adapter)).components
    for side, epoch in (("text", 5), ("image", 20)):
        state = {"epoch": epoch, f"{side}_adapter": parts[f"{side}_adapter"].state_dict(), f"{side}_optimizer": {}}
        torch.save(state, folder / ("text_adapter.pth" if side == "text" else f"image_adapter_{epoch}.pth"))
    return folder / "image_adapter_20.pth"


def maps_by_hand(file: Path, opening: RunSetup, picture: Path, name: str, quick_gelu: bool) -> Tensor:
    """The reference's calibrated map for this class name and activation, (S, S)."""
    clip = tiny_open_clip(quick_gelu)
    clip.load_state_dict(opening.model.clip.clip.state_dict())
    files = [torch.load(part, weights_only=True) for part in (file, file.with_name("text_adapter.pth"))]
    weights = {
        f"{part}.{key}": value.double()
        for state in files
        for part in ("text_adapter", "image_adapter")
        for key, value in state.get(part, {}).items()
    }
    ref = reference.Reference(clip.double(), weights, replace(opening.model.config, text_adapted=True))
    with Image.open(picture) as image:
        pixels = image_tensor(image.convert("RGB"), 40, opening.model.clip.mean, opening.model.clip.std).double()
    normal, abnormal = (opening.model.clip.tokenize(prompts) for prompts in build_prompts(name))
    with torch.no_grad():
        levels, _ = reference.adapted_image(ref, pixels)
        return reference.calibrated_map(levels, reference.anchor_pair(ref, list(normal), list(abnormal)), 40)


def test_a_published_checkpoint_keeps_its_settings(
    opening: RunSetup, world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """GELU and published names are the default, also in `predict`; options override both."""
    caplog.set_level(logging.INFO)
    file = write_published_form(tmp_path / "published", opening)
    picture = world / "data" / "MPDD" / "tubes" / "test" / "spot" / "000.png"
    name = f"local-dir:{world / 'clip'}"
    model = load_model(file, model_name=name, device="cpu")
    assert model.clip.activation == "gelu"
    assert "assumed trained with gelu and the published class names" in caplog.text
    found = model.predict(picture, class_name="tubes").anomaly_map
    expected = maps_by_hand(file, opening, picture, "scattered metal objects", quick_gelu=False)
    assert_agrees(torch.from_numpy(found), expected, 1e-5)
    as_is = model.predict(picture, class_name="tubes", class_names="catalog").anomaly_map
    assert_agrees(torch.from_numpy(as_is), maps_by_hand(file, opening, picture, "tubes", quick_gelu=False), 1e-5)
    assert relative_error(torch.from_numpy(as_is), expected) > 1e-4
    asked = load_model(file, model_name=name, activation="quick_gelu", device="cpu")
    assert asked.clip.activation == "quick_gelu"

    def evaluated(**changes: Any) -> list[float]:
        asked = {"data_root": world / "data", "output_dir": tmp_path / "out", "model_name": name, **changes}
        found = evaluate_checkpoints(str(file), "MPDD", **asked)
        return [score.score for result in found[0].classes for score in result.scores]

    default = evaluated()
    assert "--class_names is that of the run: published" in capsys.readouterr().err
    assert default == evaluated(class_names="published", activation="gelu")
    assert default != evaluated(class_names="catalog")
    assert default != evaluated(activation="quick_gelu")


def test_assumptions_about_a_forks_file_are_logged(
    opening: RunSetup, world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_published_form(tmp_path / "fork", opening, adapter="bottleneck")
    name = f"local-dir:{world / 'clip'}"
    model = load_model(file, model_name=name, device="cpu")
    assert model.clip.activation == "quick_gelu"
    assert not model.arguments
    assert "assumed trained with quick_gelu" in caplog.text and "the catalog's class names" in caplog.text
    asked = load_model(file, model_name=name, activation="gelu", device="cpu")
    assert asked.clip.activation == "gelu"
    picture = world / "data" / "MPDD" / "tubes" / "test" / "spot" / "000.png"
    maps = [asked.predict(picture, "tubes", class_names=names).anomaly_map for names in (None, "catalog", "published")]
    assert np.array_equal(maps[0], maps[1]) and not np.array_equal(maps[0], maps[2])


def test_training_continues_a_published_base_with_its_settings(opening: RunSetup, world: Path, tmp_path: Path) -> None:
    file = write_published_form(tmp_path / "published", opening)

    def started(**changes: Any) -> RunSetup:
        base = {"load_base_text_adapter": file.with_name("text_adapter.pth"), "load_base_image_adapter": file}
        own = {"shot": 2, "adapter": "linear", "save_path": tmp_path / "cross"}
        run = CrossAttentionRunConfig.of(**on_mpdd(world), **base, **own, **changes)
        return prepare(run, "train_cross_attention.py", read_base(run))

    found = started()
    assert found.model.config.activation == "gelu"
    assert found.data.names["tubes"] == "scattered metal objects"
    assert found.description["arguments"]["class_names"] == "published"
    found = started(activation="quick_gelu", class_names="catalog")
    assert found.model.config.activation == "quick_gelu"
    assert found.data.names["tubes"] == "metal tube"


# Names.


def test_every_published_name_is_a_class_of_the_catalog_and_fits_a_prompt() -> None:
    published = json.loads((ROOT / "dataset" / "published_class_names.json").read_text(encoding="utf-8"))
    assert sum(map(len, published.values())) == 43
    tokenize = SimpleTokenizer(context_length=77)
    for dataset, names in published.items():
        spec = CATALOG[dataset]
        found = class_display_names(spec, "published", list(names))
        for name, text in names.items():
            known = spec.known_class(name)
            assert found[name] == found[known] == text
            assert published_name(name) == published_name(known) == text
            assert not tokenize([prompt for group in build_prompts(text) for prompt in group])[:, -1].any()
        assert set(map(spec.known_class, names)) == set(spec.class_names)
    assert published_name("metal nut") == published["MVTec"]["metal_nut"]
    assert published_name("felt") is None


@pytest.mark.parametrize(("dataset", "listed"), [("Colon_Kvasir", "Kvasir"), ("Colon_cvc300", "CVC-300")])
def test_both_names_of_a_class_are_accepted(dataset: str, listed: str, tmp_path: Path) -> None:
    spec = CATALOG[dataset]
    assert class_display_names(spec, "published", [listed])[listed] == "colon endoscopy image"
    assert class_display_names(spec, "published", [dataset])[dataset] == "colon endoscopy image"
    file = tmp_path / "names.json"
    for written in (listed, dataset):
        file.write_text(json.dumps({written: "a polyp"}), encoding="utf-8")
        for met in (listed, dataset):
            assert class_display_names(spec, file, [met])[met] == "a polyp"


def test_a_file_named_published_is_used_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("published").write_text('{"tubes": "of the file"}', encoding="utf-8")
    spec, parse = CATALOG["MPDD"], make_parser(BaseConfig, None).parse_args
    for words, expected in (
        ("published", "scattered metal objects"),
        ("./published", "of the file"),
        ("catalog", "metal tube"),
        (str(tmp_path / "published"), "of the file"),
    ):
        config = BaseConfig.of(**vars(parse(["--class_names", words])))
        recorded = config.to_dict()["class_names"]
        assert class_display_names(spec, recorded)["tubes"] == expected, words
    assert class_display_names(spec, Path("published"))["tubes"] == "of the file"


def test_every_script_reads_masks_alike(opening: RunSetup, tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "lossy", classes=("felt",), count=2)
    for file in folder.rglob("*_mask.png"):
        with Image.open(file) as image:
            blurred = image.filter(ImageFilter.GaussianBlur(2))
        blurred.save(file)
    counts = {}
    for threshold in (0.25, 0.5, "nonzero"):
        data = load_task(str(folder), mask_threshold=threshold)
        record = next(record for record in data.records if record.label)
        drawn = read_dataset_image(data, record).mask.sum()
        tested = make_dataset(data, opening.model.clip)[data.records.index(record)]["mask"].sum()
        assert drawn == tested
        counts[threshold] = int(tested)
    assert counts[0.5] < counts[0.25] < counts["nonzero"]
