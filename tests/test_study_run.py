"""Running studies: restarts, kills, failures, several processes, GPUs and threads."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.config.tools import StudyArguments
from engine.study import keeper
from engine.study.plan import Plan, make_plan
from engine.study.run import run_study
from engine.study.runner import GpuPool, cell_environment, visible_gpus
from engine.study.study import read_study
from tests.scripts import start, wait_until
from tests.study_world import write_world
from utils.errors import Stopped, UserError

ROOT = Path(__file__).resolve().parent.parent
FILES = ("study.csv", "study_verdicts.csv", "study.md", "study.html")


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def arguments(file: Path, folder: Path, **more: object) -> StudyArguments:
    return StudyArguments.of(study=file, save_path=folder / "studies", **more)


def plan_in(folder: Path) -> Plan:
    study = read_study(folder / "world.toml")
    return make_plan(study, folder / "studies" / study.name)


def results(folder: Path) -> str:
    """The metrics of a study, to compare two runs."""
    return (folder / "studies" / "world" / "study.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dry_run": True, "report_only": True}, "--report_only has no effect with --dry_run"),
        ({"report_only": True, "jobs": 2}, "--jobs has no effect with --report_only"),
    ],
)
def test_options_without_effect_are_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        arguments(tmp_path / "world.toml", tmp_path, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an uninterrupted study."""
    folder = tmp_path_factory.mktemp("world")
    assert run_study(arguments(write_world(folder), folder, jobs=3)) == 0
    return folder


def test_finished_cells_are_not_repeated(finished: Path, log: pytest.LogCaptureFixture) -> None:
    plan = plan_in(finished)
    assert all((plan.folder / name).stat().st_size for name in FILES)
    assert all(step.log.is_file() and step.seconds >= 0 for cell in plan.cells for step in cell.steps)
    logged = plan.by_key["", "plain", 0, 0].training.log.read_text(encoding="utf-8")
    assert "training with" in logged and '"--seed", "0"' in logged
    before = results(finished)
    markers = {path: path.stat().st_mtime_ns for path in finished.rglob("*.done")}
    assert run_study(arguments(finished / "world.toml", finished)) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.done")} == markers
    assert "0 of 7 cells to run" in log.text
    assert run_study(arguments(finished / "world.toml", finished, seeds=(0, 1, 2))) == 0
    assert "3 of 10 cells to run" in log.text
    assert run_study(arguments(finished / "world.toml", finished, report_only=True)) == 0
    assert results(finished) == before


def test_a_failure_is_logged_and_does_not_stop_other_cells(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    file = write_world(tmp_path, **{"arms.better.arguments": {"fail": 1}})
    assert run_study(arguments(file, tmp_path, jobs=2)) == 1
    lines = [line for line in log.text.splitlines() if "ERROR" in line]
    failed = [line for line in lines if "better, on a, seed" in line and "status 1" in line]
    assert len(failed) == 2
    assert "error: the disk is full" in failed[0]
    file = re.search(r"log: (.*?)\)", failed[0]).group(1)
    assert "error: the disk is full" in (ROOT / file).read_text(encoding="utf-8")
    assert sum("tested, on a, seed" in line and "skipped" in line for line in lines) == 2
    assert "plain,0" in results(tmp_path), "the others went on"
    assert "missing: better: no results for seed 0: b, seed 1: b" in log.text
    # Mended, it is another cell, and what is there stays.
    log.clear()
    assert run_study(arguments(write_world(tmp_path), tmp_path)) == 0
    assert "4 of 7 cells to run" in log.text


@pytest.mark.parametrize(
    ("failing", "argument", "message", "complete"),
    [
        ("tested", "silent", "test on b wrote no CSV file", "better"),
        # The training is complete, so other cells can start from it.
        ("plain", "no_such_argument", "test on b ended with status 2", "better"),
    ],
)
def test_a_test_without_metrics_is_a_failure(
    tmp_path: Path, log: pytest.LogCaptureFixture, failing: str, argument: str, message: str, complete: str
) -> None:
    file = write_world(tmp_path, **{f"arms.{failing}.test_arguments": {argument: 1}})
    assert run_study(arguments(file, tmp_path)) == 1
    assert message in log.text
    plan = plan_in(tmp_path)
    assert not plan.by_key["", failing, 0, 0].done
    assert plan.by_key["", complete, 0, 0].done


def start_process(folder: Path, *more: str) -> subprocess.Popen[str]:
    """Run a study in another process."""
    return start("run_study.py", folder / "world.toml", "--save_path", folder / "studies", *more, cwd=folder)


def has_begun(process: subprocess.Popen[str], folder: Path) -> bool:
    assert process.poll() is None, process.communicate()
    return any(folder.rglob("history.jsonl"))


def assert_equals_uninterrupted(folder: Path, finished: Path) -> None:
    """Every epoch was trained once, and the metrics equal those of an uninterrupted study."""
    for history in folder.rglob("history.jsonl"):
        rows = history.read_text(encoding="utf-8").splitlines()
        assert [json.loads(row)["epoch"] for row in rows] == [1, 2]
    assert run_study(arguments(finished / "world.toml", finished, report_only=True)) == 0
    assert results(folder) == results(finished)


def test_a_killed_study_ends_with_the_same_metrics(finished: Path, tmp_path: Path) -> None:
    """After SIGKILL, the runner cannot end its processes."""
    write_world(tmp_path, **{"study.arguments": {"epochs": 2, "delay": 0.4}})
    for part in range(2):
        process = start_process(tmp_path, "--jobs", "2")
        wait_until(partial(has_begun, process, tmp_path))
        time.sleep(0.3 + part)
        process.kill()
        process.communicate()
    assert run_study(arguments(tmp_path / "world.toml", tmp_path, jobs=2)) == 0
    assert_equals_uninterrupted(tmp_path, finished)


def test_several_processes_share_the_cells(finished: Path, tmp_path: Path) -> None:
    write_world(tmp_path, **{"study.arguments": {"epochs": 2, "delay": 0.4}})
    processes = [start_process(tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert all(": trained in" in output for output in outputs), "both trained"
    logs = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("train.log")]
    assert [text.count("training with") for text in logs] == [1] * 4
    assert_equals_uninterrupted(tmp_path, finished)


def test_a_keeper_ends_its_command_with_its_study(tmp_path: Path) -> None:
    beat = tmp_path / "beat"
    code = f"import time\nwhile True: open({str(beat)!r}, 'a').write('.'); time.sleep(0.02)"
    command = [sys.executable, "-I", keeper.__file__, str(tmp_path / "x.done"), str(tmp_path / "x.log"), sys.executable]
    begin = f"subprocess.Popen({[*command, '-c', code]!r}, stdin=subprocess.PIPE)"
    study = subprocess.Popen([sys.executable, "-c", f"import subprocess, time\n{begin}\ntime.sleep(600)"])
    wait_until(beat.is_file)
    another = [*command, "-c", "pass"]
    assert subprocess.run(another, stdin=subprocess.PIPE).returncode == keeper.BUSY
    study.kill()
    study.wait()

    def is_quiet() -> bool:
        size = beat.stat().st_size
        time.sleep(0.3)
        return beat.stat().st_size == size

    wait_until(is_quiet)
    assert not (tmp_path / "x.done").exists()
    # Its lock is free again.
    with subprocess.Popen(another, stdin=subprocess.PIPE) as process:
        assert process.wait(60) == 0
    assert (tmp_path / "x.done").is_file()


@pytest.mark.skipif(os.name == "nt", reason="a process cannot be sent Ctrl-C alone there")
def test_a_stopped_study_tells_how_to_resume(tmp_path: Path) -> None:
    write_world(tmp_path, **{"study.arguments": {"epochs": 2, "delay": 30.0}})

    def stop() -> None:
        wait_until(lambda: any(tmp_path.rglob("args.json")))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=stop)
    # Ignored where a shell has put the tests into the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread.start()
    with pytest.raises(Stopped, match="the same command resumes the study"):
        run_study(arguments(tmp_path / "world.toml", tmp_path, jobs=2))
    thread.join()
    signal.signal(signal.SIGINT, before)
    assert not list((tmp_path / "studies").rglob("train.done"))


def test_only_visible_gpus_are_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable, gpus in (("2,3", ["2", "3"]), ("", []), ("0,-1,1", ["0"]), ("GPU-a", ["GPU-a"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
        assert visible_gpus() == gpus
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert visible_gpus() == []
    query = partial(subprocess.run, [sys.executable, "-c", "print('0'); print('1')"])
    monkeypatch.setattr("shutil.which", lambda name: "nvidia-smi")
    monkeypatch.setattr("subprocess.run", lambda command, **options: query(**options))
    assert visible_gpus() == ["0", "1"]


def test_gpus_are_assigned(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = GpuPool(["0", "1"], jobs=3)
    assert [devices.take(1) for _ in range(3)] == [["0"], ["1"], ["0"]]
    devices.release(["0"])
    assert devices.take(1) == ["0"]
    alone = GpuPool(["0", "1", "2"], jobs=1)
    assert alone.take(2) == ["0", "1"]
    assert alone.take(2) is None, "one is free, two are wanted"
    alone.release(["0", "1"])
    assert alone.take(2) == ["0", "1"]
    assert GpuPool([], jobs=2).take(1) == []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    environment = cell_environment(["1"], 3)
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["OMP_NUM_THREADS"]) == ("1", "2")
    assert "OMP_NUM_THREADS" not in cell_environment([], 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert "OMP_NUM_THREADS" not in cell_environment([], 3), "what the user asked for stays"


def test_cells_see_their_gpus_and_too_many_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    file = write_world(tmp_path)
    script = tmp_path / "train.py"
    script.write_text(
        script.read_text(encoding="utf-8").replace(
            'print("training with", asked)', 'import os; print("sees", os.environ["CUDA_VISIBLE_DEVICES"], flush=True)'
        ),
        encoding="utf-8",
    )
    assert run_study(arguments(file, tmp_path, jobs=2)) == 0
    logs = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("train.log")]
    assert {re.search(r"sees (\S+)", log).group(1) for log in logs} <= {"4", "6"}
    with pytest.raises(UserError, match="gpus = 3, but this machine has 2"):
        run_study(arguments(write_world(tmp_path, **{"arms.better.gpus": 3, "study.seeds": [7]}), tmp_path))
