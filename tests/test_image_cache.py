"""Resized images that are kept in files: the same samples as without, whatever happens to the files."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import dataset.images
from dataset import image_cache
from dataset.image_cache import CACHE_FOLDER, IMAGE, ImageCache, mask_kind, open_cache, square_bytes
from dataset.options import AS_USUAL, HALF, NONZERO, AugmentationConfig
from dataset.records import Record
from dataset.samples import AnomalyDataset, SampleKey, SeededSampler
from engine.training.base import train_base
from tests.scripts import small_runs, write_world
from utils.errors import UserError

SIZE, MEAN, STD = 21, (0.5, 0.25, 0.5), (0.5, 0.25, 0.25)
WIDTH, HEIGHT = 40, 30
ORIENTATION = 0x0112


def draw(folder: Path) -> list[Record]:
    """Images of many kinds and masks of many kinds, each with a defect; the first image is normal."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
    deep = rng.integers(0, 65536, (HEIGHT, WIDTH))
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    images: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "rgb.png": (rgb, {}),
        "small.jpg": (rgb, {"quality": 80}),
        "turned.jpg": (rgb, {"exif": turned}),
        "grey.png": (rgb.convert("L"), {}),
        "palette.png": (rgb.quantize(16), {"transparency": 3}),
        "alpha.png": (rgb.convert("RGBA"), {}),
        "bits.png": (rgb.convert("1"), {}),
        "deep.png": (Image.fromarray(deep.astype(np.uint16)), {}),
        "float.tif": (Image.fromarray((deep / 65535).astype(np.float32)), {}),
        "lossy.webp": (rgb, {}),
        "ink.tif": (rgb.convert("CMYK"), {}),
    }
    ramp = np.zeros((HEIGHT, WIDTH), np.uint8)
    ramp[8:22, 10:30] = np.linspace(1, 255, 20)
    palette = Image.fromarray((ramp > 90).astype(np.uint8) * 2, mode="P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    masks: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("png", Image.fromarray(ramp), {}),
        ("png", Image.fromarray((ramp > 0).astype(np.uint8) * 3), {}),
        ("png", palette, {}),
        ("jpg", Image.fromarray(ramp), {"quality": 60}),
        ("tif", Image.fromarray(ramp.astype(np.float32) / 255), {}),
    ]
    records = [Record("rgb.png", 0, "part")]
    for index, (name, (picture, options)) in enumerate(images.items()):
        picture.save(folder / name, **options)
        ending, mask, mask_options = masks[index % len(masks)]
        if name == "turned.jpg":
            mask_options = {**mask_options, "exif": turned}
        mask.save(folder / f"mask_{index}.{ending}", **mask_options)
        records.append(Record(name, 1, "part", f"mask_{index}.{ending}"))
    return records


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    return draw(tmp_path)


def kept_in(folder: Path) -> ImageCache:
    return ImageCache(folder / CACHE_FOLDER / "squares", SIZE)


def samples(
    folder: Path, records: Sequence[Record], kept: ImageCache | None = None, *chosen: Any, **more: Any
) -> AnomalyDataset:
    return AnomalyDataset(folder, records, SIZE, MEAN, STD, *chosen, **more, kept=kept)


def loaded(samples: AnomalyDataset) -> list[dict[str, Any]]:
    return [samples[SampleKey(index, 7 * index)] for index in range(len(samples))]


def assert_same(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> None:
    for first, second in zip(one, other, strict=True):
        for name, value in first.items():
            same = torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
            assert same, (first["image_path"], name)


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, content: bytes | None = None) -> None:
        raise AssertionError(f"{path} is decoded")

    monkeypatch.setattr(dataset.images, "_open", refuse)


CHOICES = {
    "as usual": AS_USUAL,
    "separate": AugmentationConfig(augment_moves="separate", augment_resampling="nearest"),
    "black": AugmentationConfig(augment_fill="black", keep_label=True),
    "jitter first": AugmentationConfig(jitter_first=True),
}


@pytest.mark.parametrize("threshold", [HALF, 0.2, NONZERO])
@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("augment", ["none", "geometric", "full"])
def test_samples_are_the_same_bits_with_and_without(
    tmp_path: Path,
    records: list[Record],
    monkeypatch: pytest.MonkeyPatch,
    augment: str,
    choices: str,
    threshold: float | str,
) -> None:
    how = (augment, CHOICES[choices], threshold)
    plain = loaded(samples(tmp_path, records, None, *how))
    assert all(sample["mask"].any() for sample in plain[1:]) or augment != "none"
    kept = samples(tmp_path, records, kept_in(tmp_path), *how)
    assert_same(plain, loaded(kept))
    if not (augment == "full" and choices == "jitter first"):
        forbid_decoding(monkeypatch)
    assert_same(plain, loaded(kept))


def test_sizes_and_thresholds_have_squares_of_their_own(tmp_path: Path, records: list[Record]) -> None:
    for threshold in (HALF, 0.2, NONZERO, HALF):
        how = ("none", AS_USUAL, threshold)
        assert_same(
            loaded(samples(tmp_path, records, None, *how)), loaded(samples(tmp_path, records, kept_in(tmp_path), *how))
        )
    assert open_cache(tmp_path, records, 16, 1.0).folder != open_cache(tmp_path, records, SIZE, 1.0).folder


def test_a_file_is_known_by_its_content(tmp_path: Path, records: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an equal size and time nor another name can deceive."""
    one, other = tmp_path / "one.bmp", tmp_path / "other.bmp"
    for path, colour in ((one, (200, 0, 0)), (other, (0, 200, 0))):
        Image.new("RGB", (WIDTH, HEIGHT), colour).save(path)
        os.utime(path, (1, 1))
    record = [Record("one.bmp", 0, "part")]
    before = loaded(samples(tmp_path, record, kept_in(tmp_path)))
    shutil.copyfile(other, one)
    os.utime(one, (1, 1))
    after = loaded(samples(tmp_path, record, kept_in(tmp_path)))
    assert not torch.equal(before[0]["image"], after[0]["image"])
    assert_same(after, loaded(samples(tmp_path, record)))
    forbid_decoding(monkeypatch)
    loaded(samples(tmp_path, [Record("other.bmp", 0, "part")], kept_in(tmp_path)))


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def another_source_size(data: bytes) -> bytes:
    return data[:4] + bytes([data[4] ^ 1]) + data[5:]


@pytest.mark.parametrize("damage", [cut, flipped, another_source_size, lambda data: b"", lambda data: data + b"x"])
def test_a_damaged_square_is_not_believed_and_is_made_anew(tmp_path: Path, records: list[Record], damage: Any) -> None:
    kept = samples(tmp_path, records, kept_in(tmp_path))
    plain = loaded(kept)
    files = {file: file.read_bytes() for file in kept_in(tmp_path).folder.iterdir()}
    for file, data in files.items():
        file.write_bytes(damage(data))
    assert_same(plain, loaded(kept))
    assert files == {file: file.read_bytes() for file in kept_in(tmp_path).folder.iterdir()}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_where_nothing_can_be_written_images_are_decoded_and_it_is_said_once(
    tmp_path: Path,
    records: list[Record],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    plain = loaded(samples(tmp_path, records))

    def half_a_file(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:10])
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", half_a_file)
    kept = samples(tmp_path, records, kept_in(tmp_path))
    for _ in range(2):
        assert_same(plain, loaded(kept))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert not list(kept_in(tmp_path).folder.iterdir())


def test_a_square_that_another_process_wrote_first_is_no_failure(
    tmp_path: Path, records: list[Record], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Windows lets nobody replace a file that is being read."""
    kept = kept_in(tmp_path)
    plain = loaded(samples(tmp_path, records, kept))

    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "in use")

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(ImageCache, "get", lambda *asked: None)
    assert_same(plain, loaded(samples(tmp_path, records, kept)))
    assert not caplog.records and not list(kept.folder.glob(".*"))


def write_at_once(kept: AnomalyDataset) -> DataLoader:
    sampler = SeededSampler(len(kept), seed=1, stage=2)
    return DataLoader(kept, batch_size=3, sampler=sampler, num_workers=1, multiprocessing_context="spawn")


def test_spawned_workers_of_two_loaders_fill_one_cache(tmp_path: Path, records: list[Record]) -> None:
    plain = list(DataLoader(samples(tmp_path, records, None, "full"), 3, sampler=SeededSampler(len(records), 1, 2)))
    kept = samples(tmp_path, records, open_cache(tmp_path, records, SIZE, 1.0), "full")
    one, other = zip(*zip(write_at_once(kept), write_at_once(kept), strict=True), strict=True)
    assert_same(plain, one)
    assert_same(plain, other)
    contents = [
        {(tmp_path / path).read_bytes() for record in records if (path := getattr(record, name))}
        for name in ("image_path", "mask_path")
    ]
    endings = sorted(file.suffix for file in kept.kept.folder.iterdir())
    assert endings == [".5"] * len(contents[1]) + [".image"] * len(contents[0])


def messages(action: Any) -> list[str]:
    with pytest.raises(UserError) as error:
        action()
    return str(error.value).splitlines()


@pytest.mark.parametrize("fault", ["gone", "empty", "a folder", "another size", "no mask"])
def test_mistakes_in_the_data_are_said_as_without(tmp_path: Path, records: list[Record], fault: str) -> None:
    kept = samples(tmp_path, records[2:3], kept_in(tmp_path))
    loaded(kept)
    image, mask = (tmp_path / name for name in (records[2].image_path, records[2].mask_path))
    if fault == "no mask":
        mask.unlink()
    elif fault == "another size":
        Image.new("L", (WIDTH, HEIGHT + 1), 255).save(mask)
    else:
        image.unlink()
        if fault == "empty":
            image.touch()
        elif fault == "a folder":
            image.mkdir()
    expected = messages(lambda: loaded(samples(tmp_path, records[2:3])))
    for _ in range(2):
        assert messages(lambda: loaded(kept)) == expected


def said(caplog: pytest.LogCaptureFixture) -> str:
    (line,) = caplog.messages
    caplog.clear()
    return line


def test_the_cache_is_opened_where_it_fits(
    tmp_path: Path, records: list[Record], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    assert open_cache(tmp_path, records, SIZE, 0) is None and not caplog.messages
    masks = sum(record.mask_path is not None for record in records)
    needed = len(records) * square_bytes(IMAGE, SIZE) + masks * square_bytes(mask_kind(), SIZE)
    assert open_cache(tmp_path, records, SIZE, 0.9 * needed / 2**30) is None
    assert "--cache_images allows" in said(caplog)
    kept = open_cache(tmp_path, records, SIZE, 1.01 * needed / 2**30)
    assert kept is not None and str(kept.folder) in said(caplog)
    assert open_cache(tmp_path, records, SIZE, 1.01 * needed / 2**30) is kept and not caplog.messages
    assert not (tmp_path / CACHE_FOLDER).exists()
    # What other sizes take counts too.
    loaded(AnomalyDataset(tmp_path, records, 16, MEAN, STD, kept=open_cache(tmp_path, records, 16, 1.0)))
    caplog.clear()
    assert open_cache(tmp_path, records, SIZE, 1.02 * needed / 2**30) is None and said(caplog)
    free = shutil.disk_usage(tmp_path)._replace(free=int(1.9 * needed))
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda folder: free)
    assert open_cache(tmp_path, records, SIZE, 3.0) is None
    assert "free space" in said(caplog)


def test_a_folder_that_cannot_be_written_to_is_read_all_the_same(
    tmp_path: Path, records: list[Record], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)

    def refuse(folder: Path, flag: str) -> None:
        raise UserError(f"{flag} {folder}: the file system is read-only")

    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "check_folder", refuse)
        assert open_cache(tmp_path, records, SIZE, 1.25) is None
        assert "read-only" in said(caplog)
    plain = loaded(samples(tmp_path, records, open_cache(tmp_path, records, SIZE, 1.5)))
    monkeypatch.setattr(image_cache, "check_folder", refuse)
    kept = open_cache(tmp_path, records, SIZE, 1.75)
    forbid_decoding(monkeypatch)
    assert_same(plain, loaded(samples(tmp_path, records, kept)))


def test_a_file_in_the_place_of_the_folder_costs_no_run(tmp_path: Path, records: list[Record]) -> None:
    (tmp_path / CACHE_FOLDER).write_bytes(b"")
    assert open_cache(tmp_path, records, SIZE, 1.0) is None


def test_what_a_killed_process_left_is_removed(tmp_path: Path, records: list[Record]) -> None:
    kept = open_cache(tmp_path, records, SIZE, 2.0)
    loaded(samples(tmp_path, records, kept))
    square = next(kept.folder.iterdir())
    left = kept.folder / f".{square.name}.0123abcd.{2**22 + 1}@{socket.gethostname()}.tmp"
    left.write_bytes(b"half")
    open_cache(tmp_path, records, SIZE, 2.5)
    assert not left.exists() and square.exists()


def test_a_run_is_the_same_with_squares_without_and_with_either_after_a_restart(tmp_path: Path) -> None:
    write_world(tmp_path, ("cork",), count=2)
    (tmp_path / "train" / CACHE_FOLDER).mkdir()
    config, _ = small_runs(tmp_path, seed=3)
    found = []
    for first, second in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        run = replace(config, save_path=tmp_path / f"run_{first:g}_{second:g}", cache_images=first)
        train_base(run)
        squares = len(list((tmp_path / "train" / CACHE_FOLDER).rglob("*.image")))
        train_base(replace(run, image_epoch=2, cache_images=second))
        found.append(torch.load(run.save_path / "image_adapter.pth", weights_only=True))
        assert squares == (0 if first == second == 0 else 8)
    for name in ("text_adapter", "image_adapter"):
        for key, value in found[0][name].items():
            assert all(torch.equal(value, other[name][key]) for other in found[1:]), key
