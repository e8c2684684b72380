"""Bad inputs of every kind to every script end in one line, and leave nothing (`tests/bad_inputs.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.bad_cases import CASES, CONVERT, DRAW, PRETRAIN, RUNS, SCRIPTS, TEST, case, going_on, words_of
from tests.bad_inputs import CASE, Answer, Case, answer, scratch, tried, verdict
from tests.damage import Damaged, damaged_files


@pytest.fixture(scope="module")
def world() -> Iterator[Path]:
    with scratch() as folder:
        yield folder


def of_each_kind() -> dict[str, list[Case]]:
    """The cases of each kind and script."""
    ordered = sorted(CASES, key=lambda found: (found.kind, found.script))
    return {" ".join(key): list(cases) for key, cases in groupby(ordered, lambda found: (found.kind, found.script))}


def test_there_are_enough() -> None:
    assert len(CASES) >= 400
    assert {found.script for found in CASES} == {*SCRIPTS, CONVERT, "run.py"}
    assert all(sum(found.script == script for found in CASES) >= 10 for script in SCRIPTS)


@pytest.mark.parametrize("cases", [pytest.param(cases, id=name) for name, cases in of_each_kind().items()])
def test_bad_inputs_end_in_one_line(world: Path, cases: list[Case]) -> None:
    wrong = {str(found): problems for found in cases if (problems := tried(found, world))}
    assert not wrong, "\n".join(f"{name}: {problems}" for name, problems in wrong.items())


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != PRETRAIN])
def test_the_commands_that_cases_change_are_sound(world: Path, script: str) -> None:
    """What the test above would not notice: a command that is refused for another reason than the case's."""
    status, made = tried(Case(script, "sound", words_of(SCRIPTS[script].sound)), world)[:2]
    assert status in ("exit status 0", "exit status 1") and made.startswith("0 error lines")


@pytest.mark.parametrize("run", RUNS)
def test_the_runs_that_cases_damage_go_on(world: Path, run: str) -> None:
    found = going_on(run, "", lambda: copy_sound(run))
    assert tried(found, world)[0] == "exit status 0"


def copy_sound(run: str) -> None:
    (CASE / "run").mkdir()
    for file in Path(run).iterdir():
        (CASE / "run" / file.name).write_bytes(file.read_bytes())


SOUND_ANSWER = Answer(2, "Device: cpu\nerror: no such file\n", "", 0.1)


@pytest.mark.parametrize(
    ("changes", "changed", "problem"),
    [
        ({"status": 1}, [], "exit status 1"),
        ({"status": None}, [], "exit status None"),
        ({"errors": "Traceback: KeyError: x\n"}, [], "a traceback"),
        ({"errors": "error: one\nerror: two\n"}, [], "2 error lines"),
        ({"errors": "error: one\nand more\n"}, [], "1 error lines"),
        ({"errors": "usage: x [-h]\nerror: one\n"}, [], "more than the line"),
        ({"errors": "UserWarning: odd\nerror: one\n"}, [], "more than the line"),
        ({"errors": "error: another\n"}, [], "'such' is not in"),
        ({"seconds": 60.0}, [], "took 60.0 s"),
        ({}, ["here/new/train.log"], "made, changed or removed: here/new/train.log"),
    ],
    ids=str,
)
def test_the_rule(changes: dict[str, object], changed: list[str], problem: str) -> None:
    judged = Case(TEST, "any", (), says="such")
    assert verdict(judged, SOUND_ANSWER, []) == []
    assert any(problem in found for found in verdict(judged, SOUND_ANSWER._replace(**changes), changed))


def test_what_is_made_is_noticed(world: Path) -> None:
    (world / "outside" / "more.txt").unlink(missing_ok=True)
    beyond = case(TEST, "any", "", {"checkpoint": "nowhere"}, prepare=lambda: None)
    assert tried(beyond, world) == []

    def write_beyond() -> None:
        (world / "outside" / "more.txt").touch()

    class Writing:
        def __enter__(self) -> None:
            write_beyond()

        def __exit__(self, *_: object) -> None:
            pass

    noticed = case(TEST, "any", "", {"checkpoint": "nowhere"}, stand_in=Writing)
    assert tried(noticed, world) == ["made, changed or removed: outside/more.txt"]


@given(damaged=damaged_files(), reader=st.sampled_from([(TEST, "checkpoint"), (DRAW, "base_path"), "base", "cross"]))
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_damaged_file_is_used_or_refused(world: Path, damaged: Damaged, reader: tuple[str, str] | str) -> None:
    """At the scripts: what `tests/test_damaged_files.py` asks of the functions behind them."""
    file = CASE / "image_adapter.pth"
    if isinstance(reader, str):
        file = CASE / "run" / "training_state.pth"
        found = going_on(reader, "", lambda: (copy_sound(reader), torch.save(damaged.content, file)))
    else:
        script, flag = reader
        changes = {flag: file.as_posix()}
        found = case(script, "damaged", "", changes, prepare=lambda: torch.save(damaged.content, file))
    problems = tried(found, world)
    assert not problems or problems[0] in ("exit status 0", "exit status 1", "exit status 3"), problems
    assert not any("traceback" in problem for problem in problems), problems


def test_answers_are_those_of_the_scripts(world: Path) -> None:
    """As `tests/scripts.py` sees them, from a process of their own."""
    found = answer(TEST, ["--checkpoint", "nowhere"])
    assert (found.status, found.errors.count("\n")) == (2, 1)
    assert "error: nowhere: not there" in found.errors
