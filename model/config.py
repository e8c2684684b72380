"""All choices that change the forward of an adapted CLIP, as frozen dataclasses; also the schema of checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from utils.errors import UserError
from utils.fields import limited
from utils.schema import MayHoldMore, Plain, check_fields

# The name of the toy CLIP.
TOY = "toy"
# The trainable components, by their names in checkpoints, state dicts and logs.
COMPONENTS = ("text_adapter", "text_cross_attn", "image_adapter", "image_cross_attn")
SIDES = ("text", "image")
# The files of a model to share (docs/deploying.md).
SHARED_WEIGHTS, SHARED_CONFIG = "model.safetensors", "config.json"
ADAPTERS = ("bottleneck", "linear")
# Anchors from the text encoder, or two learned vectors for all classes: a control without language.
TEXT_SIDES = ("encoder", "vectors")
SURGERIES = ("dual", "sequential", "batch_axis")
ACTIVATIONS = ("gelu", "quick_gelu")
CONTEXT_NORMS = ("unit", "none", "layer")
CROSS_ATTN_RESIDUALS = ("add", "matched")
CROSS_ATTN_INITS = ("xavier", "zero")
TEXT_CONDITIONINGS = ("image", "none")
# The det score: similarity to the abnormal anchor, or its difference from the similarity to the normal one.
DET_SCORES = ("abnormal", "difference")
# The feature of whole images: the trained projector's, or CLIP's own class token.
IMAGE_FEATURES = ("projector", "class_token")
TEXT_CONTEXTS = ("frozen", "trained", "projectors")
# Patch features to compare with normal references, and the weight of the reference map (docs/results.md).
REFERENCE_FEATURES = ("trained", "frozen", "both")
REFERENCE_WEIGHT = 0.5
# Square tiles of images: none, by the image's size, or their number along the shorter side, of at most so many.
TILES, MOST_TILES = ("off", "auto"), 8
# Images and tiles in a forward pass of `Detector.predict`.
BATCH_SIZE = 8
# The choices of a checkpoint that options can replace: of CLIP, the image features, and cross-attention.
CLIP_OVERRIDES = ("model_name", "img_size", "activation")
FORWARD_OVERRIDES = ("surgery", "surgery_until_layer", "image_feature")
CROSS_ATTENTION_OVERRIDES = (
    "text_cross_attn_weight",
    "image_cross_attn_weight",
    "context_norm",
    "cross_attn_residual",
    "text_conditioning",
    "text_context",
    "cross_attn_heads",
)
# Those that unadapted CLIP has no use for, and all.
ADAPTED = (*FORWARD_OVERRIDES, *CROSS_ATTENTION_OVERRIDES)
OVERRIDES = (*CLIP_OVERRIDES, "det_score", "tiles", *ADAPTED)


def limits_of(model_name: str) -> str | None:
    """Which images a CLIP must not be used for, if that is known."""
    return "The toy CLIP knows drawings at 96 px, not photographs" if model_name == TOY else None


def rounded(value: float) -> int:
    """Round half up; Python's `round` rounds half to even."""
    return int(value + 0.5)


@dataclass(frozen=True)
class ModelConfig:
    """The CLIP of an `AdaptedCLIP` and all choices of docs/method.md that change its outputs.

    `levels` count vision blocks from 1: level 6 is the stream after six blocks. `text_adapted` is False without Stage
    1; anchors are then CLIP's own.
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
    image_feature: str = limited("projector", choices=IMAGE_FEATURES)
    text_side: str = limited("encoder", choices=TEXT_SIDES)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers only, so that checkpoints load with `weights_only=True`."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "the checkpoint") -> ModelConfig:
        """The config of a checkpoint; `UserError`, starting with `source`, for missing, unknown or invalid values."""
        check_fields(values, cls, source, "config.model")
        for item in fields(cls):
            if item.name not in values:  # the default may have been another one at training time
                raise UserError(f"{source}: config.model has no '{item.name}'; use the version that wrote it")
        arguments: dict[str, Any] = {**values, "levels": tuple(values["levels"])}
        return cls(**arguments)


@dataclass(frozen=True)
class CrossAttentionConfig:
    """The choices of both cross-attentions (docs/method.md, "Cross-attention").

    text_context: the image features for text and for Stage 1: "frozen", those of the "trained" image branch, or its
    "projectors" on frozen tokens. cross_attn_active: False in feedback loops before `cross_attn_start_loop`. These two
    may change between the loops of a run (`LoopForward`).
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
    """The choices of the forward that may change between loops; see `CrossAttentionConfig`."""

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
    """Raise `UserError` for a value outside the choices or the range of its field."""
    for item in fields(config):
        value, choices, between = getattr(config, item.name), item.metadata.get("choices"), item.metadata.get("between")
        if value is None:
            continue
        if choices and value not in choices:
            raise UserError(f"--{item.name} {value}: choose one of {', '.join(choices)}")
        numbers = value if isinstance(value, tuple) else (value,)
        if between and not all(between[0] <= number <= between[1] for number in numbers):
            text = " ".join(map(str, numbers))
            raise UserError(f"--{item.name} {text}: takes {between[0]} to {between[1]}")


def depth_defaults(vision_layers: int, text_layers: int) -> dict[str, Any]:
    """Default levels and depths for the depths of the encoders: (6, 12, 18, 24), 6, 3, 20 for ViT-L/14."""
    return {
        "levels": tuple(sorted({max(1, rounded(vision_layers * quarter / 4)) for quarter in (1, 2, 3, 4)})),
        "image_adapt_until": max(1, rounded(vision_layers / 4)),
        "text_adapt_until": max(1, rounded(text_layers / 4)),
        "surgery_until_layer": max(1, rounded(5 * vision_layers / 6)),
    }


def check_depths(config: ModelConfig, vision_layers: int, text_layers: int) -> None:
    """Raise `UserError` for a depth or weight of `config` that a CLIP of these depths does not have."""
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
    """The arguments of a run that other scripts use."""

    more = Plain
    dataset: str
    clip_weights: str | None = None
    data_root: str | None = None
    metadata: str | None = None
    class_names: str | None = None
    val_fraction: float = field(default=0.0, metadata={"between": (0, 1)})


def tiles_choice(tiles: str | int) -> str:
    """A choice of tiles as text; `UserError` for an unknown one."""
    text = str(tiles)
    if text in TILES or text in map(str, range(1, MOST_TILES + 1)):
        return text
    raise UserError(f"--tiles {text[:40]}: choose {', '.join(TILES)}, or a number from 1 to {MOST_TILES}")
