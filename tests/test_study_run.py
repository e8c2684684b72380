"""Running studies: restarts, kills, failures, GPUs, threads, and jobs through submitit."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from engine.config.tools import StudyArguments
from engine.study import keeper, local, slurm
from engine.study.local import GpuPool, cell_environment, visible_gpus
from engine.study.plan import Plan, make_plan
from engine.study.run import run_study
from engine.study.study import read_study
from tests.study_world import write_world
from utils.errors import Stopped, UserError

ROOT = Path(__file__).resolve().parent.parent
FILES = ("study.csv", "study_verdicts.csv", "study.md", "study.html")
needs_submitit = pytest.mark.skipif(
    os.name == "nt" or importlib.util.find_spec("submitit") is None,
    reason="submitit needs signals, and to be installed",
)


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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study that was run without a break."""
    folder = tmp_path_factory.mktemp("world")
    assert run_study(arguments(write_world(folder), folder, jobs=3)) == 0
    return folder


def portable(text: str, folder: Path) -> str:
    return text.replace(folder.as_posix(), "")


def wait_until(found: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_study_writes_its_files_and_a_log_of_each_process(finished: Path) -> None:
    plan = plan_in(finished)
    assert all((plan.folder / name).stat().st_size for name in FILES)
    assert all(cell.done for cell in plan.cells)
    for cell in plan.cells:
        for step in cell.steps:
            assert step.log.is_file()
            assert step.seconds >= 0
    logged = plan.by_key["", "plain", 0, 0].training.log.read_text(encoding="utf-8")
    assert "training with" in logged
    assert '"--seed", "0"' in logged


def test_what_is_finished_is_not_run_again(finished: Path, log: pytest.LogCaptureFixture) -> None:
    before = results(finished)
    markers = {path: path.stat().st_mtime_ns for path in finished.rglob("*.done")}
    assert run_study(arguments(finished / "world.toml", finished)) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.done")} == markers
    assert results(finished) == before
    assert "0 of 7 cells to run" in log.text
    # More seeds leave those that are there.
    assert run_study(arguments(finished / "world.toml", finished, seeds=(0, 1, 2))) == 0
    assert "3 of 10 cells to run" in log.text
    assert run_study(arguments(finished / "world.toml", finished, report_only=True)) == 0
    assert results(finished) == before


def test_a_failure_is_logged_and_stops_no_other_cell(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
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


def test_an_evaluation_without_metrics_is_a_failure(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    file = write_world(tmp_path, **{"arms.tested.test_arguments": {"silent": 1}})
    assert run_study(arguments(file, tmp_path)) == 1
    assert "test on b wrote no CSV file" in log.text
    assert not plan_in(tmp_path).by_key["", "tested", 0, 0].done


def test_a_start_whose_test_fails_can_be_started_from(tmp_path: Path) -> None:
    file = write_world(tmp_path, **{"arms.plain.test_arguments": {"no_such_argument": 1}})
    assert run_study(arguments(file, tmp_path)) == 1
    plan = plan_in(tmp_path)
    assert plan.by_key["", "better", 0, 0].done
    assert not plan.by_key["", "plain", 0, 0].done


def start_runner(folder: Path, *more: str) -> subprocess.Popen[str]:
    words = [sys.executable, str(ROOT / "run_study.py"), str(folder / "world.toml"), "--save_path"]
    words += [str(folder / "studies"), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    return subprocess.Popen(
        words, cwd=folder, env=environment, text=True, encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def has_begun(runner: subprocess.Popen[str], folder: Path) -> bool:
    assert runner.poll() is None, runner.communicate()
    return any(folder.rglob("history.jsonl"))


def test_a_killed_study_ends_with_the_same_metrics(finished: Path, tmp_path: Path) -> None:
    """The runner is killed outright, which leaves it no time to end anything."""
    run_study(arguments(finished / "world.toml", finished, report_only=True))
    write_world(tmp_path, **{"study.arguments": {"epochs": 2, "delay": 0.4}})
    for part in range(2):
        runner = start_runner(tmp_path, "--jobs", "2")
        wait_until(partial(has_begun, runner, tmp_path))
        time.sleep(0.3 + part)
        runner.kill()
        runner.communicate()
    assert run_study(arguments(tmp_path / "world.toml", tmp_path, jobs=2)) == 0
    for cell in plan_in(tmp_path).cells:
        if cell.training:
            rows = (cell.folder / "run" / "history.jsonl").read_text(encoding="utf-8").splitlines()
            assert [json.loads(row)["epoch"] for row in rows] == [1, 2], "one process at a time wrote here"
    assert results(tmp_path) == results(finished)


def test_a_keeper_ends_its_command_with_its_study(tmp_path: Path) -> None:
    beat = tmp_path / "beat"
    code = f"import time\nwhile True: open({str(beat)!r}, 'a').write('.'); time.sleep(0.02)"
    words = [sys.executable, "-I", keeper.__file__, str(tmp_path / "x.done"), str(tmp_path / "x.log")]
    begin = f"subprocess.Popen({[*words, sys.executable, '-c', code]!r}, stdin=subprocess.PIPE)"
    parent = f"import subprocess, time\n{begin}\ntime.sleep(600)"
    study = subprocess.Popen([sys.executable, "-c", parent])
    wait_until(beat.is_file)
    study.kill()
    study.wait()

    def is_quiet() -> bool:
        size = beat.stat().st_size
        time.sleep(0.3)
        return beat.stat().st_size == size

    wait_until(is_quiet)
    assert not (tmp_path / "x.done").exists()
    # Its lock is free again: the next keeper begins at once, and leaves the marker.
    with subprocess.Popen([*words, sys.executable, "-c", "pass"], stdin=subprocess.PIPE) as again:
        assert again.wait(60) == 0
    assert (tmp_path / "x.done").is_file()


def test_two_keepers_of_one_marker_take_turns(tmp_path: Path) -> None:
    code = "import time, sys; open(sys.argv[1], 'a').write('x'); time.sleep(0.5)"
    words = [
        sys.executable,
        "-I",
        keeper.__file__,
        str(tmp_path / "x.done"),
        str(tmp_path / "x.log"),
        sys.executable,
        "-c",
        code,
        str(tmp_path / "count"),
    ]
    both = [subprocess.Popen(words, stdin=subprocess.PIPE) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert (tmp_path / "count").read_text() == "x"
    for process in both:
        process.stdin.close()


@pytest.mark.skipif(os.name == "nt", reason="a process cannot be sent Ctrl-C alone there")
def test_a_stopped_study_names_the_way_to_resume(tmp_path: Path) -> None:
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


def test_gpus_are_those_that_are_visible(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for named, found in (("2,3", ["2", "3"]), ("", []), ("-1", []), ("0,-1,1", ["0"]), ("GPU-a", ["GPU-a"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        assert visible_gpus() == found
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(local.shutil, "which", lambda name: None)
    assert visible_gpus() == []
    tool = tmp_path / "nvidia_smi.py"
    tool.write_text("print('0')\nprint('1')\n", encoding="utf-8")
    real = subprocess.run
    monkeypatch.setattr(local.shutil, "which", lambda name: sys.executable)
    monkeypatch.setattr(local.subprocess, "run", lambda words, **rest: real([words[0], str(tool)], **rest))
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


@needs_submitit
def test_submitit_runs_the_same_cells_here(finished: Path, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    run_study(arguments(finished / "world.toml", finished, report_only=True))
    assert run_study(arguments(write_world(tmp_path), tmp_path, jobs=3, slurm="default")) == 0
    assert "There is no Slurm on this machine" in log.text
    assert results(tmp_path) == results(finished)
    with pytest.raises(UserError, match="no Slurm on this machine"):
        run_study(arguments(write_world(tmp_path, **{"study.seeds": [5]}), tmp_path, slurm="gpu"))


def one_cell(folder: Path, delay: float) -> Path:
    """A study of one training of two epochs, each of which takes `delay` seconds."""
    changes = {
        "study.seeds": [0],
        "study.arguments": {"epochs": 2, "delay": delay},
        "study.slurm": {"timeout_min": 5},
        "arms.untrained": None,
        "arms.tested": None,
        "arms.better": None,
    }
    return write_world(folder, **changes)


def signal_jobs(number: int, folder: Path) -> threading.Thread:
    """Send a signal to the jobs of this process, once one of them has trained an epoch."""

    def send() -> None:
        wait_until(lambda: any(folder.rglob("history.jsonl")))
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "submitit.core._submit" in process.cmdline():
                    process.send_signal(number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def epochs(folder: Path) -> list[int]:
    (history,) = folder.rglob("history.jsonl")
    return [json.loads(row)["epoch"] for row in history.read_text(encoding="utf-8").splitlines()]


@needs_submitit
def test_a_job_at_its_time_limit_is_requeued(tmp_path: Path) -> None:
    """As Slurm says it: by a signal, upon which submitit queues the job again."""
    file = one_cell(tmp_path, 1.5)
    thread = signal_jobs(signal.SIGUSR2, tmp_path)
    assert run_study(arguments(file, tmp_path, slurm="default")) == 0
    thread.join()
    (log,) = tmp_path.rglob("train.log")
    assert log.read_text(encoding="utf-8").count("training with") == 2
    assert epochs(tmp_path) == [1, 2]
    (job,) = {path.name.split("_")[0] for path in tmp_path.rglob("*_submitted.pkl")}
    assert "timed-out" in next(tmp_path.rglob(f"{job}_0_log.err")).read_text(encoding="utf-8")


@needs_submitit
def test_a_killed_job_is_logged_and_resumes_with_the_same_command(
    tmp_path: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import submitit

    # Seconds that submitit gives a network's disk to show a job's result.
    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 1)
    file = one_cell(tmp_path, 1.5)
    thread = signal_jobs(signal.SIGKILL, tmp_path)
    assert run_study(arguments(file, tmp_path, slurm="default")) == 1
    thread.join()
    assert "ended without a result; the same command resumes it" in log.text
    assert run_study(arguments(file, tmp_path, slurm="default")) == 0
    assert epochs(tmp_path) == [1, 2]


@needs_submitit
def test_slurm_gets_an_array_for_each_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    """Against an sbatch that keeps what it is given: arrays, what they wait for, and what they ask for."""
    tools, kept = tmp_path / "tools", tmp_path / "kept"
    tools.mkdir()
    kept.mkdir()
    (tools / "srun").write_text("#!/bin/sh\n", encoding="utf-8")
    (tools / "sbatch").write_text(
        f'#!/bin/sh\nn=$(ls {kept} | wc -l)\ncp "$1" {kept}/$n.sh\necho "Submitted batch job $((100 + n))"\n',
        encoding="utf-8",
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    file = write_world(
        tmp_path,
        **{"study.slurm": {"timeout_min": 90, "cpus_per_task": 4, "slurm_account": "lab"}, "arms.better.gpus": 2},
    )
    assert run_study(arguments(file, tmp_path, slurm="fast", jobs=2)) == 0
    scripts = [path.read_text(encoding="utf-8") for path in sorted(kept.iterdir())]
    options = [dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", script)) for script in scripts]
    assert [found.get("array") for found in options] == ["0-2%2", "0-1%2", "0-1%2", None]
    assert [found.get("dependency") for found in options] == [None, "afterany:100", "afterany:101", "afterany:102"]
    assert [found.get("gpus-per-node") for found in options] == ["1", "2", "1", "0"]
    assert {found["partition"] for found in options} == {"fast"}
    assert {(found["time"], found["cpus-per-task"], found["account"]) for found in options} == {("90", "4", "lab")}
    assert "Job 103 writes the report after them" in log.text
    assert not list(tmp_path.rglob("*.done"))
    # What the jobs are sent does the work, in whatever order they come; the last writes the report.
    from submitit.core.utils import DelayedSubmission

    waiting = sorted((tmp_path / "studies" / "world" / "slurm").glob("*.pkl"), key=lambda path: path.stat().st_mtime)
    assert len(waiting) == 3 + 2 + 2 + 1
    for path in waiting:
        DelayedSubmission.load(path).result()
    assert all((tmp_path / "studies" / "world" / name).is_file() for name in FILES)
    assert run_study(arguments(file, tmp_path, report_only=True)) == 0


def test_slurm_needs_submitit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"requirements-study\.txt"):
        run_study(arguments(write_world(tmp_path), tmp_path, slurm="default"))


@needs_submitit
@pytest.mark.parametrize("asked", [{"memory": 3}, {"timeout_min": "long"}, {"slurm_nonsense": 1}])
def test_parameters_that_submitit_rejects_are_an_error(tmp_path: Path, asked: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"\[study\.slurm\]: "):
        run_study(arguments(write_world(tmp_path, **{"study.slurm": asked}), tmp_path, slurm="default"))
