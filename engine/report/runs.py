"""The training runs of a comparison, as `report.html` shows them: arguments, curves, warnings, and the command."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.report.commands import SCRIPTS, explicit_arguments, training_command
from engine.report.comparison import Comparison, describe_training_data
from engine.runtime.run_folder import HISTORY_FILE, WARNINGS_FILE
from engine.training.verdicts import advice, summary_cells
from model.checkpoint import Checkpoint
from utils.errors import UserError
from utils.reading import read_json_lines
from utils.svg_charts import training_charts
from utils.text import as_typed, readable_time

logger = logging.getLogger(__name__)

MOST_WARNINGS = 20


def describe_runs(comparison: Comparison) -> list[dict[str, Any]]:
    """The runs that the models come from: each other model, and the feedback run by its last loop."""
    loops = [("feedback", row.checkpoint) for row in comparison.rows if row.loop is not None and row.checkpoint]
    others = [(row.name, row.checkpoint) for row in comparison.rows if row.loop is None and row.checkpoint]
    return [
        describe_run(name, checkpoint, checkpoint.config)
        for name, checkpoint in [*others, *loops[-1:]]
        if checkpoint.config and checkpoint.config.get("script") in SCRIPTS
    ]


def describe_run(name: str, checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """A run as the page shows it: its arguments, its course until the checkpoint, and its warnings."""
    folder = checkpoint.path.parent
    whole, messages = read_rows(folder / HISTORY_FILE), read_rows(folder / WARNINGS_FILE)
    history = until_checkpoint(whole, checkpoint)
    feedback = bool(config.get("feedback"))
    header, stages = summary_cells(history, feedback) if history else ([], [])
    facts = run_facts(checkpoint, config, history)
    if len(history) < len(whole):
        facts.append(("Later epochs", f"{len(whole) - len(history)}, which this file does not contain"))
    arguments, explicit = config["arguments"], explicit_arguments(config)
    verdicts = advice(history, feedback)
    reported = {sentence.lower() for sentence in verdicts}
    warnings = [text for row in messages if (text := str(row.get("message", ""))).lower() not in reported]
    return {
        "name": name,
        "command": training_command(config),
        "facts": facts,
        "arguments": [(argument, as_typed(value), argument in explicit) for argument, value in arguments.items()],
        "charts": training_charts(history) if history else [],
        "header": header,
        "stages": stages,
        # Verdicts first: there may be many warnings of single epochs.
        "warnings": [*verdicts, *group_warnings(warnings)],
    }


def until_checkpoint(history: Sequence[Mapping[str, Any]], checkpoint: Checkpoint) -> list[Mapping[str, Any]]:
    """The epochs before a checkpoint: the run may have continued since."""
    if checkpoint.loop is not None:
        return [row for row in history if row["loop"] <= checkpoint.loop]
    if checkpoint.epoch is None:
        return list(history)
    return [row for row in history if row["stage"] == "text" or row["epoch"] <= checkpoint.epoch]


def run_facts(
    checkpoint: Checkpoint, config: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """Data, seed, length, time and versions of a run."""
    steps = checkpoint.steps or {}
    facts = [
        ("File", checkpoint.path.as_posix()),
        ("Trained on", describe_training_data(config)),
        ("Seed", str(config["seed"])),
        ("Optimizer steps", ", ".join(f"{steps.get(side, 'unknown')} {side}" for side in ("text", "image"))),
    ]
    if config.get("base") and any(config["base"].values()):
        facts.append(("Started from", "; ".join(filter(None, config["base"].values()))))
    if history:
        seconds = sum(epoch["seconds"] for epoch in history)
        rate = sum(epoch["images"] for epoch in history) / seconds
        time = f"{readable_time(seconds)} for {len(history)} epochs, {rate:.1f} images per second"
        facts.append(("Training time", time))
    return [*facts, ("Versions", ", ".join(f"{name} {number}" for name, number in config.get("versions", {}).items()))]


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; none, with a warning, if it is damaged."""
    if not file.is_file():
        return []
    try:
        return [row for _, row in read_json_lines(file, dict)]
    except UserError as error:
        logger.warning("%s; the report does not include this file", error)
        return []


def group_warnings(warnings: Sequence[str]) -> list[str]:
    """One line for warnings that differ only in numbers, with their count; at most `MOST_WARNINGS` lines."""
    groups: dict[str, list[str]] = {}
    for warning in warnings:
        groups.setdefault(re.sub(r"[0-9][0-9.e+-]*", "0", warning), []).append(warning)
    lines = []
    for group in groups.values():
        note = ", with other numbers" if len(set(group)) > 1 else ""
        lines.append(group[0] if len(group) == 1 else f"{group[0]} ({len(group)} times{note})")
    return lines if len(lines) <= MOST_WARNINGS else [*lines[:MOST_WARNINGS], f"and {len(lines) - MOST_WARNINGS} more"]
