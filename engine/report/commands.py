"""The command that repeats a run, from the arguments in its checkpoint."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from engine.config.training import BaseConfig, CrossAttentionRunConfig, FeedbackConfig, RunConfig
from utils.arguments import command_options

SCRIPTS: dict[str, type[RunConfig]] = {
    "train.py": BaseConfig,
    "train_cross_attention.py": CrossAttentionRunConfig,
    "train_cross_attention_feedback_v2.py": FeedbackConfig,
}


def command_line(script: str, values: Mapping[str, Any], launcher: Sequence[str] = ("python",)) -> str:
    """A command with an option for each value, quoted for a POSIX shell or PowerShell."""
    return shlex.join([*launcher, script, *command_options(values)])


def training_command(config: Mapping[str, Any]) -> str:
    """The command that trains what a checkpoint's `config` describes, with the arguments that differ from defaults."""
    processes = config.get("processes", 1)
    explicit = explicit_arguments(config)
    # A switch that is off against its default needs its negative form.
    switched_off = {f"no-{name}": True for name, value in explicit.items() if value is False}
    launcher = ("accelerate", "launch", "--num_processes", str(processes)) if processes > 1 else ("python",)
    return command_line(config["script"], {**explicit, **switched_off}, launcher)


def explicit_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a checkpoint's `config` that differ from the defaults of its preset and script."""
    arguments, values = SCRIPTS[config["script"]], config["arguments"]
    explicit: dict[str, Any] = {}
    # Presets and recipes first, which decide other arguments.
    for names in (("preset", "recipe"), values):
        defaults = arguments.of(**explicit).to_dict()
        explicit |= {name: values[name] for name in names if name in values and values[name] != defaults.get(name)}
    return explicit
