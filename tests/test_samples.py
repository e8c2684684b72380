"""Reading images and masks of every kind, augmentation, seeded order, and errors from worker processes."""

import logging
import os
import random
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

import engine.data.loaders
from dataset.augmentation import Augmentation, change_colours, draw_augmentation
from dataset.images import MAX_MEGAPIXELS_VARIABLE, drop_bad_images, find_bad_images, read_image, read_mask
from dataset.options import DEFAULT_AUGMENTATION, AugmentationConfig
from dataset.records import Record
from dataset.samples import AnomalyDataset, SampleKey, SeededSampler
from engine.cli.checks import check_files
from engine.config.evaluation import InferenceArguments
from engine.data.loaders import evaluation_loader, training_loader
from tests.helpers import equal
from tests.in_process import ROOT
from utils.errors import UserError, original_message

MEAN, STD = (0.5, 0.25, 0.5), (0.5, 0.25, 0.25)
ORIENTATION = 0x0112
COLOUR_FACTORS = ("brightness", "contrast", "saturation")

# One pixel of each of four colours, and the same as grey levels.
COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
GREYS = np.array([[0, 64], [128, 255]], np.uint8)


def pixels(path):
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def marked(path):
    mask = read_mask(path)
    assert mask.mode == "L"
    values = np.asarray(mask)
    assert set(np.unique(values)) <= {0, 255}
    return (values > 0).tolist()


def save(path, values, **options):
    image = values if isinstance(values, Image.Image) else Image.fromarray(values)
    image.save(path, **options)
    return path


def palette_image(indices, *colours, **options):
    image = Image.fromarray(np.array(indices, np.uint8), mode="P")
    image.putpalette([channel for colour in colours for channel in colour])
    return image


DEEP = np.array([[0, 257], [257 * 128, 65535]], np.uint16)
DEEP_AS_8_BIT = np.array([[0, 1], [128, 255]])
PALETTE = palette_image([[0, 1], [2, 0]], (255, 0, 0), (1, 2, 3), (9, 8, 7))
PALETTE_COLOURS = [[[255, 0, 0], [1, 2, 3]], [[9, 8, 7], [255, 0, 0]]]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "image", "options", "expected"),
    [
        ("x.png", COLOURS, {}, COLOURS),
        ("x.bmp", COLOURS, {}, COLOURS),
        ("x.webp", COLOURS, {"lossless": True}, COLOURS),
        ("damaged_tags.webp", COLOURS, {"lossless": True, "exif": b"Exif\0\0no tags here"}, COLOURS),
        ("grey.png", GREYS, {}, GREYS),
        ("alpha.png", Image.merge("LA", [Image.fromarray(GREYS), Image.new("L", (2, 2), 7)]), {}, GREYS),
        ("alpha.tif", np.dstack([COLOURS, np.array([[0, 128], [255, 1]], np.uint8)]), {}, COLOURS),
        ("bit.png", Image.fromarray(GREYS).convert("1", dither=Image.Dither.NONE), {}, [[0, 0], [255, 255]]),
        ("deep.png", DEEP, {}, DEEP_AS_8_BIT),
        ("deep.tif", Image.frombytes("I;16B", (2, 2), DEEP.astype(">u2").tobytes()), {}, DEEP_AS_8_BIT),
        ("x.tif", np.array([[0, 255]], np.int32), {}, [[0, 255]]),
        ("x.tif", np.array([[257, 65535]], np.int32), {}, [[1, 255]]),
        ("x.tif", np.array([[0, 0.5, 1]], np.float32), {}, [[0, 128, 255]]),
        ("x.tif", np.array([[0, 100, 255]], np.float32), {}, [[0, 100, 255]]),
        ("ink.tif", Image.new("CMYK", (1, 1), (0, 255, 255, 0)), {}, [[[255, 0, 0]]]),
        ("x.png", PALETTE, {}, PALETTE_COLOURS),
        ("x.png", PALETTE, {"transparency": 1}, PALETTE_COLOURS),
        ("x.png", PALETTE, {"transparency": bytes([0, 128, 255])}, PALETTE_COLOURS),
    ],
)
def test_images_of_any_kind_become_8_bit_rgb(tmp_path, name, image, options, expected):
    expected = np.array(expected)
    rgb = expected if expected.ndim == 3 else expected[..., None].repeat(3, axis=2)
    assert pixels(save(tmp_path / name, image, **options)).tolist() == rgb.tolist()


@pytest.mark.parametrize(
    "values", [np.array([[-1, 5]], np.int32), np.array([[0, 70000]], np.int32), np.array([[np.nan, 1]], np.float32)]
)
def test_values_outside_of_16_bits_are_refused(tmp_path, values):
    path = save(tmp_path / "x.tif", values)
    with pytest.raises(UserError, match="convert it to 8 or 16 bits") as error:
        read_image(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("ending", "dtype"), [("png", np.uint8), ("tif", np.uint8), ("png", np.uint16)])
def test_exif_orientation_of_images_and_masks(tmp_path, orientation, ending, dtype):
    upright = np.array([[0, 40, 80], [120, 160, 200]])
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    scale = 257 if dtype is np.uint16 else 1
    path = save(tmp_path / f"x.{ending}", np.ascontiguousarray(stored * scale).astype(dtype), exif=exif)
    assert pixels(path)[..., 0].tolist() == upright.tolist()
    assert marked(path) == (upright >= 100).tolist()


def damaged_files(folder):
    whole = save(folder / "whole.png", np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    jpeg = save(folder / "whole.jpg", Image.open(whole))
    content = whole.read_bytes()
    broken = {
        "cut.png": content[: len(content) // 2],
        "cut.jpg": jpeg.read_bytes()[:-200],
        "header.png": content[:20],
        "changed.png": content[:60] + bytes(40) + content[100:],
        "text.png": b"no picture",
        "empty.png": b"",
    }
    for name, data in broken.items():
        (folder / name).write_bytes(data)
    (folder / "folder.png").mkdir()
    return [*broken, "folder.png", "absent.png"]


@pytest.mark.parametrize("read", [read_image, read_mask])
def test_unreadable_files_are_named(tmp_path, read):
    for name in damaged_files(tmp_path):
        with pytest.raises(UserError) as error:
            read(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value), name


def test_too_large_images_are_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "x.png", COLOURS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    with pytest.raises(UserError, match="more than 0 megapixels: resize it"):
        read_image(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="is a Git LFS pointer"):
        read_image(path)
    monkeypatch.setenv(MAX_MEGAPIXELS_VARIABLE, "")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    with suppress(UserError):
        check_files(InferenceArguments(checkpoint="absent", max_megapixels=3))
    assert Image.MAX_IMAGE_PIXELS == 1_500_000 and os.environ[MAX_MEGAPIXELS_VARIABLE] == "3"
    # A worker process has the limit too, and Pillow prints no warning of its own below it.
    Image.new("L", (2000, 1000)).save(path)
    worker = f"from pathlib import Path; from dataset.images import *; read_image(Path({str(path)!r}))"
    worker += "; print(Image.MAX_IMAGE_PIXELS)"
    output = subprocess.run([sys.executable, "-c", worker], cwd=ROOT, stderr=subprocess.STDOUT, stdout=subprocess.PIPE)
    assert output.stdout.split() == [b"1500000"]


BLACK_RED_GREY = np.array([[[0, 0, 0], [255, 0, 0], [90, 90, 90]]], np.uint8)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1, 2, 3], [0, 1, 1, 1]),
        ([0, 3, 127, 128, 252, 255], [0, 0, 0, 1, 1, 1]),
        ([0, 100, 40], [0, 1, 0]),
        ([0, 0], [0, 0]),
        ([255, 255], [1, 1]),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_mask_values(tmp_path, values, expected, dtype):
    path = save(tmp_path / "x.tif", np.array([values], dtype))
    assert marked(path) == [[bool(value) for value in expected]]


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("x.png", np.array([[0, 65535, 30000]], np.uint16), [0, 1, 0]),
        ("x.png", np.array([[0, 256, 512]], np.uint16), [0, 1, 1]),
        ("x.tif", np.array([[0, 0.2, 0.5, 1]], np.float32), [0, 0, 1, 1]),
        ("x.png", Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"), [0, 1]),
        ("x.png", BLACK_RED_GREY, [0, 1, 0]),
        ("x.png", np.dstack([BLACK_RED_GREY, np.full((1, 3), 255, np.uint8)]), [0, 1, 0]),
        ("x.png", np.dstack([np.full((1, 3, 3), 255, np.uint8), np.array([[0, 255, 60]], np.uint8)]), [0, 1, 0]),
        ("x.png", palette_image([[0, 1, 2]], (0, 0, 0), (255, 255, 255), (60, 60, 60)), [0, 1, 0]),
        ("x.png", palette_image([[0, 1, 2]], (0, 0, 0), (192, 0, 0), (0, 0, 64)), [0, 1, 1]),
        ("x.png", palette_image([[0, 1, 2]], (0, 0, 0), (1, 1, 1), (2, 2, 2)), [0, 1, 1]),
    ],
)
def test_masks_of_any_kind(tmp_path, name, image, expected):
    assert marked(save(tmp_path / name, image)) == [[bool(value) for value in expected]]


def test_a_non_finite_mask_is_refused(tmp_path):
    with pytest.raises(UserError, match="not finite"):
        read_mask(save(tmp_path / "nan.tif", np.array([[0, np.nan]], np.float32)))


@pytest.fixture
def tree(tmp_path):
    """Eight 20 x 30 images, every other one anomalous with a white square on the image and in the mask."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(8):
        image = rng.integers(40, 120, (20, 30, 3), dtype=np.uint8)
        mask = np.zeros((20, 30), np.uint8)
        if i % 2:
            mask[8:14, 11:19] = 255
            image[mask > 0] = 255
            save(tmp_path / f"mask_{i}.png", mask)
        save(tmp_path / f"{i}.png", image)
        records.append(Record(f"{i}.png", i % 2, "part", f"mask_{i}.png" if i % 2 else None))
    return tmp_path, records


def make_dataset(tree, augment="none", size=24):
    return AnomalyDataset(*tree, img_size=size, mean=MEAN, std=STD, augment=augment)


def test_sample_without_augmentation(tree):
    root, _ = tree
    dataset = make_dataset(tree)
    assert len(dataset) == 8
    sample = dataset[3]
    assert sample["image"].shape == (3, 24, 24) and sample["image"].dtype == torch.float32
    assert sample["mask"].shape == (1, 24, 24) and sample["mask"].dtype == torch.float32
    assert (sample["label"], sample["class_name"], sample["index"]) == (1, "part", 3)
    resized = Image.open(root / "3.png").resize((24, 24), Image.Resampling.BICUBIC)
    expected = (np.asarray(resized, np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    np.testing.assert_allclose(sample["image"].permute(1, 2, 0).numpy(), expected, rtol=1e-6)
    small = Image.open(root / "mask_3.png").resize((24, 24), Image.Resampling.NEAREST)
    assert (sample["mask"][0].numpy() * 255 == np.asarray(small)).all() and sample["mask"].sum() > 40
    assert not dataset[2]["mask"].any() and dataset[2]["label"] == 0
    assert equal(dataset[SampleKey(3, 99)], sample)


def test_augmentation_needs_a_seed(tree):
    with pytest.raises(ValueError, match="SeededSampler"):
        make_dataset(tree, "full")[0]
    with pytest.raises(ValueError, match="augment must be"):
        make_dataset(tree, "some")


@pytest.mark.parametrize("augment", ["geometric", "full"])
def test_image_and_mask_move_together(tree, augment):
    dataset = make_dataset(tree, augment, size=60)
    for seed in range(30):
        sample = dataset[SampleKey(3, seed)]
        image = sample["image"] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        inside, outside = image.mean(0)[sample["mask"][0] > 0], image.mean(0)[sample["mask"][0] == 0]
        # The defect is the bright part of the picture; at its outline, pixels mix.
        assert inside.median() > outside.quantile(0.95), seed


def test_full_augmentation_is_geometric_and_colour(tree):
    plain, geometric, full = (make_dataset(tree, augment) for augment in ("none", "geometric", "full"))
    for seed in range(20):
        parameters = draw_augmentation(seed)
        moved = parameters.angle != 0 or parameters.shift != (0, 0) or parameters.flip_horizontal
        moved = moved or parameters.flip_vertical
        coloured = (parameters.brightness, parameters.contrast, parameters.saturation) != (1, 1, 1)
        samples = [dataset[SampleKey(1, seed)] for dataset in (plain, geometric, full)]
        assert torch.equal(samples[1]["mask"], samples[2]["mask"])
        assert torch.equal(samples[0]["image"], samples[1]["image"]) != moved
        assert torch.equal(samples[1]["image"], samples[2]["image"]) != coloured


def test_probabilities_and_ranges_of_augmentation():
    drawn = [draw_augmentation(seed) for seed in range(4000)]
    right, down = np.array([a.shift for a in drawn]).T
    values = {name: np.array([getattr(a, name) for a in drawn], float) for name in vars(drawn[0]) if name != "shift"}
    applied = {name: column != (name in COLOUR_FACTORS) for name, column in values.items()} | {"shift": right != 0}
    for name, column in applied.items():
        assert column.mean() == pytest.approx(0.7 if name in COLOUR_FACTORS else 0.5, abs=0.03), name
    factors = [(values[name], 0.5, 1.5) for name in COLOUR_FACTORS]
    for column, low, high in [(values["angle"], -30, 30), (right, -0.15, 0.15), (down, -0.15, 0.15), *factors]:
        margin = 0.02 * (high - low)
        assert low <= column.min() < low + margin and high - margin < column.max() <= high
    correlation = np.corrcoef(np.array(list(applied.values()), float))
    assert np.abs(correlation - np.eye(len(applied))).max() < 0.06


def shifted(right, down, **others):
    settings = {"angle": 0.0, "flip_horizontal": False, "flip_vertical": False}
    return Augmentation(shift=(right, down), brightness=1.0, contrast=1.0, saturation=1.0, **settings | others)


def one_defect(tmp_path, rows, columns, size=20, choices=DEFAULT_AUGMENTATION, mean=(0, 0, 0)):
    mask = np.zeros((size, size), np.uint8)
    mask[rows, columns] = 255
    save(tmp_path / "m.png", mask)
    save(tmp_path / "x.png", np.full((size, size, 3), 200, np.uint8))
    records = [Record("x.png", 1, "part", "m.png")]
    return AnomalyDataset(tmp_path, records, size, mean, (1, 1, 1), "geometric", choices)


@pytest.mark.parametrize(("fill", "uncovered"), [("mean", (0.0, 0.0, 0.0)), ("black", (-0.4, -0.6, -0.2))])
def test_shift_is_a_fraction_of_the_side_and_uncovers_one_colour(tmp_path, monkeypatch, fill, uncovered):
    monkeypatch.setattr("dataset.samples.draw_augmentation", lambda seed: shifted(0.1, -0.15))
    choices, mean = AugmentationConfig(augment_fill=fill), (0.4, 0.6, 0.2)
    sample = one_defect(tmp_path, slice(10, 12), slice(5, 9), choices=choices, mean=mean)[SampleKey(0, 0)]
    expected = torch.zeros(20, 20)
    expected[7:9, 7:11] = 1
    assert torch.equal(sample["mask"][0], expected)
    image = sample["image"] - torch.tensor(uncovered)[:, None, None]
    assert image[:, :, :2].abs().max() < 1e-6 and image[:, -3:].abs().max() < 1e-6
    assert (sample["image"][:, :-3, 2:] + torch.tensor(mean)[:, None, None] - 200 / 255).abs().max() < 0.01


def test_nearest_resampling_makes_no_new_colours(tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.samples.draw_augmentation", lambda seed: shifted(0.1, 0.0, angle=17.0))
    found = {}
    for resampling in ("nearest", "bilinear"):
        dataset = one_defect(
            tmp_path, slice(3, 9), slice(3, 9), choices=AugmentationConfig(augment_resampling=resampling)
        )
        save(tmp_path / "x.png", np.indices((20, 20)).sum(axis=0).astype(np.uint8)[..., None].repeat(3, 2) % 2 * 200)
        found[resampling] = len(dataset[SampleKey(0, 0)]["image"].unique())
    assert found["nearest"] == 2 and found["bilinear"] > 10


@pytest.mark.parametrize("moves", ["joint", "separate"])
@pytest.mark.parametrize(
    ("columns", "keep_label", "expected"),
    [
        (slice(18, 20), False, (0, False)),
        (slice(16, 20), False, (1, True)),
        (slice(0, 0), False, (1, False)),
        (slice(18, 20), True, (1, False)),
    ],
    ids=["moved out", "partly moved out", "empty before", "as published"],
)
def test_label_of_a_moved_defect(tmp_path, monkeypatch, moves, columns, keep_label, expected):
    monkeypatch.setattr("dataset.samples.draw_augmentation", lambda seed: shifted(0.15, 0.0))
    choices = AugmentationConfig(augment_moves=moves, keep_label=keep_label)
    sample = one_defect(tmp_path, slice(4, 9), columns, choices=choices)[SampleKey(0, 0)]
    assert (sample["label"], bool(sample["mask"].any())) == expected


def test_a_defect_lost_in_resampling_keeps_its_label(tmp_path, monkeypatch):
    outcomes = set()
    for place in range(8, 12):
        dataset = one_defect(tmp_path, slice(3, 4), slice(place, place + 1))
        for angle in np.linspace(5, 30, 50):
            monkeypatch.setattr("dataset.samples.draw_augmentation", lambda seed, a=angle: shifted(0, 0, angle=a))
            sample = dataset[SampleKey(0, 0)]
            outcomes.add((sample["label"], bool(sample["mask"].any())))
    # In (1, False) no pixel centre of the turned picture fell into the defect.
    assert outcomes == {(1, True), (1, False)}


@pytest.mark.parametrize("fill", ["mean", "black"])
@pytest.mark.parametrize("resampling", ["nearest", "bilinear"])
def test_separate_moves_rotate_then_shift_by_whole_pixels(tree, monkeypatch, fill, resampling):
    parameters = shifted(0.1, -0.07, angle=17.0)
    monkeypatch.setattr("dataset.samples.draw_augmentation", lambda seed: replace(parameters, flip_horizontal=True))
    choices = AugmentationConfig(augment_fill=fill, augment_resampling=resampling, augment_moves="separate")
    still = make_dataset(tree, size=40)[3]
    found = AnomalyDataset(*tree, 40, MEAN, STD, "geometric", choices)[SampleKey(3, 0)]
    black = ((0 - torch.tensor(MEAN)) / torch.tensor(STD)).tolist()
    for name, how, uncovered in (("image", resampling, black if fill == "black" else 0.0), ("mask", "nearest", 0.0)):
        values = torch.as_tensor(uncovered).reshape(-1, 1, 1).expand(len(still[name]), 40, 40)
        # Torchvision turns the other way round.
        turned = F.rotate(still[name], -17.0, InterpolationMode(how), fill=values[:, 0, 0].tolist())
        moved = values.clone()
        moved[:, :-3, 4:] = turned[:, 3:, :-4]
        assert torch.equal(found[name], moved.flip(-1)), name
    assert found["mask"].any()


def test_colours_can_be_changed_before_the_image_is_resized(tree, monkeypatch):
    parameters = replace(shifted(0, 0), brightness=1.4, contrast=0.6, saturation=1.3)
    monkeypatch.setattr("dataset.samples.draw_augmentation", lambda seed: parameters)
    with Image.open(tree[0] / "3.png") as file:
        image = file.convert("RGB")
    found = {}
    for first in (False, True):
        resize = partial(Image.Image.resize, size=(24, 24), resample=Image.Resampling.BICUBIC)
        steps = [resize, partial(change_colours, parameters=parameters)]
        expected = image
        for step in reversed(steps) if first else steps:
            expected = step(expected)
        choices = AugmentationConfig(jitter_first=first)
        dataset = AnomalyDataset(*tree, 24, (0, 0, 0), (1, 1, 1), "full", choices)
        found[first] = dataset[SampleKey(3, 0)]["image"]
        assert torch.equal(found[first], F.pil_to_tensor(expected).float() / 255)
        plain = AnomalyDataset(*tree, 24, (0, 0, 0), (1, 1, 1), "geometric", choices)[SampleKey(3, 0)]["image"]
        assert not torch.equal(found[first], plain)
    assert not torch.equal(found[False], found[True])


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.5, [0, 0, 0, 1, 1]), (0.25, [0, 0, 1, 1, 1]), (1.0, [0, 0, 0, 0, 1]), ("nonzero", [0, 1, 1, 1, 1])],
)
def test_mask_threshold(tmp_path, threshold, expected):
    values = np.array([[0, 3, 70, 130, 250]], np.uint8)
    path = save(tmp_path / "m.png", values)
    assert (np.asarray(read_mask(path, threshold)) > 0).astype(int).tolist() == [expected]
    save(tmp_path / "x.png", np.zeros((1, 5, 3), np.uint8))
    save(tmp_path / "m.png", values.repeat(5, axis=0))
    save(tmp_path / "x.png", np.zeros((5, 5, 3), np.uint8))
    record = Record("x.png", 1, "part", "m.png")
    dataset = AnomalyDataset(tmp_path, [record], 5, MEAN, STD, mask_threshold=threshold)
    assert dataset[0]["mask"][0, 0].int().tolist() == expected
    # Class indices stay what they are.
    indices = save(tmp_path / "i.png", np.array([[0, 1, 2, 8]], np.uint8))
    assert (np.asarray(read_mask(indices, threshold)) > 0).tolist() == [[False, True, True, True]]


def test_the_noise_of_a_lossy_mask_is_below_half_of_its_largest_value(tmp_path):
    values = np.zeros((32, 32), np.uint8)
    values[9:23, 9:23] = 255
    path = save(tmp_path / "x.jpg", values, quality=50)
    assert marked(path) == (values > 0).tolist()
    assert (np.asarray(read_mask(path, "nonzero")) > 0).sum() > 14 * 14


def test_global_generators_do_not_matter(tree):
    dataset = make_dataset(tree, "full")
    samples = []
    for state in (0, 1):
        random.seed(state)
        np.random.seed(state)
        torch.manual_seed(state)
        samples.append(dataset[SampleKey(3, 5)])
        assert torch.initial_seed() == state and torch.rand(1) == torch.rand(
            1, generator=torch.Generator().manual_seed(state)
        )
    assert equal(*samples)
    assert not equal(dataset[SampleKey(3, 5)], dataset[SampleKey(3, 6)])


def test_a_mask_of_another_size_is_reported_with_both_sizes(tmp_path):
    save(tmp_path / "x.png", np.zeros((20, 30), np.uint8))
    save(tmp_path / "m.png", np.zeros((30, 20), np.uint8))
    dataset = make_dataset((tmp_path, [Record("x.png", 1, "part", "m.png")]))
    with pytest.raises(UserError) as error:
        dataset[0]
    message = str(error.value)
    assert f"{tmp_path / 'x.png'} is 30 x 20" in message and f"{tmp_path / 'm.png'} is 20 x 30" in message


def test_sizes_are_compared_after_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    save(tmp_path / "x.png", np.zeros((20, 30), np.uint8), exif=exif)
    upright = np.zeros((30, 20), np.uint8)
    upright[:15] = 255
    save(tmp_path / "m.png", upright)
    sample = make_dataset((tmp_path, [Record("x.png", 1, "part", "m.png")]), size=10)[0]
    assert sample["mask"][0, :5].all() and not sample["mask"][0, 5:].any()


class TestSeededSampler:
    def test_every_index_occurs_once_in_a_repeatable_order(self):
        sampler = SeededSampler(50, seed=3, stage=1)
        sampler.set_position(loop=2, epoch=4)
        keys = list(sampler)
        assert len(sampler) == 50 and sorted(key.index for key in keys) == list(range(50))
        assert list(sampler) == keys
        assert len({key.seed for key in keys}) == 50
        again = SeededSampler(50, seed=3, stage=1)
        again.set_position(loop=2, epoch=4)
        assert list(again) == keys

    @pytest.mark.parametrize("other", [(4, 1, 2, 4), (3, 2, 2, 4), (3, 1, 3, 4), (3, 1, 2, 5)])
    def test_order_and_seeds_depend_on_every_part_of_the_position(self, other):
        runs = []
        for seed, stage, loop, epoch in ((3, 1, 2, 4), other):
            sampler = SeededSampler(50, seed, stage)
            sampler.set_position(loop, epoch)
            runs.append(list(sampler))
        assert [key.index for key in runs[0]] != [key.index for key in runs[1]]
        assert not {key.seed for key in runs[0]} & {key.seed for key in runs[1]}


def load_all(dataset, workers, context=None):
    sampler = SeededSampler(len(dataset), seed=1, stage=2)
    loader = DataLoader(dataset, batch_size=3, sampler=sampler, num_workers=workers, multiprocessing_context=context)
    return list(loader)


def test_batches_do_not_depend_on_workers(tree):
    dataset = make_dataset(tree, "full")
    here, spawned = load_all(dataset, 0), load_all(dataset, 2, "spawn")
    assert [batch["class_name"] for batch in here] == [["part"] * 3, ["part"] * 3, ["part"] * 2]
    assert here[0]["image"].shape == (3, 3, 24, 24) and here[0]["label"].dtype == torch.int64
    assert all(equal(one, other) for one, other in zip(here, spawned, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_one_line(tree, workers):
    root, _ = tree
    (root / "5.png").unlink()
    with pytest.raises(UserError) as error:
        load_all(make_dataset(tree), workers)
    assert ("Traceback" in str(error.value)) == (workers > 0)
    message = original_message(error.value)
    with pytest.raises(UserError) as direct:
        read_image(root / "5.png")
    assert message == str(direct.value) and str(root / "5.png") in message and "\n" not in message


def test_bad_images_are_found_logged_and_dropped(tree, caplog):
    root, records = tree
    assert find_bad_images(root, records) == []
    assert drop_bad_images(root, records) == records
    (root / "2.png").write_bytes(b"")
    (root / "mask_5.png").unlink()
    save(root / "mask_7.png", np.zeros((3, 3), np.uint8))
    bad = find_bad_images(root, records)
    assert [record.image_path for record, _ in bad] == ["2.png", "5.png", "7.png"]
    assert all(name in message for (_, message), name in zip(bad, ("2.png", "mask_5.png", "3 x 3"), strict=True))
    assert drop_bad_images(root, records) == [records[i] for i in (0, 1, 3, 4, 6)]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3


@pytest.mark.parametrize(("free", "expected"), [(63, 0), (64, 2)])
def test_workers_need_shared_memory(free, expected, tmp_path, monkeypatch, caplog):
    """Two workers need six batches of two images: 12 x 16 bytes a pixel."""
    samples = AnomalyDataset(tmp_path, [Record("a.png", 0, "a")] * 20, 590, MEAN, STD)
    monkeypatch.setattr(engine.data.loaders, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=free * 2**20, f_frsize=1), raising=False)
    assert training_loader(samples, 2, 1, 0, 2).num_workers == expected
    assert evaluation_loader(samples, 2, 2).num_workers == expected
    assert ("--num_workers 0" in caplog.text and "--shm-size" in caplog.text) == (expected == 0)
