"""Checkpoint files: written atomically, read as plain data only, refused with a one-line error if they do not fit."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.checkpoint_schema import SCHEMA, SavedFile, check_state, without_wrappers
from model.config import COMPONENTS, SIDES, CrossAttentionConfig, ModelConfig
from model.shared import POSITION, Shared, read_shared
from utils.errors import UserError
from utils.files import replacing
from utils.reading import wrong_content
from utils.schema import check

logger = logging.getLogger(__name__)

TEXT_FILE = "text_adapter.pth"
OPTIMIZERS = ("text_optimizer", "image_optimizer")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file in memory.

    Attributes:
        path: the file.
        components: state dicts by the names in `COMPONENTS`, for those that the file has.
        optimizers: state dicts of the optimizers that the file has.
        epoch: epochs of training; None if unknown.
        loop: loop of a feedback run.
        config: the model and its training; None in files of other code.
        steps: optimizer steps of each side, by "text" and "image".
        shared: the forward of a model to share; None for other files.
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
        """The name in tables."""
        return self.shared.name if self.shared else self.path.stem

    @property
    def is_published(self) -> bool:
        """Whether this has the form of AA-CLIP's published files: linear adapters (keys `fc.0`), and no config."""
        base = all(name.endswith("_adapter") for name in self.components)
        return self.config is None and base and infer_choices(self.components).get("adapter") == "linear"

    def model_config(self) -> ModelConfig:
        """The model that was trained."""
        if self.config is None:
            raise ValueError(f"{self.path} has no config")
        return ModelConfig.from_dict(self.config["model"], str(self.path))

    def cross_attention(self) -> CrossAttentionConfig | None:
        """The cross-attention that was trained; None for a base.

        Files without config are assumed to add the full output of both branches on raw context. A branch that the file
        does not have gets weight 0.
        """
        if self.config is not None:
            trained = self.config.get("cross_attention")
            return CrossAttentionConfig(**trained) if trained else None
        text, image = (float(f"{side}_cross_attn" in self.components) for side in SIDES)
        return CrossAttentionConfig(text, image, context_norm="none") if text or image else None


def save(value: Mapping[str, Any], path: Path) -> None:
    """`torch.save` of tensors on the CPU, through a temporary file that replaces `path`."""
    # torch.save does not report why it cannot open a file.
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(on_cpu(value), file)


def on_cpu(value: Any) -> Any:
    """A copy of nested mappings, lists and tuples with every tensor on the CPU, without its gradient."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(on_cpu, value))
    return value


def load(path: Path) -> Any:
    """`torch.load` of plain data onto the CPU; `UserError` for a file that is missing, damaged or holds code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except Exception as error:  # torch's reader raises many kinds of errors for damaged files
        problem = wrong_content(path, error) or f"is damaged, or no checkpoint of plain data ({type(error).__name__})"
        raise UserError(f"{path}: {problem}") from error


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a component's state dict on the CPU."""
    return {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; an image file without a text side takes the `text_adapter.pth` in its folder.

    Raises:
        UserError: the file is no checkpoint, or there is no text side.
    """
    checkpoint = read_any(path)
    if "image_adapter" not in checkpoint.components:
        raise UserError(f"{path}: has only a text side; give an image checkpoint (image_adapter*.pth) or a folder")
    text_adapted = checkpoint.config is None or checkpoint.config["model"].get("text_adapted", True)
    if "text_adapter" in checkpoint.components or not text_adapted:
        return checkpoint
    text_file = path.with_name(TEXT_FILE)
    if not text_file.is_file():
        raise UserError(
            f"{path}: has no text side, and {text_file} does not exist; copy the text adapter of the same run there"
        )
    text = read_any(text_file)
    if "text_adapter" not in text.components:
        raise UserError(f"{text_file}: has no 'text_adapter'")
    logger.info("%s has no text side: taken from %s", path, text_file)
    return replace(
        checkpoint,
        components={**text.components, **checkpoint.components},
        optimizers={**text.optimizers, **checkpoint.optimizers},
    )


def read_any(path: Path) -> Checkpoint:
    """Read a checkpoint file of one side or both; `UserError` for any other file."""
    if path.suffix != ".safetensors":
        return as_checkpoint(load(path), path)
    shared, content = read_shared(path)
    return replace(as_checkpoint(content, path), shared=shared)


def as_checkpoint(content: Any, path: Path) -> Checkpoint:
    """The content of a file as a checkpoint; `UserError`, with file and key, if it is invalid."""
    content = without_wrappers(content)
    if not isinstance(content, dict) or not any(name in content for name in COMPONENTS):
        raise UserError(f"{path}: not a checkpoint of this project (it has none of {', '.join(COMPONENTS)})")
    config = content.get("config")
    schema = config.get("schema") if isinstance(config, dict) else None
    if type(schema) is int and schema != SCHEMA:
        raise UserError(f"{path}: has schema {schema}, but this version reads {SCHEMA}; use the version that wrote it")
    # Files of other code may have an empty optimizer.
    content = {name: value for name, value in content.items() if name not in OPTIMIZERS or value != {}}
    content |= {name: without_wrappers(content[name]) for name in COMPONENTS if name in content}
    check(content, SavedFile, path)
    optimizers = {name: content[name] for name in OPTIMIZERS if content.get(name)}
    for name, optimizer in optimizers.items():
        for group in optimizer["param_groups"]:
            if len(group.get("param_names", group["params"])) != len(group["params"]):
                raise UserError(f"{path}: {name} names more or fewer parameters than it has, so it is damaged")
    if content.get("epoch") is None:
        logger.warning("%s does not contain its number of epochs", path)
    components = {name: content[name] for name in COMPONENTS if content.get(name)}
    checkpoint = Checkpoint(path, components, optimizers, **{name: content.get(name) for name in POSITION})
    if config is not None:
        checkpoint.model_config()
    return checkpoint


def infer_choices(components: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """The choices that follow from the keys of the adapters: adapter kind, `relu`, depths, number of levels.

    For AA-CLIP's published files (keys `fc.0`) and files with keys `fc1` and `fc2`. Components may be missing.
    """
    text, image = (components.get(f"{side}_adapter", {}) for side in SIDES)
    choices: dict[str, Any] = {}
    if text:
        choices["text_adapt_until"] = len({key.split(".")[0] for key in text}) - 1  # the last one is the projector
    if image:
        layers = {key.split(".")[1] for key in image if key.startswith("layer_adapters.")}
        choices["image_adapt_until"] = len(layers)
        choices["relu"] = "seg_proj.0.fc.0.weight" in image
        choices["n_levels"] = len({key.split(".")[1] for key in image if key.startswith("seg_proj.")})
    if choices.get("text_adapt_until") or choices.get("image_adapt_until"):
        adapters = [key for key in (*text, *image) if not key.startswith(("seg_proj", "det_proj"))]
        choices["adapter"] = "bottleneck" if any(key.endswith("fc1.weight") for key in adapters) else "linear"
    return choices


def load_component(module: nn.Module, state: Mapping[str, Tensor], name: str, source: Path) -> None:
    """Load one component; `UserError` with file, key, both shapes and the likely cause if it does not fit."""
    flags = "--adapter, --relu, --levels, --text_adapt_until and --image_adapt_until"
    check_state(state, module.state_dict(), f"{source}: {name}", flags)
    module.load_state_dict(state)
