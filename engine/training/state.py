"""`training_state.pth`, from which a run resumes: checked before anything is taken from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.runtime.run_folder import STATE_FILE
from engine.training.optimizers import transfer_moments
from model.checkpoint import as_checkpoint, load, load_component
from model.config import SIDES
from utils.errors import UserError
from utils.schema import MayHoldMore, Measured, Plain, check

STATE_SCHEMA = 3
TOTAL_NORM = "grad_norm/total"


@dataclass(frozen=True)
class _Row(MayHoldMore):
    """The keys of an epoch that every reader needs."""

    more = Measured
    loop: int = field(metadata={"between": (1, 2**53)})
    stage: str = field(metadata={"choices": (*SIDES, "both")})
    epoch: int = field(metadata={"between": (1, 2**53)})
    steps: int = field(metadata={"between": (0, 2**53)})
    loss: Measured
    opening_loss: Measured
    abnormal_inside: Measured
    abnormal_outside: Measured


@dataclass(frozen=True)
class _Loop(MayHoldMore):
    more = dict[str, Measured | None]
    loop: int = field(metadata={"between": (1, 2**53)})


@dataclass(frozen=True)
class _State(MayHoldMore):
    """A checkpoint of all components and both optimizers, and the run's progress."""

    schema: int
    signature: dict[str, Plain]
    done: list[int] = field(metadata={"between": (0, 2**53)})
    planned: list[int] = field(metadata={"between": (0, 2**53)})
    history: list[_Row]
    schedule_step: int = field(metadata={"between": (0, 2**53)})
    loops: list[_Loop]


def read_state(file: Path) -> dict[str, Any]:
    """The content of a run's state; `UserError`, naming file and key, if it is damaged or of another version."""
    content = load(file)
    schema = content.get("schema") if isinstance(content, dict) else None
    if type(schema) is not int or schema != STATE_SCHEMA:
        raise UserError(f"{file}: not a training state of this version; give another --save_path")
    as_checkpoint(content, file)
    check(content, _State, file)
    for position, row in enumerate(content["history"]):
        if TOTAL_NORM not in row:
            raise UserError(f"{file}: history[{position}] has no '{TOTAL_NORM}', so it is damaged")
    if len(content["done"]) != len(content["planned"]):
        raise UserError(f"{file}: done and planned count different phases, so it is damaged")
    return content


def signature_in(folder: Path) -> dict[str, Any]:
    """The signature of the run in a folder, empty if there is no run."""
    file = folder / STATE_FILE
    return read_state(file)["signature"] if file.is_file() else {}


def restore(
    saved: Mapping[str, Any],
    components: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    file: Path,
) -> None:
    """Load the weights and moments of a state from `read_state`; `UserError` if they do not fit the run."""
    for name, part in components.items():
        load_component(part, saved.get(name, {}), name, file)
    for side, optimizer in optimizers.items():
        content = saved.get(f"{side}_optimizer") or {"state": {}, "param_groups": []}
        groups = content["param_groups"]
        fitting = len(groups) == len(optimizer.param_groups) and all("lr" in group for group in groups)
        if not fitting or transfer_moments(optimizer, content) != len(content["state"]):
            raise UserError(f"{file}: {side}_optimizer is not of this run's parameters, so it is damaged")
        # The other settings follow from the arguments.
        for group, saved_group in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = saved_group["lr"]
