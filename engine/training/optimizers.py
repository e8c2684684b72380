"""Optimizer moments from one run to another, by parameter name (docs/method.md, "Training")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def are_moments_of(parameter: Tensor, state: Mapping[str, Any]) -> bool:
    """Whether a parameter's entry in an optimizer's state is one of Adam's, of the parameter's shape."""
    step, averages = state.get("step"), {key: value for key, value in state.items() if key != "step"}
    counted = step.dim() == 0 if torch.is_tensor(step) else isinstance(step, (int, float))
    fitting = all(torch.is_tensor(value) and value.shape == parameter.shape for value in averages.values())
    return counted and float(step) >= 0 and fitting and {"exp_avg", "exp_avg_sq"} <= averages.keys()


def transfer_moments(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> int:
    """Copy the moments of parameters that have the same name and shape into `optimizer`; returns how many.

    saved: another optimizer's state dict whose groups carry `param_names`. Rates, betas and decay stay the new ones',
    and parameters that `saved` does not know start fresh. A state without names transfers nothing.
    """
    moments = {
        name: saved["state"][index]
        for group in saved.get("param_groups", ())
        if "param_names" in group
        for name, index in zip(group["param_names"], group["params"], strict=True)
        if index in saved["state"]
    }
    carried = 0
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            state = moments.get(name)
            if state is None or not are_moments_of(parameter, state):
                continue
            optimizer.state[parameter] = {
                key: value.clone().to(parameter.device if value.dim() else "cpu") if torch.is_tensor(value) else value
                for key, value in state.items()
            }
            carried += 1
    return carried
