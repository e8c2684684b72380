"""Files of other code, which have no config: assumptions, messages and errors."""

import functools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config.tools import GradientTest
from engine.config.training import CrossAttentionRunConfig
from engine.detector.detector import Detector
from engine.detector.loading import build_detector
from engine.training.gradients import build_model
from engine.training.start import Start, check_start, read_base, read_whole
from model.adapter import AdaptedCLIP
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.checkpoint import Checkpoint, read_any, save, state_of
from model.clip import FrozenCLIP
from model.config import CrossAttentionConfig
from tests.helpers import adapted_clip, config_for, random_batch, tiny_clip, tiny_prompts
from utils.errors import UserError

OLD = CrossAttentionConfig(text_cross_attn_weight=1.0, image_cross_attn_weight=1.0, context_norm="none")
NAMES = {"nut": "nut", "zipper": "zipper"}


@functools.cache
def clip() -> FrozenCLIP:
    return tiny_clip()


def crossed(cross: CrossAttentionConfig = OLD) -> AdaptedCLIPWithCrossAttention:
    torch.manual_seed(3)
    return AdaptedCLIPWithCrossAttention(clip(), config_for(clip(), surgery="sequential"), cross=cross).eval()


def write(model: AdaptedCLIP, path: Path, without: tuple[str, ...] = ()) -> Checkpoint:
    """A file without config: state dicts and an epoch."""
    states = {name: state_of(part) for name, part in model.components.items() if name not in without}
    save({**states, "epoch": 20}, path)
    return read_any(path)


@torch.no_grad()
def outputs(model: AdaptedCLIP) -> list[Tensor]:
    batch, prompts = random_batch(40), tiny_prompts(clip())
    found = model(batch.images, model.text_side(prompts), batch.rows)
    return [*found.levels, found.det]


def built(checkpoint: Checkpoint, **overrides: Any) -> Detector:
    return build_detector(checkpoint, clip(), **overrides)


def test_cross_attention_without_config_is_reconstructed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = crossed()
    with caplog.at_level(logging.INFO):
        detector = built(write(model, tmp_path / "image_adapter_cross_attn.pth"))
    assert isinstance(detector.model, AdaptedCLIPWithCrossAttention)
    assert detector.model.cross_config == OLD
    assert all(torch.equal(*pair) for pair in zip(outputs(detector.model), outputs(model), strict=True))
    assert "assumed text_cross_attn_weight 1.0, image_cross_attn_weight 1.0, context_norm none" in caplog.text


def test_options_override_assumptions(tmp_path: Path) -> None:
    asked = {
        "text_cross_attn_weight": 0.2,
        "image_cross_attn_weight": 0.1,
        "context_norm": "unit",
        "text_conditioning": "none",
        "text_context": "trained",
        "cross_attn_heads": 4,
        "cross_attn_residual": "matched",
    }
    detector = built(write(crossed(), tmp_path / "cross.pth"), **asked)
    assert detector.model.cross_config == replace(OLD, **asked)
    with pytest.raises(UserError, match=r"cross\.pth: --context_norm raw: choose one of unit, none"):
        built(read_any(tmp_path / "cross.pth"), context_norm="raw")
    with pytest.raises(UserError, match=r"cross\.pth: --cross_attn_heads 5: must divide"):
        built(read_any(tmp_path / "cross.pth"), cross_attn_heads=5)


def test_an_option_overrides_the_weight_in_a_config_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = crossed()
    checkpoint = write(model, tmp_path / "cross.pth")
    config = {"model": model.config.to_dict(), "cross_attention": CrossAttentionConfig().to_dict()}
    detector = built(replace(checkpoint, config=config), image_cross_attn_weight=0.3, text_cross_attn_weight=0.1)
    assert detector.model.i_ca_w == 0.3
    assert "was trained with image_cross_attn_weight 0.1, now 0.3" in caplog.text
    assert "with text_cross_attn_weight" not in caplog.text


@pytest.mark.parametrize("side", ["text", "image"])
def test_a_missing_branch_is_disabled(side: str, tmp_path: Path) -> None:
    checkpoint = write(crossed(), tmp_path / "cross.pth", without=(f"{side}_cross_attn",))
    detector = built(checkpoint)
    off = {f"{side}_cross_attn_weight": 0.0}
    assert detector.model.cross_config == replace(OLD, **off)
    expected = outputs(crossed(replace(OLD, **off)))
    assert all(torch.equal(*pair) for pair in zip(outputs(detector.model), expected, strict=True))
    with pytest.raises(UserError, match=f"has no {side}_cross_attn, so --{side}_cross_attn_weight has no effect"):
        built(checkpoint, **{f"{side}_cross_attn_weight": 0.1})


def test_the_gradient_test_accepts_files_without_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.training.gradients.load_clip_for", lambda *_, **__: clip())
    model = crossed()
    checkpoint = write(model, tmp_path / "cross.pth")
    measured = build_model(GradientTest(checkpoint=tmp_path / "cross.pth"), checkpoint)
    assert measured.cross_config == model.cross_config
    states = (state_of(part) for part in (measured.image_cross_attn, model.image_cross_attn))
    assert all(torch.equal(*pair) for pair in zip(*(state.values() for state in states), strict=True))


def start_from(start: Start, **changes: Any) -> None:
    """`check_start` for a run with the tiny CLIP and model, with changes."""
    run = CrossAttentionRunConfig(activation=changes.pop("activation", None))
    check_start(start, config_for(clip(), **changes), run, NAMES)


def base_of(folder: Path, model: AdaptedCLIP) -> Start:
    files = {side: folder / f"{side}_adapter.pth" for side in ("text", "image")}
    write(model, files["text"], without=("image_adapter",))
    write(model, files["image"])
    return read_base(
        CrossAttentionRunConfig(load_base_text_adapter=files["text"], load_base_image_adapter=files["image"])
    )


def test_assumptions_about_a_base_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start = base_of(tmp_path, adapted_clip(clip()))
    with caplog.at_level(logging.INFO):
        start_from(start)
    for file in ("text_adapter.pth", "image_adapter.pth"):
        assert f"{file} has no config: assumed trained on these weights of tiny at 40 px" in caplog.text
        assert f"{file} has no config: assumed trained with quick_gelu" in caplog.text
    assert "--activation, --class_names" in caplog.text
    assert "not the text side" not in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        start_from(start, activation="quick_gelu")
    assert "assumed trained with quick_gelu" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_a_different_text_side_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start = base_of(tmp_path, adapted_clip(clip()))
    start.text.components["text_adapter"]["0.fc1.weight"] += 1
    start_from(start)
    assert "text_adapter.pth is not the text side stored in" in caplog.text


def test_other_class_names_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start = base_of(tmp_path, adapted_clip(clip()))
    names = {"nut": "hex nut", "rope": "rope"}
    config = {"model": config_for(clip()).to_dict(), "prompt_names": names}
    start_from(Start(replace(start.text, config=config), replace(start.image, config=config)))
    assert caplog.text.count("was trained with other names in its prompts: nut was 'hex nut', now 'nut'") == 2
    assert "zipper" not in caplog.text and "rope" not in caplog.text


def test_init_from_a_file_without_config(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(crossed(), tmp_path / "cross.pth")
    start_from(read_whole(tmp_path / "cross.pth"))
    assert "assumed text_cross_attn_weight 1.0, image_cross_attn_weight 1.0" in caplog.text
    assert "was trained with text_cross_attn_weight 1.0, now 0.1" in caplog.text
    for asked, words in (
        ({"cross_attn_residual": "matched"}, "was trained with cross_attn_residual add, now matched"),
        ({"context_norm": "layer"}, "was trained with context_norm none, now layer"),
    ):
        check_start(read_whole(tmp_path / "cross.pth"), config_for(clip()), CrossAttentionRunConfig(**asked), NAMES)
        assert words in caplog.text
