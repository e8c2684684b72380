"""What several test modules share."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Generator, Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from matplotlib.figure import Figure

from tests.helpers import TINY_ARCHITECTURE, TINY_NAME, save_openai_archive, threads, tiny_open_clip
from tests.in_process import reset_logging
from utils import curves
from utils.files import replacing


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test prints of file names that are no UTF-8 cannot be sent from one process of the suite to another."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode("utf-8")) for name, text in report.sections
    ]
    return report


@pytest.fixture(autouse=True, scope="session")
def as_many_threads_as_the_scripts() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads())
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def what_a_test_says_is_not_in_the_log_of_the_next() -> Iterator[None]:
    """A script keeps what it says until there is a run's folder: here the folder would be another test's."""
    yield
    reset_logging()


@pytest.fixture(autouse=True)
def processes_end_with_the_test() -> Iterator[None]:
    """Garbage collection, at whatever later line, waits five seconds for a worker that a failed epoch left behind."""
    yield
    for child in multiprocessing.active_children():
        child.terminate()


@pytest.fixture(autouse=True)
def curves_are_drawn_where_they_are_looked_at(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing its curves takes longer than all the rest of a tiny run: those that a test makes itself stay empty."""

    def leave_empty(_: Figure, path: Path) -> None:
        with replacing(path) as temporary:
            temporary.touch()

    if request.node.get_closest_marker("draws") is None:
        monkeypatch.setattr(curves, "save_png", leave_empty)


@pytest.fixture(scope="session")
def tiny_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny architecture under a name that open_clip knows, as it knows ViT-L-14-336."""
    file = tmp_path_factory.mktemp("architectures") / f"{TINY_NAME}.json"
    file.write_text(json.dumps(TINY_ARCHITECTURE), encoding="utf-8")
    open_clip.add_model_config(file)
    return TINY_NAME


@pytest.fixture(scope="session")
def openai_archive(tiny_name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny CLIP, which runs with QuickGELU, as a TorchScript archive in the form of OpenAI's."""
    return save_openai_archive(tiny_open_clip(quick_gelu=True), tmp_path_factory.mktemp("archive") / "tiny.pt")
