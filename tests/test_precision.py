"""The precision of a run, its resumption, and computations that stay in float32."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from engine.cli.checks import check_files
from engine.evaluation.evaluate import autocast
from engine.runtime.device import check_device, choose_precision
from engine.training import stage1, stage2
from engine.training.base import train_base
from model.blocks import full_product
from model.scoring import anomaly_map, det_scores
from tests.scripts import small_runs, write_clip, write_dataset
from tests.test_waiting import COMBINATIONS, make_batch, make_stage
from utils.errors import UserError


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """A process has one precision for accelerate, and one for torch's matrix products."""
    AcceleratorState._reset_state(reset_partial_state=True)
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a GPU that supports bf16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    return monkeypatch


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0)])
def test_auto_is_bf16_on_a_gpu_that_supports_it(device: Any, gpu: pytest.MonkeyPatch) -> None:
    assert choose_precision(device, "auto") == "bf16"
    # Some that do not have it would compute it slowly by other means.
    gpu.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert choose_precision(device, "auto") == "fp32"
    assert choose_precision(device, "bf16") == "bf16"


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_auto_is_fp32_elsewhere(device: str, gpu: pytest.MonkeyPatch) -> None:
    assert choose_precision(device, "auto") == "fp32"
    with autocast("cpu", "auto"):
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("precision", "tf32", "product", "said"),
    [
        ("fp32", "on", "high", "precision fp32, TF32 on"),
        ("fp32", "off", "highest", "precision fp32, TF32 off"),
        ("bf16", "on", "highest", "precision bf16, TF32 off"),
        ("auto", "on", "highest", "precision bf16, TF32 off"),
    ],
)
def test_tf32_applies_to_fp32_only(
    precision: str, tf32: str, product: str, said: str, gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    torch.set_float32_matmul_precision("medium")
    assert check_device("auto", precision, tf32) == "cuda"
    assert torch.get_float32_matmul_precision() == product
    assert not torch.backends.cudnn.allow_tf32
    assert said in caplog.messages[-1]


def test_cpu_settings_are_unchanged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    check_device("cpu", "auto", "on")
    assert torch.get_float32_matmul_precision() == "highest"
    assert "precision fp32, torch" in caplog.messages[-1]


class Products(TorchDispatchMode):
    """The types in which matrices are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function.overloadpacket.__name__ in ("mm", "bmm", "addmm"):
            self.types.add(arguments[0].dtype)
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize(
    ("allowed", "given", "computed", "returned"),
    [
        ("highest", torch.bfloat16, torch.float32, torch.float32),
        ("highest", torch.float64, torch.float64, torch.float64),
        ("high", torch.float32, torch.float64, torch.float32),
        ("high", torch.float64, torch.float64, torch.float64),
    ],
)
def test_similarities_are_not_computed_in_tf32(
    allowed: str, given: torch.dtype, computed: torch.dtype, returned: torch.dtype
) -> None:
    a, b = torch.randn(2, 5, 4, dtype=given), torch.randn(2, 4, 2, dtype=given)
    torch.set_float32_matmul_precision(allowed)
    with Products() as products, torch.autocast("cpu", torch.bfloat16):
        found = full_product(a, b)
    assert products.types == {computed} and found.dtype == returned
    assert torch.allclose(found, (a.double() @ b.double()).to(returned))


@pytest.mark.parametrize(("side", "kind", "loop"), COMBINATIONS)
def test_losses_and_their_inputs_are_float32_in_half_precision(
    side: str, kind: str, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, batch = make_stage(side, kind, loop), make_batch()
    stage.eval()
    exact = stage(batch).losses["total"].item()
    seen: list[torch.Tensor] = []

    def note(similarities: Any, anchors: torch.Tensor, *others: Any) -> Any:
        seen.extend([*similarities, anchors] if side == "text" else [*similarities.levels, similarities.det])
        return taken(similarities, anchors, *others)

    module, name = (stage1, "stage1_losses") if side == "text" else (stage2, "stage2_losses")
    taken = getattr(module, name)
    monkeypatch.setattr(module, name, note)
    with torch.autocast("cpu", torch.bfloat16), Products() as products:
        output = stage(batch)
        output.losses["total"].backward()
    assert torch.bfloat16 in products.types
    assert len(seen) == 5 and {value.dtype for value in seen} == {torch.float32}
    assert {value.dtype for value in output.losses.values()} == {torch.float32}
    assert output.losses["total"].item() == pytest.approx(exact, rel=0.05)


def test_scores_are_float32_in_half_precision() -> None:
    stage, batch = make_stage("image", "words", "first"), make_batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = stage.model(batch["image"], stage.text_side, torch.tensor([0, 2, 0, 1]))
        assert anomaly_map(outputs, 40, "industrial").dtype == det_scores(outputs).dtype == torch.float32


def test_a_run_is_not_resumed_in_another_precision(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip")
    write_dataset(tmp_path / "train", count=2)
    train_base(small_runs(tmp_path, precision="bf16")[0])
    for check in (check_files, train_base):
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(UserError, match="precision was bf16, now fp32"):
            check(small_runs(tmp_path, precision="fp32")[0])
    check_files(small_runs(tmp_path)[0])
