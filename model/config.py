"""Every choice that changes the forward of an adapted CLIP, in one frozen value that prints, saves and compares."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from utils.errors import UserError

ADAPTERS = ("bottleneck", "linear")
SURGERIES = ("dual", "sequential")
ACTIVATIONS = ("gelu", "quick_gelu")
CONTEXT_NORMS = ("unit", "none")
CROSS_ATTN_INITS = ("xavier", "zero")
CROSS_ATTN_SCALES = ("fixed", "learned")
TEXT_CONDITIONINGS = ("image", "batch_mean", "none")
TEXT_CONTEXTS = ("frozen", "trained", "projectors")


def rounded(value: float) -> int:
    """Round half up, so that a depth's default does not depend on banker's rounding."""
    return int(value + 0.5)


@dataclass(frozen=True)
class ModelConfig:
    """What an `AdaptedCLIP` is: the CLIP under it and every choice of docs/method.md that its outputs depend on.

    `levels` count vision blocks from 1: level 6 is the stream after six blocks. `text_adapted` is False where Stage 1
    was left out, so that anchors come from CLIP's own text projection.
    """

    model_name: str
    weights_digest: str
    activation: str
    img_size: int
    levels: tuple[int, ...]
    text_adapt_until: int
    image_adapt_until: int
    surgery_until_layer: int
    text_adapt_weight: float = 0.1
    image_adapt_weight: float = 0.1
    adapter: str = "bottleneck"
    relu: bool = False
    surgery: str = "dual"
    text_adapted: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain containers only, so that a checkpoint holding it loads with `weights_only=True`."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "the checkpoint") -> ModelConfig:
        """The config of a checkpoint; `source` names the file in the error for keys that are missing or unknown."""
        known = {field.name for field in fields(cls)}
        missing = known - set(values)
        unknown = set(values) - known
        if missing or unknown:
            what = ", ".join(
                [*(f"no '{key}'" for key in sorted(missing)), *(f"unknown '{key}'" for key in sorted(unknown))]
            )
            raise UserError(
                f"{source}: its model config does not fit this version ({what}); use the version that wrote it"
            )
        return cls(**{key: tuple(value) if key == "levels" else value for key, value in values.items()})


@dataclass(frozen=True)
class CrossAttentionConfig:
    """What the two cross-attentions are (docs/method.md, "Cross-attention").

    `text_conditioning`: whether anchors see each image ("image"), the batch's mean in Stage 1 ("batch_mean"), or no
    image ("none"). `text_context`: the image features they see, and that Stage 1 looks at: "frozen", those of the
    "trained" image branch, or its "projectors" on frozen tokens. `cross_attn_active`: False in the loops of a feedback
    run before its `cross_attn_start_loop`.
    """

    text_cross_attn_weight: float = 0.1
    image_cross_attn_weight: float = 0.1
    cross_attn_heads: int = 8
    cross_attn_dropout: float = 0.1
    context_norm: str = "unit"
    cross_attn_init: str = "xavier"
    cross_attn_scale: str = "fixed"
    text_conditioning: str = "image"
    text_context: str = "frozen"
    cross_attn_active: bool = True

    @property
    def on(self) -> bool:
        """Whether either branch can have an effect: both fixed at weight 0 are left out of the forward."""
        weights = (self.text_cross_attn_weight, self.image_cross_attn_weight)
        return self.cross_attn_scale == "learned" or any(weights)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_cross_attention(config: CrossAttentionConfig, text_width: int) -> None:
    """Raise `UserError` for choices that do not exist, or heads that do not divide the text width."""
    if config.cross_attn_heads < 1 or text_width % config.cross_attn_heads:
        raise UserError(f"--cross_attn_heads {config.cross_attn_heads}: must divide the text width, {text_width}")
    if not 0 <= config.cross_attn_dropout < 1:
        raise UserError(f"--cross_attn_dropout {config.cross_attn_dropout}: takes 0 to below 1")
    for flag, value, choices in (
        ("context_norm", config.context_norm, CONTEXT_NORMS),
        ("cross_attn_init", config.cross_attn_init, CROSS_ATTN_INITS),
        ("cross_attn_scale", config.cross_attn_scale, CROSS_ATTN_SCALES),
        ("text_conditioning", config.text_conditioning, TEXT_CONDITIONINGS),
        ("text_context", config.text_context, TEXT_CONTEXTS),
    ):
        if value not in choices:
            raise UserError(f"--{flag} {value}: choose one of {', '.join(choices)}")


def depth_defaults(vision_layers: int, text_layers: int) -> dict[str, Any]:
    """Levels and adapter depths that follow the encoders' depths: (6, 12, 18, 24), 6, 3, 20 for ViT-L/14."""
    return {
        "levels": tuple(sorted({max(1, rounded(vision_layers * quarter / 4)) for quarter in (1, 2, 3, 4)})),
        "image_adapt_until": max(1, rounded(vision_layers / 4)),
        "text_adapt_until": max(1, rounded(text_layers / 4)),
        "surgery_until_layer": max(1, rounded(5 * vision_layers / 6)),
    }


def check_depths(config: ModelConfig, vision_layers: int, text_layers: int) -> None:
    """Raise `UserError` where a depth or weight of `config` does not exist in a CLIP of these depths."""
    levels = config.levels
    if not levels or any(not 1 <= level <= vision_layers for level in levels) or list(levels) != sorted(set(levels)):
        raise UserError(f"--levels {' '.join(map(str, levels))}: levels ascend and lie between 1 and {vision_layers}")
    for flag, value, low, high in (
        ("image_adapt_until", config.image_adapt_until, 0, vision_layers),
        ("text_adapt_until", config.text_adapt_until, 0, text_layers),
        ("surgery_until_layer", config.surgery_until_layer, 1, vision_layers + 1),
        ("image_adapt_weight", config.image_adapt_weight, 0, 1),
        ("text_adapt_weight", config.text_adapt_weight, 0, 1),
    ):
        if not low <= value <= high:
            raise UserError(f"--{flag} {value}: {config.model_name} takes {low} to {high}")
    for flag, value, choices in (
        ("adapter", config.adapter, ADAPTERS),
        ("surgery", config.surgery, SURGERIES),
        ("activation", config.activation, ACTIVATIONS),
    ):
        if value not in choices:
            raise UserError(f"--{flag} {value}: choose one of {', '.join(choices)}")
