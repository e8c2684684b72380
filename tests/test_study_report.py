"""The result files of complete and partial studies."""

import csv
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config.tools import StudyArguments
from engine.study.evaluations import read_evaluation, read_facts
from engine.study.fairness import argument_differences, check_fairness
from engine.study.plan import Plan, make_plan
from engine.study.report import literature_table, write_study_report
from engine.study.results import Results, metric_title, read_results
from engine.study.run import run_study
from engine.study.runner import run_cells
from engine.study.study import read_study
from tests.study_world import write_world
from utils.errors import UserError

LITERATURE = """method,train,test,pixel_ap,image_auroc,source
Somebody,a,b,46.5,92.9,"a table, page 3"
Nobody,x,y,1.0,1.0,elsewhere
"""
RESCORED = """model,dataset,class,images,anomalous,det_score,aupro_limit,map_size,pixel_ap,published_image_auroc
Mapper,{test},cork,4,2,,0.3,model,1.0,2.0
Mapper,{test},average,4,2,,0.3,model,56.789123,n/a
"""


def run(folder: Path, **changes: Any) -> Plan:
    study = read_study(write_world(folder, **changes))
    plan = make_plan(study, folder / "studies" / study.name)
    run_cells(plan, 4)
    return plan


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Six seeds, enough for a verdict on one arm; three test datasets in two pairs."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "literature.csv").write_text(LITERATURE, encoding="utf-8")
    return run(
        folder,
        **{
            "study.seeds": [0, 1, 2, 3, 4, 5],
            "study.pairs": [{"train": "a", "test": ["b", "c"]}, {"train": "b", "test": ["a"]}],
            "study.literature": (folder / "literature.csv").as_posix(),
            "study.title": "A <study> & its title",
            "arms.untrained.compare": False,
            "arms.tested.compare": False,
            "arms.better.note": "Gains a point in each epoch.",
        },
    )


@pytest.fixture(scope="module")
def files(plan: Plan) -> dict[str, str]:
    write_study_report(plan, ["python", "run_study.py", "a study.toml"])
    return {name: (plan.folder / f"study.{name}").read_text(encoding="utf-8") for name in ("csv", "md", "html")}


def test_the_csv_contains_every_seed_class_and_metric(plan: Plan, files: dict[str, str]) -> None:
    rows = list(csv.DictReader(files["csv"].splitlines()))
    assert len(rows) == 4 * 6 * 3 * 2, "arms, seeds, test datasets, classes"
    row = next(
        r for r in rows if (r["arm"], r["seed"], r["train"], r["test"], r["class"]) == ("better", "3", "a", "c", "felt")
    )
    step = next(step for step in plan.by_key["", "better", 3, 0].steps if step.test == "c")
    assert float(row["pixel_ap"]) == pytest.approx(read_evaluation(step.path)[1].values["pixel_ap"], abs=1e-6)
    assert row["image_auroc"] == "n/a"


def test_values_are_means_over_classes_datasets_and_pairs(plan: Plan) -> None:
    results = read_results(plan)
    (setting,) = results.settings
    better = next(arm for arm in setting.arms if arm.name == "better")
    by_hand = []
    for seed in range(6):
        of_pairs = []
        for number, tests in ((0, ("b", "c")), (1, ("a",))):
            steps = plan.by_key["", "better", seed, number].steps
            of_tests = [
                np.mean([row.values["pixel_ap"] for row in read_evaluation(step.path)])
                for step in steps
                if step.test in tests
            ]
            of_pairs.append(np.mean(of_tests))
        by_hand.append(np.mean(of_pairs))
    mean, spread, count = better.mean("pixel_ap")
    assert (mean, spread, count) == (pytest.approx(np.mean(by_hand)), pytest.approx(np.std(by_hand, ddof=1)), 6)
    # One class has no image AUROC: the mean is over the other.
    assert better.mean("image_auroc")[2] == 6
    assert better.verdicts["pixel_ap"].outcome == "better"
    assert better.verdicts["pixel_ap"].p == 2 / 2**6
    assert better.summary.startswith("Pixel AP: better, +")
    assert not next(arm for arm in setting.arms if arm.name == "plain").verdicts


def test_the_page_and_the_text(files: dict[str, str]) -> None:
    for text in (files["md"], files["html"]):
        for part in ("Pixel AP: better, +", "95 % interval", "optimizer steps, only", "12 compared with 6"):
            assert part in text, part
    page = files["html"]
    assert "a table, page 3" in page and "Somebody (reported elsewhere)" in page and "Nobody" not in page
    assert "A &lt;study&gt; &amp; its title" in page
    assert "Gains a point in each epoch." in page
    assert "python run_study.py &#39;a study.toml&#39;" in page
    assert page.count("data:image/svg+xml") == 2 * 2, "a forest plot for each metric, light and dark"
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page) and "<script" not in page, "loads nothing"
    assert "rgba(46, 160, 67, 0.60)" in page


def test_results_of_other_methods(tmp_path: Path) -> None:
    """Of the pairs of the study: reported elsewhere, and rescored here if trained on the same data or on none."""
    (tmp_path / "literature.csv").write_text(LITERATURE, encoding="utf-8")
    rescored = []
    for test, train in (("c", ""), ("a", "b"), ("b", "x"), ("x", "")):
        file = tmp_path / f"rescored_{test}.csv"
        file.write_text(RESCORED.format(test=test), encoding="utf-8")
        rescored.append({"file": file.as_posix(), "train": train})
    pairs = [{"train": "a", "test": ["b", "c"]}, {"train": "b", "test": ["a"]}]
    changes = {"study.pairs": pairs, "study.rescored": rescored, "study.metrics": ["pixel_ap", "published_image_auroc"]}
    literature = (tmp_path / "literature.csv").as_posix()
    study = read_study(write_world(tmp_path, **changes, **{"study.literature": literature}))
    results = Results(make_plan(study, tmp_path), study.metrics, (), [], [])
    _, rows = literature_table(results)
    assert [row[:5] for row in rows] == [
        ["Somebody (reported elsewhere)", "a", "b", "46.5", "92.9"],
        ["Mapper (rescored here)", "a", "c", "56.79", "–"],
        ["Mapper (rescored here)", "b", "a", "56.79", "–"],
    ]


def test_one_verdict_on_several_metrics(plan: Plan) -> None:
    study = read_study(
        write_world(
            plan.folder.parent.parent,
            **{
                "study.seeds": list(range(6)),
                "study.verdict_metrics": ["pixel_ap", "image_auroc"],
                "study.metrics": ["pixel_ap", "image_auroc"],
            },
        )
    )
    results = read_results(make_plan(study, plan.folder))
    arms = {arm.name: arm for arm in results.settings[0].arms}
    # Three arms and two metrics are one family of six: with six seeds nothing can be shown.
    assert arms["better"].verdicts["pixel_ap"].p_holm == pytest.approx(6 * 2 / 2**6)
    assert arms["better"].summary == "not decided in Pixel AP, Image AUROC"
    assert "for 6 comparisons" in arms["better"].verdicts["pixel_ap"].reason


def test_fairness(plan: Plan) -> None:
    fairness = check_fairness(read_results(plan))
    rows = {arm: dict(zip(fairness.facts, findings, strict=True)) for arm, findings in fairness.rows}
    assert {rows["better"][fact] for fact in ("seed", "training data", "test arguments", "test images")} == {"same"}
    assert rows["better"]["optimizer steps, only"] == "12 compared with 6", "with those of the run it started from"
    assert rows["tested"]["test arguments"] == "--bonus 1 compared with none"
    assert rows["untrained"]["training data"] == "not trained compared with a, not trained compared with b"
    assert fairness.unfair == ["better differs in optimizer steps, only: 12 compared with 6"]


def test_facts_in_a_checkpoint_have_priority(tmp_path: Path) -> None:
    plan = run(tmp_path, **{"study.seeds": [0]})
    cell = plan.by_key["", "plain", 0, 0]
    tests = {"test arguments": "none", "test images": "12 (6 anomalous)"}
    assert read_facts(cell) == {"training data": "a", "seed": "0", "optimizer steps, only": "6", **tests}
    config = {"dataset": "A", "shot": 4, "metadata_digest": "abc", "seed": 9}
    torch.save({"config": config, "steps": {"text": 7, "image": None}}, cell.folder / "run" / "model.json")
    assert read_facts(cell) == {
        "training data": "A",
        "images of each class": "4",
        "digest of the image list": "abc",
        "seed": "9",
        "optimizer steps, text": "7",
        **tests,
    }


def test_different_arguments(plan: Plan) -> None:
    header, rows = argument_differences(read_results(plan))
    assert header == ["Argument", "untrained", "plain", "better", "tested"]
    found = {row[0]: row[1:] for row in rows}
    assert found["gain"] == ["–", "0.0", "1.0", "–"]
    assert found["starts from"] == ["nothing", "nothing", "plain", "better"]
    assert found["test: bonus"] == ["–", "–", "–", "1"]
    assert not {"seed", "save_path", "dataset", "start"} & set(found)


def test_a_partial_study_is_reported(tmp_path: Path) -> None:
    file = write_world(tmp_path, **{"study.seeds": [0, 1, 2]})
    arguments = StudyArguments.of(study=file, save_path=tmp_path / "studies", report_only=True)
    assert run_study(arguments) == 1, "nothing is there"
    page = tmp_path / "studies" / "world" / "study.html"
    assert "No evaluation is finished." in page.read_text(encoding="utf-8")
    plan = run(tmp_path, **{"study.seeds": [0, 1]})
    # A seed of which one arm is done, another that lost its figures, and a class that one arm lacks.
    step = plan.by_key["", "better", 1, 0].steps[1]
    step.marker.unlink()
    write_world(tmp_path, **{"study.seeds": [0, 1, 2]})
    assert run_study(arguments) == 1
    text = (page.with_suffix(".md")).read_text(encoding="utf-8")
    assert "better: no results for seed 1: b, seed 2: b" in text
    results = read_results(make_plan(read_study(file), plan.folder))
    arms = {arm.name: arm for arm in results.settings[0].arms}
    assert arms["better"].verdicts["pixel_ap"].seeds == (0,)
    assert arms["plain"].mean("pixel_ap")[2] == 2
    assert arms["tested"].verdicts["pixel_ap"].seeds == (0, 1)
    # A dataset that nobody was tested on yet keeps nothing from being said of the others.
    more = write_world(tmp_path, **{"study.pairs": [{"train": "a", "test": ["b", "c"]}]})
    arms = {arm.name: arm for arm in read_results(make_plan(read_study(more), plan.folder)).settings[0].arms}
    assert arms["plain"].mean("pixel_ap")[2] == 2


def test_every_arm_to_compare_with_has_a_report(tmp_path: Path) -> None:
    """Exchanging the arms changes the sign of a gain; each report corrects for its own comparisons."""
    plan = run(
        tmp_path,
        **{
            "study.also_compare_with": ["better"],
            "study.seeds": [0, 1, 2, 3, 4, 5],
            "arms.untrained.compare": False,
            "arms.tested.compare": False,
        },
    )
    results = write_study_report(plan, ["python"])
    assert results.plan.study.compare_with == "plain"
    text = (plan.folder / "study_against_better.md").read_text(encoding="utf-8")
    for said in ("**plain**: Pixel AP: worse, -", "Compared with: better", "the difference from better"):
        assert said in text, said
    rows = list(csv.DictReader((plan.folder / "study_verdicts.csv").read_text(encoding="utf-8").splitlines()))
    verdicts = {(row["arm"], row["compared_with"]): row for row in rows if row["metric"] == "pixel_ap"}
    assert set(verdicts) == {("better", "plain"), ("plain", "better")}
    assert [row["verdict"] for row in verdicts.values()] == ["better", "worse"]
    gains = [float(row["gain"]) for row in verdicts.values()]
    assert gains[0] == pytest.approx(-gains[1]) and gains[0] > 1
    first = (plan.folder / "study.md").read_text(encoding="utf-8")
    assert "**better**: Pixel AP: better, +" in first
    assert "study_against_better.html" in first


def test_settings_are_separate_studies(tmp_path: Path) -> None:
    plan = run(tmp_path, **{"study.settings": {"short": {"epochs": 1}, "long": {"epochs": 3}}, "study.arguments": {}})
    results = write_study_report(plan, ["python"])
    assert [setting.name for setting in results.settings] == ["short", "long"]
    means = [
        next(arm.mean("pixel_ap")[0] for arm in setting.arms if arm.name == "plain") for setting in results.settings
    ]
    assert means[0] < means[1]
    page = (plan.folder / "study.html").read_text(encoding="utf-8")
    assert "<h2>short</h2>" in page
    assert "better, long" in page, "in the fairness table"
    assert not results.missing


def test_the_last_model_of_a_csv_is_used(tmp_path: Path) -> None:
    lines = [
        "model,dataset,class,images,anomalous,x",
        "epoch 1,d,cup,4,2,1.0",
        "epoch 1,d,average,4,2,1.0",
        "epoch 2,d,cup,4,2,3.5",
        "epoch 2,d,nut,4,2,n/a",
        "epoch 2,d,average,4,2,9.0",
    ]
    (tmp_path / "a.csv").write_text("\n".join(lines), encoding="utf-8")
    cup, nut = read_evaluation(tmp_path)
    assert (cup.class_name, cup.values, cup.counts) == ("cup", {"x": 3.5}, ("4", "2"))
    assert math.isnan(nut.values["x"])
    (tmp_path / "a.csv").write_text("image,score\n", encoding="utf-8")
    assert read_evaluation(tmp_path) == []


def test_missing_literature(tmp_path: Path) -> None:
    file = write_world(tmp_path, **{"study.literature": "no/such.csv"})
    with pytest.raises(UserError, match=r"no/such\.csv"):
        run_study(StudyArguments.of(study=file, save_path=tmp_path / "studies", report_only=True))


def test_metric_titles() -> None:
    titles = {"pixel_auroc": "Pixel AUROC", "aupro": "AUPRO", "image_f1_max": "Image F1-max", "others": "Others"}
    assert {name: metric_title(name) for name in titles} == titles
