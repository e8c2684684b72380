"""What `test_stage2_gradients.py` is asked for."""

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

DEFAULT_WEIGHT = CrossAttentionConfig.image_cross_attn_weight


@dataclass(frozen=True, kw_only=True)
class GradientTest(Arguments):
    """What is measured: which model, on which images, with which cross-attention. None is what was not asked for."""

    model_name: str | None = changed(ModelArguments, "model_name", None, unset=f"{TRAINED}, else toy")
    clip_weights: str | None = changed(
        ModelArguments, "clip_weights", unset="those trained with, else OpenAI's from the hub"
    )
    activation: str | None = changed(ModelArguments, "activation", unset=f"{TRAINED}, else the one the weights need")
    img_size: int | None = changed(ModelArguments, "img_size", unset=f"{TRAINED}, else the model's own")
    checkpoint: Path | None = setting(
        None, "trained model, a base or one with cross-attention", "model", unset="none, fresh weights"
    )
    preset: str | None = changed(
        FeedbackConfig,
        "preset",
        None,
        help="feedback preset whose cross-attention is measured",
        unset="none",
        group="cross-attention",
    )
    image_cross_attn_weight: float | None = changed(
        CrossAttentionArguments, "image_cross_attn_weight", None, unset=f"{TRAINED}, else {DEFAULT_WEIGHT}"
    )
    text_cross_attn_weight: float | None = changed(
        CrossAttentionArguments, "text_cross_attn_weight", None, unset=f"{TRAINED}, else {DEFAULT_WEIGHT}"
    )
    context_norm: str | None = changed(CrossAttentionArguments, "context_norm", None, unset=f"{TRAINED}, else unit")
    cross_attn_residual: str | None = changed(
        CrossAttentionArguments, "cross_attn_residual", None, unset=f"{TRAINED}, else add"
    )
    dataset: str = changed(DataArguments, "dataset", "toy_train")
    data_root: Path | None = changed(DataArguments, "data_root")
    batches: int = setting(1, "batches to average over", "data", between=(1, 1_000_000))
    batch_size: int = setting(8, "images in each batch", "data", between=(1, 100_000))
    seed: int = changed(RunConfig, "seed", help="seed of fresh weights and of the batches", group="data")
    device: str = changed(MachineArguments, "device")
    component: bool = setting(False, "list every component's gradient norm in both stages", "what to do")
    sweep: tuple[float, ...] = setting(
        (),
        "weights of the image side to measure as well, for a plot and a CSV",
        "what to do",
        between=(0, 1e6),
        several=True,
    )
    output_dir: Path = setting(Path("runs/gradients"), "folder of plot and CSV", "output")

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the fields that were asked for."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}
