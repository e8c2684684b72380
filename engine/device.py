"""The device of a run, checked before anything is built, and accelerate on it."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator

from utils.errors import UserError


def check_device(device: str, precision: str) -> str:
    """Resolve `auto`, and raise `UserError` for a device that is absent or a precision that it lacks."""
    name, _, index = device.partition(":")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        device = name = "cuda" if cuda else "mps" if mps else "cpu"
    if name not in ("cpu", "cuda", "mps") or (index and not (name == "cuda" and index.isdigit())):
        raise UserError(f"--device {device}: choose auto, cpu, cuda, cuda:N or mps")
    if (name == "cuda" and not cuda) or (name == "mps" and not mps):
        raise UserError(f"--device {device}: there is none here; --device cpu runs anywhere")
    if index and int(index) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: there are {torch.cuda.device_count()} here, counted from 0")
    if precision == "fp16" and name == "cpu":
        raise UserError("--precision fp16 needs a GPU; take bf16 or fp32 on the CPU")
    return device


def make_accelerator(device: str, precision: str, accumulate: int, tracker: str, save_path: Path) -> Accelerator:
    """accelerate's Accelerator for the arguments of a run; `UserError` for a device or tracker that is not there."""
    device = check_device(device, precision)
    if tracker == "wandb" and find_spec("wandb") is None:
        raise UserError("--tracker wandb: wandb is not installed; pip install wandb, or take tensorboard")
    if device.startswith("cuda:"):
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        gradient_accumulation_steps=accumulate,
        log_with=None if tracker == "none" else tracker,
        project_dir=str(save_path),
    )
