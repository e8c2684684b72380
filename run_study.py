"""Run or resume a study: arms over seeds and datasets, compared with statistics (docs/studies.md)."""

from __future__ import annotations

from engine.config.common import make_parser
from engine.config.study import StudyArguments
from utils.cli import Parser, path
from utils.logging import set_up_logging
from utils.script import run_script


def build_parser() -> Parser:
    parser = make_parser(StudyArguments, __doc__)
    parser.usage = "%(prog)s STUDY.toml [--ARGUMENT VALUE ...]"
    parser.add_argument("study", type=path, metavar="STUDY.toml", help="study file, such as studies/smoke.toml")
    return parser


def main() -> int:
    given = vars(build_parser().parse_args())
    study = given.pop("study")
    set_up_logging()
    # scipy and matplotlib take a second: arguments come first
    from engine.study.run import run_study

    return run_study(study, StudyArguments.of(**given))


if __name__ == "__main__":
    run_script(main)
