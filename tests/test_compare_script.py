"""`compare_feedback_loops.py` as a user runs it: table, files, missing and damaged loops, unfair comparisons."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from engine.evaluation.results import METRICS as ALL_METRICS
from engine.evaluation.results import PUBLISHED
from tests.evaluating import compare_feedback_loops, evaluate_checkpoints
from tests.scripts import SIZE, base_arguments, common_arguments, flags, read_csv, run, save, write_world
from utils.errors import UserError

# Folders in the tests are no datasets of the catalog, so that published scores are not reported.
METRICS = [metric for metric in ALL_METRICS if not metric.startswith(PUBLISHED)]

OTHERS = ["unadapted", "base", "cross-attention"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a cross-attention run of another seed from it, and three loops of feedback from it."""
    folder = write_world(tmp_path_factory.mktemp("world"), ("cork", "tile"))
    common = flags(**common_arguments(folder, shot=8, image_lr=0.005))
    once, start = flags(text_epoch=1, image_epoch=2), flags(**base_arguments(folder))
    loops = flags(num_feedback_loops=3, text_epochs_per_loop=1, image_epochs_per_loop=2)
    run("train.py", *common, *once, "--save_path", folder / "base")
    run("train_cross_attention.py", *common, *once, *start, "--seed", 1, "--save_path", folder / "cross")
    run("train_cross_attention_feedback_v2.py", *common, *start, *loops, "--save_path", folder / "feedback")
    return folder


@pytest.fixture(scope="module")
def compared(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with a gap in its loops, 1, 2, 3 and 10, compared with everything; and the log."""
    folder = tmp_path_factory.mktemp("compared") / "run"
    shutil.copytree(world / "feedback", folder)
    change(world / "feedback" / "loop_3_final.pth", scale_projector, folder / "loop_10_final.pth")
    return folder, run("compare_feedback_loops.py", *options_for(world, folder), "--unadapted", apart=True)


def options_for(world: Path, save_path: Path) -> list[object]:
    runs = ["--base_path", world / "base", "--cross_path", world / "cross" / "image_adapter.pth"]
    return ["--save_path", save_path, "--dataset", world / "test", *runs, "--num_workers", 0, "--device", "cpu"]


def compare(world: Path, save_path: Path, dataset: str = "test", **options: Any) -> int:
    """The script's function in this process."""
    return compare_feedback_loops(save_path, str(world / dataset), device="cpu", **options)


@pytest.fixture
def loops(world: Path, tmp_path: Path) -> Path:
    """A copy of the feedback run, to be changed."""
    return shutil.copytree(world / "feedback", tmp_path / "loops")


def change(source: Path, edit: Callable[[dict[str, Any]], None], target: Path | None = None) -> Path:
    """Write a changed checkpoint, to `target` or in place."""
    content = torch.load(source, weights_only=True)
    edit(content)
    torch.save(content, target or source)
    return target or source


def scale_projector(content: dict[str, Any]) -> None:
    """Invert one of the four levels, which changes all metrics."""
    content["image_adapter"]["seg_proj.0.fc.weight"] *= -1


def rows_of(folder: Path) -> list[dict[str, str]]:
    return read_csv(folder / "comparison.csv")


def averages(folder: Path) -> dict[str, dict[str, str]]:
    return {row["model"]: row for row in rows_of(folder) if row["class"] == "average"}


def log_of(folder: Path) -> str:
    return (folder / "comparison.log").read_text(encoding="utf-8")


def page_of(folder: Path) -> str:
    return (folder / "comparison.md").read_text(encoding="utf-8")


def assert_printed(printed: Sequence[str], expected: Sequence[float]) -> None:
    """Values of the CSV file, which have six decimals, are printed with two."""
    assert all(len(value.partition(".")[2]) == 2 for value in printed)
    assert [float(value) for value in printed] == pytest.approx(expected, rel=0, abs=0.005001)


def test_table_and_files_contain_every_model_in_order(compared: tuple[Path, str]) -> None:
    folder, errors = compared
    models = [*OTHERS, "Loop 1", "Loop 2", "Loop 3", "Loop 10"]
    rows = rows_of(folder)
    assert [row["model"] for row in rows] == [model for model in models for _ in range(3)]
    assert [row["class"] for row in rows] == ["cork", "tile", "average"] * len(models)
    lines = errors.splitlines()
    top = lines.index(next(line for line in lines if line.startswith("Loop ") and "Pixel AUROC" in line))
    assert lines[top].split("  ")[0] == "Loop"
    header = "Pixel AUROC  Pixel AP  Pixel F1  AUPRO  AUPIMO  Image AUROC  Image AP  Image F1"
    assert " ".join(lines[top].split()[1:]) == " ".join(header.split())
    found = averages(folder)
    for line, model in zip(lines[top + 2 :], models, strict=False):
        assert line.startswith(model)
        assert_printed(line.removeprefix(model).split(), [float(found[model][metric]) for metric in METRICS])
        assert f"| {model} | {' | '.join(line.removeprefix(model).split())} |" in page_of(folder)
    with Image.open(folder / "comparison.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400
    assert not list(folder.glob(".*.tmp"))


def test_best_and_improvement_lines_follow_from_the_figures(compared: tuple[Path, str]) -> None:
    folder, errors = compared
    found = {model: {metric: float(row[metric]) for metric in METRICS} for model, row in averages(folder).items()}
    loops = [model for model in found if model.startswith("Loop")]
    for metric, label in (("pixel_auroc", "Pixel AUROC"), ("image_auroc", "Image AUROC")):
        (line,) = (line for line in errors.splitlines() if line.startswith(f"Best {label}: "))
        best, value = re.fullmatch(rf"Best {label}: (Loop \d+) \((.+)\)", line).groups()
        assert_printed([value], [found[best][metric]])
        # Of loops that are equal but for rounding, any.
        assert found[best][metric] == pytest.approx(max(found[model][metric] for model in loops), rel=0, abs=2e-6)
        assert f"- {line}" in page_of(folder)
    labels = ("Pixel AUROC", "Pixel AP", "Pixel F1", "AUPRO", "AUPIMO", "Image AUROC", "Image AP", "Image F1")
    for start in ("Loop 1", *OTHERS):
        begin = f"Improvement from {start} to Loop 10: "
        (line,) = (line for line in errors.splitlines() if line.startswith(begin))
        gains = re.fullmatch(
            ", ".join(rf"{label} ([+-][\d.]+)" for label in labels) + " percentage points", line[len(begin) :]
        )
        assert_printed(gains.groups(), [found["Loop 10"][metric] - found[start][metric] for metric in METRICS])
        assert f"- {line}" in page_of(folder)
    assert found["Loop 10"] != found["Loop 3"]


def test_values_equal_those_of_inference(world: Path, compared: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = compared
    rows = rows_of(folder)
    files = {
        "base": world / "base" / "image_adapter.pth",
        "cross-attention": world / "cross" / "image_adapter.pth",
        "Loop 2": folder / "loop_2_final.pth",
    }
    for model, file in files.items():
        (evaluation,) = evaluate_checkpoints(str(file), str(world / "test"), output_dir=tmp_path, device="cpu")
        mine = [row for row in rows if row["model"] == model and row["class"] != "average"]
        for row, theirs in zip(mine, evaluation.classes, strict=True):
            assert (row["class"], row["images"]) == (theirs.class_name, str(theirs.images))
            assert [float(row[metric]) for metric in METRICS] == pytest.approx(
                [theirs.values[metric] for metric in METRICS], abs=2e-6
            )


@pytest.mark.parametrize(("deleted", "planned", "missing"), [(3, 3, "loop_3_final.pth"), (None, 5, "loop_4_final.pth")])
def test_missing_loops_are_a_warning(world: Path, loops: Path, deleted: int | None, planned: int, missing: str) -> None:
    """Also those that a resumed run has planned."""
    if deleted:
        (loops / f"loop_{deleted}_final.pth").unlink()
    arguments = json.loads((loops / "args.json").read_text(encoding="utf-8"))
    (loops / "args.json").write_text(json.dumps({**arguments, "num_feedback_loops": planned}), encoding="utf-8")
    assert compare(world, loops) == 0
    assert f"Missing in {loops}: {missing}" in log_of(loops)
    assert f"(the run planned {planned} loops)" in page_of(loops)


@pytest.mark.draws
def test_a_single_loop_has_a_report_and_a_figure(world: Path, loops: Path) -> None:
    for number in (1, 3):
        (loops / f"loop_{number}_final.pth").unlink()
    assert compare(world, loops, base_path=world / "base") == 0
    assert "Improvement from Loop" not in page_of(loops)
    assert "Improvement from base to Loop 2" in page_of(loops)
    with Image.open(loops / "comparison.png") as picture:
        assert min(picture.size) > 400


def test_another_det_score_is_named_everywhere(world: Path, loops: Path, tmp_path: Path) -> None:
    options = {"unadapted": True, "report": True, "output_dir": tmp_path}
    compare(world, loops, **options)
    published = averages(tmp_path)
    assert "det score" not in page_of(tmp_path) and "--det_score" not in (tmp_path / "report.html").read_text("utf-8")
    compare(world, loops, **options, det_score="difference")
    asked_for = averages(tmp_path)
    assert {row["det_score"] for row in published.values()} == {"abnormal"}
    assert {row["det_score"] for row in asked_for.values()} == {"difference"}
    pixel = [metric for metric in METRICS if "image" not in metric]
    assert all(published[name][metric] == asked_for[name][metric] for name in published for metric in pixel)
    said = "image scores with det score difference"
    assert said in page_of(tmp_path) and said in log_of(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "--det_score difference" in page and re.search(r"Det score\W.{0,40}difference", page, re.DOTALL)


@pytest.fixture
def with_normals(world: Path, loops: Path, tmp_path: Path) -> Path:
    """A copy of the dataset whose classes have train/good; one loop is enough to be tested on it."""
    for number in (1, 3):
        (loops / f"loop_{number}_final.pth").unlink()
    data = shutil.copytree(world / "test", tmp_path / "test")
    rng = np.random.default_rng(8)
    for name in ("cork", "tile"):
        for index in range(4):
            save(data / name / "train" / "good" / f"{index}.png", rng.integers(60, 120, (SIZE, SIZE, 3)))
    return data


def heatmaps_in(page: Path) -> set[str]:
    """The heatmaps of a report, as their addresses in it."""
    text = page.read_text(encoding="utf-8")
    return set(re.findall(r'<img src="([^"]+)" alt="[^"]+: (?:unadapted|Loop \d)"', text))


def test_references_change_table_and_heatmaps_and_are_named(loops: Path, with_normals: Path) -> None:
    compare_feedback_loops(loops, str(with_normals), unadapted=True, report=True, device="cpu")
    before = {path.name: path.read_bytes() for path in loops.glob("comparison.*") if path.suffix != ".log"}
    choice = {"reference_shots": 2, "reference_weight": 0.7}
    compare_feedback_loops(loops, str(with_normals), unadapted=True, report=True, device="cpu", **choice)
    said = log_of(loops)
    assert "in percent, compared with normal references" in said
    assert {name: (loops / name).read_bytes() for name in before} == before

    found = {(row["model"], row["class"]): row for row in read_csv(loops / "comparison_2_references.csv")}
    zero_shot = {(row["model"], row["class"]): row for row in rows_of(loops)}
    assert found.keys() == zero_shot.keys() and all(found[key] != zero_shot[key] for key in found)
    (evaluation,) = evaluate_checkpoints(loops / "loop_2_final.pth", with_normals, output_dir=loops / "out", **choice)
    for theirs in evaluation.classes:
        mine = [float(found["Loop 2", theirs.class_name][metric]) for metric in METRICS]
        assert mine == pytest.approx([theirs.values[metric] for metric in METRICS], abs=2e-6)

    plain, compared = loops / "report.html", loops / "report_2_references.html"
    assert heatmaps_in(plain) and heatmaps_in(compared) and not heatmaps_in(plain) & heatmaps_in(compared)
    assert "normal references" not in plain.read_text(encoding="utf-8")
    page = compared.read_text(encoding="utf-8")
    assert "--reference_shots 2 --reference_weight 0.7" in page and "zero-shot" not in page
    assert "2 normal images of each class of the dataset" in page and "distance to normal references" in page
    written = (loops / "comparison_2_references.md").read_text(encoding="utf-8")
    assert "compared with normal references" in written and "`comparison_2_references.csv`" in written


def test_a_damaged_loop_is_unreadable_and_the_others_are_evaluated(world: Path, loops: Path) -> None:
    """Damage of a loop's file is found in reading it or in building the model."""
    file = loops / "loop_2_final.pth"
    file.write_bytes(file.read_bytes()[:5000])
    errors = run("compare_feedback_loops.py", *options_for(world, loops), status=1)
    assert "Traceback" not in errors
    assert any(line.split() == ["Loop", "2", *["unreadable"] * len(METRICS)] for line in errors.splitlines())
    assert "| Loop 2 | unreadable |" in page_of(loops)
    found = averages(loops)
    assert list(found) == ["base", "cross-attention", "Loop 1", "Loop 2", "Loop 3"]
    assert {found["Loop 2"][metric] for metric in METRICS} == {"unreadable"}
    assert float(found["Loop 3"]["pixel_auroc"]) > 0
    assert "Improvement from Loop 1 to Loop 3" in errors


def reshape(content: dict[str, Any]) -> None:
    content["image_adapter"]["det_proj.fc.weight"] = torch.zeros(8, 8)


def spoil(content: dict[str, Any]) -> None:
    content["image_adapter"]["det_proj.fc.weight"][0, 0] = float("nan")


def other_weights(content: dict[str, Any]) -> None:
    content["config"]["model"]["weights_digest"] = "0" * 32


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (reshape, "det_proj.fc.weight"),
        (spoil, "not finite"),
        (lambda content: content.pop("image_cross_attn"), "no image_cross_attn"),
        (lambda content: content["config"].pop("model"), "config"),
        (lambda content: content["config"]["cross_attention"].update(new_choice=1), "config"),
        (lambda content: content.update(config=None), "cross_attention"),
        (lambda content: content.clear(), "not a checkpoint"),
        (other_weights, "was trained on other weights"),
    ],
)
def test_kinds_of_damage(world: Path, loops: Path, edit: Callable[[dict[str, Any]], None], reason: str) -> None:
    change(loops / "loop_2_final.pth", edit)
    assert compare(world, loops) == 1
    assert averages(loops)["Loop 2"]["pixel_auroc"] == "unreadable"
    assert averages(loops)["Loop 3"]["pixel_auroc"] != "unreadable"
    line = next(line for line in page_of(loops).splitlines() if "Loop 2 is unreadable: " in line)
    assert reason in line


def test_only_damaged_loops(world: Path, loops: Path) -> None:
    for number in (1, 2, 3):
        (loops / f"loop_{number}_final.pth").write_bytes(b"")
    assert compare(world, loops, unadapted=True) == 1
    assert list(averages(loops)) == ["Loop 1", "Loop 2", "Loop 3"]
    assert "Best Pixel AUROC: n/a" in log_of(loops)
    assert "No checkpoint can be read" in log_of(loops)
    assert compare(world, loops, base_path=world / "base") == 1
    assert float(averages(loops)["base"]["pixel_auroc"]) > 0


def test_unfair_comparisons_are_reported_with_both_values(compared: tuple[Path, str]) -> None:
    folder, errors = compared
    for sentence in (
        "Unfair comparison: different optimizer steps of the image side (Loop 10 48, base 16)",
        "Unfair comparison: different seed (Loop 10 0, cross-attention 1)",
        "Unfair comparison: different optimizer steps of the text side (Loop 10 16, cross-attention 8)",
    ):
        assert sentence in errors
        assert sentence in page_of(folder)
    assert "different seed (Loop 10 0, base" not in errors
    assert "different training data" not in errors
    assert "different seed (Loop 10 0, Loop" not in errors


CONTINUED = {"text": 16, "image": 48}


@pytest.mark.parametrize(
    ("config", "steps", "sentence"),
    [
        ({}, CONTINUED, None),
        ({"metadata_digest": "0" * 64}, CONTINUED, "with 8 images per class, base train (image list 000000000000)"),
        ({"training_mode": "full_shot", "shot": None}, CONTINUED, "full_shot"),
        ({"seed": 7}, CONTINUED, "different seed (Loop 3 0, base 7)"),
        ({"arguments": {"dataset": "train", "val_fraction": 0.25}}, CONTINUED, "held out (Loop 3 0.0, base 0.25)"),
        ({}, {"text": 16, "image": None}, "different optimizer steps of the image side? (Loop 3 48, base unknown)"),
        ({}, None, "different optimizer steps of the text side? (Loop 3 16, base unknown)"),
    ],
)
def test_a_base_with_equal_data_seed_and_steps_is_fair(
    world: Path, loops: Path, tmp_path: Path, config: Mapping[str, Any], steps: Mapping[str, Any], sentence: str | None
) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["steps"] = steps
        content["config"].update(config)

    base = change(world / "base" / "image_adapter.pth", edit, tmp_path / "base.pth")
    compare(world, loops, base_path=base)
    assert ("nfair comparison" in page_of(loops)) == (sentence is not None)
    if sentence is not None:
        assert sentence in page_of(loops)
        assert sentence in log_of(loops)


def test_testing_on_training_images_is_a_warning(world: Path, loops: Path, tmp_path: Path) -> None:
    compare(world, loops, dataset="train", output_dir=tmp_path / "out")
    assert "NOT ZERO-SHOT" in log_of(tmp_path / "out")
    files = {f"comparison.{ending}" for ending in ("csv", "md", "png", "log")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert not (loops / "comparison.csv").exists()


def test_a_base_that_does_not_fit_is_a_user_error(world: Path, loops: Path, tmp_path: Path) -> None:
    other = change(world / "base" / "image_adapter.pth", other_weights, tmp_path / "other.pth")
    misfit = change(world / "base" / "image_adapter.pth", reshape, tmp_path / "misfit.pth")
    for options, words in (
        ({"base_path": other}, "trained on other weights"),
        ({"base_path": misfit}, "det_proj.fc.weight"),
    ):
        with pytest.raises(UserError, match=words):
            compare(world, loops, **options)
    assert not (loops / "comparison.csv").exists()


def test_wrong_clip_weights_are_not_reported_as_damaged_loops(world: Path, loops: Path, tmp_path: Path) -> None:
    state = load_file(world / "clip" / "open_clip_model.safetensors")
    torch.save({**state, "text_projection": -state["text_projection"]}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="--clip_weights"):
        compare(world, loops, clip_weights=str(tmp_path / "other.pt"))


def test_a_cross_attention_checkpoint_given_as_base_is_an_error(world: Path, loops: Path, tmp_path: Path) -> None:
    crossed = world / "cross" / "image_adapter.pth"
    compare(world, loops, base_path=crossed)
    assert "The row base has the wrong kind of model" in log_of(loops)

    def leave_out(content: dict[str, Any]) -> None:
        content["config"]["cross_attention"].update(text_cross_attn_weight=0.0, image_cross_attn_weight=0.0)

    # A base continued by the same script is the fair control.
    compare(world, loops, base_path=change(crossed, leave_out, tmp_path / "continued.pth"), output_dir=tmp_path / "out")
    assert "wrong kind of model" not in log_of(tmp_path / "out")
