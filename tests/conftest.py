"""Hooks and fixtures for all tests."""

import json
import logging
import multiprocessing
from collections.abc import Generator, Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from matplotlib.figure import Figure

from tests.helpers import TINY_ARCHITECTURE, TINY_NAME, save_openai_archive, tiny_open_clip
from tests.in_process import reset_logging
from utils import curves
from utils.files import replacing


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape output that is not UTF-8, which one process of the suite cannot send to another."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode("utf-8")) for name, text in report.sections
    ]
    return report


# Tensors here are tiny, and threads that wait for each other cost ten times more.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def logging_ends_with_the_test() -> Iterator[None]:
    """Scripts keep early log records for a run's folder, which here would be another test's."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    reset_logging()


@pytest.fixture(autouse=True)
def processes_end_with_the_test() -> Iterator[None]:
    """Otherwise, garbage collection waits five seconds for a worker that a failed epoch left behind."""
    yield
    for child in multiprocessing.active_children():
        child.terminate()


@pytest.fixture(autouse=True)
def curves_are_not_drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing curves takes longer than a tiny run: they stay empty files without the marker `draws`."""

    def leave_empty(_: Figure, path: Path) -> None:
        with replacing(path) as temporary:
            temporary.touch()

    if request.node.get_closest_marker("draws") is None:
        monkeypatch.setattr(curves, "save_png", leave_empty)


@pytest.fixture(scope="session")
def tiny_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny architecture under a name that open_clip knows, like ViT-L-14-336."""
    file = tmp_path_factory.mktemp("architectures") / f"{TINY_NAME}.json"
    file.write_text(json.dumps(TINY_ARCHITECTURE), encoding="utf-8")
    open_clip.add_model_config(file)
    return TINY_NAME


@pytest.fixture(scope="session")
def openai_archive(tiny_name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny CLIP, which runs with QuickGELU, as a TorchScript archive in the form of OpenAI's."""
    return save_openai_archive(tiny_open_clip(quick_gelu=True), tmp_path_factory.mktemp("archive") / "tiny.pt")
