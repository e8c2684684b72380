"""Parsers made from frozen dataclasses whose fields are the options of a script."""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from utils.errors import UserError
from utils.fields import POSITIONAL
from utils.version import project_version

# The groups of `--help`, in their order.
GROUPS = (
    POSITIONAL,
    "task",
    "metrics",
    "references",
    "model",
    "adapters",
    "cross-attention",
    "base",
    "feedback",
    "data",
    "training",
    "schedule",
    "machine",
    "output",
)

Config = TypeVar("Config", bound="Arguments")
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Arguments:
    """The options of a script, as fields with the same names.

    presets: option values by preset; the options `preset` and `recipe` select them. not_options: fields that a script
    does not offer. less_memory: what reduces GPU memory, for the message after running out of it.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    not_options: ClassVar[Collection[str]] = ()
    less_memory: ClassVar[str] = "smaller batches"

    @classmethod
    def of(cls: type[Config], **explicit: Any) -> Config:
        """The defaults, changed by the preset, then by the recipe, then by explicit values.

        Raises `UserError` for an explicit value that has no effect.
        """
        values: dict[str, Any] = {}
        for option in ("preset", "recipe"):
            values |= cls.preset_values(explicit.get(option, getattr(cls, option, None)))
        explicit = {name: tuple(value) if isinstance(value, list) else value for name, value in explicit.items()}
        arguments = cls(**{**values, **explicit})
        for name, reason in arguments.unused().items():
            if explicit.get(name):
                raise UserError(f"--{name} has no effect {reason}: leave --{name} out")
        return arguments

    @classmethod
    def preset_values(cls, preset: str | None) -> dict[str, Any]:
        """The values that a preset or recipe gives to options of this class."""
        names = {item.name for item in fields(cls)}
        values = cls.presets.get(preset or "", {})
        return {name: value for name, value in values.items() if name in names}

    def unused(self) -> dict[str, str]:
        """The options that have no effect with the values of others, and why."""
        return {}

    def check(self) -> None:
        """Raise `UserError` for options that contradict each other."""

    def not_default(self, names: Iterable[str]) -> list[str]:
        """The names whose values differ from the defaults."""
        defaults = {item.name: item.default for item in fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    def changed(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """The values that differ from the defaults."""
        names = [item.name for item in fields(self) if item.name not in exclude]
        return {name: getattr(self, name) for name in self.not_default(names)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in `args.json`."""
        return {item.name: plain(getattr(self, item.name)) for item in fields(self)}


def plain(value: Any) -> Any:
    """A value for JSON; paths have slashes on Windows too."""
    if isinstance(value, Path):
        return value.as_posix()
    return list(value) if isinstance(value, tuple) else value


def command_options(values: Mapping[str, Any]) -> list[str]:
    """Values as options of a command: true is a flag, false and None are left out, a list has several values."""
    options: list[str] = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        options.append(f"--{name}")
        if value is not True:
            options += [str(plain(item)) for item in (value if isinstance(value, (list, tuple)) else [value])]
    return options


class Parser(argparse.ArgumentParser):
    """An argument parser with `--version`, whose errors are `UserError`: one line and exit status 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.add_argument("--version", action="version", version=project_version())

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def make_parser(config: type[Arguments], description: str | None) -> Parser:
    """The parser of a script. Its namespace contains only explicit options, so that presets can set the others."""
    hints = get_type_hints(config)
    required = [item for item in fields(config) if item.default is MISSING]
    words = [_metavar(item) if _is_positional(item) else f"--{item.name} {item.name.upper()}" for item in required]
    usage = " ".join(["%(prog)s", *words, "[--OPTION VALUE ...]" if fields(config) else "[-h] [--version]"])
    parser = Parser(usage=usage, description=description, argument_default=argparse.SUPPRESS)
    selectors = [item.metadata["choices"] for item in fields(config) if item.name in ("preset", "recipe")]
    presets = {name: config.preset_values(name) for choices in selectors for name in choices}
    options = [item for item in fields(config) if item.name not in config.not_options]
    for title in GROUPS:
        members = [item for item in options if item.metadata.get("group") == title]
        if members:
            group = parser.add_argument_group(title)
            for item in members:
                name = item.name if _is_positional(item) else f"--{item.name}"
                by_preset = {preset: values[item.name] for preset, values in presets.items() if item.name in values}
                group.add_argument(name, **_options(item, hints[item.name], by_preset))
    return parser


def _options(item: Field, hint: Any, by_preset: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `add_argument` for a field; by_preset: its value in each preset of the script."""
    metadata = item.metadata
    options: dict[str, Any] = {"help": _help(item, by_preset)}
    kind, several = _value_type(hint)
    if kind is bool:
        return {**options, "action": argparse.BooleanOptionalAction if by_preset else "store_true"}
    if item.default is MISSING and not _is_positional(item):
        options["required"] = True
    if several:
        options["nargs"] = "+"
    if metadata["choices"]:
        return {**options, **metadata["argparse"], "choices": tuple(metadata["choices"])}
    readers = {int: number(int, metadata["between"]), float: number(float, metadata["between"]), Path: path}
    options |= {"type": readers.get(kind, not_empty), "metavar": _metavar(item, kind)}
    return {**options, **metadata["argparse"]}


def _is_positional(item: Field) -> bool:
    return item.metadata.get("group") == POSITIONAL


def _metavar(item: Field, kind: type = str) -> str:
    if _is_positional(item):
        return item.metadata["argparse"].get("metavar", item.name.upper())
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def _value_type(hint: Any) -> tuple[Any, bool]:
    """The type of one value, and whether there are several: `(int, False)` for `int | None`."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    return (get_args(hint)[0], True) if get_origin(hint) is tuple else (hint, False)


def _help(item: Field, by_preset: Mapping[str, Any]) -> str:
    """The help text with the default and the values of presets that differ from it."""
    text = item.metadata["help"]
    unset = item.metadata["unset"]
    values = [] if item.default is MISSING else [unset or "none" if item.default is None else _shown(item.default)]
    values += [f"{preset}: {_shown(value)}" for preset, value in by_preset.items() if value != item.default]
    return (f"{text} (default: {'; '.join(values)})" if values else text).replace("%", "%%")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(plain(value))


def number(kind: type[Number], between: tuple[float, float] | None) -> Callable[[str], Number]:
    """A reader of finite numbers within a range, for argparse."""

    def read(text: str) -> Number:
        short = text if len(text) <= 40 else f"{text[:40]}..."
        try:
            value = kind(text)
        except ValueError:
            needed = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"'{short}' is not {needed}") from None
        low, high = between or (float("-inf"), float("inf"))
        if not (low <= value <= high and abs(value) < float("inf")):
            raise argparse.ArgumentTypeError(f"{short} is not between {low} and {high}")
        return value

    return read


def not_empty(text: str) -> str:
    """A reader of text that is not empty, for argparse."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty text; leave the option out for its default")
    return text


def path(text: str) -> Path:
    """A reader of paths, which expands `~`, for argparse."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError("an empty path, or one with a NUL character, names no file")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: there is no such user") from None
