"""`run.py`: packages, indexes, arguments and signals."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import run

INDEX = "https://download.pytorch.org/whl/cu126"


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would run, with an existing, empty environment."""
    python = tmp_path / "python"
    python.write_text("", encoding="utf-8")
    monkeypatch.setattr(run, "VENV", tmp_path)
    monkeypatch.setattr(run, "PYTHON", python)
    found: list[list[str]] = []
    monkeypatch.setattr(run, "call", lambda command: found.append(command[1:]) or 0)
    return found


def test_torch_comes_from_the_given_index_and_the_rest_from_pypi(calls: list[list[str]]) -> None:
    assert run.main(["--torch-index", INDEX, "test", "-k", "metadata", "-x"]) == 0
    torch, *rest, tests = calls
    assert torch[torch.index("--index-url") + 1] == INDEX
    assert {word.partition(">")[0] for word in torch if ">=" in word} == {"torch", "torchvision"}
    assert "--force-reinstall" in torch, "a build without CUDA may be there already"
    assert [command[-1].rpartition(os.sep)[2] for command in rest] == ["requirements.txt", "requirements-dev.txt"]
    assert not any("--index-url" in command for command in rest)
    assert tests[-3:] == ["-k", "metadata", "-x"]
    # Once: the second start finds everything there, another index is another build.
    calls.clear()
    assert run.main(["demo", "--torch-index", INDEX]) == 0
    assert [command[1] for command in calls] == ["engine.cli.demo"]
    calls.clear()
    assert run.main(["demo"]) == 0
    assert len(calls) == 1
    assert run.main(["--torch-index", INDEX.replace("126", "130"), "demo"]) == 0
    assert len(calls) == 3


def test_a_change_of_an_included_file_of_requirements_is_installed(
    calls: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in {file for files in run.REQUIREMENTS.values() for file in files} | {"requirements-export.txt"}:
        (tmp_path / name).write_bytes((run.ROOT / name).read_bytes())
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert run.main(["test"]) == run.main(["test"]) == 0
    (tmp_path / "requirements-app.txt").write_text("another\n", encoding="utf-8")
    calls.clear()
    assert run.main(["test"]) == 0
    assert [Path(command[-1]).name for command in calls[:-1]] == ["requirements-dev.txt"]


def test_help_needs_no_environment_and_no_command_is_an_error(
    calls: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([]) == 2
    assert "{app,check,demo,test}" in capsys.readouterr().out
    run.PYTHON.unlink()
    assert run.main(["demo", "--help"]) == 0
    assert "usage: " in capsys.readouterr().out
    assert calls == []


@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), (["--epochs", "3"], 2), (["again"], 2)])
def test_the_demo_takes_no_options(words: list[str], status: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "engine.cli.demo", *words], cwd=run.ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == status
    assert ("usage: " in ended.stdout) == (status == 0)
    assert ("unrecognized arguments: " in ended.stderr) == (status == 2)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 7)])
def test_the_running_command_handles_signals(number: int, status: int) -> None:
    """SIGTERM is forwarded; the terminal sends Ctrl-C to both processes."""
    code = "import time, sys; time.sleep(0.6); sys.exit(7)"

    def send() -> None:
        time.sleep(0.3)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    assert run.call([sys.executable, "-S", "-c", code]) == status
    thread.join()


def test_the_tested_versions_are_within_the_bounds() -> None:
    lines = (run.ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    for file in run.ROOT.glob("requirements*.txt"):
        for line in file.read_text(encoding="utf-8").splitlines():
            if not line.startswith(("#", "-r")) and (requirement := Requirement(line)).marker is None:
                assert requirement.specifier.contains(tested[canonicalize_name(requirement.name)]), line
