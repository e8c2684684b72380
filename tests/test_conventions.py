"""Names of folders and files (docs/datasets.md): which are normal, which are masks, and what is skipped."""

import logging
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataset.conventions import (
    image_extensions,
    is_anomalous_name,
    is_ground_truth_name,
    is_normal_name,
    mask_key,
    may_be_mask_name,
    pair_masks,
)
from dataset.folders import find_images
from dataset.images import read_mask, read_pair
from dataset.locate import locate_dataset
from dataset.metadata import load_records
from dataset.records import Record
from utils.errors import UserError

RNG = np.random.default_rng(3)
SHAPE = (16, 16)
NORMAL = """good OK ok normal Normal NORMAL negative non_defective non-defective defect_free DefectFree 01_good 1-ok
good_images OKParts nofault good_2 i.O. Without_Defect"""
OTHERS = "defective NG abnormal bad not_ok nok anomalous damaged good_defect goods okay2 1"
NFC, NFD = (unicodedata.normalize(form, "Prüfung") for form in ("NFC", "NFD"))


def photo(path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 255, (*SHAPE, 3), dtype=np.uint8)).save(path, **options)
    return path


def mask(path: Path, value: int = 255, rows: slice = slice(4, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(SHAPE, np.uint8)
    pixels[rows] = value
    Image.fromarray(pixels).save(path)
    return path


def part(root: Path, masks: str | None = "ground_truth/dent/{}_mask.png", good: str = "good", value: int = 255) -> Path:
    """A class with two normal and two anomalous images; `masks` is the path of a mask, with {} for the image's name."""
    for name in ("a", "b"):
        photo(root / f"test/{good}/{name}.png")
        photo(root / f"test/dent/{name}.png")
        if masks is not None:
            mask(root / masks.format(name), value)
    return root


def records_of(root: Path) -> list[Record]:
    return load_records(locate_dataset(str(root)))


@pytest.mark.parametrize("name", [*NORMAL.split(), " good ", "0 Good"])
def test_folder_names_of_normal_images(tmp_path: Path, name: str) -> None:
    assert is_normal_name(name) and not is_anomalous_name(name)
    assert {record.label for record in records_of(part(tmp_path / "part", good=name))} == {0, 1}


@pytest.mark.parametrize("name", OTHERS.split())
def test_folder_names_of_other_images(name: str) -> None:
    assert not is_normal_name(name)


def test_a_class_without_normal_folder_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert all(record.label for record in records_of(part(tmp_path / "part", None, good="fine")))
    assert "none of the folders dent, fine" in caplog.text


@pytest.mark.parametrize(
    "masks",
    [
        *(
            f"ground_truth/dent/{{}}{end}.png"
            for end in ("_mask", "-mask", "_Mask", "_gt", "_label", "_seg", "", ".png")
        ),
        "ground_truth/dent/{}_segmentation.bmp",
        "ground_truth/dent/mask_{}.gif",
        "ground_truth/{}_mask.png",
        "Ground Truth/Dent/{}.png",
        "masks/dent/{}_mask.png",
        "mask/{}.png",
        "defect_masks/{}.png",
        "labels/dent/{}.png",
        "ground_truth/dent/{}/000.png",
        "ground_truth/{}/000.png",
        "test/ground_truth/dent/{}_mask.png",
        "test/dent/{}_mask.png",
        "test/dent/gt/{}.png",
        "test/dent_truth/{}.png",
    ],
)
def test_masks_are_found(tmp_path: Path, masks: str, caplog: pytest.LogCaptureFixture) -> None:
    records = records_of(part(tmp_path / "part", masks))
    assert [(Path(record.image_path).name, record.label) for record in records] == [
        ("a.png", 1),
        ("b.png", 1),
        ("a.png", 0),
        ("b.png", 0),
    ]
    for record, name in zip(records[:2], ("a", "b"), strict=True):
        assert record.mask_path is not None
        assert (tmp_path / "part" / record.mask_path) in (path := tmp_path / "part" / masks.format(name), path.parent)
        assert np.asarray(read_pair(tmp_path / "part", record)[1]).any()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("images", "masks", "expected"),
    [
        ("a.png", "a.png a_mask.png", {"a.png": "a_mask.png"}),
        ("a.jpg a_seg.jpg", "a.png a_seg.png", {"a.jpg": "a.png", "a_seg.jpg": "a_seg.png"}),
        ("a.png A.png", "a_mask.png A_mask.png", {"a.png": "a_mask.png", "A.png": "A_mask.png"}),
        ("IMG_1.JPG", "img_1_mask.png", {"IMG_1.JPG": "img_1_mask.png"}),
        (f"{NFD}.png", f"{NFC}_mask.png", {f"{NFD}.png": f"{NFC}_mask.png"}),
        ("1.5.png 1.png", "1.5_mask.png", {"1.5.png": "1.5_mask.png"}),
        ("1.png", "11_mask.png mask.png 1_other.png", {}),
    ],
)
def test_pairs_of_images_and_masks(images: str, masks: str, expected: dict[str, str]) -> None:
    pairs = pair_masks(map(Path, images.split()), map(Path, masks.split()))
    assert {image.name: mask.name for image, mask in pairs.items()} == expected


def test_several_masks_of_an_image_are_combined_each_by_its_maximum(tmp_path: Path) -> None:
    mask(tmp_path / "0.png", 254, slice(0, 2))
    mask(tmp_path / "1.png", 90, slice(8, 9))
    assert (np.asarray(read_mask(tmp_path)) > 0).any(axis=1).nonzero()[0].tolist() == [0, 1, 8]
    photo(tmp_path / "2.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"2\.png cannot be read"):
        read_mask(tmp_path)


@pytest.mark.parametrize(
    ("masks", "value", "expected"),
    [
        ("ground_truth/dent/{}_xy.png", 255, "such as a_xy.png, b_xy.png: expected a_mask.png or a.png"),
        ("ground_truth/{}_xy.png", 255, "such as a_xy.png, b_xy.png: expected a_mask.png or a.png"),
        ("ground_truth/dent/{}_mask.png", 0, "2 of 2 masks have no anomalous pixel"),
    ],
)
def test_unusable_masks_are_reported_and_count_as_missing(
    tmp_path: Path, masks: str, value: int, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    part(tmp_path / "part", masks, value=value)
    assert all(record.mask_path is None for record in records_of(tmp_path / "part"))
    assert expected in caplog.text


@pytest.mark.parametrize("extension", sorted({".jfif", ".pgm", ".ppm", ".gif", ".jpe", ".tga", ".dib", ".jp2", ".bmp"}))
def test_every_format_that_pillow_reads_is_an_image(tmp_path: Path, extension: str) -> None:
    assert extension in image_extensions() and ".eps" not in image_extensions()
    image_format = Image.registered_extensions()[extension]
    photo(part(tmp_path / "part") / f"test/good/c{extension}", format=image_format)
    assert len(records_of(tmp_path / "part")) == 5
    assert len(find_images(tmp_path / "part", "--image").images) == 5


def skip(root: Path) -> None:
    """Files of all kinds that are not used."""
    (root / "test/good/a.json").write_text("{}")
    (root / "test/dent/x.HEIC").write_text("")
    photo(root / "test/dent/xyz/a.tiff")
    mask(root / "ground_truth/dent/c_mask.png")
    for name in ("c.png", "d.png"):
        (root / "test/good" / name).symlink_to("nowhere")


def test_skipped_files_are_counted_with_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    skip(part(tmp_path / "part"))
    assert len(records_of(tmp_path / "part")) == 4
    reasons = (
        "1 .json",
        "1 .heic (pip install pillow-heif)",
        "2 dangling links",
        "1 in the folder test/dent/xyz, which is not read",
        "1 masks without an anomalous image",
    )
    assert all(reason in caplog.text for reason in reasons)
    caplog.clear()
    (tmp_path / "part/heatmaps").mkdir()
    photo(tmp_path / "part/heatmaps/a_heatmap.png")
    assert len(find_images(tmp_path / "part", "--image").images) == 5
    more = ("3 in the mask folder ground_truth", "1 in the output folder heatmaps")
    assert all(reason in caplog.text for reason in (*reasons[:3], *more))


def test_images_that_are_not_masks_stay_images(tmp_path: Path) -> None:
    """A folder called "label", images called "_label", and drawings in black and white."""
    for name in ("label/a.png", "no_mask/a.png", "good/a.png", "good/a_label.png", "dent/a.png"):
        photo(tmp_path / "part/test" / name)
    assert len(records_of(tmp_path / "part")) == len(find_images(tmp_path, "--image").images) == 5
    mask(tmp_path / "p_mask/ground_truth/dent/a.png")
    photo(tmp_path / "p_mask/test/dent/a.png")
    assert len(find_images(tmp_path, "--image").images) == 6
    for kind in ("line", "circle"):
        mask(tmp_path / f"drawing/test/{kind}/a.png")
    mask(tmp_path / "drawing/test/good/a.png")
    assert len(records_of(tmp_path / "drawing")) == 3


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("test_public/{}/a_regular.png", "test_public/ground_truth/bad/a_regular_mask.png"),  # MVTec AD 2
        ("test/{}/rgb/a.png", "test/bad/gt/a.png"),  # MVTec 3D-AD
    ],
)
def test_layouts_of_other_datasets(tmp_path: Path, images: str, masks: str) -> None:
    for kind in ("good", "bad"):
        photo(tmp_path / "can" / images.format(kind))
    mask(tmp_path / "can" / masks)
    assert records_of(tmp_path / "can") == [
        Record(images.format("bad"), 1, "can", masks),
        Record(images.format("good"), 0, "can"),
    ]


def test_lists_name_files_in_either_unicode_form(tmp_path: Path) -> None:
    photo(tmp_path / "part" / NFD / f"{NFD}.png")
    file = tmp_path / "list.jsonl"
    file.write_text(f'{{"image_path": "{NFC}/{NFC}.png", "label": 0, "class_name": "a"}}', encoding="utf-8")
    (record,) = load_records(locate_dataset(str(tmp_path / "part")), file)
    assert (tmp_path / "part" / record.image_path).is_file()


def test_the_documented_names_are_accepted() -> None:
    page = (Path(__file__).parents[1] / "docs/datasets.md").read_text(encoding="utf-8")
    names = {
        row: re.findall("`([^`]+)`", text) for row, text in re.findall(r"^\| ([^|]+) \| (.*) \|$", page, re.MULTILINE)
    }
    assert len(names["normal images"]) >= 8 and all(map(is_normal_name, names["normal images"]))
    assert len(names["name of a mask"]) == 6
    assert {mask_key(Path(f"a{suffix}.png")) for suffix in names["name of a mask"]} == {"a"}
    ground_truth = [is_ground_truth_name(name) or may_be_mask_name(name) for name in names["mask folders"][1:7]]
    assert ground_truth == [True] * 6
