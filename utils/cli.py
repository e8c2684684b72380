"""What the scripts share: a parser, values from text, and errors that end in one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from utils.errors import NotFiniteError, Stopped, UserError, original_message

USER_ERROR = 2
NOT_FINITE = 3


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one line with status 2."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and leave with its status; a user's mistake is one line on standard error and status 2."""
    try:
        status = main() or 0
    except UserError as error:
        status = _say(original_message(error), USER_ERROR)
    except NotFiniteError as error:
        status = _say(str(error), NOT_FINITE)
    except Stopped as error:
        status = _say(str(error), 128 + error.signal_number)
    except torch.OutOfMemoryError:
        status = _say(
            "out of GPU memory; these need less: a smaller --image_batch_size or --text_batch_size (training) or "
            "--batch_size (testing), --precision bf16, a smaller --img_size",
            USER_ERROR,
        )
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); nothing is left to say, and Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except KeyboardInterrupt:
        status = _say("stopped", 130)
    sys.exit(status)


def _say(message: str, status: int) -> int:
    line = " ".join(message.split())
    sys.stderr.write(f"error: {line}\n" if status in (USER_ERROR, NOT_FINITE) else f"{line}\n")
    return status


def number(kind: type[int] | type[float], between: tuple[float, float] | None) -> Callable[[str], int | float]:
    """A reader of whole numbers or numbers within a range, for argparse; infinite ones and NaN are none."""

    def read(text: str) -> int | float:
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"'{shown}' is not {what}") from None
        low, high = between or (float("-inf"), float("inf"))
        if not (low <= value <= high and abs(value) < float("inf")):
            raise argparse.ArgumentTypeError(f"{shown} is not between {low} and {high}")
        return value

    return read


def path(text: str) -> Path:
    """A path from the command line, with `~` as the shell takes it, for argparse."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError("an empty path, or one with a NUL character, names no file")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: there is no such user") from None
