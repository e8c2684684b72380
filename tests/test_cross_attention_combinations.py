"""All combinations of cross-attention options: training, checkpoints and predictions."""

import functools
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine import load_model
from engine.detector.loading import build_detector
from engine.training.feedback import train_feedback
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.checkpoint import read_checkpoint, save, state_of
from model.clip import FrozenCLIP
from model.config import CrossAttentionConfig
from model.losses import stage1_losses, stage2_losses
from model.scoring import similarities
from tests.helpers import config_for, gradients_of, random_batch, tiny_clip, tiny_prompts
from tests.scripts import small_runs, write_clip, write_dataset
from utils.errors import UserError

CHOICES = {
    item.name: st.sampled_from(item.metadata["choices"])
    for item in fields(CrossAttentionConfig)
    if item.metadata.get("choices")
}
WEIGHTS = st.sampled_from([0.0, 0.3, 1.0])


@functools.cache
def clip() -> FrozenCLIP:
    return tiny_clip()


def losses_of(model: AdaptedCLIPWithCrossAttention) -> tuple[Tensor, Tensor]:
    """The losses of Stage 1 and Stage 2 on a batch."""
    batch, prompts = random_batch(40), tiny_prompts(model.clip)
    features = model.stage1_features(batch.images, prompts, batch.rows)
    anchors = model.batch_anchors(prompts, batch.rows, features)
    first = stage1_losses(similarities(features.levels, anchors), anchors, batch.masks, 0.1)[0]["total"]
    outputs = model(batch.images, model.text_side(prompts), batch.rows)
    return first, stage2_losses(outputs, batch.masks, batch.labels)[0]["total"]


@torch.no_grad()
def outputs_of(model: AdaptedCLIPWithCrossAttention) -> list[Tensor]:
    batch = random_batch(40)
    found = model.eval()(batch.images, model.text_side(tiny_prompts(model.clip)), batch.rows)
    return [*found.levels, found.det]


@settings(max_examples=40, deadline=None)
@given(
    choices=st.fixed_dictionaries(
        {
            **CHOICES,
            "text_cross_attn_weight": WEIGHTS,
            "image_cross_attn_weight": WEIGHTS,
            "cross_attn_dropout": st.sampled_from([0.0, 0.5]),
        }
    )
)
@example(choices={"context_norm": "layer", "cross_attn_residual": "matched", "text_context": "trained"})
def test_all_combinations_train_and_predict_from_their_checkpoint(choices: dict[str, Any]) -> None:
    """Gradients are finite and reach the components of their side; the file predicts like the model."""
    cross = CrossAttentionConfig(cross_attn_heads=4, **choices)
    torch.manual_seed(3)
    try:
        model = AdaptedCLIPWithCrossAttention(clip(), config_for(clip()), cross=cross).train()
    except UserError as error:
        assert cross.cross_attn_init == "zero" and "--cross_attn_residual matched" in str(error)
        return
    for side, loss in zip(("text", "image"), losses_of(model), strict=True):
        model.zero_grad()
        loss.backward()
        found = gradients_of(model)
        assert all(value.isfinite().all() for value in (loss, *found.values()))
        assert {name.split(".")[0] for name in found} == set(model.trained_components(side))
        assert all(
            any(found[name].any() for name in found if name.startswith(part))
            for part in model.components
            if part in model.trained_components(side)
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "loop_1_final.pth"
        states = {name: state_of(part) for name, part in model.components.items()}
        save({**states, "epoch": 1}, file)
        checkpoint = read_checkpoint(file)
    config = {"model": model.config.to_dict(), "cross_attention": cross.to_dict()}
    loaded = build_detector(type(checkpoint)(file, checkpoint.components, epoch=1, config=config), clip()).model
    assert loaded.cross_config == cross
    assert all(torch.equal(*pair) for pair in zip(outputs_of(loaded), outputs_of(model), strict=True))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_clip(folder / "clip")
    write_dataset(folder / "train", count=2)
    return folder


@pytest.mark.parametrize(
    "asked",
    [
        {"feedback_features": "projectors", "cross_attn_start_loop": 2},
        {"context_norm": "layer", "cross_attn_residual": "add", "cross_attn_init": "zero"},
    ],
    ids=lambda asked: "-".join(map(str, asked.values())),
)
def test_feedback_trains_and_each_file_has_its_config(asked: dict[str, Any], world: Path, tmp_path: Path) -> None:
    config = replace(small_runs(world)[1], save_path=tmp_path / "run", **asked)
    train_feedback(config)
    for loop in (1, 2):
        model = load_model(tmp_path / "run" / f"loop_{loop}_final.pth", device="cpu").model
        for name, value in asked.items():
            if name in {item.name for item in fields(CrossAttentionConfig)}:
                assert getattr(model.cross_config, name) == value
        assert model.cross_config.cross_attn_active == (loop >= config.cross_attn_start_loop)
    final = load_model(tmp_path / "run" / "final_model.pth", device="cpu")
    assert 0 <= final.predict(world / "train" / "felt" / "test" / "spot" / "000.png", "felt").score <= 1
