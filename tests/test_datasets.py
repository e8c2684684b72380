"""Every dataset of the catalog in miniature, as its archive unpacks: rows, labels, masks, and its evaluation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dataset.catalog import CATALOG, GROUPS, known_dataset
from dataset.images import read_pair
from dataset.layouts import LAYOUTS
from dataset.locate import locate_dataset
from dataset.toy.classes import TOY_DATASETS
from engine.config.evaluation import InferenceArguments
from engine.data.task import load_task
from engine.evaluation.inference import load_several
from engine.evaluation.results import METRICS
from engine.study.study import read_study
from tests.documented import ROOT
from tests.scripts import error_line, read_csv, run, write_clip
from utils.errors import UserError
from utils.metrics import IMAGE_METRICS, PIXEL_METRICS

RNG = np.random.default_rng(7)
SIZE = (20, 28)


def photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(60, 200, (*SIZE, 3), dtype=np.uint8)).save(path)


def mask(path: Path, value: int = 255, rows: slice = slice(4, 9)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(SIZE, np.uint8)
    pixels[rows] = value
    Image.fromarray(pixels).save(path)


@dataclass(frozen=True)
class Tree:
    """The files of an archive: normal images, anomalous images with their masks, other images, masks and texts.

    The mask of an anomalous image may be a folder of masks; `classes` are those of its images in order.
    """

    normal: Iterable[str] = ()
    anomalous: dict[str, str | None] = field(default_factory=dict)
    unused: Iterable[str] = ()
    black: Iterable[str] = ()
    texts: dict[str, str] = field(default_factory=dict)

    def write(self, root: Path) -> Path:
        for name in (*self.normal, *self.anomalous, *self.unused):
            photo(root / name)
        for name in filter(None, self.anomalous.values()):
            if Path(name).suffix:
                mask(root / name)
            else:
                mask(root / name / "000.png", 254, slice(2, 5))
                mask(root / name / "001.png", 90, slice(12, 13))
        for name in self.black:
            mask(root / name, 0)
        for name, text in self.texts.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text, encoding="utf-8")
        photo(root / "__MACOSX/test/good/._000.png")
        (root / "readme.txt").write_text("", encoding="utf-8")
        return root


def mvtec(
    classes: Iterable[str], image: str = ".png", mask: str = "_mask.png", kind: str = "bad", test: str = "test"
) -> Tree:
    """MVTec's layout: one normal and two anomalous test images of each class, and a training image."""
    truth = "test_public/ground_truth" if test == "test_public" else "ground_truth"
    return Tree(
        [f"{name}/{test}/good/000{image}" for name in classes],
        {
            f"{name}/{test}/{kind}/00{n}{image}": f"{name}/{truth}/{kind}/00{n}{mask}"
            for name in classes
            for n in (1, 2)
        },
        unused=[f"{name}/train/good/007{image}" for name in classes],
    )


def bmad(folder: str) -> Tree:
    inside = {f"{folder}/test/Ungood/img/{n}.png": None for n in (3, 4)}
    return Tree([f"{folder}/test/good/img/1.png"], inside, [f"{folder}/train/good/9.png"])


def real_iad(lists: tuple[str, ...] = ("realiad_jsons/realiad_jsons_sv", "realiad_jsons/realiad_jsons")) -> Tree:
    """Two classes in two sizes; the single-view list has one image of each side, the other list two."""
    normal, anomalous, small, texts = [], {}, [], {}
    for name in ("audiojack", "usb"):
        rows = []
        for view in ("C1", "C2"):
            good, bad = f"OK/S0001/{name}_0001_OK_{view}_1.jpg", f"NG/BX/S0002/{name}_0002_NG_BX_{view}_1.jpg"
            truth = bad.replace(".jpg", "_mask.png")
            rows.append({"category": name, "anomaly_class": "OK", "image_path": good, "mask_path": None})
            rows.append({"category": name, "anomaly_class": "BX", "image_path": bad, "mask_path": truth})
            small += [f"realiad_256/{name}/{good}", f"realiad_256/{name}/{bad}"]
            normal.append(f"realiad_1024/{name}/{good}")
            anomalous[f"realiad_1024/{name}/{bad}"] = f"realiad_1024/{name}/{truth}"
        for folder in lists:
            test = rows[:2] if "_sv" in folder else rows
            content = {"meta": {"normal_class": "OK", "prefix": f"{name}/"}, "train": rows[:1], "test": test}
            texts[f"{folder}/{name}.json"] = json.dumps(content)
    if any("_sv" in folder for folder in lists):
        small += [path for path in (*normal, *anomalous) if "_C2_" in path]
        normal = [path for path in normal if "_C1_" in path]
        anomalous = {path: truth for path, truth in anomalous.items() if "_C1_" in path}
    return Tree(normal, anomalous, small, texts=texts)


DTD = list(CATALOG["DTD-Synthetic"].class_names)
DAGM = [f"Class{number}" for number in range(1, 11)]
KSDD2 = {f"test/1000{n}.png": f"test/1000{n}_GT.png" for n in (2, 3)}
ISIC = "ISBI2016_ISIC_Part1_Test"
LOCO, LOCO_KINDS = "mvtec_loco_anomaly_detection/pushpins", ("logical", "structural")
ENDO = "EndoTect_2020_Segmentation_Test_Dataset"
HEAD_CT = {f"head_ct/head_ct/00{n}.png": None for n in (0, 1)}
HEAD_CT_TABLE = {"labels.csv": "id, hemorrhage\n0,1\n1,1\n2,0\n"}


def dagm(folder: str, classes: Iterable[str] = DAGM) -> Tree:
    return Tree(
        [f"{folder}/{name}/Test/0001.PNG" for name in classes],
        {f"{folder}/{name}/Test/0576.PNG": f"{folder}/{name}/Test/Label/0576_label.PNG" for name in classes},
        [f"{folder}/{name}/Train/0002.PNG" for name in classes],
        texts={f"{folder}/{name}/Test/Label/Labels.txt": "1\n1\t0\t0001.PNG\t0\t0\n" for name in classes},
    )


def doubled(tree: Tree) -> Tree:
    """The same with each class folder twice: Class1/Class1."""

    def twice(path: str) -> str:
        return re.sub(r"(Class\d+)/", r"\1/\1/", path)

    anomalous = {twice(image): twice(mask or "") for image, mask in tree.anomalous.items()}
    return Tree(list(map(twice, tree.normal)), anomalous, list(map(twice, tree.unused)))


# The archives of each dataset as they unpack into a folder, and other copies of them.
TREES: dict[str, list[Tree]] = {
    "DTD-Synthetic": [mvtec([f"DTD-Synthetic/{name}" for name in DTD])],
    "DAGM": [dagm("DAGM_KaggleUpload"), dagm("."), dagm("DAGM2007/DAGM2007"), doubled(dagm("DAGM"))],
    "KolektorSDD": [
        Tree(
            ["kos01/Part0.jpg", "kos02/Part0.jpg"],
            {"kos01/Part1.jpg": "kos01/Part1_label.bmp"},
            black=["kos01/Part0_label.bmp", "kos02/Part0_label.bmp"],
        )
    ],
    "KolektorSDD2": [
        Tree(["test/10001.png"], KSDD2, ["train/1.png"], ["test/10001_GT.png", "train/1_GT.png"], {"split_0.pyb": ""})
    ],
    "RSDD": [mvtec(["Metal15"], ".bmp", ".png", "anomaly")],
    "HeadCT": [
        Tree(["head_ct/head_ct/002.png"], HEAD_CT, texts=HEAD_CT_TABLE),
        Tree(["head_ct/head_ct/002.png"], HEAD_CT, texts={"head_ct/labels.csv": HEAD_CT_TABLE["labels.csv"]}),
        Tree(["HeadCT/brain/test/good/1.png"], {"HeadCT/brain/test/defect/2.png": None}),
    ],
    "BrainMRI": [
        Tree(
            ["brain_tumor_dataset/no/1 no.jpeg", "brain_tumor_dataset/no/N2.JPG"],
            {f"brain_tumor_dataset/yes/Y{name}": None for name in ("1.jpg", "2.JPG", "3.jpeg", "4.png")},
            ["no/1 no.jpeg", "no/N2.JPG", *(f"yes/Y{name}" for name in ("1.jpg", "2.JPG", "3.jpeg", "4.png"))],
        ),
        Tree(["BrainMRI/test/good/1.png"], {"BrainMRI/test/defect/2.png": None}),
    ],
    "Br35H": [
        Tree(
            ["no/no0.jpg"], {"yes/y0.jpg": None, "yes/y1.jpg": None}, ["pred/pred0.jpg", "Br35H-Mask-RCNN/TEST/y1.jpg"]
        )
    ],
    "ISIC": [
        Tree((), {f"{ISIC}_Data/ISIC_3.jpg": f"{ISIC}_GroundTruth/ISIC_3_Segmentation.png"}),
        Tree((), {f"ISIC/{ISIC}_Data/{ISIC}_Data/ISIC_3.jpg": f"ISIC/{ISIC}_GroundTruth/ISIC_3_Segmentation.png"}),
    ],
    "Endo": [
        Tree((), {f"{ENDO}/images/a-b.jpg": f"{ENDO}/masks/a-b.jpg", f"{ENDO}/images/c.jpg": f"{ENDO}/masks/c.png"})
    ],
    "TN3K": [
        Tree((), {"tn3k/test-image/0001.jpg": "tn3k/test-mask/0001.jpg"}, ["tn3k/trainval-image/0001.jpg"]),
        Tree((), {"Thyroid Dataset/tn3k/test-image/0001.jpg": "Thyroid Dataset/tn3k/test-mask/0001.jpg"}),
    ],
    "Real-IAD": [real_iad(), real_iad(("realiad_jsons_sv",)), real_iad(("realiad_jsons",)), real_iad(())],
    "MVTec-LOCO": [
        Tree(
            [f"{LOCO}/test/good/000.png"],
            {
                f"{LOCO}/test/{kind}_anomalies/000.png": f"{LOCO}/ground_truth/{kind}_anomalies/000"
                for kind in LOCO_KINDS
            },
            [f"{LOCO}/validation/good/000.png"],
            texts={f"{LOCO}/defects_config.json": "[]"},
        )
    ],
    "MVTec-AD2": [mvtec(["mvtec_ad_2/can", "mvtec_ad_2/vial"], test="test_public")],
    "GoodsAD": [mvtec(["GoodsAD/food_box", "GoodsAD/drink_can"], ".jpg", ".png", "surface_damage")],
    "Chest": [bmad("Chest_AD")],
    "Histopathology": [bmad("Histopathology_AD/Histopathology_AD")],
    "OCT2017": [bmad("Retina_OCT2017")],
}

CASES = [pytest.param(name, tree, id=f"{name}-{n}") for name, trees in TREES.items() for n, tree in enumerate(trees)]


@pytest.mark.parametrize(("name", "tree"), CASES)
def test_an_archive_is_read_as_it_unpacks(name: str, tree: Tree, tmp_path: Path) -> None:
    data = load_task(name, tree.write(tmp_path))
    root = data.located.root
    files = {(root / row.image_path).relative_to(tmp_path).as_posix(): row for row in data.records}
    assert len(files) == len(data.records)
    assert {path for path, row in files.items() if not row.label} == {Path(path).as_posix() for path in tree.normal}
    masks = {
        path: row.mask_path and (root / row.mask_path).relative_to(tmp_path) for path, row in files.items() if row.label
    }
    assert masks == {Path(image).as_posix(): mask and Path(mask) for image, mask in tree.anomalous.items()}
    for path, row in files.items():
        classes = CATALOG[name].class_names
        assert row.class_name in classes and (len(classes) == 1 or row.class_name in Path(path).parts)
        pixels = np.asarray(read_pair(root, row)[1])
        expected = [2, 3, 4, 12] if row.mask_path and not Path(row.mask_path).suffix else [4, 5, 6, 7, 8]
        # JPEG masks have a fringe.
        assert (pixels > 127).any(axis=1).nonzero()[0].tolist() == (expected if row.mask_path else [])


def test_every_new_dataset_has_a_tree() -> None:
    known = {
        "MVTec",
        "VisA",
        "BTAD",
        "MPDD",
        "Brain",
        "Liver",
        "Retina",
        *(n for n in CATALOG if n.startswith("Colon_")),
    }
    assert set(CATALOG) == {*TREES, *known, *TOY_DATASETS}


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("dtd_synthetic", "DTD-Synthetic"),
        ("headct", "HeadCT"),
        ("head-ct", "HeadCT"),
        ("BRAIN_MRI", "BrainMRI"),
        ("real_iad", "Real-IAD"),
        ("MVTec AD 2", "MVTec-AD2"),
        ("mvtec-loco", "MVTec-LOCO"),
        ("colon-clinicdb", "Colon_clinicDB"),
        ("oct2018", None),
    ],
)
def test_names_without_case_and_separators(written: str, name: str | None) -> None:
    spec = known_dataset(written)
    assert (spec and spec.name) == name


@pytest.mark.parametrize("spec", [CATALOG[name] for name in GROUPS["all"]], ids=lambda spec: spec.name)
def test_facts_of_the_catalog(spec) -> None:
    assert spec.source and spec.licence and spec.notes.endswith(".")
    assert all(sign in LAYOUTS or sign.isdecimal() for sign in spec.lookalikes)
    assert spec.size is None or (spec.metrics == "pixel") == (spec.size[0] == 0)


def brats(folder: str) -> Tree:
    images = {f"{folder}/test/Ungood/img/{n}.png": f"{folder}/test/Ungood/label/{n}.png" for n in (1, 2)}
    return Tree([f"{folder}/test/good/img/3.png"], images)


@pytest.mark.parametrize(
    ("name", "tree", "expected"),
    [
        ("BrainMRI", brats("BrainMRI"), "AA-CLIP's Brain .* --dataset Brain"),
        ("Brain", Tree(["Brain/no/1.jpg"], {"Brain/yes/2.jpg": None}), "BrainMRI of Kaggle .* --dataset BrainMRI"),
        ("Brain", Tree(["Brain/test/good/1.png"], {"Brain/test/defect/2.png": None}), "BrainMRI in MVTec's layout"),
        ("DAGM", dagm("DAGM", DAGM[:7]), "re-annotated DAGM of 7 classes"),
        ("DAGM", mvtec([f"DAGM/{name}" for name in DAGM[:7]]), "in MVTec's layout .*7 classes"),
    ],
)
def test_another_dataset_of_the_same_name_is_rejected(name: str, tree: Tree, expected: str, tmp_path: Path) -> None:
    tree.write(tmp_path / "data")
    with pytest.raises(UserError, match=f"is not {name} but another dataset that goes by this name: .*{expected}"):
        load_task(name, tmp_path / "data")
    # A data root of another name, and the same folders under the right one.
    other = (tmp_path / "data" / name).rename(tmp_path / "other")
    with pytest.raises(
        UserError, match=f"other is not {name} but another dataset that goes by this name: .*{expected}"
    ):
        load_task(name, other)
    if name == "BrainMRI":
        assert len(load_task("Brain", other.rename(tmp_path / "Brain")).records) == 3


@pytest.mark.parametrize(
    ("name", "tree", "change", "expected"),
    [
        ("KolektorSDD", 0, "kos02/Part0_label.bmp", "kos02/Part0.jpg has no mask next to it"),
        ("ISIC", 0, f"{ISIC}_GroundTruth/ISIC_3_Segmentation.png", "ISIC_3.jpg has no mask"),
        ("DTD-Synthetic", 0, "DTD-Synthetic/Woven_001/ground_truth/bad/001_mask.png", "has no mask"),
        ("HeadCT", 0, "head_ct/head_ct/001.png", "labels.csv and the images in .* only one of them has 1"),
        ("Real-IAD", 0, "realiad_jsons/realiad_jsons_sv/usb.json", "usb.json"),
        ("Real-IAD", 0, "realiad_1024/usb/OK/S0001/usb_0001_OK_C1_1.jpg", "usb_0001_OK_C1_1.jpg does not exist"),
    ],
)
def test_incomplete_archives_are_reported(name: str, tree: int, change: str, expected: str, tmp_path: Path) -> None:
    (TREES[name][tree].write(tmp_path) / change).unlink()
    with pytest.raises(UserError, match=expected):
        load_task(name, tmp_path)


def test_only_the_name_tells_some_datasets_apart(tmp_path: Path) -> None:
    Tree(["no/1.jpg"], {"yes/1.jpg": None}).write(tmp_path)
    for name in ("BrainMRI", "Br35H", "Chest", "Endo"):
        with pytest.raises(UserError, match="is not under the data root"):
            locate_dataset(name, tmp_path)


def test_a_group_is_no_training_dataset() -> None:
    with pytest.raises(UserError, match="Industrial is a group of datasets"):
        locate_dataset("Industrial")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip")


def options(clip: Path, root: Path, output: Path, *names: object) -> tuple[object, ...]:
    words = ("--checkpoint", "none", "--model_name", f"local-dir:{clip}", "--data_root", root, "--output_dir", output)
    return (*words, "--num_workers", 0, "--device", "cpu", "--dataset", *names)


UNDEFINED = {"both": (), "image": PIXEL_METRICS, "pixel": [*IMAGE_METRICS, *(f"published_{m}" for m in IMAGE_METRICS)]}


def test_all_datasets_are_evaluated_in_one_call(clip: Path, tmp_path: Path) -> None:
    for name, (tree, *_) in TREES.items():
        tree.write(tmp_path / "data" / name)
    errors = run("inference.py", *options(clip, tmp_path / "data", tmp_path / "out", "all"))
    assert "11 datasets are not under the data root and are skipped: MVTec, VisA, BTAD, MPDD, Brain" in errors
    assert "average of 18" in errors and "nan" not in errors
    *rows, average = read_csv(tmp_path / "out/unadapted_summary_all.csv")
    assert [row["dataset"] for row in rows] == [name for name in GROUPS["all"] if name in TREES]
    for row in rows:
        tree, spec = TREES[row["dataset"]][0], CATALOG[row["dataset"]]
        counts = len([*tree.normal, *tree.anomalous]), len(tree.anomalous)
        assert (int(row["images"]), int(row["anomalous"])) == counts
        undefined = [metric for metric in METRICS if row[metric] == "n/a" and metric != "aupimo"]
        assert undefined == [metric for metric in UNDEFINED[spec.metrics] if metric != "aupimo"]
        *classes, last = read_csv(tmp_path / f"out/unadapted_evaluation_{spec.name}.csv")
        assert last == row
        names = [name for name in spec.class_names if any(f"/{name}/" in path for path in tree.anomalous)]
        assert [line["class"] for line in classes] == (names or [spec.name])
    for metric in METRICS:
        values = [float(row[metric]) for row in rows if row[metric] != "n/a"]
        assert float(average[metric]) == pytest.approx(np.mean(values), abs=1e-5)


def test_a_group_on_half_of_its_datasets(clip: Path, tmp_path: Path) -> None:
    for name in ("RSDD", "GoodsAD", "KolektorSDD", "Endo", "DAGM"):
        TREES[name][0].write(tmp_path / "data" / name)
    (tmp_path / "data/KolektorSDD/kos01/Part0_label.bmp").unlink()
    words = options(clip, tmp_path / "data", tmp_path / "out")
    errors = run("inference.py", *words, "industrial")
    assert "9 datasets are not under the data root" in errors
    assert "KolektorSDD is skipped: the image" in errors and re.search("^GoodsAD +6 ", errors, re.MULTILINE)
    rows = read_csv(tmp_path / "out/unadapted_summary_industrial.csv")
    assert [row["dataset"] for row in rows] == ["DAGM", "RSDD", "GoodsAD", "average"]
    run("inference.py", *words, "rsdd", "Medical", "RSDD", "MVTec")
    rows = read_csv(tmp_path / "out/unadapted_summary_rsdd_Medical_RSDD_MVTec.csv")
    assert [row["dataset"] for row in rows] == ["RSDD", "Endo", "average"]
    assert rows[-1]["image_auroc"] == rows[0]["image_auroc"] and rows[1]["image_auroc"] == "n/a"
    # Endo has no training images, from which references are taken.
    assert "Endo is skipped: " in run("inference.py", *words, "Endo", "RSDD", "--reference_shots", 1)
    rows = read_csv(tmp_path / "out/unadapted_summary_Endo_RSDD_1_references.csv")
    assert [row["dataset"] for row in rows] == ["RSDD", "average"]


def test_the_published_study_tests_all_datasets_but_those_of_its_trainings() -> None:
    visa, mvtec = read_study(ROOT / "studies/published.toml").pairs
    assert {*visa.test, visa.train} == set(GROUPS["all"]) and mvtec.test == ("VisA",)


def test_a_group_does_not_contain_the_training_dataset(tmp_path: Path) -> None:
    for name in ("RSDD", "GoodsAD"):
        TREES[name][0].write(tmp_path / name)
    trained = [SimpleNamespace(config={"dataset": "RSDD"}, arguments={})]
    for words, expected in ((("industrial",), ["GoodsAD"]), (("RSDD", "GoodsAD"), ["RSDD", "GoodsAD"])):
        tasks = load_several(InferenceArguments(checkpoint="x", dataset=words, data_root=tmp_path), trained)
        assert [data.located.spec.name for data in tasks] == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("industrail",), "neither a folder nor one of the known datasets (MVTec, VisA, "),
        (("RSDD", "industrail"), "nor one of inference.py's groups of them (industrial, medical, all)"),
        (("medical",), "is not under the data root"),
        (("medical", "--data_root", "nothing"), "the data root nothing does not exist"),
        (("RSDD", "Endo", "--metadata", "list.jsonl"), "are for a single --dataset"),
        (("all", "--class_names", "list.jsonl"), "are for a single --dataset"),
        (("a/part", "b/part"), "two datasets have the same name (part, part)"),
        (("RSDD", "a/part", "--reference_shots", "4"), "there are 1 normal images of 'part'"),
    ],
)
def test_datasets_that_cannot_be_evaluated(words: tuple[str, ...], expected: str, clip: Path, tmp_path: Path) -> None:
    TREES["RSDD"][0].write(tmp_path / "RSDD")
    for name in ("a", "b"):
        mvtec([f"{name}/part"]).write(tmp_path)
    (tmp_path / "list.jsonl").write_text("{}", encoding="utf-8")
    assert expected in error_line("inference.py", *options(clip, tmp_path, tmp_path / "out", *words), cwd=tmp_path)
