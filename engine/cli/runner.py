"""A script: options to a frozen arguments object, early checks, then one function that does the work."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from engine.cli.checks import check_files
from utils.arguments import Arguments, Parser, make_parser
from utils.logging import set_up_logging
from utils.script import run_script


class Script:
    """A script of this project.

    Args:
        description: For `--help`.
        arguments: The class of its options.
        function: What does the work, "package.module.name". It is imported after the options are checked, because
            torch takes seconds; it takes the arguments, and may return an exit status.
        shared: Whether the processes of a launch share the work.
        **defaults: Values of options that are used unless the command line gives them or a preset.
    """

    def __init__(
        self, description: str | None, arguments: type[Arguments], function: str, shared: bool = False, **defaults: Any
    ) -> None:
        self.description = description
        self.arguments = arguments
        self.function = function
        self.shared = shared
        self.defaults = defaults

    def parser(self) -> Parser:
        return make_parser(self.arguments, self.description)

    def parse(self, words: Sequence[str] | None = None) -> Arguments:
        """The arguments of a command line, by default of this process."""
        explicit = vars(self.parser().parse_args(words))
        return self.arguments.of(**{**({} if "preset" in explicit else self.defaults), **explicit})

    def main(self) -> int | None:
        arguments = self.parse()
        set_up_logging()
        arguments.check()
        check_files(arguments)
        module, name = self.function.rsplit(".", 1)
        status: int | None = getattr(import_module(module), name)(arguments)
        return status if isinstance(status, int) else None

    def run(self) -> NoReturn:
        """Run the script, and exit with its status."""
        run_script(self.main, self.arguments.less_memory, self.shared)
