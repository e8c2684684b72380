"""Messages about the device and an unused GPU."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import engine.runtime.device
from engine.runtime.device import check_device, warn_of_unused_gpu
from utils.errors import UserError


def test_the_device_its_name_precision_and_versions_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert check_device("cpu", "bf16") == "cpu"
    (line,) = caplog.messages
    for part in ("Device: cpu (", "threads)", "precision bf16", f"torch {torch.__version__}", "CUDA "):
        assert part in line


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="each of the 2 processes uses its own GPU; give cuda"):
        check_device("cuda:1", "fp32")


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> nn.Module:
    """A large model on a machine with an NVIDIA driver and torch without CUDA."""
    monkeypatch.setattr(engine.runtime.device, "LARGE", 10)
    monkeypatch.setattr(engine.runtime.device, "NVIDIA_DRIVER", tmp_path)
    monkeypatch.setattr(engine.runtime.device.shutil, "which", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    return nn.Linear(10, 10)


def test_a_large_model_on_the_cpu_despite_a_gpu_is_a_warning(
    large: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_unused_gpu(torch.device("cpu"), large)
    (line,) = caplog.messages
    for part in ("is built without CUDA", "--index-url https://download.pytorch.org/", "--torch-index"):
        assert part in line


@pytest.mark.parametrize("why", ["small", "no driver", "torch sees it", "on the GPU"])
def test_no_warning_for_small_models_or_without_gpu(
    why: str, large: nn.Module, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if why == "no driver":
        monkeypatch.setattr(engine.runtime.device, "NVIDIA_DRIVER", tmp_path / "none")
    if why == "torch sees it":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device = "meta" if why == "on the GPU" else "cpu"
    warn_of_unused_gpu(torch.device(device), nn.Linear(2, 2) if why == "small" else large)
    assert caplog.messages == []
