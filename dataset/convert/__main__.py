"""`python -m dataset.convert`."""

from dataset.convert.arguments import ConversionArguments, build_parser
from utils.script import run_script


def main() -> None:
    arguments = ConversionArguments.of(**vars(build_parser().parse_args()))
    # Imported here, so that a missing package ends in one line.
    from dataset.convert.files import convert
    from utils.logging import set_up_logging

    set_up_logging()
    convert(arguments)


if __name__ == "__main__":
    run_script(main)
