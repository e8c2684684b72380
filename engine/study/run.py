"""What `run_study.py` does: plan, run or submit, report."""

from __future__ import annotations

import logging
import shlex
import sys
from functools import partial
from pathlib import Path

from dataset.locate import locate_dataset
from dataset.toy.classes import TOY_DATASETS
from engine.config.study import DEFAULT_PARTITION, StudyArguments
from engine.study.local import duration, kind_of, run_locally
from engine.study.plan import Plan, make_plan, shown
from engine.study.report import write_study_report
from engine.study.results import Results
from engine.study.slurm import run_through_submitit
from engine.study.study import read_study
from utils.errors import UserError

logger = logging.getLogger(__name__)

INCOMPLETE = 1


def run_study(file: Path, arguments: StudyArguments) -> int:
    """Run what is left of a study and report what is there; the exit status is 1 where something is missing."""
    study = read_study(file, arguments.seeds)
    plan = make_plan(study, arguments.save_path.resolve() / study.name)
    if arguments.dry_run:
        sys.stdout.write("\n".join(describe_plan(plan, arguments.jobs or 1)) + "\n")
        return 0
    seeds = ["--seeds", *map(str, arguments.seeds)] if arguments.seeds else []
    report = partial(write_study_report, plan, ["python", "run_study.py", shown(file.resolve()), *seeds])
    if not arguments.report_only:
        left = [cell for cell in plan.cells if not cell.done]
        logger.info("%s: %d of %d cells to run, in %s", study.name, len(left), len(plan.cells), shown(plan.folder))
        if left and arguments.slurm is None:
            run_locally(plan, arguments.jobs or 1)
        elif left:
            partition = "" if arguments.slurm == DEFAULT_PARTITION else arguments.slurm
            if not run_through_submitit(plan, partition, arguments.jobs, report):
                return 0
    return say(report())


def say(results: Results) -> int:
    """The verdicts, and what is missing, in the log; the exit status."""
    for setting in results.settings:
        for arm in setting.arms:
            if arm.summary:
                logger.info("%s: %s", ", ".join(filter(None, [arm.name, setting.name])), arm.summary)
    for sentence in results.missing:
        logger.warning("missing: %s", sentence)
    return INCOMPLETE if results.missing else 0


def describe_plan(plan: Plan, jobs: int) -> list[str]:
    """The commands of a study in the order in which they can be run, what is missing for them, and the hours."""
    lines = []
    for cell in sorted(plan.cells, key=lambda cell: cell.level):
        done = " (done)" if cell.done else ""
        lines += [f"# {cell}{done}", *(shlex.join(["python", *step.words]) for step in cell.steps), ""]
    steps = [step for cell in plan.cells for step in cell.steps]
    trainings, done = sum(step.kind == "train" for step in steps), sum(step.done for step in steps)
    lines.append(
        f"# {len(plan.cells)} cells: {trainings} trainings, {len(steps) - trainings} evaluations; {done} of them done"
    )
    return [*lines, f"# {hours_left(plan, jobs)}", *(f"# missing: {what}" for what in missing_data(plan))]


def hours_left(plan: Plan, jobs: int) -> str:
    """How long what is left takes: as long as what is finished of its kind, else as the study file says."""
    study = plan.study
    measured: dict[tuple[str, ...], list[float]] = {}
    for cell in plan.cells:
        for step in cell.steps:
            if step.done:
                measured.setdefault(kind_of(cell, step), []).append(step.seconds)
    hours, unknown, stated = 0.0, 0, False
    for cell in plan.cells:
        for step in (step for step in cell.steps if not step.done):
            found = measured.get(kind_of(cell, step))
            if found:
                hours += sum(found) / len(found) / 3600
                continue
            scale = study.settings[cell.setting].scale * cell.pair.scale if step.kind == "train" else 1.0
            given = cell.arm.hours if step.kind == "train" else study.test_hours
            unknown += given is None
            stated |= given is not None
            hours += scale * (given or 0.0)
    if unknown and not hours:
        return f"left: {unknown} processes, of which nothing is known yet"
    said = f"left: about {duration(3600 * hours)} one after another"
    if jobs > 1:
        said += f", {duration(3600 * hours / jobs)} with --jobs {jobs} where none waits for another"
    if stated and study.hours_from:
        said += f" (computed: {study.hours_from})"
    return said + (f"; of {unknown} processes nothing is known yet, and they are not in it" if unknown else "")


def missing_data(plan: Plan) -> list[str]:
    """The datasets that are not where the study looks for them, and what else its file says it needs."""
    study = plan.study
    found = []
    for roots, names in (
        (study.arguments, [pair.train for pair in study.pairs]),
        (study.test_arguments, [test for pair in study.pairs for test in pair.test]),
    ):
        root = Path(roots["data_root"]) if "data_root" in roots else None
        for name in dict.fromkeys(names):
            if name in TOY_DATASETS:
                continue
            try:
                locate_dataset(name, root)
            except UserError as error:
                found.append(str(error))
    return [*dict.fromkeys(found), *([study.needs] if study.needs and found else [])]
