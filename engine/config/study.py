"""Arguments of `run_study.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.config.common import Arguments
from utils.fields import setting

# The value of --slurm without a partition.
DEFAULT_PARTITION = "default"


@dataclass(frozen=True)
class StudyArguments(Arguments):
    """How a study is run; the study file defines the study."""

    seeds: tuple[int, ...] | None = setting(
        None, "seeds, instead of those of the study file", "what to do", several=True, unset="those of the file"
    )
    report_only: bool = setting(False, "only report the finished evaluations", "what to do")
    dry_run: bool = setting(False, "only list the commands and missing data", "what to do")
    jobs: int | None = setting(
        None,
        "number of cells that run at the same time, each on its own GPUs, if available",
        "machine",
        between=(1, 4096),
        unset="1; with Slurm no limit",
    )
    slurm: str | None = setting(
        None,
        "submit the cells to Slurm through submitit, to this partition or the default one; without Slurm, submitit "
        "runs them on this machine",
        "machine",
        alone=DEFAULT_PARTITION,
        unset="run here",
    )
    save_path: Path = setting(Path("runs/studies"), "folder of all studies; each has its own folder in it", "output")
