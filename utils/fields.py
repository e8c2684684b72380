"""Dataclass fields that carry their help, range and choices, from which parsers and checks follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, field
from typing import Any


def setting(
    default: Any,
    help: str,
    group: str,
    *,
    between: tuple[float, float] | None = None,
    choices: Sequence[str] | None = None,
    free: bool = False,
    unset: str | None = None,
    several: bool = False,
    kind: Callable[[str], Any] | None = None,
    alone: Any = None,
    under: Mapping[str, Any] | None = None,
    before: Any = MISSING,
    word: bool = False,
    kept: bool = False,
) -> Any:
    """A field that can be a script's argument by the same name; its annotation says the type.

    default: `MISSING` makes it required. help: a sentence with the unit, group: its heading. between: the range of a
    number. free: a restart may differ in it without being another run. unset: what no value means, for the help.
    several: takes one value or more, a tuple. kind: reads the text where the annotation does not say how. alone: the
    value where the argument stands without one. under: its default under presets and recipes, by their names. before:
    what it was in runs that do not have it, where that is not the default. word: it is given by its place, not by a
    flag. kept: where it is not given, a run that goes on keeps what it began with.
    """
    metadata = {
        "help": help,
        "group": group,
        "between": between,
        "choices": choices,
        "free": free,
        "unset": unset,
        "several": several,
        "kind": kind,
        "alone": alone,
        "under": dict(under or {}),
        "before": before,
        "word": word,
        "kept": kept,
    }
    return field(default=default, metadata=metadata)


def changed(owner: type, name: str, default: Any = MISSING, **metadata: Any) -> Any:
    """The field `name` of another dataclass, with another default, other words or more presets."""
    declared = owner.__dataclass_fields__[name]
    default = declared.default if default is MISSING else default
    presets = {**declared.metadata["under"], **metadata.pop("under", {})}
    return field(default=default, metadata={**declared.metadata, **metadata, "under": presets})
