"""Checkpoint files: written whole, read as plain data only, refused with one line where they do not fit."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.config import COMPONENTS, CrossAttentionConfig, ModelConfig
from utils.errors import UserError
from utils.files import replacing

logger = logging.getLogger(__name__)

SCHEMA = 1
TEXT_FILE = "text_adapter.pth"
OPTIMIZERS = ("text_optimizer", "image_optimizer")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file in memory: the state dicts it has, its position, and its config (None: written elsewhere).

    steps: optimizer steps that each side has seen, by "text" and "image"; None where the file does not say.
    """

    path: Path
    components: dict[str, dict[str, Tensor]]
    optimizers: dict[str, dict[str, Any]] = field(default_factory=dict)
    epoch: int | None = None
    loop: int | None = None
    config: dict[str, Any] | None = None
    steps: dict[str, int | None] | None = None

    def model_config(self) -> ModelConfig:
        """The forward that this file was trained with."""
        if self.config is None:
            raise ValueError(f"{self.path} has no config")
        return ModelConfig.from_dict(self.config["model"], str(self.path))


def save(value: Mapping[str, Any], path: Path) -> None:
    """`torch.save` to a temporary file that then takes the place of `path`."""
    # Opened here: of a file that torch opens, it does not say why it cannot be written.
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(dict(value), file)


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
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
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
    return Checkpoint(
        path,
        {**text.components, **checkpoint.components},
        {**text.optimizers, **checkpoint.optimizers},
        checkpoint.epoch,
        checkpoint.loop,
        checkpoint.config,
        checkpoint.steps,
    )


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    """`UserError` for a config that describes no forward of this version."""
    try:
        ModelConfig.from_dict(config["model"], str(path))
        CrossAttentionConfig(**(config.get("cross_attention") or {}))
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: its config is damaged ({error!r})") from error


def read_any(path: Path) -> Checkpoint:
    """Read a checkpoint file of either side or both, as it is; `UserError` for a file that is none."""
    content = load(path)
    if not isinstance(content, dict) or not any(name in content for name in COMPONENTS):
        raise UserError(f"{path}: not a checkpoint of this project (none of {', '.join(COMPONENTS)} is in it)")
    if content.get("epoch") is None:
        logger.warning("%s does not say how many epochs it was trained", path)
    for name in COMPONENTS:
        state = content.get(name, {})
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise UserError(f"{path}: its '{name}' is not a state dict, so it is not a checkpoint of this project")
    config = content.get("config")
    schema = config.get("schema") if isinstance(config, dict) else None
    if config is not None and schema != SCHEMA:
        raise UserError(f"{path}: schema {schema} where this version reads {SCHEMA}; use the version that wrote it")
    if config is not None:
        _check_config(config, path)
    return Checkpoint(
        path,
        {name: content[name] for name in COMPONENTS if name in content},
        {name: content[name] for name in OPTIMIZERS if name in content},
        content.get("epoch"),
        content.get("loop"),
        config,
        content.get("steps"),
    )


def infer_choices(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the keys of a file without config tell: adapter kind, `relu`, depths and number of levels.

    Covers AA-CLIP's published form (`fc.0` keys) and runs with `fc1` / `fc2` keys.
    """
    text, image = checkpoint.components["text_adapter"], checkpoint.components["image_adapter"]
    adapters = [key for key in (*text, *image) if not key.startswith(("seg_proj", "det_proj"))]
    kind = "bottleneck" if any(key.endswith("fc1.weight") for key in adapters) else "linear"
    return {
        "adapter": kind,
        "relu": "seg_proj.0.fc.0.weight" in image,
        "text_adapt_until": len({key.split(".")[0] for key in text}) - 1,
        "image_adapt_until": len({key.split(".")[1] for key in image if key.startswith("layer_adapters.")}),
        "n_levels": len({key.split(".")[1] for key in image if key.startswith("seg_proj.")}),
    }


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
