"""Parsers made from frozen dataclasses whose fields are the arguments."""

from __future__ import annotations

import argparse
import types
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

from utils.cli import Parser, not_empty, number, path
from utils.schema import type_hints

# The groups of `--help`, in their order.
GROUPS = (
    "what to do",
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


@dataclass(frozen=True)
class Arguments:
    """What a script was asked for: its fields are the arguments, by the same names."""

    @classmethod
    def of(cls: type[Config], **given: Any) -> Config:
        """The defaults, changed by the preset, then by the recipe, then by what is given."""
        values: dict[str, Any] = {}
        for choice in ("preset", "recipe"):
            values |= decided_by(cls, given.get(choice, getattr(cls, choice, None)))
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        return cls(**{**values, **given})

    @classmethod
    def of_before(cls) -> dict[str, Any]:
        """What arguments with another default now were, as plain values, in runs that began before there were any."""
        told = ((item.name, item.metadata.get("before", MISSING)) for item in fields(cls))
        return {name: plain(value) for name, value in told if value is not MISSING}

    def not_default(self, names: Iterable[str]) -> list[str]:
        """Those of these arguments that have another value than their default, in the order of `names`."""
        defaults = {item.name: item.default for item in fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    def changed(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """The values that differ from the defaults."""
        names = [item.name for item in fields(self) if item.name not in exclude]
        return {name: getattr(self, name) for name in self.not_default(names)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `args.json` holds them."""
        return {item.name: plain(getattr(self, item.name)) for item in fields(self)}


def decided_by(config: type[Arguments], name: str | None) -> dict[str, Any]:
    """The arguments that a preset or recipe decides, with its values."""
    found = ((item.name, item.metadata.get("under", {})) for item in fields(config))
    return {argument: values[name] for argument, values in found if name in values}


def make_parser(config: type[Arguments], description: str | None) -> Parser:
    """A script's parser. What is not given is left out of its namespace, so that presets can tell."""
    hints = type_hints(config)
    needed = [item for item in fields(config) if item.default is MISSING]
    required = "".join(f"{'' if _is_word(item) else f' --{item.name}'} {item.name.upper()}" for item in needed)
    usage = f"%(prog)s{required} [--ARGUMENT VALUE ...]"
    parser = Parser(usage=usage, description=description, argument_default=argparse.SUPPRESS)
    named = [item.metadata["choices"] for item in fields(config) if item.name in ("preset", "recipe")]
    deciding = {name for choices in named for name in choices}
    for title in GROUPS:
        members = [item for item in fields(config) if item.metadata.get("group") == title]
        if members:
            group = parser.add_argument_group(title)
            for item in members:
                name = item.name if _is_word(item) else f"--{item.name}"
                group.add_argument(name, **_options(item, hints[item.name], deciding))
    return parser


def _options(item: Field, hint: Any, deciding: Collection[str]) -> dict[str, Any]:
    """What argparse is told of an argument; deciding: the presets and recipes of this script."""
    under = {name: value for name, value in item.metadata["under"].items() if name in deciding}
    told = {**item.metadata, "under": under}
    options: dict[str, Any] = {"help": _help(told, item.default)}
    kind = _bare(hint)
    if kind is bool:
        return {**options, "action": argparse.BooleanOptionalAction if told["under"] else "store_true"}
    if item.default is MISSING and not _is_word(item):
        options["required"] = True
    if told["several"]:
        options["nargs"] = "+"
    if told["alone"] is not None:
        options |= {"nargs": "?", "const": told["alone"]}
    if told["choices"]:
        return {**options, "choices": tuple(told["choices"])}
    readers = {int: number(int, told["between"]), float: number(float, told["between"]), Path: path, str: not_empty}
    metavar = item.name.upper() if _is_word(item) else {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")
    return {**options, "type": told["kind"] or readers[kind], "metavar": metavar}


def _is_word(item: Field) -> bool:
    """Whether an argument is given by its place, without a flag."""
    return bool(item.metadata.get("word"))


def _bare(hint: Any) -> type:
    """The type of one value: `int` for `int | None` and for `tuple[int, ...]`."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    return get_args(hint)[0] if get_origin(hint) is tuple else hint


def _help(told: Mapping[str, Any], default: Any) -> str:
    """The sentence of an argument, with its default and those under presets and recipes."""
    known = "" if default is MISSING else told["unset"] if default is None else _words(default)
    defaults = [*([known] if known else []), *(f"{name}: {_words(value)}" for name, value in told["under"].items())]
    shown = f"{told['help']} (default: {'; '.join(defaults)})" if defaults else told["help"]
    return shown.replace("%", "%%")


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(plain(value))


def plain(value: Any) -> Any:
    """A value as JSON holds it; paths with slashes, which Windows takes too."""
    if isinstance(value, Path):
        return value.as_posix()
    return list(value) if isinstance(value, tuple) else value
