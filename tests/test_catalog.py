"""The catalog, finding datasets on disk, and the names of classes in prompts."""

import json
import logging
import re
from pathlib import Path

import pytest

from dataset import locate, toy_world
from dataset.catalog import CATALOG
from dataset.class_names import class_display_names
from dataset.layouts import LAYOUTS
from dataset.locate import locate_dataset
from dataset.prompts import build_prompts
from engine.data.task import load_task
from utils.errors import UserError


def make_folders(root, *paths):
    for path in paths:
        (root / path).mkdir(parents=True)
    return root


def write_files(root, *paths):
    """Files of which only the names matter."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def write_classes(root, *class_names):
    """Classes in MVTec's layout, with one normal image each."""
    return write_files(root, *(f"{name}/test/good/000.png" for name in class_names))


@pytest.mark.parametrize("spec", CATALOG.values(), ids=lambda spec: spec.name)
def test_catalog_entries(spec):
    assert spec.class_names and spec.domain in ("industrial", "medical") and set(spec.layouts) <= set(LAYOUTS)
    for name in spec.class_names.values():
        assert re.fullmatch(r"[a-z]+([ -][a-z]+)*", name)
        assert not re.search("normal|good|damage|broken|flaw|defect|anomal", name)


def test_prompts():
    normal, abnormal = build_prompts("metal nut")
    assert normal == [
        "metal nut.",
        "a photo of metal nut.",
        "a metal nut.",
        "a photo of a metal nut.",
        "the metal nut.",
        "a photo of the metal nut.",
    ]
    assert len(abnormal) == len(set(abnormal)) == 10
    assert abnormal[:2] == ["a damaged metal nut.", "a photo of a damaged metal nut."]
    assert abnormal[-1] == "a photo of a metal nut with damage."


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("MVTec", "mvtec_anomaly_detection"),
        ("mvtec", "mvtec"),
        ("VISA", "visa"),
        ("btad", "BTech_Dataset_transformed"),
        ("Brain", "Brain_AD"),
        ("colon_clinicdb", "TestDataset/CVC-ClinicDB"),
        ("Colon_Kvasir", "Colon_Kvasir"),
    ],
)
def test_named_dataset_under_the_data_root_in_any_letter_case(tmp_path, name, folder):
    make_folders(tmp_path, folder)
    located = locate_dataset(name, tmp_path)
    assert located.root.samefile(tmp_path / folder)
    assert located.spec is {known.lower(): spec for known, spec in CATALOG.items()}[name.lower()]


def test_data_root_that_is_the_dataset_itself(tmp_path):
    by_classes = write_classes(tmp_path / "any", *list(CATALOG["MVTec"].class_names)[:8])
    by_name = make_folders(tmp_path / "Liver_AD", "test")
    assert locate_dataset("MVTec", by_classes).root == by_classes
    assert locate_dataset("Liver", by_name).root == by_name
    # The same folders in another medical set: only the name tells them apart.
    with pytest.raises(UserError):
        locate_dataset("Brain", by_name)
    # One class that two datasets share does not make one the other.
    with pytest.raises(UserError):
        locate_dataset("MVTec", write_classes(tmp_path / "other", "leather"))


@pytest.mark.parametrize(
    ("name", "classes", "folder"),
    [
        ("BTAD", ("01", "02", "03"), "BTAD/BTech_Dataset_transformed"),
        ("MPDD", ("tubes", "connector"), "MPDD/MPDD"),
        ("MVTec", ("screw", "grid"), "mvtec/archive/mvtec_anomaly_detection"),
        ("VisA", ("candle", "pcb1"), "VisA_pytorch/1cls"),
        ("Liver", ("test/good/img",), "Liver_AD/Liver_AD"),
    ],
)
def test_archives_unpacked_into_separate_folders(tmp_path, name, classes, folder):
    if name == "Liver":
        write_files(tmp_path / folder, "test/good/img/1.png")
    else:
        write_classes(tmp_path / folder, *classes)
    # The same classes, none of whose images are meant.
    write_classes(tmp_path / folder.split("/")[0] / "2cls_highshot", *CATALOG[name].class_names)
    write_classes(tmp_path / folder.split("/")[0] / "__MACOSX", *CATALOG[name].class_names)
    assert locate_dataset(name, tmp_path).root == tmp_path / folder


def test_the_folder_with_most_of_the_dataset_is_used(tmp_path):
    make_folders(tmp_path, "mvtec_anomaly_detection", "MVTec/bottle/test/good")
    write_classes(tmp_path / "MVTec-AD", "screw")
    write_classes(tmp_path / "mvtec", "screw", "grid")
    assert locate_dataset("MVTec", tmp_path).root == tmp_path / "mvtec"


def write_visa(root, *class_names):
    images = [(name, kind) for name in class_names for kind in ("Normal", "Anomaly")]
    write_files(root, *(f"{name}/Data/Images/{kind}/0.JPG" for name, kind in images))
    write_files(root, *(f"{name}/Data/Masks/Anomaly/0.png" for name in class_names))
    rows = [f"{n},test,{'normal,' if k == 'Normal' else 'anomaly,'}{n}/Data/Images/{k}/0.JPG," for n, k in images]
    rows = [row + (f"{row.split(',')[0]}/Data/Masks/Anomaly/0.png" if "anomaly" in row else "") for row in rows]
    (root / "split_csv").mkdir()
    (root / "split_csv" / "1cls.csv").write_text("\n".join(["object,split,label,image,mask", *rows]), encoding="utf-8")
    return root


def test_two_archives_unpacked_flat_into_one_folder_are_two_datasets(tmp_path):
    write_classes(write_visa(tmp_path, *CATALOG["VisA"].class_names), *CATALOG["MVTec"].class_names)
    for _ in range(2):
        for name, count in (("MVTec", 15), ("VisA", 24)):
            data = load_task(name, tmp_path)
            assert data.located.root == tmp_path
            assert (list(data.names), len(data.records)) == (list(CATALOG[name].class_names), count)


def test_visa_in_the_one_class_layout_has_catalog_names(tmp_path):
    root = write_classes(tmp_path / "VisA", "pcb1", "cashew")
    write_files(root, "pcb1/test/bad/000.JPG", "pcb1/Ground_Truth/bad/000.png")
    data = load_task("visa", tmp_path)
    assert data.names == {"cashew": "cashew nut", "pcb1": "printed circuit board"}
    assert [(r.image_path, r.mask_path) for r in data.records if r.label] == [
        ("pcb1/test/bad/000.JPG", "pcb1/Ground_Truth/bad/000.png")
    ]
    # The folder itself as data root.
    assert load_task("VisA", root).digest == data.digest


@pytest.mark.parametrize(
    ("name", "listed", "expected"),
    [
        ("Colon_cvc300", "CVC-300", "colon"),
        ("Retina", "Retina_RESC", "retina"),
        ("VisA", "PCB1", "printed circuit board"),
        ("Colon_cvc300", "polyp_x", "polyp x"),
    ],
)
def test_class_names_of_external_lists(tmp_path, name, listed, expected):
    assert class_display_names(CATALOG[name], None, [listed])[listed] == expected
    file = tmp_path / "names.json"
    known = next((known for known, text in CATALOG[name].class_names.items() if text == expected), listed)
    file.write_text(json.dumps({known: "thing"}), encoding="utf-8")
    assert class_display_names(CATALOG[name], file, [listed])[listed] == "thing"


def test_an_unknown_layout_is_described(tmp_path):
    write_files(tmp_path / "MVTec", "images/bottle/1.png", "labels.csv")
    with pytest.raises(UserError) as error:
        load_task("MVTec", tmp_path)
    message = one_line(error)
    assert all(part in message for part in ("the folders images", "labels.csv", "CLASS/test/good/x.png", "--metadata"))
    with pytest.raises(UserError) as error:
        locate_dataset("BTAD", tmp_path)
    assert all(
        part in one_line(error) for part in ("holds the folders MVTec", "BTech_Dataset_transformed", "--metadata")
    )
    with pytest.raises(UserError, match=r"which holds nothing: expected .*--metadata FILE"):
        load_task(str(make_folders(tmp_path, "empty") / "empty"))


@pytest.mark.parametrize("path", ["x" * 5000, "~nosuchuser/data", "a" * 300])
def test_unreadable_paths(path):
    with pytest.raises(UserError, match="unknown dataset"):
        locate_dataset(path)
    with pytest.raises(UserError, match="does not exist"):
        locate_dataset("MVTec", Path(path))


def test_data_root_comes_from_the_environment_or_is_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folders(tmp_path, "data/MPDD", "elsewhere/MPDD")
    monkeypatch.delenv(locate.DATA_ROOT_VARIABLE, raising=False)
    assert locate_dataset("MPDD").root.resolve() == tmp_path / "data" / "MPDD"
    monkeypatch.setenv(locate.DATA_ROOT_VARIABLE, str(tmp_path / "elsewhere"))
    assert locate_dataset("MPDD").root == tmp_path / "elsewhere" / "MPDD"
    assert locate_dataset("MPDD", tmp_path / "data").root == tmp_path / "data" / "MPDD"


def test_own_folder_with_many_classes_and_with_one(tmp_path):
    make_folders(tmp_path / "parts", "metal_screw/test/good", "bolt/test/good", "notes", "bolt/train", "__MACOSX/test")
    many = locate_dataset(str(tmp_path / "parts"))
    assert many.spec.class_names == {"bolt": "bolt", "metal_screw": "metal screw"}
    assert (many.spec.layouts, many.spec.domain, many.spec.name) == (["mvtec"], "industrial", "parts")
    one = locate_dataset(str(tmp_path / "parts" / "metal_screw"))
    assert one.spec.class_names == {"metal_screw": "metal screw"}
    assert one.root == tmp_path / "parts" / "metal_screw"


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["MVTek", "", "no/such/folder"])
def test_an_unknown_dataset_lists_the_known_ones(name):
    with pytest.raises(UserError) as error:
        locate_dataset(name)
    assert all(known in one_line(error) for known in CATALOG)


def test_missing_folders_list_the_searched_paths(tmp_path):
    with pytest.raises(UserError) as error:
        locate_dataset("VisA", tmp_path / "nothing")
    assert str(tmp_path / "nothing") in one_line(error) and "--data_root" in one_line(error)
    with pytest.raises(UserError) as error:
        locate_dataset("VisA", tmp_path)
    assert str(tmp_path / "VisA") in one_line(error) and "split_csv/1cls.csv" in one_line(error)


def test_toy_dataset_is_drawn_on_first_use_only(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    drawn = []

    def draw(name, folder, seed):
        drawn.append((name, seed))
        (folder / "nut" / "test").mkdir(parents=True)

    monkeypatch.setattr(toy_world, "write_toy_dataset", draw)
    for _ in range(2):
        assert locate_dataset("toy_test", tmp_path / "new").root == tmp_path / "new" / "toy_test"
    assert drawn == [("toy_test", 0)]
    assert len(caplog.messages) == 1
    # The dataset's own folder as data root: nothing is drawn into it.
    assert locate_dataset("toy_test", tmp_path / "new" / "toy_test").root == tmp_path / "new" / "toy_test"
    assert len(drawn) == 1


def test_toy_dataset_that_cannot_be_drawn(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be drawn"):
        locate_dataset("toy_train", tmp_path / "file")


def test_class_names_from_a_file(tmp_path):
    file = tmp_path / "names.json"
    file.write_text(json.dumps({"pcb1": " circuit board ", "candle": "Wachsstöcke"}), encoding="utf-8")
    names = class_display_names(CATALOG["VisA"], file)
    assert names == CATALOG["VisA"].class_names | {"pcb1": "circuit board", "candle": "Wachsstöcke"}
    assert CATALOG["VisA"].class_names["candle"] == "candle"


def test_class_names_of_classes_that_only_the_metadata_contains(tmp_path):
    names = class_display_names(CATALOG["BTAD"], None, ["01", "small_gear"])
    assert names == CATALOG["BTAD"].class_names | {"small_gear": "small gear"}
    assert "small_gear" not in CATALOG["BTAD"].class_names
    file = tmp_path / "names.json"
    file.write_text('{"small_gear": "cog"}')
    assert class_display_names(CATALOG["BTAD"], file, ["small_gear"])["small_gear"] == "cog"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"candel": "candle"}', "'candel'; its classes are candle, "),
        ('{"candle": " "}', "'candle' must be non-empty text"),
        (None, "cannot be read"),
        (b" " * 2_000_000, "larger than 1 MiB"),
    ],
)
def test_bad_class_names_file(tmp_path, text, expected):
    file = tmp_path / "names.json"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    with pytest.raises(UserError) as error:
        class_display_names(CATALOG["VisA"], file)
    assert len(one_line(error)) < 500
    assert expected in one_line(error) and str(file) in one_line(error)
