"""The command that makes a run again, from what its checkpoint or `args.json` says of it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.training.arguments import BaseConfig, CrossAttentionRunConfig
from engine.training.feedback_arguments import FeedbackConfig


def command_line(script: str, values: Mapping[str, Any], launcher: Sequence[str] = ("python",)) -> str:
    """A command, quoted for a POSIX shell or PowerShell, with an argument for each value.

    None and False are left out, True is a flag, a list is spread.
    """
    words = [*launcher, script]
    for name, value in values.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            words += [plain(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
    return shlex.join(words)


def plain(value: Any) -> str:
    """A value as it is typed; paths with slashes, which Windows takes too."""
    return value.as_posix() if isinstance(value, Path) else str(value)


def training_command(config: Mapping[str, Any]) -> str:
    """The command that trains what a checkpoint's `config` describes: the arguments that differ from the defaults."""
    asked = config["arguments"]
    script, defaults = script_and_defaults(config)
    changed = {name: value for name, value in asked.items() if value != defaults.get(name)}
    # A switch that is off against its default needs the form that says so.
    switched_off = {f"no-{name}": True for name, value in changed.items() if value is False}
    # As many processes, which share the images of a step.
    processes = config.get("processes", 1)
    launcher = ("accelerate", "launch", "--num_processes", str(processes)) if processes > 1 else ("python",)
    return command_line(script, {**changed, **switched_off}, launcher)


def script_and_defaults(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The script that wrote a checkpoint with this `config`, and its arguments' defaults as `args.json` holds them."""
    if config.get("feedback"):
        preset, optimizer = (config["arguments"][name] for name in ("preset", "optimizer"))
        # The weight decay that is taken unless one is given follows the optimizer.
        decay = FeedbackConfig.from_preset(preset, optimizer=optimizer).weight_decay
        defaults = FeedbackConfig.from_preset(preset, weight_decay=decay).to_dict()
        # The script's own default preset, which need not be named.
        defaults["preset"] = FeedbackConfig.preset
        return "train_cross_attention_feedback_v2.py", defaults
    if config.get("cross_attention"):
        return "train_cross_attention.py", CrossAttentionRunConfig().to_dict()
    return "train.py", BaseConfig().to_dict()
