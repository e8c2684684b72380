"""`test_stage2_gradients.py`: the model it measures, its verdict and its exit status (run in this process)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import test_stage2_gradients as script
from engine.config.tools import GradientTest
from engine.training.gradients import Measurement, build_model, verdict
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.checkpoint import read_checkpoint
from tests.scripts import train_small_runs
from utils.errors import UserError

# Those of the preset v1_original.
ORIGINAL = {
    "image_cross_attn_weight": 1.0,
    "text_cross_attn_weight": 1.0,
    "context_norm": "none",
    "cross_attn_residual": "add",
}

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_small_runs(tmp_path_factory.mktemp("world"))


@pytest.fixture
def measure(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the script; its exit status and standard output."""

    def run(*flags: str, **options: Any) -> tuple[int, str]:
        options = {"dataset": world / "train", "device": "cpu", "batch_size": 4, **options}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr("sys.argv", ["test_stage2_gradients.py", *words, *flags])
        return script.script.main(), capsys.readouterr().out

    return run


def number(output: str, name: str) -> float:
    return float(output.rpartition(f"{name}: ")[2].split()[0].rstrip("x"))


def test_the_default_is_the_cross_attention_of_train_cross_attention(measure: Run) -> None:
    status, output = measure(batches=2)
    lines = output.splitlines()
    assert "new adapters" in lines[0]
    assert lines[1] == "Options: image weight 0.1, text weight 0.1, context layer, residual matched"
    assert lines[2] == "Image adapter gradient norm:"
    starts = (
        "  Without cross-attention: ",
        "  With cross-attention:    ",
        "  Ratio: ",
        "Cosine ",
        "Contribution to the ",
    )
    assert all(line.startswith(start) for line, start in zip(lines[3:8], starts, strict=True))
    assert "over 2 batches" in lines[6]
    # A matched branch adds exactly its weight.
    assert number(output, "|x|") == pytest.approx(0.1, abs=1e-6)
    assert (status, lines[8]) == (0, "[OK] Cross-attention doesn't harm gradient flow significantly")


def test_row1_the_original_setting_fails_as_preset_and_as_options(measure: Run) -> None:
    """Row 1 of docs/method.md, "Known defects". Its ratio alone looks like that of the defaults."""
    status, output = measure(**ORIGINAL)
    assert status == 1
    assert 0.8 <= number(output, "Ratio") <= 1.25
    assert number(output, "Cosine between the two gradients") < 0.95
    assert output.splitlines()[-1].startswith("[CAUTION]")
    assert measure(preset="v1_original") == (1, output)
    assert measure("--allow", preset="v1_original") == (0, output)


def test_a_zero_initialised_branch_is_reported(measure: Run) -> None:
    status, output = measure(preset="v3")
    assert "zero-initialised: measure it after training" in output
    assert (status, number(output, "|x|")) == (0, 0.0)


@pytest.mark.parametrize(
    ("ratio", "cosine", "expected"),
    [
        (1.0, 1.0, "[OK]"),
        (0.81, 0.951, "[OK]"),
        (1.24, 0.951, "[OK]"),
        (0.79, 1.0, "[CAUTION]"),
        (1.26, 1.0, "[CAUTION]"),
        (1.0, 0.949, "[CAUTION]"),
    ],
)
def test_verdicts(ratio: float, cosine: float, expected: str) -> None:
    assert verdict(Measurement([2.0], [2.0 * ratio], [cosine], [0.01])).startswith(expected)


def changed(source: Path, target: Path, **choices: Any) -> Path:
    """A checkpoint of a run with other choices of cross-attention."""
    content = torch.load(source, weights_only=True)
    content["config"]["cross_attention"].update(choices)
    torch.save(content, target)
    return target


def model_of(file: Path, **options: Any) -> AdaptedCLIPWithCrossAttention:
    return build_model(GradientTest(checkpoint=file, **options), read_checkpoint(file))


def settings(model: AdaptedCLIPWithCrossAttention) -> tuple[float, float, str]:
    return model.i_ca_w, model.t_ca_w, model.cross_config.context_norm


def test_a_checkpoint_is_measured_with_its_options_by_default(world: Path, tmp_path: Path) -> None:
    final = world / "feedback" / "final_model.pth"
    model = model_of(final)
    trained = torch.load(final, weights_only=True)["image_cross_attn"]["q_proj.weight"]
    assert torch.equal(model.image_cross_attn.q_proj.weight, trained)
    assert settings(model) == (0.1, 0.1, "layer")
    choices = {"image_cross_attn_weight": 0.7, "text_cross_attn_weight": 0.3, "context_norm": "none"}
    larger = changed(final, tmp_path / "larger.pth", **choices)
    assert settings(model_of(larger)) == (0.7, 0.3, "none")
    assert settings(model_of(larger, image_cross_attn_weight=0.5, context_norm="unit")) == (0.5, 0.3, "unit")
    with pytest.raises(UserError, match="was trained on"):
        model_of(final, model_name="toy")
    with pytest.raises(UserError, match=r"--preset v2: .* has cross-attention of its own"):
        model_of(final, preset="v2")


def test_a_base_gets_a_new_cross_attention(world: Path) -> None:
    base = world / "base" / "image_adapter.pth"
    assert settings(model_of(base)) == (0.1, 0.1, "layer")
    assert settings(model_of(base, preset="v1_original")) == (1.0, 1.0, "none")


def test_a_folder_is_its_latest_checkpoint_and_components_are_listed(world: Path, measure: Run) -> None:
    status, output = measure("--component", checkpoint=world / "feedback")
    assert "loop_2_final.pth, with its own cross-attention" in output
    assert status == ("[CAUTION]" in output)
    for line in ("Stage 1 (text):", "Stage 2 (image):", "  text_cross_attn: ", "  image_cross_attn: "):
        assert line in output
    assert "with a new cross-attention" in measure(checkpoint=world / "base")[1]


def test_a_loop_before_cross_attention_starts_has_none(world: Path, tmp_path: Path, measure: Run) -> None:
    choices = {"cross_attn_active": False, "image_cross_attn_weight": 0.7}
    off = changed(world / "feedback" / "loop_1_final.pth", tmp_path / "off.pth", **choices)
    status, output = measure(checkpoint=off)
    assert "image cross-attention is off" in output and status == 0
    assert (number(output, "Ratio"), number(output, "|x|")) == (1.0, 0.0)
    assert number(measure(checkpoint=off, image_cross_attn_weight=0.7)[1], "|x|") > 0
