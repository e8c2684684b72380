"""The step benchmark at a tiny size, and the gradients of the plain step."""

import pytest
import torch
from torch import Tensor

from benchmarks.bench_vit_l import VARIANTS, Bench, parse_arguments, run
from tests.helpers import assert_agrees


def test_every_variant_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    variants = [variant for variant in VARIANTS if not variant.endswith("compiled")]
    options = ["--tiny", "--device", "cpu", "--repeats", "1", "--variants", *variants]
    rows = run(parse_arguments(options))
    assert {(row.stage, row.variant) for row in rows} >= {
        ("text", "plain"),
        ("image", "checkpointed"),
        ("evaluation", "bf16"),
    }
    assert all(len(row.seconds) == 1 and row.seconds[0] > 0 and row.flops > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "text loss: plain" in printed and len(printed.splitlines()) >= len(rows) + 5


def gradients_of_step(bench: Bench, stage: str, variant: str) -> list[Tensor]:
    """The gradients that the optimizer of a step receives."""
    found: list[Tensor] = []

    def note(optimizer: torch.optim.Optimizer) -> None:
        found.extend(p.grad.clone() for group in optimizer.param_groups for p in group["params"])

    step = bench.step(stage, variant, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", note)
        step()
    return found


@pytest.mark.parametrize("stage", ["text", "image"])
def test_the_plain_step_has_the_same_gradients(stage: str) -> None:
    bench = Bench("cpu", tiny=True)
    plain, same = (gradients_of_step(bench, stage, variant) for variant in ("plain", "same"))
    for one, other in zip(plain, same, strict=True):
        assert_agrees(one, other, 1e-3)
    assert not any(p.requires_grad or p.grad is not None for p in bench.clip.parameters())


def test_different_losses_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench("cpu", tiny=True)
    monkeypatch.setattr("benchmarks.plain_step.SMOOTHING", 0.1)
    with pytest.raises(SystemExit, match="losses differ"):
        bench.check_losses()
