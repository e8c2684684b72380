"""Arguments of `run_study.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.config.common import Arguments
from utils.fields import setting

# What --slurm means without a name.
DEFAULT_PARTITION = "default"


@dataclass(frozen=True)
class StudyArguments(Arguments):
    """How a study is run; what it is stands in its file."""

    seeds: tuple[int, ...] | None = setting(
        None, "seeds in place of the file's", "what to do", several=True, unset="the file's"
    )
    report_only: bool = setting(False, "run nothing: report what is there", "what to do")
    dry_run: bool = setting(False, "run nothing: list the commands, what is missing, and the hours", "what to do")
    jobs: int | None = setting(
        None,
        "cells at a time, each on GPUs of its own where there are some",
        "machine",
        between=(1, 4096),
        unset="1; with Slurm as many as it gives",
    )
    slurm: str | None = setting(
        None,
        "submit to Slurm through submitit, to this partition or the default one; where there is no Slurm, "
        "submitit runs the jobs on this machine",
        "machine",
        alone=DEFAULT_PARTITION,
        unset="run here",
    )
    save_path: Path = setting(Path("runs/studies"), "folder of all studies, in which each has its own", "output")
