"""Dataclass fields with limits for their values, and fields that are options of a script."""

from collections.abc import Collection
from dataclasses import MISSING, field
from typing import Any

# The group of options that are given by position.
POSITIONAL = "positional arguments"


def limited(
    default: Any = MISSING, *, between: tuple[float, float] | None = None, choices: Collection[str] | None = None
) -> Any:
    """A field with a range or choices, which `utils.schema.check` and `changed` read."""
    return field(default=default, metadata={"between": between, "choices": choices})


def setting(
    default: Any,
    help: str,
    group: str,
    *,
    between: tuple[float, float] | None = None,
    choices: Collection[str] | None = None,
    free: bool = False,
    unset: str | None = None,
    **argparse: Any,
) -> Any:
    """A field that `utils.arguments.make_parser` turns into an option with the same name and the annotated type.

    Args:
        default: `MISSING` makes the option required.
        help: One sentence, with the unit of the value.
        group: The heading in `--help`, or `POSITIONAL`.
        between: The range of a number.
        choices: The allowed values.
        free: Whether a run may be resumed with another value.
        unset: What None means, for `--help`; "none" by default.
        **argparse: More arguments of `ArgumentParser.add_argument`, such as `type` for a value with its own syntax.
    """
    metadata = {"help": help, "group": group, "between": between, "choices": choices, "free": free, "unset": unset}
    return field(default=default, metadata={**metadata, "argparse": argparse})


def changed(owner: type, name: str, default: Any = MISSING, **metadata: Any) -> Any:
    """The field `name` of the dataclass `owner` with another default or other metadata."""
    declared = owner.__dataclass_fields__[name]  # type: ignore[attr-defined]  # owner is a dataclass
    default = declared.default if default is MISSING else default
    unspecified: dict[str, Any] = {"between": None, "choices": None, "free": False, "unset": None, "argparse": {}}
    return field(default=default, metadata={**unspecified, **declared.metadata, **metadata})
