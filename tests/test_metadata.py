"""Metadata of every layout, from small trees drawn for the tests, and its file."""

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset.catalog import CATALOG
from dataset.class_names import class_display_names
from dataset.few_shot import few_shot
from dataset.images import read_pair
from dataset.locate import LocatedDataset, locate_dataset
from dataset.metadata import build_metadata, list_file, load_records
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
    """Two classes, in another order than in the catalog, with other files."""
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
    records = load_records(located("MVTec", mvtec))
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


def table(root: Path) -> Path:
    return root / "split_csv" / "1cls.csv"


def test_visa(visa, caplog):
    assert load_records(located("VisA", visa)) == [
        Record("candle/Data/Images/Anomaly/000.JPG", 1, "candle", "candle/Data/Masks/Anomaly/000.png"),
        Record("candle/Data/Images/Normal/0002.JPG", 0, "candle"),
        Record("candle/Data/Images/Normal/0010.JPG", 0, "candle"),
        Record("pcb1/Data/Images/Anomaly/000.JPG", 1, "pcb1", "pcb1/Data/Masks/Anomaly/000.png"),
    ]
    assert "cashew" in caplog.text and "pcb1" not in caplog.text


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda root: table(root).unlink(), ["1cls.csv"]),
        (lambda root: table(root).write_text("object,split\n"), ["label, image, mask"]),
        (lambda root: table(root).write_text(VISA_ROWS.replace("anomaly", "odd")), [":2", "'odd'"]),
        (
            lambda root: table(root).write_text("object,split,label,image,mask\ncandle,test,normal\n"),
            [":2", "image must be the path"],
        ),
        (
            lambda root: table(root).write_text(VISA_ROWS.replace("candle/Data", "../candle/Data")),
            [":4", "image must be the path"],
        ),
        (lambda root: (root / "candle/Data/Images/Normal/0002.JPG").unlink(), [":5", "0002.JPG"]),
        (lambda root: (root / "pcb1/Data/Masks/Anomaly/000.png").unlink(), [":2", "Masks/Anomaly/000.png"]),
        *(
            (lambda root, content=content: table(root).write_bytes(content), ["1cls.csv", "--metadata"])
            for content in (b"object,split\xff", b"\x00" * 100, b'object\n"' + b"x" * 200_000)
        ),
    ],
)
def test_incomplete_visa(visa, damage, expected):
    damage(visa)
    with pytest.raises(UserError) as error:
        build_metadata(located("VisA", visa))
    assert all(part in Path(str(error.value)).as_posix() for part in expected)


def test_btad_with_different_extensions(tmp_path):
    root = draw(
        tmp_path,
        "01/test/ok/0000.bmp",
        "01/test/ko/0000.bmp",
        "01/ground_truth/ko/0000.png",
        "03/test/ko/0002.bmp",
        "03/ground_truth/ko/0002.bmp",
    )
    assert build_metadata(located("BTAD", root)) == [
        Record("01/test/ko/0000.bmp", 1, "01", "01/ground_truth/ko/0000.png"),
        Record("01/test/ok/0000.bmp", 0, "01"),
        Record("03/test/ko/0002.bmp", 1, "03", "03/ground_truth/ko/0002.bmp"),
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
        ("BTAD", ["01/test/ko/5.bmp"], "01/ground_truth/ko/5_mask.png or 5.png"),
        ("Brain", ["test/Ungood/img/2.png"], "test/Ungood/label/2.png"),
        ("Colon_Kvasir", ["images/2.png"], "masks/2.png"),
    ],
)
def test_a_missing_mask_is_reported_with_its_path(tmp_path, name, images, expected):
    with pytest.raises(UserError) as error:
        build_metadata(located(name, draw(tmp_path, *images)))
    assert (tmp_path / images[0]).as_posix() in Path(str(error.value)).as_posix()
    assert expected in Path(str(error.value)).as_posix()


@pytest.mark.parametrize("name", CATALOG)
def test_a_folder_without_images_is_an_error_with_the_layout(tmp_path, name):
    with pytest.raises(UserError, match=r"expected|1cls\.csv") as error:
        build_metadata(located(name, tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_natural_order():
    paths = ["a/10.png", "a/9.png", "a b/1.png", "a/x2y10.png", "a/x2y9.png", "a/010.png", "²/1.png"]
    in_order = sorted(paths, key=natural_key)
    assert in_order == ["a/9.png", "a/010.png", "a/10.png", "a/x2y9.png", "a/x2y10.png", "a b/1.png", "²/1.png"]


def test_list_is_saved_once(mvtec):
    dataset = located("MVTec", mvtec)
    built = load_records(dataset)
    assert built == build_metadata(dataset)
    lines = (list_file(located("MVTec", mvtec))).read_bytes().decode("utf-8").split("\n")
    assert lines[-1] == "" and len(lines) == len(built) + 2
    assert json.loads(lines[5]) == {"image_path": "bottle/test/good/1.png", "label": 0, "class_name": "bottle"}
    assert [path.name for path in mvtec.glob("*metadata*")] == ["metadata_test_MVTec.jsonl"]
    before = list_file(dataset).stat()
    assert load_records(dataset) == built and list_file(dataset).stat() == before


def test_non_ascii_names_are_preserved(tmp_path):
    root = draw(tmp_path / "Gehäuse", "Schräube/test/good/über.png", "Schräube/test/good/a\u2028b.png")
    dataset = locate_dataset(str(root))
    assert load_records(dataset) == load_records(dataset)
    assert {record.class_name for record in load_records(dataset)} == {"Schräube"}


def test_no_list_is_saved_in_an_unwritable_folder(mvtec, monkeypatch, caplog):
    caplog.set_level(logging.INFO)

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr("dataset.metadata.write_text", refuse)
    assert len(load_records(located("MVTec", mvtec))) == 10
    assert not (list_file(located("MVTec", mvtec))).exists()
    assert "cannot be saved" in caplog.text


def test_added_and_removed_images_are_reported_and_listed(mvtec, caplog):
    load_records(located("MVTec", mvtec))
    draw(mvtec, "zipper/test/good/0.png")
    shutil.rmtree(mvtec / "wood")
    caplog.clear()
    records = load_records(located("MVTec", mvtec))
    assert {record.class_name for record in records} == {"bottle", "zipper"}
    assert "1 added and 3 removed" in caplog.text and "such as zipper/test/good/0.png" in caplog.text
    # Missing classes are named each time.
    caplog.clear()
    assert load_records(located("MVTec", mvtec)) == records
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "no images of" in warning and "wood" in warning


def test_own_folders_are_listed_again_and_no_list_is_saved(tmp_path):
    root = draw(tmp_path / "parts", "bolt/test/good/1.png")
    assert len(load_records(locate_dataset(str(root)))) == 1
    draw(root, "bolt/test/good/2.png")
    assert len(load_records(locate_dataset(str(root)))) == 2 and [path.name for path in root.iterdir()] == ["bolt"]


def test_a_saved_list_of_another_dataset_is_replaced(mvtec, caplog):
    dataset = located("MVTec", mvtec)
    built = load_records(dataset)
    saved = list_file(dataset).read_bytes()
    header, rows = saved.split(b"\n", 1)
    for key in ("dataset", "layout"):
        list_file(dataset).write_bytes(json.dumps({**json.loads(header), key: "visa"}).encode() + b"\n" + rows)
        assert load_records(dataset) == built and list_file(dataset).read_bytes() == saved
    for content, message in ((rows, "is not replaced: pass it with --metadata"), (b"{", "delete that file")):
        list_file(dataset).write_bytes(content)
        assert load_records(dataset) == built and message in caplog.text
        assert list_file(dataset).read_bytes() == content


def test_a_list_given_for_another_dataset_is_refused(mvtec):
    dataset = located("MVTec", mvtec)
    built = load_records(dataset)
    assert load_records(dataset, list_file(dataset)) == built
    with pytest.raises(UserError, match=r"lists images of 'MVTec', not of VisA"):
        load_records(located("VisA", mvtec), list_file(dataset))


def test_unrelated_files_are_ignored(mvtec):
    before = build_metadata(located("MVTec", mvtec))
    draw(
        mvtec,
        "bottle/test/.ipynb_checkpoints/1-checkpoint.png",
        "bottle/test/@eaDir/1.png",
        "bottle/test/good/@eaDir/1.png",
        "bottle/test/__MACOSX/1.png",
        "wood/ground_truth/hole/.ipynb_checkpoints/000_mask-checkpoint.png",
    )
    (mvtec / "bottle" / "test" / "good" / "folder.png").mkdir()
    assert build_metadata(located("MVTec", mvtec)) == before


@pytest.mark.parametrize("name", ["Ground_Truth", "GROUND_TRUTH", "ground truth"])
def test_ground_truth_in_any_letter_case(mvtec, name):
    (mvtec / "wood" / "ground_truth").rename(mvtec / "wood" / name)
    (record,) = (r for r in build_metadata(located("MVTec", mvtec)) if r.label and r.class_name == "wood")
    assert record.mask_path.lower() == f"wood/{name.lower()}/hole/000_mask.png"


@pytest.mark.skipif(os.name == "nt", reason="names that Windows does not have")
@pytest.mark.parametrize("name", [b"caf\xe9.png", b" blank.png", b"back\\slash.png", b"two\nlines.png"])
def test_unusual_file_names_are_preserved_in_the_saved_list(tmp_path, name):
    root = draw(tmp_path / "parts", f"bolt/test/good/{os.fsdecode(name)}")
    dataset = locate_dataset(str(root))
    first = load_records(dataset)
    assert load_records(dataset) == first == [Record(f"bolt/test/good/{os.fsdecode(name)}", 0, "bolt")]


@pytest.mark.parametrize("key", ["image_path", "mask_path"])
@pytest.mark.parametrize(
    "path", ["../x.png", "a/../../x.png", "/etc/x.png", "..\\x.png", "a/..", ".", "a\0b.png", "\ud800.png", "D:\\x.png"]
)
def test_paths_that_leave_the_folder_are_refused(tmp_path, key, path):
    row = {"image_path": "x.png", "label": 1, "class_name": "a", "mask_path": "m.png", key: path}
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps(row))
    says = "is an absolute Windows path" if path[0] == "D" else "must be the path of a file below the dataset's folder"
    with pytest.raises(UserError, match=f":1: {key} {says}"):
        load_records(located("VisA", tmp_path), file)


def test_symbolic_links_inside_the_folder_work(tmp_path):
    outside = draw(tmp_path / "elsewhere", "good/1.png", "spot/2.png")
    root = draw(tmp_path / "parts", "bolt/ground_truth/spot/2.png")
    (root / "bolt" / "test").symlink_to(outside, target_is_directory=True)
    records = load_records(locate_dataset(str(root)))
    assert [record.image_path for record in records] == ["bolt/test/good/1.png", "bolt/test/spot/2.png"]
    assert all(read_pair(root, record)[0].size == (4, 4) for record in records)


def test_external_lists(tmp_path):
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
    ("content", "expected"),
    [
        (None, "own.jsonl"),
        (b"\n\n", "no image"),
        (b"\xff\xfe{}", "UTF-8"),
        (b"\n[1]", ":2: "),
        (b'{"image_path": ', ":1: not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"label": 0, "class_name": "a"}', ":1: image_path"),
        (b'{"image_path": "x.png", "class_name": "a", "label": NaN}', ":1: label"),
        (b'{"image_path": "x.png", "class_name": "a", "label": 1, "mask_path": " "}', ":1: mask_path"),
        (b'{"image_path": "x.png", "class_name": "' + b"a" * 201 + b'", "label": 0}', "the limit is 200"),
        (b'{"schema": 2}', ":1: schema must be 1, not 2"),
        (b'{"schema": 1, "dataset": "VisA", "layout": "visa"}', ":1: classes"),
    ],
)
def test_a_bad_list_is_an_error(tmp_path, content, expected):
    file = tmp_path / "own.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_records(located("VisA", tmp_path), file)
    assert str(file) in str(error.value) and expected in str(error.value) and "\n" not in str(error.value)


def test_the_digest_depends_on_the_records(mvtec, tmp_path):
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


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
SOUND_ROWS = [
    {"schema": 1, "dataset": "VisA", "layout": "visa", "classes": ["pcb1"]},
    {"image_path": "pcb1/a.png", "label": 1, "class_name": "pcb1", "mask_path": "pcb1/m.png"},
    {"image_path": "pcb1/b.png", "label": 0, "class_name": "pcb1"},
]


@st.composite
def damaged_lists(draw):
    """A valid list in which a value is replaced, or a key or some bytes are missing."""
    rows = [dict(row) for row in SOUND_ROWS]
    row = draw(st.sampled_from(rows))
    key = draw(st.sampled_from(sorted(row)))
    kind = draw(st.sampled_from(["value", "missing", "whole", "bytes"]))
    if kind == "value":
        row[key] = draw(JSON_VALUES)
    elif kind == "missing":
        del row[key]
    elif kind == "whole":
        rows[rows.index(row)] = draw(JSON_VALUES)
    content = "\n".join(map(json.dumps, rows)).encode("ascii")
    if kind == "bytes":
        start, length = draw(st.integers(0, len(content))), draw(st.integers(0, 30))
        content = content[:start] + draw(st.binary(max_size=20)) + content[start + length :]
    return content


@settings(deadline=None, max_examples=300)
@given(damaged_lists())
def test_a_damaged_list_is_an_error_or_harmless(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    file = folder / "damaged.jsonl"
    file.write_bytes(content)
    try:
        records = load_records(located("VisA", folder), file)
    except UserError as error:
        message = str(error)
        assert str(file) in message and len(message.splitlines()) == 1 and len(message) < 600
        return
    assert records and len(metadata_digest(records)) == 64
    for record in records:
        assert record.label in (0, 1) and (record.mask_path is not None) == bool(record.label)
        assert folder in Path(os.path.normpath(folder / record.image_path)).parents
    few_shot(records, 1, 0)
    class_display_names(CATALOG["VisA"], None, [record.class_name for record in records])
