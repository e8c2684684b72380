"""Options of `test_stage2_gradients.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.common import Arguments, DataArguments, MachineArguments, ModelArguments
from engine.config.evaluation import TRAINED
from engine.config.feedback import FeedbackConfig
from engine.config.training import CrossAttentionArguments, RunConfig
from model.config import CrossAttentionConfig
from utils.fields import changed, setting

# Its cross-attention is that of `train_cross_attention.py`.
DEFAULT_PRESET = "v2"
DEFAULT_WEIGHT = CrossAttentionConfig.image_cross_attn_weight


@dataclass(frozen=True, kw_only=True)
class GradientTest(Arguments):
    """The model, the images and the cross-attention to measure; None means not given."""

    model_name: str | None = changed(ModelArguments, "model_name", None, unset=f"{TRAINED}, else toy")
    clip_weights: str | None = changed(
        ModelArguments, "clip_weights", unset="those trained with, else OpenAI's from the hub"
    )
    activation: str | None = changed(ModelArguments, "activation", unset=f"{TRAINED}, else the one the weights need")
    img_size: int | None = changed(ModelArguments, "img_size", unset=f"{TRAINED}, else the model's own")
    checkpoint: Path | None = setting(
        None, "file or run folder of a trained model, with or without cross-attention", "model", unset="none"
    )
    preset: str | None = changed(
        FeedbackConfig,
        "preset",
        None,
        help="feedback preset whose cross-attention is measured",
        unset="that of train_cross_attention.py",
        group="cross-attention",
    )
    image_cross_attn_weight: float | None = changed(
        CrossAttentionArguments, "image_cross_attn_weight", None, unset=f"{TRAINED}, else {DEFAULT_WEIGHT}"
    )
    text_cross_attn_weight: float | None = changed(
        CrossAttentionArguments, "text_cross_attn_weight", None, unset=f"{TRAINED}, else {DEFAULT_WEIGHT}"
    )
    context_norm: str | None = changed(CrossAttentionArguments, "context_norm", None, unset=f"{TRAINED}, else layer")
    cross_attn_residual: str | None = changed(
        CrossAttentionArguments, "cross_attn_residual", None, unset=f"{TRAINED}, else matched"
    )
    dataset: str = changed(DataArguments, "dataset", "toy_train")
    data_root: Path | None = changed(DataArguments, "data_root")
    batches: int = setting(1, "batches to average over", "data", between=(1, 1_000_000))
    batch_size: int = setting(8, "images in each batch", "data", between=(1, 100_000))
    seed: int = changed(RunConfig, "seed", help="seed of fresh weights and of the batches", group="data")
    device: str = changed(MachineArguments, "device")
    component: bool = setting(False, "list every component's gradient norm in both stages", "what to do")
    allow: bool = setting(False, "exit with status 0 even for [CAUTION]", "what to do")

    def given(self, *names: str) -> dict[str, Any]:
        """The fields among `names` that are not None."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}
