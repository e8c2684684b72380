"""The command that makes a run again, from what its checkpoint or `args.json` says of it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from engine.config.training import BATCH_SIZES, BaseConfig, CrossAttentionRunConfig, FeedbackConfig, RunConfig
from utils.arguments import plain


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
            words += [str(plain(item)) for item in (value if isinstance(value, (list, tuple)) else [value])]
    return shlex.join(words)


def training_command(config: Mapping[str, Any]) -> str:
    """The command that trains what a checkpoint's `config` describes: the arguments that differ from the defaults."""
    processes = config.get("processes", 1)
    if "batch_of" not in config:
        # Each process of an earlier run had a batch of its own.
        of_steps = {name: processes * config["arguments"][name] for name in BATCH_SIZES if name in config["arguments"]}
        config = {**config, "arguments": {**config["arguments"], **of_steps}}
    given = given_arguments(config)
    # A switch that is off against its default needs the form that says so.
    switched_off = {f"no-{name}": True for name, value in given.items() if value is False}
    launcher = ("accelerate", "launch", "--num_processes", str(processes)) if processes > 1 else ("python",)
    return command_line(script_and_arguments(config)[0], {**given, **switched_off}, launcher)


def given_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that must be given to have what a checkpoint's `config` asked for."""
    arguments = script_and_arguments(config)[1]
    asked = config["arguments"]
    given: dict[str, Any] = {}
    # Presets and recipes first, which decide other arguments, then the optimizer, which decides the weight decay.
    for names in (("preset", "recipe"), ("optimizer",), asked):
        made = arguments.of(**given).to_dict()
        given |= {name: asked[name] for name in names if name in asked and asked[name] != made.get(name)}
    return given


def script_and_arguments(config: Mapping[str, Any]) -> tuple[str, type[RunConfig]]:
    """The script that wrote a checkpoint with this `config`, and its arguments."""
    scripts = {
        "train.py": BaseConfig,
        "train_cross_attention.py": CrossAttentionRunConfig,
        "train_cross_attention_feedback_v2.py": FeedbackConfig,
    }
    # Before checkpoints named their script, these two entries told.
    script = list(scripts)[2 if config.get("feedback") else 1 if config.get("cross_attention") else 0]
    script = config.get("script", script)
    return script, scripts[script]
