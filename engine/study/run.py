"""The work of `run_study.py`: plan a study, run its cells, and report."""

import logging
import sys
from pathlib import Path

from dataset.locate import locate_dataset
from dataset.toy.classes import TOY_DATASETS
from engine.config.tools import StudyArguments
from engine.study.plan import Plan, make_plan, path_from_root
from engine.study.report import write_study_report
from engine.study.runner import run_cells
from engine.study.study import read_study
from utils.errors import UserError

logger = logging.getLogger(__name__)


def run_study(arguments: StudyArguments) -> int:
    """Run the remaining cells of a study and report; the exit status is 1 if results are missing."""
    file, study = arguments.study, read_study(arguments.study, arguments.seeds)
    plan = make_plan(study, arguments.save_path.resolve() / study.name)
    if arguments.dry_run:
        sys.stdout.write("\n".join(describe_plan(plan)) + "\n")
        return 0
    if not arguments.report_only:
        remaining = sum(not cell.done for cell in plan.cells)
        logger.info("%s: %d of %d cells to run, in %s", study.name, remaining, len(plan.cells), plan.folder)
        if remaining:
            run_cells(plan, arguments.jobs)
    seeds = ["--seeds", *map(str, arguments.seeds)] if arguments.seeds else []
    command = ["python", "run_study.py", path_from_root(file.resolve()), *seeds]
    results = write_study_report(plan, command)
    for setting in results.settings:
        for arm in setting.arms:
            if arm.summary:
                logger.info("%s: %s", ", ".join(filter(None, [arm.name, setting.name])), arm.summary)
    for sentence in results.missing:
        logger.warning("missing: %s", sentence)
    return int(bool(results.missing))


def describe_plan(plan: Plan) -> list[str]:
    """The commands of a study in the order of its cells, their number, and missing data."""
    lines = []
    for cell in plan.cells:
        done = " (done)" if cell.done else ""
        lines += [f"# {cell}{done}", *(step.typed for step in cell.steps), ""]
    steps = [step for cell in plan.cells for step in cell.steps]
    tests, done_steps = sum(bool(step.test) for step in steps), sum(step.done for step in steps)
    counts = f"{len(steps) - tests} trainings, {tests} evaluations; {done_steps} of them done"
    return [*lines, f"# {len(plan.cells)} cells: {counts}", *(f"# missing: {item}" for item in missing_data(plan))]


def missing_data(plan: Plan) -> list[str]:
    """The datasets that are not found, and what else the study needs."""
    study = plan.study
    needed = [(pair.train, study.arguments) for pair in study.pairs]
    needed += [(test, study.test_arguments) for pair in study.pairs for test in pair.test]
    problems: dict[str, None] = {}
    for name, arguments in needed:
        if name not in TOY_DATASETS:
            try:
                locate_dataset(name, Path(arguments["data_root"]) if "data_root" in arguments else None)
            except UserError as error:
                problems[str(error)] = None
    return [*problems, *([study.needs] if study.needs and problems else [])]
