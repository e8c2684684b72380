"""`test_stage2_gradients.py`: what it measures of which model, and what it says of that (run in this process)."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import test_stage2_gradients as script
from engine.config.gradients import GradientTest
from engine.training.gradients import Bench, Measurement, verdict
from model.config import CrossAttentionConfig
from tests.scripts import train_small_runs
from utils.errors import UserError

OLD = ("--image_cross_attn_weight", "1.0", "--text_cross_attn_weight", "1.0", "--context_norm", "none")
# Keeps what earlier code did.
OLD_PRESET = "v1_original"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_small_runs(tmp_path_factory.mktemp("world"))


@pytest.fixture
def measure(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Run the script; its exit status, and what it said on standard output."""

    def run(*arguments: object) -> tuple[int, str]:
        asked = ["--dataset", world / "train", "--device", "cpu", *arguments]
        monkeypatch.setattr("sys.argv", ["test_stage2_gradients.py", *map(str, asked)])
        return script.main(), capsys.readouterr().out

    root = logging.getLogger()
    handlers = list(root.handlers)
    yield run
    root.handlers[:] = handlers


def figure(said: str, name: str) -> float:
    return float(said.rpartition(f"{name}: ")[2].split()[0].rstrip("x"))


def changed(source: Path, target: Path, **choices: Any) -> Path:
    """A checkpoint of a run with other choices of cross-attention."""
    content = torch.load(source, weights_only=True)
    content["config"]["cross_attention"].update(choices)
    torch.save(content, target)
    return target


def test_the_defaults_leave_the_gradient_its_length_and_direction(measure: Callable[..., tuple[int, str]]) -> None:
    status, said = measure("--batches", 2, "--batch_size", 4)
    assert status == 0
    lines = said.splitlines()
    assert "the toy model with fresh weights" in lines[0]
    assert lines[1] == "Setting: image weight 0.1, text weight 0.1, context unit"
    assert lines[2] == "Image adapter gradient norm:"
    starts = (
        "  Without cross-attention: ",
        "  With cross-attention:    ",
        "  Ratio: ",
        "Cosine ",
        "Contribution to the ",
    )
    assert all(line.startswith(start) for line, start in zip(lines[3:8], starts, strict=True))
    assert lines[8] == "[OK] Cross-attention doesn't harm gradient flow significantly"
    assert "over 2 batches" in lines[6]
    assert figure(said, "Cosine between the two gradients") > 0.99
    assert 0 < figure(said, "|x|") < 0.05


def test_row1_the_old_setting_turns_the_gradient_and_is_cautioned(measure: Callable[..., tuple[int, str]]) -> None:
    """Row 1 of docs/method.md, "Known defects". Its ratio alone is as healthy as the defaults'."""
    status, said = measure(*OLD)
    assert status == 1
    assert 0.8 <= figure(said, "Ratio") <= 1.25
    assert figure(said, "Cosine between the two gradients") < 0.95
    assert figure(said, "|x|") > 0.1
    assert said.splitlines()[-1].startswith("[CAUTION]")
    assert "[OK]" not in said


def test_what_a_preset_chose_is_not_judged(measure: Callable[..., tuple[int, str]]) -> None:
    status, said = measure("--preset", OLD_PRESET)
    assert status == 0
    assert "Setting: image weight 1, text weight 1, context none" in said
    assert figure(said, "Cosine between the two gradients") < 0.95
    assert said.splitlines()[-1].startswith(f"[BY INTENT] preset {OLD_PRESET} sets the weight to 1, above the default")
    status, said = measure("--preset", OLD_PRESET, "--image_cross_attn_weight", 1.0)
    assert (status, said.splitlines()[-1].split()[0]) == (1, "[CAUTION]"), "asked for by flag"
    assert measure("--preset", "v2")[1].splitlines()[-1].startswith("[OK]")


@pytest.mark.parametrize(
    ("ratio", "cosine", "expected"),
    [
        (1.0, 1.0, "[OK]"),
        (0.81, 0.951, "[OK]"),
        (1.24, 0.951, "[OK]"),
        (0.79, 1.0, "[CAUTION]"),
        (1.26, 1.0, "[CAUTION]"),
        (1.0, 0.949, "[CAUTION]"),
        (1.0, -1.0, "[CAUTION]"),
    ],
)
def test_verdicts(ratio: float, cosine: float, expected: str) -> None:
    found = Measurement(0.1, [2.0], [2.0 * ratio], [cosine], [0.01])
    assert verdict(found).startswith(expected)
    assert verdict(found, "somebody").startswith("[BY INTENT] somebody")
    by_intent = "[BY INTENT] somebody matches the residual, which makes 10% of the stream"
    assert verdict(found, None, "somebody").startswith(expected if expected == "[OK]" else by_intent)


def test_a_matched_branch_adds_exactly_its_weight(measure: Callable[..., tuple[int, str]]) -> None:
    asked = ("--context_norm", "layer", "--cross_attn_residual", "matched", "--image_cross_attn_weight", 0.3)
    status, said = measure(*asked)
    assert "Setting: image weight 0.3, text weight 0.1, context layer, residual matched" in said
    assert figure(said, "|x|") == pytest.approx(0.3, abs=1e-6)
    assert (status, said.splitlines()[-1].split()[0]) == (1, "[CAUTION]"), "asked for by flag, it is judged"


def bench(world: Path, **asked: Any) -> Bench:
    return Bench(GradientTest(dataset=str(world / "train"), device="cpu", batch_size=4, **asked))


def setting(measured: Bench) -> tuple[float, float, str]:
    model = measured.model
    return model.i_ca_w, model.t_ca_w, model.cross_config.context_norm


def test_a_checkpoint_is_measured_as_what_it_is(world: Path, tmp_path: Path) -> None:
    final = world / "feedback" / "final_model.pth"
    measured = bench(world, checkpoint=final)
    assert "with its own cross-attention" in measured.subject
    trained = torch.load(final, weights_only=True)["image_cross_attn"]["q_proj.weight"]
    assert torch.equal(measured.model.image_cross_attn.q_proj.weight, trained)
    assert setting(measured) == (pytest.approx(0.1), pytest.approx(0.1), "layer")
    assert measured.chosen_by is None

    choices = {"image_cross_attn_weight": 0.7, "text_cross_attn_weight": 0.3, "context_norm": "none"}
    larger = changed(final, tmp_path / "larger.pth", **choices)
    measured = bench(world, checkpoint=larger)
    assert setting(measured) == (0.7, 0.3, "none")
    assert measured.chosen_by == str(larger)
    assert measured.measure(measured.weight).weight == 0.7
    assert measured.measure(0.0).cosine == [pytest.approx(1)]
    assert measured.weight == 0.7


def test_flags_that_are_given_win(world: Path, tmp_path: Path) -> None:
    final = world / "feedback" / "final_model.pth"
    choices = {"image_cross_attn_weight": 0.7, "context_norm": "none"}
    larger = changed(final, tmp_path / "larger.pth", **choices)
    measured = bench(world, checkpoint=larger, image_cross_attn_weight=0.5, context_norm="unit")
    assert setting(measured) == (0.5, 0.1, "unit")
    assert measured.chosen_by is None
    # A flag with the checkpoint's own value is a flag.
    assert bench(world, checkpoint=larger, image_cross_attn_weight=0.7).chosen_by is None
    measured = bench(world, checkpoint=final, image_cross_attn_weight=0.2, text_cross_attn_weight=0.0)
    assert setting(measured) == (0.2, 0.0, "layer")
    with pytest.raises(UserError, match="was trained on"):
        bench(world, checkpoint=final, model_name="toy")
    with pytest.raises(UserError, match=r"--preset v2: .* has cross-attention of its own"):
        bench(world, checkpoint=final, preset="v2")


def test_a_base_gets_a_fresh_cross_attention(world: Path) -> None:
    measured = bench(world, checkpoint=world / "base" / "image_adapter.pth")
    assert "with a fresh cross-attention on top" in measured.subject
    default = CrossAttentionConfig()
    expected = (default.image_cross_attn_weight, default.text_cross_attn_weight, default.context_norm)
    assert setting(measured) == expected
    measured = bench(world, checkpoint=world / "base" / "image_adapter.pth", preset=OLD_PRESET)
    assert setting(measured) == (1.0, 1.0, "none")
    assert measured.chosen_by == f"preset {OLD_PRESET}"


def test_a_loop_before_cross_attention_starts_has_none(world: Path, tmp_path: Path) -> None:
    choices = {"cross_attn_active": False, "image_cross_attn_weight": 0.7}
    off = changed(world / "feedback" / "loop_1_final.pth", tmp_path / "off.pth", **choices)
    measured = bench(world, checkpoint=off)
    assert "image cross-attention is off" in measured.subject
    found = measured.measure(measured.weight)
    assert (found.ratio, found.cosine, found.contribution) == (1.0, [pytest.approx(1)], [0.0])
    assert measured.chosen_by is None
    assert bench(world, checkpoint=off, image_cross_attn_weight=0.7).measure(0.7).contribution > [0.0]


def test_sweep_and_components(world: Path, tmp_path: Path, measure: Callable[..., tuple[int, str]]) -> None:
    status, said = measure(
        "--checkpoint",
        world / "feedback" / "final_model.pth",
        "--component",
        "--sweep",
        0,
        0.1,
        1,
        "--output_dir",
        tmp_path,
    )
    assert status == 0
    assert said.count("[BY INTENT]") == 1, "the residual is the checkpoint's; at weights that a flag names it is judged"
    for line in ("Stage 1 (text):", "Stage 2 (image):", "  image_cross_attn: ", "weight 0.0", "weight 1.0"):
        assert line in said
    with (tmp_path / "gradient_sweep.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["weight"]) for row in rows] == [0.0, 0.1, 1.0]
    assert list(rows[0]) == ["weight", "without", "with", "ratio", "cosine", "contribution"]
    assert float(rows[0]["cosine"]) == pytest.approx(1)
    assert float(rows[2]["cosine"]) < float(rows[1]["cosine"]) < 1
    assert float(rows[2]["contribution"]) == pytest.approx(10 * float(rows[1]["contribution"]), rel=1e-3)
    assert (tmp_path / "gradient_sweep.png").stat().st_size > 1000
