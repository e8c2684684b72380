"""Bad inputs of every kind to every script end in one line and change nothing (`tests/bad_inputs.py`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.bad_cases import (
    CASES,
    CONVERT,
    DRAW,
    FILE,
    PRETRAIN,
    RUNS,
    SCRIPTS,
    STATE_FILE,
    TEST,
    case,
    resuming,
    words_of,
)
from tests.bad_inputs import Answer, Case, answer, problems_of, scratch, verdict
from tests.damage import Damaged, damaged_files


@pytest.fixture(scope="module")
def world() -> Iterator[Path]:
    with scratch() as folder:
        yield folder


def of_each_kind() -> dict[str, list[Case]]:
    """The cases of each kind and script."""
    ordered = sorted(CASES, key=lambda case: (case.kind, case.script))
    return {" ".join(key): list(cases) for key, cases in groupby(ordered, lambda case: (case.kind, case.script))}


def test_every_script_has_cases() -> None:
    assert {case.script for case in CASES} == {*SCRIPTS, CONVERT, "run.py"}
    assert all(sum(case.script == script for case in CASES) >= 10 for script in SCRIPTS)


@pytest.mark.parametrize("cases", [pytest.param(cases, id=name) for name, cases in of_each_kind().items()])
def test_bad_inputs_end_in_one_line(world: Path, cases: list[Case]) -> None:
    wrong = {str(case): problems for case in cases if (problems := problems_of(case, world))}
    assert not wrong, "\n".join(f"{name}: {problems}" for name, problems in wrong.items())


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != PRETRAIN])
def test_the_unchanged_commands_are_accepted(world: Path, script: str) -> None:
    """Otherwise a command might be rejected for another reason than the case's."""
    status, errors = problems_of(Case(script, "sound", words_of(SCRIPTS[script][1])), world)[:2]
    assert status in ("exit status 0", "exit status 1") and errors.startswith("0 error lines")


@pytest.mark.parametrize("run", RUNS)
def test_the_undamaged_runs_resume(world: Path, run: str) -> None:
    assert problems_of(resuming(run, ""), world)[0] == "exit status 0"


@pytest.mark.parametrize(
    ("changes", "changed", "problem"),
    [
        ({"status": 1}, [], "exit status 1"),
        ({"status": None}, [], "exit status None"),
        ({"errors": "Traceback: KeyError: x\n"}, [], "a traceback"),
        ({"errors": "error: one\nerror: two\n"}, [], "2 error lines"),
        ({"errors": "error: one\nand more\n"}, [], "1 error lines"),
        ({"errors": "UserWarning: odd\nerror: one\n"}, [], "more than the line"),
        ({"errors": "error: another\n"}, [], "'such' is not in"),
        ({"seconds": 60.0}, [], "took 60.0 s"),
        ({}, ["here/new/train.log"], "made, changed or removed: here/new/train.log"),
    ],
    ids=str,
)
def test_each_violation_of_the_rule_is_reported(changes: dict[str, object], changed: list[str], problem: str) -> None:
    sound, rejected = Answer(2, "Device: cpu\nerror: no such file\n", "", 0.1), Case(TEST, "any", (), says="such")
    assert verdict(rejected, sound, []) == []
    assert any(problem in found for found in verdict(rejected, sound._replace(**changes), changed))


def test_a_created_file_is_reported(world: Path) -> None:
    @contextmanager
    def writing() -> Iterator[None]:
        (world / "outside" / "more.txt").touch()
        yield

    assert problems_of(case(TEST, "any", "", {"checkpoint": "nowhere"}), world) == []
    noticed = problems_of(case(TEST, "any", "", {"checkpoint": "nowhere"}, stand_in=writing), world)
    assert noticed == ["made, changed or removed: outside/more.txt"]


@given(damaged=damaged_files(), reader=st.sampled_from([(TEST, "checkpoint"), (DRAW, "base_path"), "base", "cross"]))
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_damaged_file_is_used_or_rejected(world: Path, damaged: Damaged, reader: tuple[str, str] | str) -> None:
    """The scripts themselves; `tests/test_damaged_files.py` tests the functions they call."""
    if isinstance(reader, str):
        command = resuming(reader, "", lambda: torch.save(damaged.content, STATE_FILE))
    else:
        script, option = reader
        command = case(script, "damaged", "", {option: FILE.as_posix()}, lambda: torch.save(damaged.content, FILE))
    problems = problems_of(command, world)
    assert not problems or problems[0] in ("exit status 0", "exit status 1", "exit status 3"), problems
    assert not any("traceback" in problem for problem in problems), problems


def test_answers_equal_those_of_a_separate_process(world: Path) -> None:
    result = answer(TEST, ["--checkpoint", "nowhere"])
    assert (result.status, result.errors.count("\n")) == (2, 1)
    assert "error: nowhere: does not exist" in result.errors
