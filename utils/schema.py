"""Checks values from files against type annotations, before anything is built from them.

A dataclass defines the keys and their types; `between` and `choices` in the metadata of its fields limit the values. So
the frozen dataclasses that describe a model are the schema of the files that contain them.
"""

import functools
import math
import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from utils.errors import UserError

type_hints = functools.cache(get_type_hints)
MAX_DEPTH = 8
_NAMES = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", type(None): "null"}


class MayHoldMore:
    """Base of dataclasses whose table in a file may have other keys too; `more` is the annotation of their values."""

    more: ClassVar[Any] = Any


class Plain:
    """Annotation of text, finite numbers, true, false, nothing, and lists and tables of these, a few levels deep."""

    @staticmethod
    def problem(value: Any, depth: int = MAX_DEPTH) -> str | None:
        """Describe what is wrong with a value; None if it is valid."""
        if isinstance(value, (list, tuple, dict)):
            if not depth:
                return f"is nested more than {MAX_DEPTH} levels deep"
            if isinstance(value, dict) and not all(_is(key, str) for key in value):
                return "holds a table with a key that is not text"
            inside = value.values() if isinstance(value, dict) else value
            return next(filter(None, (Plain.problem(item, depth - 1) for item in inside)), None)
        return None if any(_is(value, kind) for kind in _NAMES) else f"holds {_shown(value)}, which is not plain data"


class Measured:
    """Annotation of a measured number, which need not be finite."""

    @staticmethod
    def problem(value: Any) -> str | None:
        return None if type(value) is float or _is(value, int) else f"is {_shown(value)}, expected a number"


def check(value: Any, hint: Any, source: object, key: str = "", limits: Mapping[str, Any] | None = None) -> None:
    """Raise a one-line `UserError` unless a value matches an annotation.

    Args:
        value: The value from a file.
        hint: A type of `_NAMES`, a list, tuple, table or union of annotations, a dataclass, or a class with a static
            method `problem` that describes what is wrong. The error of a union is that of its last part.
        source: The file, for the message.
        key: The place in the file, for the message.
        limits: `between` and `choices` of a field; they also apply to the items of a list.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return
    if hint is dict:
        origin, parts = dict, (str, Plain)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in parts:
            return
        *others, last = (part for part in parts if part is not type(None))
        for part in others:
            with suppress(UserError):
                check(value, part, source, key, limits)
                return
        check(value, last, source, key, limits)
    elif is_dataclass(hint):
        check_fields(value, hint, source, key)
    elif origin in (list, tuple):
        fixed = origin is tuple and parts[-1] is not ...
        if not isinstance(value, (list, tuple)) or (fixed and len(value) != len(parts)):
            raise _mismatch(source, key, value, f"a list{f' of {len(parts)}' if fixed else ''}")
        for index, item in enumerate(value):
            check(item, parts[index if fixed else 0], source, f"{key}[{index}]", limits)
    elif origin is dict:
        if not isinstance(value, dict):
            raise _mismatch(source, key, value, "a table of named values")
        for name, item in value.items():
            check(name, parts[0], source, f"a key of {key or 'it'}")
            check(item, parts[1], source, f"{key}[{_shown(name)}]", limits)
    elif hasattr(hint, "problem"):
        if problem := hint.problem(value):
            raise UserError(f"{source}: {key or 'it'} {problem}")
    else:
        _check_scalar(value, type(None) if hint is None else hint, source, key, limits or {})


def check_fields(values: Any, kind: Any, source: object, key: str = "") -> None:
    """Raise `UserError`, as `check` does, unless `values` is a table with the fields of the dataclass `kind`."""
    check(values, dict[str, Any], source, key)
    declared, hints = {item.name: item for item in fields(kind)}, type_hints(kind)
    for name, item in declared.items():
        if name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise UserError(f"{source}: {key or 'it'} has no '{name}', so it is damaged or of another version")
    for name, value in values.items():
        if name in declared:
            if value is not None or declared[name].default is not None:
                check(value, hints[name], source, f"{key}.{name}" if key else name, declared[name].metadata)
        elif issubclass(kind, MayHoldMore):
            check(value, kind.more, source, f"{key}[{_shown(name)}]")
        else:
            raise UserError(f"{source}: {key or 'it'} has an unknown key {_shown(name)}; use the version that wrote it")


def _check_scalar(value: Any, kind: type, source: object, key: str, limits: Mapping[str, Any]) -> None:
    if not _is(value, kind):
        unwritable = kind is str and type(value) is str
        raise _mismatch(source, key, value, "text in UTF-8 without NUL characters" if unwritable else _NAMES[kind])
    between, choices = limits.get("between"), limits.get("choices")
    if choices and value not in choices:
        raise _mismatch(source, key, value, f"one of {', '.join(map(str, choices))}")
    if between and kind in (int, float) and not between[0] <= value <= between[1]:
        raise _mismatch(source, key, value, f"{between[0]} to {between[1]}")


def _is(value: Any, kind: type) -> bool:
    """Whether a value has a plain type: booleans are not numbers, numbers are finite, and text can be written."""
    if kind is float:
        return _is(value, int) or (type(value) is float and math.isfinite(value))
    if type(value) is not kind:
        return False
    if isinstance(value, str):
        return not any(sign == "\0" or "\ud800" <= sign <= "\udfff" for sign in value)
    return not isinstance(value, int) or abs(value) < 2**63


def _mismatch(source: object, key: str, value: Any, expected: str) -> UserError:
    return UserError(f"{source}: {key or 'it'} is {_shown(value)}, expected {expected}")


def _shown(value: Any) -> str:
    """A value as short text on one line, however large it is."""
    if isinstance(value, (int, float)) and abs(value) >= 1e30 and math.isfinite(value if type(value) is float else 0):
        return "a huge number"
    if value is None or isinstance(value, (int, float)):
        return "null" if value is None else str(value)
    return ascii(value[:40]) if isinstance(value, str) else f"a {type(value).__name__}"
