"""A page in the browser: drop images, see where they are anomalous."""

from __future__ import annotations

from engine.cli.checks import check_page
from engine.config.app import AppArguments
from engine.config.common import make_parser
from utils.cli import Parser
from utils.logging import set_up_logging
from utils.script import run_script


def build_parser() -> Parser:
    return make_parser(AppArguments, __doc__)


def main() -> None:
    arguments = AppArguments.of(**vars(build_parser().parse_args()))
    set_up_logging()
    check_page(arguments)
    # torch and Gradio take seconds: arguments come first
    from engine.app.serve import serve

    serve(arguments)


if __name__ == "__main__":
    run_script(main, "a smaller --img_size, or --device cpu")
