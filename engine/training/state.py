"""`training_state.pth`, from which a run resumes: checked before anything is taken from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import GenericAlias
from typing import Any

import torch
from torch import nn

from engine.runtime.run_folder import STATE_FILE
from engine.training.optimizers import are_moments_of
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
    for side, optimizer in optimizers.items():
        _check_optimizer(saved, f"{side}_optimizer", optimizer, file)
    for name, part in components.items():
        load_component(part, saved.get(name, {}), name, file)
    for side, optimizer in optimizers.items():
        optimizer.load_state_dict(saved[f"{side}_optimizer"])


def _check_optimizer(saved: Mapping[str, Any], name: str, optimizer: torch.optim.Optimizer, file: Path) -> None:
    """`UserError` unless a saved optimizer has this one's settings, and moments of its parameters' shapes."""
    groups = (saved.get(name) or {}).get("param_groups", [])
    if [group.get("param_names") for group in groups] != [group["param_names"] for group in optimizer.param_groups]:
        raise UserError(f"{file}: {name} is not of this run's parameters, so it is damaged")
    moments = saved[name]["state"]
    for position, (group, now) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        within = f"{name}.param_groups[{position}]"
        for key, value in now.items():
            if isinstance(value, (float, tuple)) and key not in group:
                raise UserError(f"{file}: {within} has no '{key}', so it is damaged")
        for key in group.keys() & now.keys():
            check(group[key], _like(now[key]), file, f"{within}.{key}")
        for index, parameter in zip(group["params"], now["params"], strict=True):
            if index in moments and not are_moments_of(parameter, moments[index]):
                shape = tuple(parameter.shape)
                raise UserError(f"{file}: {name}.state[{index}] holds no moments of weights {shape}, so it is damaged")


def _like(setting: Any) -> Any:
    """The annotation of an optimizer's setting, from its present value; an unset switch may be on or off."""
    if isinstance(setting, tuple):
        return GenericAlias(tuple, (float,) * len(setting))
    if isinstance(setting, (bool, float)):
        return type(setting)
    return bool | None if setting is None else Any
