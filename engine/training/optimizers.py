"""The optimizers of a run, and their moments from one run to another (docs/method.md, "Training")."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.config.training import RunConfig
from model.adapter import AdaptedCLIP

ADAM_BETAS, ADAMW_BETAS = (0.5, 0.999), (0.9, 0.999)


def make_optimizer(model: AdaptedCLIP, side: str, config: RunConfig) -> torch.optim.Optimizer:
    """A side's one optimizer for the whole run, with a group for each component."""
    parts = [part for name, part in model.components.items() if name.startswith(side)]
    groups = [{"params": list(part.named_parameters())} for part in parts]
    decay = getattr(config, "weight_decay", 0.0)
    # `Schedule` sets the learning rate of every step.
    if getattr(config, "optimizer", "adam") == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=ADAMW_BETAS, weight_decay=decay)
    return torch.optim.Adam(groups, lr=0.0, betas=ADAM_BETAS, weight_decay=decay)


def are_moments_of(parameter: Tensor, state: Mapping[str, Any]) -> bool:
    """Whether a parameter's entry in an optimizer's state is one of Adam's, of the parameter's shape."""
    step: Any = state.get("step")
    averages = {key: value for key, value in state.items() if key != "step"}
    counted = step.dim() == 0 if torch.is_tensor(step) else isinstance(step, (int, float))
    fitting = all(torch.is_tensor(value) and value.shape == parameter.shape for value in averages.values())
    return counted and float(step) >= 0 and fitting and {"exp_avg", "exp_avg_sq"} <= averages.keys()


def transfer_moments(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> int:
    """Copy the moments of parameters with the same name and shape into `optimizer`; returns their number.

    saved: another optimizer's state dict whose groups carry `param_names`. Learning rates, betas and decay stay those
    of `optimizer`, and other parameters start without moments.
    """
    moments = {
        name: saved["state"][index]
        for group in saved.get("param_groups", ())
        if "param_names" in group
        for name, index in zip(group["param_names"], group["params"], strict=True)
        if index in saved["state"]
    }
    transferred = 0
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            state = moments.get(name)
            if state is None or not are_moments_of(parameter, state):
                continue
            moments_of_parameter = copy.deepcopy(dict(state))
            step = torch.as_tensor(moments_of_parameter.pop("step"), dtype=torch.float32)
            averages = {key: value.to(parameter) for key, value in moments_of_parameter.items()}
            optimizer.state[parameter] = {"step": step, **averages}
            transferred += 1
    return transferred
