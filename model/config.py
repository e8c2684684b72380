"""Every choice that changes the forward of an adapted CLIP, in one frozen value that prints, saves and compares."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from utils.errors import UserError
from utils.fields import limited
from utils.schema import MayHoldMore, Plain, check_fields

# The trainable parts, by the names that checkpoints, state dicts and logs use.
COMPONENTS = ("text_adapter", "text_cross_attn", "image_adapter", "image_cross_attn")
SIDES = ("text", "image")
# A model to share is a folder with these two (docs/deploying.md).
SHARED_WEIGHTS, SHARED_CONFIG = "model.safetensors", "config.json"
ADAPTERS = ("bottleneck", "linear")
SURGERIES = ("dual", "sequential", "batch_axis")
ACTIVATIONS = ("gelu", "quick_gelu")
CONTEXT_NORMS = ("unit", "none", "layer")
CROSS_ATTN_RESIDUALS = ("add", "matched")
CROSS_ATTN_INITS = ("xavier", "zero")
TEXT_CONDITIONINGS = ("image", "none")
# What the det score compares with in testing: the abnormal anchor, or its difference from the normal one.
DET_SCORES = ("abnormal", "difference")
TEXT_CONTEXTS = ("frozen", "trained", "projectors")
# Which patch features normal references are compared by, and the weight of the map that they give (docs/results.md).
REFERENCE_FEATURES = ("trained", "frozen", "both")
REFERENCE_WEIGHT = 0.5


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
    activation: str = limited(choices=ACTIVATIONS)
    img_size: int = limited(between=(1, 8192))
    levels: tuple[int, ...] = limited(between=(1, 1000))
    text_adapt_until: int = limited(between=(0, 1000))
    image_adapt_until: int = limited(between=(0, 1000))
    surgery_until_layer: int = limited(between=(1, 1000))
    text_adapt_weight: float = limited(0.1, between=(0, 1))
    image_adapt_weight: float = limited(0.1, between=(0, 1))
    adapter: str = limited("bottleneck", choices=ADAPTERS)
    relu: bool = False
    surgery: str = limited("dual", choices=SURGERIES)
    text_adapted: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain containers only, so that a checkpoint holding it loads with `weights_only=True`."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "the checkpoint") -> ModelConfig:
        """The config of a checkpoint; `source` names the file in the error for what is missing, unknown or unfit."""
        check_fields(values, cls, source, "config.model")
        for item in fields(cls):
            if item.name not in values:  # a default of today need not be what the file was trained with
                raise UserError(f"{source}: config.model has no '{item.name}'; use the version that wrote it")
        return cls(**{key: tuple(value) if key == "levels" else value for key, value in values.items()})


@dataclass(frozen=True)
class CrossAttentionConfig:
    """What the two cross-attentions are (docs/method.md, "Cross-attention").

    text_context: the image features that text sees, and that Stage 1 looks at: "frozen", those of the "trained" image
    branch, or its "projectors" on frozen tokens. cross_attn_active: False in the loops of a feedback run before its
    `cross_attn_start_loop`. A feedback loop decides these two (`LoopForward`), the others hold for a whole run.
    """

    text_cross_attn_weight: float = limited(0.1, between=(0, 100))
    image_cross_attn_weight: float = limited(0.1, between=(0, 100))
    cross_attn_heads: int = limited(8, between=(1, 1024))
    cross_attn_dropout: float = limited(0.1, between=(0, 0.99))
    context_norm: str = limited("unit", choices=CONTEXT_NORMS)
    cross_attn_residual: str = limited("add", choices=CROSS_ATTN_RESIDUALS)
    cross_attn_init: str = limited("xavier", choices=CROSS_ATTN_INITS)
    text_conditioning: str = limited("image", choices=TEXT_CONDITIONINGS)
    text_context: str = limited("frozen", choices=TEXT_CONTEXTS)
    cross_attn_active: bool = True

    @property
    def on(self) -> bool:
        """Whether either branch has a weight; a branch of weight 0 is skipped in the forward."""
        return bool(self.sides)

    @property
    def sides(self) -> set[str]:
        """The sides whose branch has a weight."""
        return {side for side in SIDES if getattr(self, f"{side}_cross_attn_weight")}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class LoopForward(NamedTuple):
    """What a feedback loop decides of the forward; meanings as in `CrossAttentionConfig`."""

    text_context: str
    cross_attn_active: bool


def check_cross_attention(config: CrossAttentionConfig, text_width: int) -> None:
    """Raise `UserError` for invalid or conflicting choices, or heads that do not divide the text width."""
    check_settings(config)
    if text_width % config.cross_attn_heads:
        raise UserError(f"--cross_attn_heads {config.cross_attn_heads}: must divide the text width, {text_width}")
    if config.cross_attn_residual != "matched":
        return
    for side in config.sides:
        weight = getattr(config, f"{side}_cross_attn_weight")
        if weight > 1:
            raise UserError(f"--{side}_cross_attn_weight {weight:g}: 0 to 1 with --cross_attn_residual matched")
    if config.on and config.cross_attn_init == "zero":
        raise UserError(
            "--cross_attn_init zero does not go with --cross_attn_residual matched: an output of length 0 has no "
            "direction to rescale; use --cross_attn_init xavier or --cross_attn_residual add"
        )


def check_settings(config: Any) -> None:
    """Raise `UserError` for a value that is none of its field's choices, or out of its range."""
    for item in fields(config):
        value, choices, between = getattr(config, item.name), item.metadata.get("choices"), item.metadata.get("between")
        if value is None:
            continue
        if choices and value not in choices:
            raise UserError(f"--{item.name} {value}: choose one of {', '.join(choices)}")
        numbers = value if isinstance(value, tuple) else (value,)
        if between and not all(between[0] <= number <= between[1] for number in numbers):
            shown = " ".join(map(str, numbers))
            raise UserError(f"--{item.name} {shown}: takes {between[0]} to {between[1]}")


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
    ):
        if not low <= value <= high:
            raise UserError(f"--{flag} {value}: {config.model_name} takes {low} to {high}")
    check_settings(config)


@dataclass(frozen=True)
class SavedArguments(MayHoldMore):
    """Of the arguments that a run had, those that other scripts take over."""

    more = Plain
    dataset: str
    clip_weights: str | None = None
    data_root: str | None = None
    metadata: str | None = None
    class_names: str | None = None
    val_fraction: float = field(default=0.0, metadata={"between": (0, 1)})
