"""Cells, commands and digests of a study file, and the files in `studies/`."""

import importlib
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from engine.study.plan import Plan, make_plan
from engine.study.run import describe_plan
from engine.study.study import read_study
from tests.documented import parsing
from tests.study_world import write_world
from utils.arguments import Parser, command_options
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
STUDIES = sorted((ROOT / "studies").glob("*.toml"))


def plan_of(file: Path, folder: Path = ROOT / "runs" / "nowhere") -> Plan:
    study = read_study(file)
    return make_plan(study, folder / study.name)


def folders(plan: Plan) -> dict[str, str]:
    """The folder of the first seed's cell by arm."""
    seed = plan.study.seeds[0]
    return {arm: cell.folder.name for (_, arm, s, _), cell in plan.by_key.items() if s == seed}


def test_cells_and_their_commands(tmp_path: Path) -> None:
    plan = plan_of(write_world(tmp_path))
    assert len(plan.cells) == 1 + 3 * 2, "the untrained arm has no seed"
    cells = {arm: plan.by_key["", arm, 1, 0] for arm in plan.study.arms}
    train, test = (step.command for step in cells["better"].steps)
    plain = f"runs/nowhere/world/cells/{cells['plain'].folder.name}"
    better = f"runs/nowhere/world/cells/{cells['better'].folder.name}"
    options = f"--epochs 2 --gain 1.0 --start {plain}/run/model.json --dataset a --seed 1 --save_path {better}/run"
    assert train == (f"{tmp_path.as_posix()}/train.py", *options.split())
    assert test[:5] == (f"{tmp_path.as_posix()}/test.py", "--checkpoint", f"{better}/run/model.json", "--dataset", "b")
    assert "none" in cells["untrained"].steps[0].command
    # What is only tested tests the run of the arm it starts from, with arguments of its own.
    (tested,) = cells["tested"].steps
    assert tested.command[1:5] == ("--bonus", "1", "--checkpoint", f"{better}/run/model.json")


def test_only_changed_cells_are_run_again(tmp_path: Path) -> None:
    before = folders(plan_of(write_world(tmp_path)))
    common = folders(plan_of(write_world(tmp_path, **{"study.arguments": {"epochs": 3}})))
    assert all(common[arm] != before[arm] for arm in ("plain", "better", "tested"))
    assert common["untrained"] == before["untrained"]
    # What others start from counts for them.
    of_start = folders(plan_of(write_world(tmp_path, **{"arms.plain.arguments": {"gain": 0.5}})))
    assert of_start["better"] != before["better"]
    of_one = folders(plan_of(write_world(tmp_path, **{"arms.better.arguments": {"gain": 2.0}})))
    assert of_one["plain"] == before["plain"]
    assert of_one["better"] != before["better"]
    # More to test leaves trainings where they are; what an evaluation is asked for is in its own name.
    more = plan_of(write_world(tmp_path, **{"study.pairs": [{"train": "a", "test": ["b", "c"]}]}))
    assert folders(more) == before
    asked = plan_of(write_world(tmp_path, **{"study.test_arguments": {"bonus": 2}}))
    assert folders(asked)["plain"] == before["plain"]
    places = [plan.by_key["", "plain", 0, 0].steps[1].path for plan in (more, asked)]
    assert places[0] != places[1]


def test_options_of_a_command_and_their_order(tmp_path: Path) -> None:
    options = command_options({"flag": True, "off": False, "list": [1, 2], "text": "a b", "number": 0.5})
    assert options == ["--flag", "--list", "1", "2", "--text", "a b", "--number", "0.5"]
    one = folders(plan_of(write_world(tmp_path, **{"study.arguments": {"epochs": 2, "delay": 0.0}})))
    other = folders(plan_of(write_world(tmp_path, **{"study.arguments": {"delay": 0.0, "epochs": 2, "fail": False}})))
    assert one == other


def test_settings_pairs_and_launchers(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "study.settings": {"short": {"epochs": 1}, "long": {"epochs": 9}},
        "study.pairs": [{"train": "a", "test": ["b"]}, {"train": "b", "test": ["a", "c"], "arguments": {"delay": 0.5}}],
        "arms.plain.launch": ["-m", "accelerate.commands.launch", "--num_processes", "2"],
        "arms.plain.gpus": 2,
    }
    plan = plan_of(write_world(tmp_path, **changes))
    assert len(plan.cells) == 1 + 3 * 2 * 2 * 2
    words = plan.by_key["long", "plain", 1, 1].training.command
    assert words[:4] == ("-m", "accelerate.commands.launch", "--num_processes", "2")
    assert words[5:11] == ("--epochs", "9", "--delay", "0.5", "--dataset", "b")
    untrained = next(cell for cell in plan.cells if cell.arm_name == "untrained")
    assert [step.test for step in untrained.steps] == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study.seeds": []}, "seeds is empty"),
        ({"study.seeds": [0, 0]}, "twice"),
        ({"study.seeds": ["0"]}, "expected a whole number"),
        ({"study.compare_with": "nobody"}, "compare with, 'nobody', is not"),
        ({"study.nonsense": 1}, "unknown key 'nonsense'"),
        ({"study.test_script": None}, "has no 'test_script'"),
        ({"study.name": "a/b"}, "names a folder"),
        ({"study.pairs": [{"train": "a", "test": ["b"]}, {"train": "a", "test": ["c"]}]}, "two pairs"),
        ({"study.metrics": ["x"], "study.verdict_metrics": ["y"]}, "verdict_metrics not among metrics: y"),
        ({"arms.plain.checkpoint": None}, "arms.plain: checkpoint is missing"),
        ({"arms.plain.start": {"arm": "better"}}, "starts from itself"),
        ({"arms.plain.start": {"arm": "who"}}, "'who', which is not an arm"),
        ({"arms.plain.start": {"arm": "untrained"}}, "trains nothing"),
        ({"arms.plain.gpus": 0}, "must be at least 1"),
    ],
)
def test_errors_in_the_file_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=r"world\.toml") as error:
        read_study(write_world(tmp_path, **changes))
    assert message in str(error.value)


def test_other_files_are_not_a_study(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    for content, message in (("[study", "not valid TOML"), ("[study]\n", "tables"), ("arms = 1\nstudy = 2\n", "table")):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            read_study(file)


@cache
def parser_of(script: str) -> Parser:
    return importlib.import_module(script.removesuffix(".py")).script.parser()


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_every_command_of_the_studies_is_accepted_by_its_script(file: Path) -> None:
    plan = plan_of(file)
    lines = describe_plan(plan)
    listed = [shlex.split(line) for line in lines if line.startswith("python ")]
    assert len(listed) == sum(len(cell.steps) for cell in plan.cells)
    for _, script, *arguments in listed:
        with parsing():
            parser_of(script).parse_args(arguments)


def test_the_published_study_names_missing_requirements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ANOMALY_DATA_ROOT", str(tmp_path / "none"))
    plan = plan_of(ROOT / "studies" / "published.toml")
    lines = describe_plan(plan)
    missing = [line for line in lines if line.startswith("# missing: ")]
    for name in {pair.train for pair in plan.study.pairs} | {test for pair in plan.study.pairs for test in pair.test}:
        assert any(name in line for line in missing), name
    assert "weights" in missing[-1]


def test_planning_needs_no_torch() -> None:
    """A large study is listed without delay."""
    code = "import sys, engine.study.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0
