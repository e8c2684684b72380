"""A run's data location is the default of every script that tests, draws or resumes the run."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from engine.data.task import load_task
from engine.runtime.run_folder import arguments_in
from engine.training.base import train_base
from engine.training.feedback import train_feedback
from tests.evaluating import compare_feedback_loops, evaluate_checkpoints
from tests.scripts import small_runs, write_dataset, write_world
from utils.errors import UserError


@pytest.fixture
def moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MPDD in a separate data root; the working directory is another folder."""
    write_dataset(tmp_path / "root" / "MPDD", classes=("tubes", "connector"), count=3)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "root"


def test_the_data_root_of_the_run_is_the_default(moved: Path) -> None:
    run = {"dataset": "VisA", "data_root": moved.as_posix()}
    assert load_task("MPDD", run=run).located.root == moved / "MPDD"
    with pytest.raises(UserError, match="elsewhere_else"):
        load_task("MPDD", moved / "elsewhere_else", run=run)


def test_metadata_and_class_names_of_the_run_apply_to_its_dataset_only(moved: Path, tmp_path: Path) -> None:
    names, listed = tmp_path / "names.json", tmp_path / "list.jsonl"
    names.write_text(json.dumps({"tubes": "copper pipe"}), encoding="utf-8")
    row = {"image_path": "tubes/test/good/000.png", "label": 0, "class_name": "tubes"}
    listed.write_text(json.dumps(row), encoding="utf-8")
    run = {"dataset": "mpdd", "data_root": str(moved), "metadata": str(listed), "class_names": str(names)}
    data = load_task("MPDD", run=run)
    assert (len(data.records), data.names) == (1, {"tubes": "copper pipe"})
    other = load_task("MPDD", run={**run, "dataset": "VisA"})
    assert len(other.records) == 12 and other.names["tubes"] == "metal tube"


def test_missing_paths_are_ignored_with_a_message(moved: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    shutil.copytree(moved / "MPDD", Path("data") / "MPDD")
    run = {"dataset": "MPDD", "data_root": "/no/such/root", "metadata": "/no/such/list"}
    assert load_task("MPDD", run=run).located.root == Path("data") / "MPDD"
    assert all(f"/no/such/{name} no longer exists" in caplog.text for name in ("root", "list"))


def test_a_dataset_outside_the_data_root_of_the_run_is_found_in_the_default_root(moved: Path) -> None:
    write_dataset(Path("data") / "BTAD", classes=("01",), count=2)
    for kind, other in (("good", "ok"), ("spot", "ko")):
        (Path("data") / "BTAD" / "01" / "test" / kind).rename(Path("data") / "BTAD" / "01" / "test" / other)
    (Path("data") / "BTAD" / "01" / "ground_truth" / "spot").rename(Path("data/BTAD/01/ground_truth/ko"))
    for mask in Path("data/BTAD/01/ground_truth/ko").iterdir():
        mask.rename(mask.with_name(mask.name.replace("_mask", "")))
    assert load_task("BTAD", run={"data_root": str(moved)}).located.root == Path("data") / "BTAD"


def test_testing_comparing_and_resuming_find_the_data(
    moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = write_world(tmp_path / "world", ("cork",), count=2)
    base, feedback = small_runs(world, dataset="MPDD", data_root=moved)
    train_base(base)
    train_feedback(feedback)
    assert evaluate_checkpoints(str(base.save_path / "image_adapter.pth"), None, device="cpu")[0].dataset == "MPDD"
    assert compare_feedback_loops(feedback.save_path, "MPDD", base_path=base.save_path, device="cpu") == 0
    train_base(type(base).of(**{**vars(base), "data_root": None, "image_epoch": 2}))
    assert (base.save_path / "image_adapter_2.pth").is_file()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not valid JSON"),
        (b"{}", "it has no 'dataset'"),
        (b'{"dataset": "VisA", "data_root": 5}', "data_root is 5, expected text"),
        (b'{"dataset": "VisA", "num_feedback_loops": NaN}', "nan"),
    ],
)
def test_damaged_arguments_are_ignored_with_a_message(
    content: bytes, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "args.json").write_bytes(content)
    assert arguments_in(tmp_path) == {}
    assert len(caplog.records) == 1 and "\n" not in caplog.messages[0]
    assert str(tmp_path / "args.json") in caplog.messages[0] and words in caplog.messages[0]
