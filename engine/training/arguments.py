"""What a training run was asked for: a frozen value that argparse fills, that is saved, that a restart must equal."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from model.clip import FrozenCLIP
from model.clip_loading import load_clip
from model.config import CrossAttentionConfig, ModelConfig


def free(default: Any) -> Any:
    """A setting in which a restart may differ without being another run (docs/method.md, "Training").

    Weights and metadata are compared by digest, prompts by their words, and epochs where the run stands.
    """
    return field(default=default, metadata={"free": True})


Config = TypeVar("Config", bound="RunConfig")


@dataclass(frozen=True)
class RunConfig:
    """Arguments that all training scripts share, by the same names and with the base's defaults."""

    model_name: str = "ViT-L-14-336"
    clip_weights: str | None = free(None)
    img_size: int | None = None
    activation: str | None = None
    surgery: str = "dual"
    surgery_until_layer: int | None = None
    adapter: str = "bottleneck"
    relu: bool = False
    levels: tuple[int, ...] | None = None
    text_adapt_weight: float = 0.1
    image_adapt_weight: float = 0.1
    text_adapt_until: int | None = None
    image_adapt_until: int | None = None
    dataset: str = "VisA"
    data_root: Path | None = free(None)
    metadata: Path | None = free(None)
    class_names: Path | None = free(None)
    skip_bad_images: bool = False
    training_mode: str = "few_shot"
    shot: int = 32
    text_batch_size: int = 16
    image_batch_size: int = 2
    text_lr: float = 1e-5
    image_lr: float = 5e-4
    accumulate: int = 1
    text_norm_weight: float = 0.1
    stage1_levels: str = "all"
    seed: int = 0
    device: str = free("auto")
    precision: str = "fp32"
    num_workers: int = free(2)
    save_path: Path = free(Path("ckpt/base"))
    resume: str = free("auto")
    tracker: str = free("tensorboard")

    @classmethod
    def from_namespace(cls: type[Config], arguments: Namespace) -> Config:
        values = vars(arguments)
        levels = values.get("levels")
        return cls(**{**values, "levels": tuple(levels) if levels else None})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `args.json` holds them."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self)}

    def signature(self) -> dict[str, Any]:
        """What makes this run this run: a restart with another value is another run."""
        values = self.to_dict()
        signature = {item.name: values[item.name] for item in fields(self) if "free" not in item.metadata}
        if self.training_mode == "full_shot":
            del signature["shot"]
        return signature


@dataclass(frozen=True)
class BaseConfig(RunConfig):
    """Arguments of `train.py`: the base's column of docs/method.md, "Training"."""

    text_epoch: int = free(5)
    image_epoch: int = free(20)


@dataclass(frozen=True)
class CrossAttentionArguments(RunConfig):
    """Arguments that the scripts with cross-attention share: the branches, and the base that they start from."""

    text_cross_attn_weight: float = CrossAttentionConfig.text_cross_attn_weight
    image_cross_attn_weight: float = CrossAttentionConfig.image_cross_attn_weight
    cross_attn_heads: int = CrossAttentionConfig.cross_attn_heads
    cross_attn_dropout: float = CrossAttentionConfig.cross_attn_dropout
    context_norm: str = CrossAttentionConfig.context_norm
    cross_attn_init: str = CrossAttentionConfig.cross_attn_init
    cross_attn_scale: str = CrossAttentionConfig.cross_attn_scale
    text_conditioning: str = CrossAttentionConfig.text_conditioning
    load_base_text_adapter: Path | None = free(None)
    load_base_image_adapter: Path | None = free(None)
    reset_base_optimizer: bool = False
    allow_partial_base: bool = free(False)
    freeze_base: bool = False

    def cross_attention(self) -> CrossAttentionConfig:
        """The choices that the forward depends on; what a feedback loop sets keeps its default."""
        names = {item.name for item in fields(CrossAttentionConfig)} & {item.name for item in fields(self)}
        return CrossAttentionConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class CrossAttentionRunConfig(CrossAttentionArguments, BaseConfig):
    """Arguments of `train_cross_attention.py`."""

    save_path: Path = free(Path("ckpt/cross_attention"))


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return value.as_posix()
    return list(value) if isinstance(value, tuple) else value


def build_clip(config: RunConfig) -> FrozenCLIP:
    """The frozen CLIP that a run asks for."""
    return load_clip(config.model_name, config.clip_weights, config.img_size, config.activation)


def resolve_model(config: RunConfig, clip: FrozenCLIP, text_adapted: bool = True) -> ModelConfig:
    """The forward that a run asks for, with the depths that were left open filled in from the CLIP model.

    text_adapted: whether the text side is trained, now or in the base that the run starts from.
    """
    asked = {
        name: getattr(config, name)
        for name in ("levels", "text_adapt_until", "image_adapt_until", "surgery_until_layer")
        if getattr(config, name) is not None
    }
    return ModelConfig(
        model_name=clip.model_name,
        weights_digest=clip.weights_digest,
        activation=clip.activation,
        img_size=clip.img_size,
        text_adapt_weight=config.text_adapt_weight,
        image_adapt_weight=config.image_adapt_weight,
        adapter=config.adapter,
        relu=config.relu,
        surgery=config.surgery,
        text_adapted=text_adapted,
        **{**clip.defaults, **asked},
    )
