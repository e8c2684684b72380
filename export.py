"""Write a checkpoint as one file for one class, ONNX or a torch program, that runs without this repository."""

from __future__ import annotations

from engine.cli.checks import check_exporting
from engine.config.common import make_parser
from engine.config.export import ExportArguments
from utils.cli import Parser
from utils.logging import set_up_logging
from utils.script import run_script


def build_parser() -> Parser:
    return make_parser(ExportArguments, __doc__)


def main() -> None:
    arguments = ExportArguments.of(**vars(build_parser().parse_args()))
    set_up_logging()
    check_exporting(arguments)
    # torch takes seconds: arguments come first
    from engine.export.export import export_checkpoint

    export_checkpoint(arguments)


if __name__ == "__main__":
    run_script(main, "a smaller --img_size")
