"""`python -m dataset.convert`."""

from __future__ import annotations

from dataset.convert import ConversionArguments, build_parser, convert
from utils.logging import set_up_logging
from utils.script import run_script


def main() -> None:
    arguments = ConversionArguments.of(**vars(build_parser().parse_args()))
    set_up_logging()
    convert(arguments)


if __name__ == "__main__":
    run_script(main)
