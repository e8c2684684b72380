"""Keys and value types of checkpoint files, which `utils.schema.check` compares with a file's content."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model.config import CrossAttentionConfig, ModelConfig, SavedArguments
from utils.errors import UserError
from utils.schema import MayHoldMore, Plain

SCHEMA = 1
FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FloatTensor:
    """Annotation of a dense tensor of finite floating-point numbers: weights and optimizer moments."""

    @staticmethod
    def problem(value: Any) -> str | None:
        """The problem of a value as the end of a sentence; None if there is none."""
        if not isinstance(value, Tensor):
            return f"is a {type(value).__name__}, expected a tensor"
        if value.layout != torch.strided or value.is_nested or value.is_quantized or value.is_meta:
            return "is not a dense tensor with values"
        if value.dtype not in FLOAT_TYPES:
            return f"is a tensor of {value.dtype}, expected floating-point numbers"
        if value.untyped_storage().nbytes() < value.numel() * value.element_size():
            return "is a tensor larger than its storage"
        return None if value.isfinite().all() else "has values that are not finite"


State = dict[str, FloatTensor]
# Modules that data parallel training and torch.compile put around a model, in the names of its tensors.
WRAPPERS = ("module", "_orig_mod")


def without_wrappers(state: Any) -> Any:
    """A state dict whose keys name no `WRAPPERS`; anything else, and keys that would become the same, unchanged."""
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        return state
    plain = {".".join(part for part in key.split(".") if part not in WRAPPERS): state[key] for key in state}
    return plain if len(plain) == len(state) else state


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str, flags: str) -> None:
    """`UserError`, starting with `source`, if a tensor is missing, unknown or of another shape than `expected`.

    flags: the options that may have other values than in training.
    """
    for key, value in expected.items():
        if key not in state:
            raise UserError(f"{source} has no '{key}'; check {flags}")
        if state[key].shape != value.shape:
            raise UserError(
                f"{source} '{key}' is {tuple(state[key].shape)}, but this model has {tuple(value.shape)}; "
                "the file comes from another CLIP model (check --model_name)"
            )
    for key in sorted(state.keys() - expected.keys()):
        raise UserError(f"{source} has '{key}', which this model does not have; check {flags}")


def _from(low: int, default: Any) -> Any:
    """A field for a whole number of at least `low`."""
    return field(default=default, metadata={"between": (low, 2**53)})


@dataclass(frozen=True)
class SavedGroup(MayHoldMore):
    """A parameter group of an optimizer."""

    params: list[int]
    lr: float = 0.0
    param_names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SavedOptimizer(MayHoldMore):
    """The state dict of an optimizer."""

    state: dict[int, dict[str, float | FloatTensor | None]]
    param_groups: list[SavedGroup]


@dataclass(frozen=True)
class SavedConfig(MayHoldMore):
    """The `config` of a checkpoint: the model, and how it was trained."""

    more = Plain
    schema: int
    model: ModelConfig
    dataset: str
    metadata_digest: str
    prompt_names: dict[str, str]
    training_mode: str
    seed: int
    arguments: SavedArguments
    cross_attention: CrossAttentionConfig | None = None
    domain: str = ""
    shot: int | None = None
    processes: int = _from(1, 1)
    versions: dict[str, str] = field(default_factory=dict)
    base: dict[str, str | None] | None = None
    feedback: bool = False


@dataclass(frozen=True)
class SavedFile(MayHoldMore):
    """A checkpoint file of any script or origin. The state file of a run has more keys."""

    text_adapter: State = field(default_factory=dict)
    text_cross_attn: State = field(default_factory=dict)
    image_adapter: State = field(default_factory=dict)
    image_cross_attn: State = field(default_factory=dict)
    text_optimizer: SavedOptimizer | None = None
    image_optimizer: SavedOptimizer | None = None
    epoch: int | None = _from(0, None)
    loop: int | None = _from(1, None)
    steps: dict[str, int | None] | None = None
    config: SavedConfig | None = None
