"""Metadata of every layout, from small trees drawn for the tests, and its file."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dataset.catalog import CATALOG, DatasetSpec
from dataset.locate import LocatedDataset, locate_dataset
from dataset.metadata import build_metadata, kept_file, load_records
from dataset.records import Record, metadata_digest, natural_key
from utils.errors import UserError


def draw(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        image_format = "PNG" if (root / path).suffix.lower() == ".png" else None
        Image.new("L", (4, 4)).save(root / path, format=image_format)
    return root


def located(name: str, root: Path) -> LocatedDataset:
    return LocatedDataset(CATALOG[name], root)


@pytest.fixture
def mvtec(tmp_path):
    """Two of the classes, written in another order than the catalog's, with files that are no images."""
    root = draw(
        tmp_path / "mvtec",
        *(f"wood/test/good/{i:03}.png" for i in range(2)),
        "wood/test/hole/000.png",
        "wood/ground_truth/hole/000_mask.png",
        *(f"bottle/test/good/{i}.png" for i in (10, 9, 1)),
        *(f"bottle/test/{kind}/{name}" for kind in ("broken_large", "contamination") for name in ("2.PNG", "10.jpeg")),
        *(f"bottle/ground_truth/{k}/{i}_mask.png" for k in ("broken_large", "contamination") for i in (2, 10)),
        "bottle/train/good/000.png",
        "bottle/test/good/._1.png",
    )
    (root / "readme.txt").write_text("not an image")
    (root / "bottle" / "test" / "good" / "Thumbs.db").write_text("not an image")
    return root


def test_mvtec(mvtec, caplog):
    records = build_metadata(located("MVTec", mvtec))
    assert [(r.image_path, r.label, r.mask_path) for r in records if r.class_name == "bottle"] == [
        ("bottle/test/broken_large/2.PNG", 1, "bottle/ground_truth/broken_large/2_mask.png"),
        ("bottle/test/broken_large/10.jpeg", 1, "bottle/ground_truth/broken_large/10_mask.png"),
        ("bottle/test/contamination/2.PNG", 1, "bottle/ground_truth/contamination/2_mask.png"),
        ("bottle/test/contamination/10.jpeg", 1, "bottle/ground_truth/contamination/10_mask.png"),
        ("bottle/test/good/1.png", 0, None),
        ("bottle/test/good/9.png", 0, None),
        ("bottle/test/good/10.png", 0, None),
    ]
    assert [r.class_name for r in records] == ["bottle"] * 7 + ["wood"] * 3
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "zipper" in warning and "cable" in warning and "bottle" not in warning


def test_own_folders_with_masks_named_like_the_images(tmp_path, caplog):
    root = draw(
        tmp_path / "parts",
        "screw/test/Good/a.bmp",
        "screw/test/bent/b.webp",
        "screw/ground_truth/bent/b.tif",
        "bolt/test/good/1.png",
    )
    records = build_metadata(locate_dataset(str(root)))
    assert records == [
        Record("bolt/test/good/1.png", 0, "bolt"),
        Record("screw/test/Good/a.bmp", 0, "screw"),
        Record("screw/test/bent/b.webp", 1, "screw", "screw/ground_truth/bent/b.tif"),
    ]
    single = build_metadata(locate_dataset(str(root / "screw")))
    assert single == [
        Record("test/Good/a.bmp", 0, "screw"),
        Record("test/bent/b.webp", 1, "screw", "ground_truth/bent/b.tif"),
    ]
    assert not caplog.records


def test_classes_keep_the_order_of_the_catalog(tmp_path):
    names = ("tile", "carpet", "bolt")
    root = draw(tmp_path, *(f"{name}/test/good/0.png" for name in names))
    spec = DatasetSpec("own", "industrial", ("mvtec",), "own", {name: name for name in names})
    assert [record.class_name for record in build_metadata(LocatedDataset(spec, root))] == list(names)


VISA_ROWS = """object,split,label,image,mask
pcb1,test,anomaly,pcb1/Data/Images/Anomaly/000.JPG,pcb1/Data/Masks/Anomaly/000.png
candle,train,normal,candle/Data/Images/Normal/0000.JPG,
candle,test,normal,candle/Data/Images/Normal/0010.JPG,
candle,test,normal,candle\\Data\\Images\\Normal\\0002.JPG,
candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,candle/Data/Masks/Anomaly/000.png
cashew,test,normal,cashew/Data/Images/Normal/0000.JPG,
"""


@pytest.fixture
def visa(tmp_path):
    root = draw(
        tmp_path / "VisA",
        "candle/Data/Images/Normal/0000.JPG",
        "candle/Data/Images/Normal/0002.JPG",
        "candle/Data/Images/Normal/0010.JPG",
        "candle/Data/Images/Anomaly/000.JPG",
        "candle/Data/Masks/Anomaly/000.png",
        "pcb1/Data/Images/Anomaly/000.JPG",
        "pcb1/Data/Masks/Anomaly/000.png",
    )
    (root / "split_csv").mkdir()
    (root / "split_csv" / "1cls.csv").write_text(VISA_ROWS, encoding="utf-8")
    return root


def test_visa(visa, caplog):
    assert build_metadata(located("VisA", visa)) == [
        Record("candle/Data/Images/Anomaly/000.JPG", 1, "candle", "candle/Data/Masks/Anomaly/000.png"),
        Record("candle/Data/Images/Normal/0002.JPG", 0, "candle"),
        Record("candle/Data/Images/Normal/0010.JPG", 0, "candle"),
        Record("pcb1/Data/Images/Anomaly/000.JPG", 1, "pcb1", "pcb1/Data/Masks/Anomaly/000.png"),
    ]
    assert "cashew" in caplog.text and "pcb1" not in caplog.text


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda root: (root / "split_csv" / "1cls.csv").unlink(), ["1cls.csv"]),
        (lambda root: (root / "split_csv" / "1cls.csv").write_text("object,split\n"), ["image, label, mask"]),
        (
            lambda root: (root / "split_csv" / "1cls.csv").write_text(VISA_ROWS.replace("anomaly", "odd")),
            [":2", "'odd'"],
        ),
        (lambda root: (root / "candle/Data/Images/Normal/0002.JPG").unlink(), [":5", "0002.JPG"]),
        (lambda root: (root / "pcb1/Data/Masks/Anomaly/000.png").unlink(), [":2", "Masks/Anomaly/000.png"]),
    ],
)
def test_visa_that_is_incomplete(visa, damage, expected):
    damage(visa)
    with pytest.raises(UserError) as error:
        build_metadata(located("VisA", visa))
    assert all(part in Path(str(error.value)).as_posix() for part in expected)


def test_btad_whose_endings_differ(tmp_path):
    root = draw(
        tmp_path,
        "01/test/ok/0000.bmp",
        "01/test/ko/0000.bmp",
        "01/ground_truth/ko/0000.png",
        "02/test/ko/0001.png",
        "02/ground_truth/ko/0001.png",
        "03/test/ok/0000.bmp",
        "03/test/ko/0002.bmp",
        "03/ground_truth/ko/0002.bmp",
    )
    assert build_metadata(located("BTAD", root)) == [
        Record("01/test/ko/0000.bmp", 1, "01", "01/ground_truth/ko/0000.png"),
        Record("01/test/ok/0000.bmp", 0, "01"),
        Record("02/test/ko/0001.png", 1, "02", "02/ground_truth/ko/0001.png"),
        Record("03/test/ko/0002.bmp", 1, "03", "03/ground_truth/ko/0002.bmp"),
        Record("03/test/ok/0000.bmp", 0, "03"),
    ]


@pytest.mark.parametrize("ungood", ["Ungood", "ungood"])
def test_medical(tmp_path, ungood):
    root = draw(tmp_path, "test/good/img/1.png", f"test/{ungood}/img/2.png", f"test/{ungood}/label/2.png")
    normal, anomalous = sorted(build_metadata(located("Retina", root)), key=lambda record: record.label)
    assert normal == Record("test/good/img/1.png", 0, "Retina")
    assert anomalous.image_path.lower() == "test/ungood/img/2.png"
    assert anomalous.mask_path.lower() == "test/ungood/label/2.png"
    assert (anomalous.label, anomalous.class_name) == (1, "Retina")


def test_colon(tmp_path):
    root = draw(tmp_path, "images/10.png", "images/9.jpg", "masks/10.png", "masks/9.png")
    assert build_metadata(located("Colon_cvc300", root)) == [
        Record("images/9.jpg", 1, "Colon_cvc300", "masks/9.png"),
        Record("images/10.png", 1, "Colon_cvc300", "masks/10.png"),
    ]


@pytest.mark.parametrize(
    ("name", "images", "expected"),
    [
        ("MVTec", ["bottle/test/hole/000.png", "bottle/ground_truth/hole/1_mask.png"], "hole/000_mask.png"),
        ("BTAD", ["01/test/ko/5.bmp"], "01/ground_truth/ko/5.png"),
        ("Brain", ["test/Ungood/img/2.png"], "test/Ungood/label/2.png"),
        ("Colon_Kvasir", ["images/2.png"], "masks/2.png"),
    ],
)
def test_missing_mask_names_the_path_expected(tmp_path, name, images, expected):
    with pytest.raises(UserError) as error:
        build_metadata(located(name, draw(tmp_path, *images)))
    assert (tmp_path / images[0]).as_posix() in Path(str(error.value)).as_posix()
    assert Path(str(error.value)).as_posix().endswith(expected)


@pytest.mark.parametrize("name", CATALOG)
def test_folder_without_images_names_the_layout(tmp_path, name):
    with pytest.raises(UserError, match=r"expected|1cls\.csv") as error:
        build_metadata(located(name, tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_natural_order():
    paths = ["a/10.png", "a/9.png", "a b/1.png", "a/x2y10.png", "a/x2y9.png", "a/010.png", "²/1.png"]
    in_order = sorted(paths, key=natural_key)
    assert in_order == ["a/9.png", "a/010.png", "a/10.png", "a/x2y9.png", "a/x2y10.png", "a b/1.png", "²/1.png"]


def test_metadata_is_built_once_and_read_back(mvtec, monkeypatch):
    dataset = located("MVTec", mvtec)
    built = load_records(dataset)
    assert built == build_metadata(dataset)
    lines = (kept_file(located("MVTec", mvtec))).read_bytes().decode("utf-8").split("\n")
    assert lines[-1] == "" and len(lines) == len(built) + 1
    assert json.loads(lines[4]) == {"image_path": "bottle/test/good/1.png", "label": 0, "class_name": "bottle"}
    assert [path.name for path in mvtec.glob("*metadata*")] == [METADATA_FILE]
    monkeypatch.setattr("dataset.metadata.build_metadata", None)
    assert load_records(dataset) == built


def test_names_beyond_ascii_come_back(tmp_path):
    root = draw(tmp_path / "Gehäuse", "Schräube/test/good/über.png", "Schräube/test/good/a\u2028b.png")
    dataset = locate_dataset(str(root))
    assert load_records(dataset) == load_records(dataset)
    assert {record.class_name for record in load_records(dataset)} == {"Schräube"}


def test_folder_that_cannot_be_written_keeps_nothing(mvtec, monkeypatch, caplog):
    caplog.set_level(logging.INFO)

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr("dataset.metadata.write_text", refuse)
    assert len(load_records(located("MVTec", mvtec))) == 10
    assert not (kept_file(located("MVTec", mvtec))).exists()
    assert "cannot be written" in caplog.text


def test_kept_file_that_is_stale(mvtec):
    load_records(located("MVTec", mvtec))
    (mvtec / "wood/test/hole/000.png").unlink()
    with pytest.raises(UserError) as error:
        load_records(located("MVTec", mvtec))
    assert str(kept_file(located("MVTec", mvtec))) in str(error.value) and "delete" in str(error.value)


def test_file_made_elsewhere(tmp_path):
    file = tmp_path / "visa.jsonl"
    file.write_text(
        "\n".join(
            [
                '\ufeff{"label": 1.0, "mask_path": "a\\\\m.png", "class_name": "a", "image_path": "a\\\\b\\\\x.png"}',
                '{"image_path": "./a/y.png", "class_name": "a", "label": "0", "cls": "more", "mask_path": ""}',
                "",
                '{"image_path": "a/z.png", "class_name": "01", "label": false, "mask_path": null}',
                '{"image_path": "a/u\u2028.png", "class_name": "a", "label": true, "mask_path": "m.png"}\r',
                '{"image_path": "a/v.png", "class_name": "a", "label": 0.0, "mask_path": "a/of_a_normal_image.png"}',
                '{"image_path": "a/w.png", "class_name": "a", "label": "1", "mask_path": "m.png"}',
            ]
        ),
        encoding="utf-8",
    )
    assert load_records(located("VisA", tmp_path), file) == [
        Record("a/b/x.png", 1, "a", "a/m.png"),
        Record("a/y.png", 0, "a"),
        Record("a/z.png", 0, "01"),
        Record("a/u\u2028.png", 1, "a", "m.png"),
        Record("a/v.png", 0, "a"),
        Record("a/w.png", 1, "a", "m.png"),
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"image_path": ', "no valid JSON"),
        ("[1]", "JSON object"),
        ('{"label": 0, "class_name": "a"}', "image_path"),
        ('{"image_path": "x.png", "label": 0, "class_name": 1}', "class_name"),
        ('{"image_path": "x.png", "class_name": "a"}', "label"),
        ('{"image_path": "x.png", "class_name": "a", "label": 2, "mask_path": "m.png"}', "label"),
        ('{"image_path": "x.png", "class_name": "a", "label": 0.5, "mask_path": "m.png"}', "label"),
        ('{"image_path": "x.png", "class_name": "a", "label": [1], "mask_path": "m.png"}', "label"),
        ('{"image_path": "x.png", "class_name": "a", "label": 1}', "mask_path"),
        ('{"image_path": "x.png", "class_name": "a", "label": 1, "mask_path": " "}', "mask_path"),
    ],
)
def test_bad_line_is_named(tmp_path, line, expected):
    file = tmp_path / "own.jsonl"
    file.write_text('{"image_path": "x.png", "label": 0, "class_name": "a"}\n' + line + "\n")
    with pytest.raises(UserError) as error:
        load_records(located("VisA", tmp_path), file)
    assert f"{file}:2: " in str(error.value) and expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"\xff\xfe{}"])
def test_bad_file_is_named(tmp_path, content):
    file = tmp_path / "own.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_records(located("VisA", tmp_path), file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_digest_is_of_the_records(mvtec, tmp_path):
    records = build_metadata(located("MVTec", mvtec))
    digest = metadata_digest(records)
    rows = ({"mask_path": r.mask_path, "label": float(r.label), **vars(r)} for r in records)
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert metadata_digest(load_records(located("MVTec", mvtec), tmp_path / "other.jsonl")) == digest
    assert len(digest) == 64
    others = [
        *([replace(records[0], **{key: value}), *records[1:]] for key, value in vars(Record("x", 0, "x", "x")).items()),
        records[::-1],
        records[1:],
    ]
    assert len({digest, *map(metadata_digest, others)}) == 7
