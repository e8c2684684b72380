"""The benchmark of steps at a tiny size: equal losses, and operations that are counted as its formula has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import bench_vit_l
from benchmarks.bench_vit_l import WAYS, Bench, parse_arguments, run
from tests.helpers import assert_agrees


@pytest.fixture(autouse=True)
def small_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_vit_l.PRODUCT, "cpu", 64)


def test_every_way_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    ways = [way for way in WAYS if not way.endswith("compiled")]
    rows = run(parse_arguments(["--tiny", "--device", "cpu", "--cross_attention", "--repeats", "1", "--ways", *ways]))
    assert {(row.stage, row.way) for row in rows} >= {
        ("text", "plain"),
        ("image", "checkpointed"),
        ("evaluation", "bf16"),
    }
    assert any(row.cross for row in rows) and not any(row.cross and row.way == "plain" for row in rows)
    assert all(len(row.seconds) == 1 and row.seconds[0] > 0 and row.flops > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "loss of text: plain" in printed and len(printed.splitlines()) >= len(rows) + 5


def gradients_of_step(bench: Bench, stage: str, way: str) -> list[Tensor]:
    """The gradients that a step's optimizer is given."""
    found: list[Tensor] = []

    def note(optimizer: torch.optim.Optimizer) -> None:
        found.extend(p.grad.clone() for group in optimizer.param_groups for p in group["params"])

    step = bench.step(stage, way, False, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", note)
        step()
    return found


@pytest.mark.parametrize("stage", ["text", "image"])
def test_the_plain_step_has_the_same_gradients(stage: str) -> None:
    bench = Bench("cpu", tiny=True)
    plain, same = (gradients_of_step(bench, stage, way) for way in ("plain", "same"))
    for one, other in zip(plain, same, strict=True):
        assert_agrees(one, other, 1e-3)
    assert not any(p.requires_grad or p.grad is not None for p in bench.clip.parameters())


def test_another_loss_is_no_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench("cpu", tiny=True)
    monkeypatch.setattr("benchmarks.plain_step.SMOOTHING", 0.1)
    with pytest.raises(SystemExit, match="do not compute the same"):
        bench.check_losses()
