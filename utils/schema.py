"""Values read from files, checked against annotations before anything is built from them.

A dataclass says which keys there are and of which types; under `between` and `choices`, the metadata of its fields says
which values are allowed. So the frozen dataclasses that describe a model are the schema of the files that hold them.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from utils.errors import UserError

type_hints = functools.cache(get_type_hints)
DEEPEST = 8
_WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", type(None): "nothing"}


class MayHoldMore:
    """Marks a dataclass whose table in a file may have keys that it does not name; `more` annotates their values."""

    more: ClassVar[Any] = Any


class Plain:
    """An annotation: text, finite numbers, true, false, nothing, and lists and tables of these, a few levels deep."""

    @staticmethod
    def problem(value: Any, depth: int = DEEPEST) -> str | None:
        """What is wrong with a value; None where it fits."""
        if isinstance(value, (list, tuple, dict)):
            if not depth:
                return f"is nested more than {DEEPEST} levels deep"
            if isinstance(value, dict) and not all(_is(key, str) for key in value):
                return "holds a table with a key that is not text"
            inside = value.values() if isinstance(value, dict) else value
            return next(filter(None, (Plain.problem(item, depth - 1) for item in inside)), None)
        return None if any(_is(value, kind) for kind in _WORDS) else f"holds {_shown(value)}, which is not plain data"


class Measured:
    """An annotation: a number that was measured, which need not be finite."""

    @staticmethod
    def problem(value: Any) -> str | None:
        return None if type(value) is float or _is(value, int) else f"is {_shown(value)}, a number is needed"


def check(value: Any, hint: Any, source: object, key: str = "", limits: Mapping[str, Any] | None = None) -> None:
    """Raise `UserError`, one line with `source` and `key`, unless a value is what the annotation `hint` asks for.

    hint: a type of `_WORDS`, a list, tuple, table or union of annotations, a dataclass, or a class with a static method
    `problem`, which says in words what is wrong. The error of a union is that of its last part. limits: a field's
    `between` and `choices`, also of a list's items.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return
    if hint is dict:
        origin, parts = dict, (str, Plain)
    if origin in (Union, types.UnionType):
        _check_union(value, parts, source, key, limits)
    elif is_dataclass(hint):
        check_fields(value, hint, source, key)
    elif origin in (list, tuple):
        fixed = origin is tuple and parts[-1] is not ...
        if not isinstance(value, (list, tuple)) or (fixed and len(value) != len(parts)):
            raise _refusal(source, key, value, f"a list{f' of {len(parts)}' if fixed else ''}")
        for index, item in enumerate(value):
            check(item, parts[index if fixed else 0], source, f"{key}[{index}]", limits)
    elif origin is dict:
        if not isinstance(value, dict):
            raise _refusal(source, key, value, "a table of named values")
        for name, item in value.items():
            check(name, parts[0], source, f"a key of {key or 'it'}")
            check(item, parts[1], source, f"{key}[{_shown(name)}]", limits)
    elif hasattr(hint, "problem"):
        problem = hint.problem(value)
        if problem:
            raise UserError(f"{source}: {key or 'it'} {problem}")
    else:
        _check_scalar(value, type(None) if hint is None else hint, source, key, limits or {})


def check_fields(values: Any, kind: type, source: object, key: str = "") -> None:
    """Raise `UserError` unless `values` is a table with the fields of the dataclass `kind`, as `check` does."""
    check(values, dict[str, Any], source, key)
    known, hints = {item.name: item for item in fields(kind)}, type_hints(kind)
    for name, item in known.items():
        if name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise UserError(f"{source}: {key or 'it'} has no '{name}', so it is damaged or of another version")
    for name, value in values.items():
        if name not in known and not issubclass(kind, MayHoldMore):
            raise UserError(f"{source}: {key or 'it'} has an unknown {_shown(name)}; use the version that wrote it")
        within = f"{key}.{name}" if key else name
        if name in known and value is None and known[name].default is None:
            continue
        if name in known:
            check(value, hints[name], source, within, known[name].metadata)
        else:
            check(value, kind.more, source, f"{key}[{_shown(name)}]")


def _check_union(
    value: Any, parts: tuple[Any, ...], source: object, key: str, limits: Mapping[str, Any] | None
) -> None:
    if value is None and type(None) in parts:
        return
    problems = []
    for part in parts:
        if part is not type(None):
            try:
                check(value, part, source, key, limits)
                return
            except UserError as error:
                problems.append(error)
    raise problems[-1]


def _check_scalar(value: Any, kind: type, source: object, key: str, limits: Mapping[str, Any]) -> None:
    if not _is(value, kind):
        unwritable = kind is str and type(value) is str
        raise _refusal(source, key, value, "text in UTF-8 without NUL characters" if unwritable else _WORDS[kind])
    between, choices = limits.get("between"), limits.get("choices")
    if choices and value not in choices:
        raise _refusal(source, key, value, f"one of {', '.join(map(str, choices))}")
    if between and kind in (int, float) and not between[0] <= value <= between[1]:
        raise _refusal(source, key, value, f"{between[0]} to {between[1]}")


def _is(value: Any, kind: type) -> bool:
    """Whether a value is of a plain type: no boolean is a number, numbers are finite, and text can be written."""
    if kind is float:
        return _is(value, int) or (type(value) is float and math.isfinite(value))
    if type(value) is not kind:
        return False
    if kind is int:
        return abs(value) < 2**63
    return kind is not str or not any(sign == "\0" or "\ud800" <= sign <= "\udfff" for sign in value)


def _refusal(source: object, key: str, value: Any, needed: str) -> UserError:
    return UserError(f"{source}: {key or 'it'} is {_shown(value)}, where {needed} is needed")


def _shown(value: Any) -> str:
    """A value in a few words on one line, however large it is."""
    if isinstance(value, (int, float)) and abs(value) >= 1e30 and math.isfinite(value if type(value) is float else 0):
        return "a huge number"
    if value is None or isinstance(value, (int, float)):
        return "nothing" if value is None else str(value)
    return ascii(value[:40]) if isinstance(value, str) else f"a {type(value).__name__}"
