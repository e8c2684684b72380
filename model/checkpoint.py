"""Checkpoint files: written whole, read as plain data only, refused with one line where they do not fit."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as as_safetensors
from torch import Tensor, nn

from model.config import (
    COMPONENTS,
    DET_SCORES,
    SHARED_CONFIG,
    SHARED_WEIGHTS,
    SIDES,
    CrossAttentionConfig,
    ModelConfig,
    SavedArguments,
)
from utils.errors import UserError
from utils.files import replacing, write_json
from utils.reading import read_json
from utils.schema import MayHoldMore, Plain, check

logger = logging.getLogger(__name__)

SCHEMA = 1
FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TEXT_FILE = "text_adapter.pth"
OPTIMIZERS = ("text_optimizer", "image_optimizer")
SHARED_FORMAT = 1


class FloatTensor:
    """An annotation: a tensor as weights and moments are kept, dense, of finite floating-point numbers."""

    @staticmethod
    def problem(value: Any) -> str | None:
        """What is wrong with a value; None where it fits."""
        if not isinstance(value, Tensor):
            return f"is a {type(value).__name__}, where a tensor is needed"
        if value.layout != torch.strided or value.is_nested or value.is_quantized or value.is_meta:
            kind = "on no device" if value.is_meta else "not a plain one, with a place for every number"
            return f"is a tensor that is {kind}"
        if value.dtype not in FLOAT_TYPES:
            return f"is a tensor of {value.dtype}, where floating-point numbers are needed"
        if value.untyped_storage().nbytes() < value.numel() * value.element_size():
            return "is a tensor larger than what is kept of it"
        return None if value.isfinite().all() else "holds values that are not finite"


State = dict[str, FloatTensor]


def _from(low: int, default: Any) -> Any:
    """A field that holds a whole number from `low` on."""
    return field(default=default, metadata={"between": (low, 2**53)})


@dataclass(frozen=True)
class _Group(MayHoldMore):
    params: list[int]
    param_names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SavedOptimizer(MayHoldMore):
    state: dict[int, dict[str, float | FloatTensor | None]]
    param_groups: list[_Group]


@dataclass(frozen=True)
class _Config(MayHoldMore):
    """What every version of this schema has written, and, with a default, what some have."""

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
class _File(MayHoldMore):
    """A checkpoint file of any script or origin. The state of a run is one too, which holds more."""

    text_adapter: State = field(default_factory=dict)
    text_cross_attn: State = field(default_factory=dict)
    image_adapter: State = field(default_factory=dict)
    image_cross_attn: State = field(default_factory=dict)
    text_optimizer: SavedOptimizer | None = None
    image_optimizer: SavedOptimizer | None = None
    epoch: int | None = _from(0, None)
    loop: int | None = _from(1, None)
    steps: dict[str, int | None] | None = None
    config: _Config | None = None


@dataclass(frozen=True)
class _SharedForward:
    model: ModelConfig
    cross_attention: CrossAttentionConfig | None
    det_score: str = field(metadata={"choices": DET_SCORES})


@dataclass(frozen=True)
class _SharedConfig:
    """The `config.json` of a model to share; `config` is checked as that of any checkpoint."""

    format: int
    name: str
    forward: _SharedForward
    epoch: Any = None
    loop: Any = None
    steps: Any = None
    config: Any = None


class Shared(NamedTuple):
    """What a model that was shared says beside its checkpoint: what this was called, and the forward that it ran with.

    That need not be the one it was trained with, and is known of files without config as well.
    """

    name: str
    model: ModelConfig
    cross_attention: CrossAttentionConfig | None
    det_score: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file in memory: the state dicts it has, its position, and its config (None: written elsewhere).

    steps: optimizer steps that each side has seen, by "text" and "image"; None where the file does not say.
    shared: of a file that was made to be shared, else None.
    """

    path: Path
    components: dict[str, dict[str, Tensor]]
    optimizers: dict[str, dict[str, Any]] = field(default_factory=dict)
    epoch: int | None = None
    loop: int | None = None
    config: dict[str, Any] | None = None
    steps: dict[str, int | None] | None = None
    shared: Shared | None = None

    @property
    def name(self) -> str:
        """What tables call this."""
        return self.shared.name if self.shared else self.path.stem

    @property
    def is_published(self) -> bool:
        """Whether this has the form of AA-CLIP's published files: linear adapters (keys `fc.0`), and no config."""
        base = all(name.endswith("_adapter") for name in self.components)
        return self.config is None and base and infer_choices(self.components).get("adapter") == "linear"

    def model_config(self) -> ModelConfig:
        """The forward that this file was trained with."""
        if self.config is None:
            raise ValueError(f"{self.path} has no config")
        return ModelConfig.from_dict(self.config["model"], str(self.path))

    def cross_attention(self) -> CrossAttentionConfig | None:
        """The cross-attention that this file was trained with, or is taken to be where it has no config; or None.

        Files without config come from code that added the output of both branches, seeing raw context, at full scale.
        A branch that the file does not hold gets the weight 0.
        """
        if self.config is not None:
            trained = self.config.get("cross_attention")
            return CrossAttentionConfig(**trained) if trained else None
        crossed = {side: self.components.get(f"{side}_cross_attn") for side in SIDES}
        if not any(crossed.values()):
            return None
        return CrossAttentionConfig(
            **{f"{side}_cross_attn_weight": 1.0 if state else 0.0 for side, state in crossed.items()},
            context_norm="none",
        )


def save(value: Mapping[str, Any], path: Path) -> None:
    """`torch.save`, from the CPU whatever device a tensor is on, to a temporary file that then takes `path`'s place.

    So every file loads on a machine without a GPU, also by a plain `torch.load`.
    """
    # Opened here: of a file that torch opens, it does not say why it cannot be written.
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(on_cpu(value), file)


def on_cpu(value: Any) -> Any:
    """A copy of nested mappings, lists and tuples in which every tensor is on the CPU, without its gradient."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(map(on_cpu, value)) if isinstance(value, tuple) else list(map(on_cpu, value))
    return value


def load(path: Path) -> Any:
    """`torch.load` of plain data onto the CPU; `UserError` for a file that is missing, damaged or holds code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except Exception as error:  # torch's reader fails in many ways on a file that is damaged or something else
        raise UserError(f"{path}: damaged, or not a checkpoint of plain data ({type(error).__name__})") from error


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A component's state dict on the CPU, detached from the live parameters."""
    return {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint file; an image file without a text side takes the `text_adapter.pth` beside it.

    Raises `UserError` for a file that is not a checkpoint, or whose text side is nowhere.
    """
    checkpoint = read_any(path)
    if "image_adapter" not in checkpoint.components:
        raise UserError(f"{path}: holds a text side only; give an image checkpoint (image_adapter*.pth) or a folder")
    text_adapted = checkpoint.config is None or checkpoint.config["model"].get("text_adapted", True)
    if "text_adapter" in checkpoint.components or not text_adapted:
        return checkpoint
    beside = path.with_name(TEXT_FILE)
    if not beside.is_file():
        raise UserError(
            f"{path}: has no text side, and {beside} is not there; put the text adapter it was trained with there"
        )
    text = read_any(beside)
    if "text_adapter" not in text.components:
        raise UserError(f"{beside}: holds no 'text_adapter'")
    logger.info("%s has no text side: taken from %s", path, beside)
    return replace(
        checkpoint,
        components={**text.components, **checkpoint.components},
        optimizers={**text.optimizers, **checkpoint.optimizers},
    )


def read_any(path: Path) -> Checkpoint:
    """Read a checkpoint file of either side or both, as it is; `UserError` for a file that is none."""
    return read_shared(path) if path.suffix == ".safetensors" else as_checkpoint(load(path), path)


def write_shared(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint that has `shared` as a folder to share: weights as safetensors, all else as JSON."""
    name, model, cross_attention, det_score = checkpoint.shared
    crossed = cross_attention.to_dict() if cross_attention else None
    described = {
        "format": SHARED_FORMAT,
        "name": name,
        "forward": {"model": model.to_dict(), "cross_attention": crossed, "det_score": det_score},
        "epoch": checkpoint.epoch,
        "loop": checkpoint.loop,
        "steps": checkpoint.steps,
        "config": checkpoint.config,
    }
    tensors = {
        f"{component}.{key}": value.detach().cpu().contiguous().clone()
        for component, state in checkpoint.components.items()
        for key, value in state.items()
    }
    # First what `is_shared` knows the folder by.
    write_json(folder / SHARED_CONFIG, described)
    with replacing(folder / SHARED_WEIGHTS) as temporary:
        temporary.write_bytes(as_safetensors(tensors, {"format": "pt"}))


def is_shared(folder: Path) -> bool:
    """Whether `write_shared` has made a folder, and not another project with files of the same names."""
    try:
        described = read_json(folder / SHARED_CONFIG)
    except UserError:
        return False
    return isinstance(described, dict) and {"format", "forward"} <= described.keys()


def read_shared(path: Path) -> Checkpoint:
    """Read the weights of a folder that `write_shared` made; `UserError` where it is none, or is damaged."""
    beside = path.with_name(SHARED_CONFIG)
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged, or no model to share ({type(error).__name__})") from error
    described = read_json(beside)
    if isinstance(described, dict) and described.get("format") != SHARED_FORMAT:
        raise UserError(f"{beside}: not a model of this project, or of another version (format {SHARED_FORMAT})")
    check(described, _SharedConfig, beside)
    content: dict[str, Any] = {name: described.get(name) for name in ("epoch", "loop", "steps", "config")}
    for key, value in tensors.items():
        component, _, rest = key.partition(".")
        if component not in COMPONENTS:
            raise UserError(f"{path}: holds {key!r}, which is no part of a model of this project")
        content.setdefault(component, {})[rest] = value
    forward = described["forward"]
    crossed = forward["cross_attention"]
    shared = Shared(
        described["name"],
        ModelConfig.from_dict(forward["model"], str(beside)),
        CrossAttentionConfig(**crossed) if crossed else None,
        forward["det_score"],
    )
    return replace(as_checkpoint(content, path), shared=shared)


def as_checkpoint(content: Any, path: Path) -> Checkpoint:
    """What a file holds, as a checkpoint; `UserError`, naming file and key, where it is none that can be used."""
    if not isinstance(content, dict) or not any(name in content for name in COMPONENTS):
        raise UserError(f"{path}: not a checkpoint of this project (none of {', '.join(COMPONENTS)} is in it)")
    config = content.get("config")
    schema = config.get("schema") if isinstance(config, dict) else None
    if type(schema) is int and schema != SCHEMA:
        raise UserError(f"{path}: schema {schema} where this version reads {SCHEMA}; use the version that wrote it")
    # Files from elsewhere may have an empty entry in place of an optimizer's state.
    content = {
        name: value
        for name, value in content.items()
        if not (name in OPTIMIZERS and isinstance(value, dict) and not value)
    }
    check(content, _File, path)
    optimizers = {name: content[name] for name in OPTIMIZERS if content.get(name)}
    for name, optimizer in optimizers.items():
        for group in optimizer["param_groups"]:
            if len(group.get("param_names", group["params"])) != len(group["params"]):
                raise UserError(f"{path}: {name} names more or fewer parameters than it has, so it is damaged")
    if content.get("epoch") is None:
        logger.warning("%s does not say how many epochs it was trained", path)
    checkpoint = Checkpoint(
        path,
        {name: content[name] for name in COMPONENTS if content.get(name)},
        optimizers,
        content.get("epoch"),
        content.get("loop"),
        config,
        content.get("steps"),
    )
    if config is not None:
        checkpoint.model_config()
    return checkpoint


def check_config(config: Mapping[str, Any], source: str) -> None:
    """`UserError`, which begins with `source`, for a `config` with which a checkpoint could not be read again."""
    check(config, _Config, source)


def infer_choices(components: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """What the keys of the adapters of either side, or of both, tell: adapter kind, `relu`, depths, number of levels.

    Covers AA-CLIP's published form (`fc.0` keys) and runs with `fc1` / `fc2` keys. What no key tells is left out.
    """
    text, image = (components.get(f"{side}_adapter", {}) for side in SIDES)
    depths = [
        {key.split(".")[0] for key in text},
        {key.split(".")[1] for key in image if key.startswith("layer_adapters.")},
    ]
    told: dict[str, Any] = {}
    if text:
        told["text_adapt_until"] = len(depths[0]) - 1  # the last one is the projector
    if image:
        told["image_adapt_until"] = len(depths[1])
        told["relu"] = "seg_proj.0.fc.0.weight" in image
        told["n_levels"] = len({key.split(".")[1] for key in image if key.startswith("seg_proj.")})
    if told.get("text_adapt_until") or told.get("image_adapt_until"):
        adapters = [key for key in (*text, *image) if not key.startswith(("seg_proj", "det_proj"))]
        told["adapter"] = "bottleneck" if any(key.endswith("fc1.weight") for key in adapters) else "linear"
    return told


def load_component(module: nn.Module, state: Mapping[str, Tensor], name: str, source: Path) -> None:
    """Load one component; `UserError` naming file, key, both shapes and the likely cause where it does not fit."""
    expected = module.state_dict()
    for key, value in expected.items():
        if key not in state:
            raise UserError(f"{source}: {name} has no '{key}'; {_likely_cause(key, state, expected)}")
        if tuple(state[key].shape) != tuple(value.shape):
            raise UserError(
                f"{source}: {name} '{key}' is {tuple(state[key].shape)} where this model has {tuple(value.shape)}; "
                "the file comes from another CLIP model (check --model_name)"
            )
    unknown = sorted(set(state) - set(expected))
    if unknown:
        cause = _likely_cause(unknown[0], state, expected)
        raise UserError(f"{source}: {name} has '{unknown[0]}', which this model has not; {cause}")
    module.load_state_dict(state)


def _likely_cause(key: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    if key.startswith(("seg_proj", "det_proj")):
        return "its projectors are of the other kind (check --relu and --levels)"
    if any(part.endswith("fc1.weight") for part in state) != any(part.endswith("fc1.weight") for part in expected):
        return "its adapters are of the other kind (check --adapter)"
    return "its depths are other ones (check --text_adapt_until and --image_adapt_until)"
