"""What the scripts share: a parser, and values from text."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from utils.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one line with status 2."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


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


def not_empty(text: str) -> str:
    """Text from the command line that is not empty, for argparse."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty text says nothing; leave the argument out for its default")
    return text


def path(text: str) -> Path:
    """A path from the command line, with `~` as the shell takes it, for argparse."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError("an empty path, or one with a NUL character, names no file")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: there is no such user") from None
