"""`python -m dataset.convert`: each source becomes a dataset that is read, and nothing is overwritten."""

import json
import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataset.convert.arguments import ConversionArguments, build_parser
from dataset.convert.files import convert
from dataset.images import read_mask, read_pair
from dataset.locate import locate_dataset
from dataset.metadata import build_metadata
from dataset.records import Record
from utils.errors import UserError

SIZE = (12, 8)


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def draw(root: Path, files: dict[str, Any]) -> Path:
    """Photographs (None), masks (a value) or text for names with blanks between."""
    for number, (name, content) in enumerate((name, files[names]) for names in files for name in names.split()):
        pixels: Any = np.random.default_rng(number).integers(60, 200, (8, 12, 3), dtype=np.uint8)
        text(root / name, str(content))
        if isinstance(content, int):
            pixels = np.zeros((8, 12), np.uint8)
            pixels[3:5, 2:6] = content
        if not isinstance(content, str):
            Image.fromarray(pixels).save(root / name)
    return root


def converted(source: Path, target: Path, **more: Any) -> list[Record]:
    """The records of a converted dataset."""
    convert(ConversionArguments(source=source, target=target, **more))
    records = build_metadata(locate_dataset(str(target)))
    for record in records:
        read_pair(target, record)
    return records


def lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    return text(file, "\n".join(map(json.dumps, rows)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of two classes, two of them of one name."""
    images = "raw/a/1.png raw/a/2.jpg raw/b/1.png raw/b/3.png a/test/dent/1.png"
    return draw(tmp_path, {images: None, "raw/masks/1.png": 255})


@pytest.mark.parametrize(
    "keys",
    [
        "image_path label class_name mask_path defect",
        "img_path anomaly cls_name mask_path specie_name",
        "filename label clsname maskname label_name",
    ],
)
def test_lists_in_several_formats(folder: Path, keys: str) -> None:
    image, label, class_name, mask_path, kind = keys.split()
    rows = [
        {image: "raw/a/1.png", label: 1, class_name: "metal nut", mask_path: "raw/masks/1.png", kind: "bent"},
        {image: "raw/b/1.png", label: 1, class_name: "metal nut", mask_path: "", kind: "bent"},
        {image: "raw\\a\\2.jpg", label: 0.0, class_name: "metal nut", mask_path: "raw/masks/1.png", kind: "good"},
        {image: str(folder / "raw/b/3.png"), label: "good", class_name: "screw"},
    ]
    records = converted(lines(folder / "list.jsonl", rows), folder / "new")
    assert records == [
        Record("metal nut/test/bent/1.png", 1, "metal nut", "metal nut/ground_truth/bent/1_mask.png"),
        # Another image of the same name keeps a name that says where it came from.
        Record("metal nut/test/bent/b_1.png", 1, "metal nut"),
        Record("metal nut/test/good/2.jpg", 0, "metal nut"),
        Record("screw/test/good/3.png", 0, "screw"),
    ]


@pytest.mark.parametrize("turned", [False, True])
def test_coco_masks_fit_images_with_exif_rotation(folder: Path, turned: bool) -> None:
    """Annotations may refer to the rotated image (8 x 12) or to the file's pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = Image.new("RGB", SIZE)
    pixels.paste((255, 255, 255), (2, 3, 6, 5))
    pixels.save(folder / "raw/a/1.png", exif=exif)
    # The bright pixels, turned by 90 degrees.
    shown, stored = [3, 2, 2, 4], [2, 3, 4, 2]
    content = {
        "images": [{"id": 1, "file_name": "a/1.png", "width": 8 if turned else 12, "height": 12 if turned else 8}],
        "annotations": [{"image_id": 1, "bbox": shown if turned else stored}],
    }
    text(folder / "raw/coco.json", json.dumps(content))
    (record,) = converted(folder / "raw/coco.json", folder / "new", class_name="nut")
    image, drawn = read_pair(folder / "new", record)
    assert record.class_name == "nut"
    np.testing.assert_array_equal(np.asarray(drawn) > 0, np.asarray(image.convert("L")) > 128)


def test_visa_with_its_own_split(tmp_path: Path) -> None:
    images = "candle/Data/Images/Normal/0.JPG candle/Data/Images/Normal/1.JPG candle/Data/Images/Anomaly/0.JPG"
    rows = [f"candle,{split},normal,{image}," for split, image in zip(("train", "test"), images.split(), strict=False)]
    rows.append("candle,test,anomaly,candle/Data/Images/Anomaly/0.JPG,candle/Data/Masks/Anomaly/0.png")
    table = "\n".join(["object,split,label,image,mask", *rows])
    draw(tmp_path / "visa", {images: None, "candle/Data/Masks/Anomaly/0.png": 255, "split_csv/1cls.csv": table})
    assert converted(tmp_path / "visa", tmp_path / "new") == [
        Record("candle/test/bad/0.JPG", 1, "candle", "candle/ground_truth/bad/0_mask.png"),
        Record("candle/test/good/1.JPG", 0, "candle"),
    ]
    assert (tmp_path / "new/candle/train/good/0.JPG").is_file()


def test_the_target_may_lie_in_the_source(tmp_path: Path) -> None:
    root = draw(tmp_path / "screw", {"OK/1.png NOK/bent/1.png unsure/9.png": None})
    for _ in range(2):
        kinds = [Path(record.image_path).parent.name for record in converted(root, root / "converted")]
        assert kinds == ["bent", "good", "unsure"]


def labelme(*shapes: tuple[str, str, list[list[float]]]) -> str:
    rows = [{"label": label, "shape_type": kind, "points": points} for label, kind, points in shapes]
    return json.dumps({"shapes": rows, "imageWidth": 12, "imageHeight": 8})


def described(root: Path, records: list[Record]) -> set[str]:
    """Kind, name and anomalous pixels of each record, and its class if there are several."""
    first = 0 if len({record.class_name for record in records}) > 1 else 2
    words = set()
    for record in records:
        pixels = np.count_nonzero(read_pair(root, record)[1]) if record.mask_path else "-"
        name = "/".join(Path(record.image_path).with_suffix("").parts[first:])
        words.add(f"{name} {pixels}" if record.label else name)
    return words


DENT = ("dent", "polygon", [[2, 3], [5, 3], [5, 4], [2, 4]])
OK = ("OK", "rectangle", [[2, 3], [6, 5]])
# The files of a folder, what each image becomes, and options.
FOLDERS: list[tuple[dict[str, Any], str, dict[str, str]]] = [
    (
        {
            "bad/1.json": labelme(DENT, ("dent", "polygon", [[0, 0], [1, 1]]), ("ok", "point", [[1, 1]])),
            "bad/2.json": labelme(("dent", "point", [[2, 3]])),
            "bad/1.png bad/2.png bad/3.png good/1.png": None,
        },
        "dent/1 8, dent/2 -, bad/3 -, good/1",
        {},
    ),
    (
        {
            "json/1.json": labelme(("dent", "rectangle", OK[2])),
            "json/2.json": labelme(("hole", "circle", [[4, 4], [6, 4]])),
            "json/3.json": labelme(OK),
            "img/1.png img/2.png img/3.png img/4.png": None,
        },
        "dent/1 8, hole/2 18, good/3, good/4",
        {},
    ),
    (
        {
            "train/labels/1.txt": "1 0.375 0.5 0.25 0.25\n",
            "train/labels/2.txt": "0 0.5 0.5 1 1 0.9\n",
            "val/labels/1.txt": "",
            "val/labels/2.txt": "3 0.2 0.4 0.45 0.4 0.45 0.55 0.2 0.55 0.8\n",
            "data.yaml": "names: ['ok', 'dent']\n",
            "train/images/1.png train/images/2.png val/images/1.png val/images/2.png val/images/3.png": None,
        },
        "dent/1 6, good/2, good/1, class_3/2 8, good/3",
        {},
    ),
    ({"1.txt": "0 0.5 0.5 0.5 0.5\n", "classes.txt": "hole", "1.png": None}, "hole/1 24", {}),
    ({"images/1.jpg": None, "masks/1_segmentation.png": 255}, "anomalous/1 8", {}),
    ({"a/1.jpg a/2.jpg": None, "a/1_label.bmp": 255, "a/2_label.bmp": 0}, "anomalous/1 8, good/2", {}),
    ({"a/1.jpg b/2.jpg": None, "a/1.png": 255, "b/2.png": 0}, "a/1 8, good/2", {}),
    ({"x/1.png x/2.png": None, "x/Label/1_label.png": 255}, "good/2, anomalous/1 8", {}),
    ({"bad/1.png ok/1.png": None, "masks/1/1.png masks/1/2.png": 255}, "bad/1 8, good/1", {}),
    ({"ok/1.png bent/1.png cut/1.png": None, "mask_dir/bent/1.png": 255}, "good/1, bent/1 8, cut/1 -", {}),
    ({"a/ok/1.png a/bad/2.png b/ok/3.png": None}, "a/test/good/1, a/test/bad/2 -, b/test/good/3", {}),
    ({"ok/1.png x/1.png": None, "truth/1.png": 255}, "good/1, x/1 8", {"masks": "truth"}),
    ({"a/1.png b/2.png": None, "ok/b/2.png": 255}, "good/1, b/2 8", {"normal": "a", "masks": "ok"}),
    ({"ok/1.png x/2.png": None, "x/2.txt": ""}, "good/1, good/2", {}),
    ({"ok/1.png ng/z/1.png ng/2.png u/9.png": None, "gt/z/1.png": 255}, "ng/2 -, z/1 8, good/1", {"anomalous": "ng"}),
    ({"ok/1.ppm bad/2.ppm": None, "masks/2_mask.gif": 255}, "good/1, bad/2 8", {}),
    ({"test/a/1.png test/good/2.png": None, "w/a/1.png": 255}, "a/1 8, good/2", {"masks": "w"}),
]


@pytest.mark.parametrize(("files", "expected", "options"), FOLDERS)
def test_folders_of_labelling_tools_and_with_masks(
    tmp_path: Path, files: dict[str, Any], expected: str, options: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    records = converted(draw(tmp_path / "raw", files), tmp_path / "new", **options)
    assert described(tmp_path / "new", records) == set(expected.split(", "))
    assert len(list(tmp_path.glob("new/*/test/*/*"))) == len(records)
    images = {Path(name).suffix for names, content in files.items() if content is None for name in names.split()}
    assert {Path(record.image_path).suffix for record in records} == images
    unlabelled = {"img/4.png", "val/images/3.png", "x/Label/1_label.png"}
    assert ("count as normal" in caplog.text) == any(name in names.split() for names in files for name in unlabelled)


# The pixels of `mask`, and of the annotations.
SQUARE = {(y, x) for y in (3, 4) for x in (2, 3, 4, 5)}
# Four pixels of the third column, and two of the next one.
RUNS = {"size": [8, 12], "counts": [17, 4, 4, 2, 69]}


def annotated(*more: dict[str, Any], **annotation: Any) -> str:
    """A COCO file of two images, one with an annotation of the category scratch, and with others."""
    return json.dumps(
        {
            "images": [
                {"id": 1, "file_name": "raw/a/1.png", "width": 12.0, "height": 8.0},
                {"id": 2, "file_name": "raw\\b\\3.png"},
            ],
            "categories": [{"id": 7, "name": "scratch"}, {"id": 8, "name": "Good"}],
            "annotations": [{"image_id": 1, "category_id": 7, **annotation}, *({"image_id": 1, **row} for row in more)],
        }
    )


REAL_IAD = {
    "meta": {"prefix": "raw/", "normal_class": "OK"},
    "train": [{"category": "a", "anomaly_class": "OK", "image_path": "b/3.png", "mask_path": None}],
    "test": [{"category": "a", "anomaly_class": "BX", "image_path": "a/1.png", "mask_path": "masks/1.png"}],
}
META = {
    "train": {"a": [{"img_path": "raw/b/3.png", "cls_name": "a", "anomaly": 0}]},
    "test": {"a": [{"img_path": "raw/a/1.png", "mask_path": "raw/masks/1.png", "anomaly": 1}]},
}
SAVED = [
    {"schema": 1, "dataset": "x", "layout": "mvtec", "classes": []},
    {"image_path": "a/test/dent/1.png", "label": 1, "class_name": "a", "mask_path": "raw/masks/1.png"},
]
POLYGONS = [[2, 3, 5, 3, 5, 4, 2, 4], [9, 1, 9, 2]]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", annotated(segmentation=RUNS), "scratch/1 6, good/3"),
        ("a.json", annotated(segmentation={**RUNS, "counts": "a044NQ2"}), "scratch/1 6, good/3"),
        ("a.json", annotated(segmentation=POLYGONS), "scratch/1 8, good/3"),
        ("a.json", annotated(segmentation=POLYGONS[1:], bbox=[9, 1, 1, 1]), "good/1, good/3"),
        ("a.json", annotated(bbox=[9, 1, 0, 1]), "good/1, good/3"),
        ("a.json", annotated(bbox=[2, 3, 4, 2], segmentation=[]), "scratch/1 8, good/3"),
        ("a.json", annotated(bbox=[2, 3, 4, 2], category_id=9), "anomalous/1 8, good/3"),
        ("a.json", annotated({"bbox": [2, 3, 1, 2]}, bbox=[3, 3, 3, 2]), "combined/1 8, good/3"),
        ("meta.json", json.dumps(META), "anomalous/1 8"),
        ("a.jsonl", "\n".join(map(json.dumps, SAVED)), "dent/1 8"),
        ("a.json", annotated(bbox=[2, 3, 4, 2], category_id=8), "good/1, good/3"),
        ("a.csv", "filename,label\nraw/a/1.png,1\nraw/b/3.png,0\n", "anomalous/1 -, good/3"),
        (
            "a.csv",
            "Image;Class;Mask\r\nraw\\a\\1.png;Hole;raw/masks/1.png\r\nraw/b/3.png;Good;\r\n",
            "Hole/1 8, good/3",
        ),
        ("a.tsv", "path\tIs Anomaly\nraw/a/1.png\tTrue\nraw/b/3.png\tno\n", "anomalous/1 -, good/3"),
        ("a.csv", "file,defect_type,category\nraw/a/1.png,bent,x\nraw/b/3.png,none,x\n", "bent/1 -, good/3"),
        ("a.json", json.dumps(REAL_IAD, indent=1), "BX/1 8"),
    ],
)
def test_coco_files_and_lists(folder: Path, name: str, content: str, expected: str) -> None:
    text(folder / name, content)
    assert described(folder / "new", converted(folder / name, folder / "new")) == set(expected.split(", "))
    assert (folder / "new/a/train/good/3.png").is_file() == ('"train"' in content)
    for drawn in (folder / "new").rglob("1_mask.png"):
        rows, columns = np.nonzero(read_mask(drawn))
        pixels = set(zip(rows.tolist(), columns.tolist(), strict=True))
        assert pixels == ({(1, 2), (1, 3), (2, 2), (2, 3), (3, 2), (4, 2)} if "counts" in content else SQUARE)


IMAGES = "raw/a/1.png raw/b/3.png"
BOX = annotated(bbox=[2, 3, 4, 2])
GOOD = "file,label\n1.png,0\n3.png,0\n"


def test_a_second_source_is_not_mixed_with_the_first(folder: Path) -> None:
    text(folder / "defects.json", BOX)
    text(folder / "normal.json", annotated(bbox=[2, 3, 0, 2]))
    for first, second in (("defects", "normal"), ("normal", "defects")):
        records = converted(folder / f"{first}.json", folder / first)
        with pytest.raises(UserError, match="is not of this conversion: use a new folder"):
            convert(ConversionArguments(source=folder / f"{second}.json", target=folder / first))
        assert build_metadata(locate_dataset(str(folder / first))) == records
    convert(ConversionArguments(source=folder / "normal.json", target=folder / "defects", class_name="other"))
    classes = {record.class_name for record in build_metadata(locate_dataset(str(folder / "defects")))}
    assert "other" in classes and len(classes) == 2


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        ({"a/1.png": None, "a.csv": "filename,label\na/1.png,Gut\n"}, "a.csv", "labels are Gut; set .* --normal"),
        ({"a/1.png": None, "a.csv": "a/1.png,0\na/1.png,0\n"}, "a.csv", "expected image_path and label"),
        ({"a/1.png": None, "a.csv": "file,label\nD:\\a\\1.png,0\n"}, "a.csv", "absolute path of Windows"),
        ({"a/1.png": None, "a/1.txt": "a red nut\n"}, "", r"a/1\.txt:1: expected a class of YOLO"),
        ({"ok/1.png": None, "ok/1.txt": "0 0.5 0.5 0.5 0.5\n"}, "", "normal images, but .* marks class_0"),
        ({"a/1.png b/1.png": None, "masks/1.png": 255}, "", r"masks/1\.png belongs to 2 images"),
        ({"a/1.png": None, "1.json": labelme(DENT)}, "1.json", "convert its folder"),
        ({"a/1.png": None, "a.csv": "file,label\na/1.png,0\na/1.png,1\n"}, "a.csv", "both normal and anomalous"),
        ({IMAGES: None, "a.json": BOX.replace("12.0", "6")}, "a.json", "is 12 x 8, but its .* made on 6 x 8"),
        ({IMAGES: None, "a.json": BOX.replace("8.0", "12").replace("12.0", "8")}, "a.json", "made on 8 x 12"),
        ({"1.png 3.png": None, "a.csv": GOOD, "new/object/test/good/3.png": 255}, "a.csv", "exists already with anot"),
        (
            {"1.png 3.png": None, "a.csv": GOOD, "new/object/test/c/1.png": 255},
            "a.csv",
            r"1\.png is not of this conver",
        ),
    ],
)
def test_sources_that_are_refused(tmp_path: Path, files: dict[str, Any], source: str, message: str) -> None:
    draw(tmp_path, files)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    with pytest.raises(UserError, match=message):
        convert(ConversionArguments(source=tmp_path / source, target=tmp_path / "new"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


@pytest.mark.parametrize(
    ("files", "of_dataset", "of_convert"),
    [
        ({"images/1.png": None, "a.csv": "file,label\n"}, "the path of a list such as a.csv", "such as a.csv"),
        ({"images/1.png": None, "images/2.HEIC": ""}, "pip install pillow-heif", "pip install pillow-heif"),
        ({"a/b/part/test/ok/1.png": None}, "use --dataset .*/b", "use --dataset .*/b"),
        ({"test/1.jpg": None, "test/1_GT.png": 255}, "python -m dataset.convert", None),
        ({"part/test/ok/1.png": None}, None, "use --dataset"),
        ({"test/images/1.png": None, "test/labels/1.txt": "0 0.5 0.5 1 1"}, "python -m dataset.convert", None),
        ({"test/ok/1.png test/a/1.png test/b/1.png": None, "gt/1.png": 255}, "belongs to 2 images", "use --dataset"),
    ],
)
def test_dataset_and_convert_name_each_other_only_if_the_other_reads_it(
    tmp_path: Path, files: dict[str, Any], of_dataset: str | None, of_convert: str | None
) -> None:
    root = draw(tmp_path / "raw", files)
    with pytest.raises(UserError, match=of_dataset) if of_dataset else nullcontext():
        build_metadata(locate_dataset(str(root)))
    with pytest.raises(UserError, match=of_convert) if of_convert else nullcontext():
        convert(ConversionArguments(source=root, target=tmp_path / "new"))


@pytest.mark.parametrize("way", ["linked", "copied", "refused"])
def test_files_are_linked_or_copied_once(
    folder: Path, way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    if way == "refused":
        monkeypatch.setattr(os, "link", refuse)
    caplog.set_level(logging.INFO)
    rows = [{"image_path": "raw/a/1.png", "label": 1, "class_name": "nut", "mask_path": "raw/masks/1.png"}]
    source, target = lines(folder / "list.jsonl", rows), folder / "new"
    arguments = ConversionArguments(source=source, target=target, copy=way == "copied")
    assert convert(arguments) == {"linked" if way == "linked" else "copied": 2}
    assert (target / "nut/test/anomalous/1.png").samefile(folder / "raw/a/1.png") == (way == "linked")
    assert caplog.text.count("cannot be linked") == (way == "refused")
    assert convert(arguments) == {"existing": 2}
    assert "1 images from a list" in caplog.text and "2 existing" in caplog.text


@pytest.mark.parametrize(
    ("class_name", "kind"), [("../out", "../../x"), (".hidden", "."), ("a/b", "c\\d"), ("con", "nul")]
)
def test_names_of_the_source_stay_in_the_target(folder: Path, class_name: str, kind: str) -> None:
    row = {"image_path": "raw/a/1.png", "label": 1, "class_name": class_name, "defect": kind}
    (record,) = converted(lines(folder / "list.jsonl", [row]), folder / "new")
    assert (folder / "new" / record.image_path).resolve().is_relative_to(folder / "new")


def test_arguments_are_positional() -> None:
    asked = vars(build_parser().parse_args(["a.jsonl", "b", "--copy"]))
    assert asked == {"source": Path("a.jsonl"), "target": Path("b"), "copy": True}
    assert "SOURCE TARGET" in build_parser().format_help()
