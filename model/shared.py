"""A model to share: a folder with the weights as safetensors and everything else as JSON (docs/deploying.md)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as as_safetensors
from torch import Tensor

from model.config import COMPONENTS, DET_SCORES, SHARED_CONFIG, SHARED_WEIGHTS, CrossAttentionConfig, ModelConfig
from utils.errors import UserError
from utils.files import replacing, write_json
from utils.reading import read_json, wrong_content
from utils.schema import MayHoldMore, check

SHARED_FORMAT = 1
# Of the checkpoint, as in its file.
POSITION = ("epoch", "loop", "steps", "config")


@dataclass(frozen=True)
class _Forward:
    model: ModelConfig
    cross_attention: CrossAttentionConfig | None
    det_score: str = field(metadata={"choices": DET_SCORES})


@dataclass(frozen=True)
class _Description(MayHoldMore):
    """`config.json`; the entries of `POSITION` are checked like those of any checkpoint."""

    format: int
    name: str
    forward: _Forward


class Shared(NamedTuple):
    """The checkpoint's original name, and the forward at the time of sharing, which may differ from the training's."""

    name: str
    model: ModelConfig
    cross_attention: CrossAttentionConfig | None
    det_score: str


def write_shared(
    folder: Path, shared: Shared, components: Mapping[str, Mapping[str, Tensor]], position: Mapping[str, Any]
) -> None:
    """Write a folder to share; position: the entries of `POSITION`."""
    crossed = shared.cross_attention.to_dict() if shared.cross_attention else None
    forward = {"model": shared.model.to_dict(), "cross_attention": crossed, "det_score": shared.det_score}
    tensors = {
        f"{component}.{key}": value.detach().cpu().contiguous().clone()
        for component, state in components.items()
        for key, value in state.items()
    }
    # The description first, because `is_shared` recognises the folder by it.
    write_json(folder / SHARED_CONFIG, {"format": SHARED_FORMAT, "name": shared.name, "forward": forward, **position})
    with replacing(folder / SHARED_WEIGHTS) as temporary:
        temporary.write_bytes(as_safetensors(tensors, {"format": "pt"}))


def is_shared(folder: Path) -> bool:
    """Whether `write_shared` has written a folder, and not another project."""
    try:
        description = read_json(folder / SHARED_CONFIG)
    except UserError:
        return False
    return isinstance(description, dict) and {"format", "forward"} <= description.keys()


def read_shared(path: Path) -> tuple[Shared, dict[str, Any]]:
    """Read the weights file of a shared folder and the description next to it.

    Returns:
        The shared forward, and the content as that of a checkpoint file.

    Raises:
        UserError: the folder is incomplete, damaged or of another format.
    """
    source = path.with_name(SHARED_CONFIG)
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (SafetensorError, OSError, ValueError) as error:
        problem = wrong_content(path, error) or f"is damaged, or no model to share ({type(error).__name__})"
        raise UserError(f"{path}: {problem}") from error
    description = read_json(source)
    if isinstance(description, dict) and description.get("format") != SHARED_FORMAT:
        raise UserError(f"{source}: not a model of this project, or of another version (format {SHARED_FORMAT})")
    check(description, _Description, source)
    content: dict[str, Any] = {name: description.get(name) for name in POSITION}
    for key, value in tensors.items():
        component, _, rest = key.partition(".")
        if component not in COMPONENTS:
            raise UserError(f"{path}: has {key!r}, which is no part of a model of this project")
        content.setdefault(component, {})[rest] = value
    forward = description["forward"]
    crossed = forward["cross_attention"]
    shared = Shared(
        description["name"],
        ModelConfig.from_dict(forward["model"], str(source)),
        CrossAttentionConfig(**crossed) if crossed else None,
        forward["det_score"],
    )
    return shared, content
