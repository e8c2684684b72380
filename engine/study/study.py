"""What a study file says: arms, seeds, pairs of datasets, and what to compare. Nothing here knows any script."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

from utils.errors import UserError
from utils.schema import type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Table = TypeVar("Table")
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Flags:
    """The flags that the runner fills in itself; an empty one is not given."""

    save: str = "--save_path"
    seed: str = "--seed"
    dataset: str = "--dataset"
    checkpoint: str = "--checkpoint"
    output: str = "--output_dir"


@dataclass(frozen=True)
class Pair:
    """A dataset to train on and those to test on; `scale`: of the hours of its trainings."""

    train: str
    test: tuple[str, ...]
    arguments: Arguments = field(default_factory=dict)
    scale: float = 1.0


@dataclass(frozen=True)
class Setting:
    """More arguments for all arms, such as a number of shots, under which the study is done once; `scale` of hours."""

    arguments: Arguments = field(default_factory=dict)
    scale: float = 1.0


@dataclass(frozen=True)
class Start:
    """The arm that another one starts from, and the arguments that name files of its run."""

    arm: str
    arguments: Arguments = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One way to train or to test.

    script: what trains, "" for an arm that is only tested. checkpoint: the file of its run to test, or for an arm
    that neither trains nor starts from one, the word that the test script takes. launch: words between Python and the
    script. hours: of one training. compare: whether it is tested against the arm to compare with, or only shown.
    """

    script: str = ""
    arguments: Arguments = field(default_factory=dict)
    start: Start | None = None
    checkpoint: str = ""
    test_arguments: Arguments = field(default_factory=dict)
    launch: tuple[str, ...] = ()
    gpus: int = 1
    hours: float | None = None
    compare: bool = True
    note: str = ""


@dataclass(frozen=True)
class Study:
    """A study file (docs/studies.md). `arms` and `settings` by name; percent and points in `margin`.

    also_compare_with: arms that all others are compared with too, each in a report of its own.
    """

    name: str
    seeds: tuple[int, ...]
    pairs: tuple[Pair, ...]
    compare_with: str
    arms: dict[str, Arm]
    test_script: str
    title: str = ""
    also_compare_with: tuple[str, ...] = ()
    arguments: Arguments = field(default_factory=dict)
    test_arguments: Arguments = field(default_factory=dict)
    settings: dict[str, Setting] = field(default_factory=lambda: {"": Setting()})
    flags: Flags = Flags()
    metrics: tuple[str, ...] = ()
    verdict_metrics: tuple[str, ...] = ()
    margin: float = 0.5
    literature: str = ""
    needs: str = ""
    test_hours: float | None = None
    hours_from: str = ""
    slurm: Arguments = field(default_factory=dict)


def read_study(path: Path, seeds: tuple[int, ...] | None = None) -> Study:
    """Read and check a study file; `seeds` take the place of its own. `UserError` names what is wrong with it."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not TOML: {error}") from error
    if set(content) != {"study", "arms"}:
        raise UserError(f"{path}: takes tables [study] and [arms.NAME], and has {', '.join(content) or 'none'}")
    study = _table(Study, {**_a_table(content["study"], f"{path}: [study]"), "arms": content["arms"]}, f"{path}: study")
    if seeds:
        study = replace(study, seeds=seeds)
    _check(study, path)
    return study


def _check(study: Study, path: Path) -> None:
    def refuse(problem: str) -> None:
        raise UserError(f"{path}: {problem}")

    if not re.fullmatch(r"\w[\w.-]*", study.name):
        refuse(f"name = {study.name!r}: it names a folder; letters, digits, _ . - only")
    for what in ("seeds", "pairs", "arms", "settings"):
        if not getattr(study, what):
            refuse(f"{what} is empty")
    if len(set(study.seeds)) < len(study.seeds):
        refuse("a seed is named twice")
    trains = [(pair.train, tuple(sorted(map(str, pair.arguments.items())))) for pair in study.pairs]
    if len(set(trains)) < len(trains):
        refuse("two pairs train on the same; give one of them all test datasets")
    for name in (study.compare_with, *study.also_compare_with):
        if name not in study.arms:
            refuse(f"an arm to compare with, {name!r}, is none of the arms ({', '.join(study.arms)})")
    if unknown := set(study.verdict_metrics) - set(study.metrics or study.verdict_metrics):
        refuse(f"verdict_metrics not among metrics: {', '.join(sorted(unknown))}")
    for name, arm in study.arms.items():
        if arm.gpus < 1:
            refuse(f"arms.{name}: gpus = {arm.gpus}, takes 1 or more")
        if not arm.checkpoint:
            refuse(f"arms.{name}: checkpoint is missing: the file to test, or what the test script takes for none")
        seen = [name]
        while arm.start is not None:
            if arm.start.arm not in study.arms:
                refuse(f"arms.{seen[-1]}: starts from {arm.start.arm!r}, which is no arm")
            if arm.start.arm in seen:
                refuse(f"arms.{name}: starts from itself ({' from '.join([*seen, arm.start.arm])})")
            seen.append(arm.start.arm)
            arm = study.arms[arm.start.arm]
            if not arm.script:
                refuse(f"arms.{seen[-2]}: starts from {seen[-1]!r}, which trains nothing")


def _table(kind: type[Table], content: Any, where: str) -> Table:
    """A dataclass from a TOML table, whose keys and types are those of the fields."""
    content = _a_table(content, where)
    hints = type_hints(kind)
    known = {item.name: item for item in fields(kind)}
    if unknown := set(content) - set(known):
        raise UserError(f"{where}: not known: {', '.join(sorted(unknown))} (there are {', '.join(known)})")
    required = [name for name, item in known.items() if item.default is MISSING and item.default_factory is MISSING]
    if missing := [name for name in required if name not in content]:
        raise UserError(f"{where}: missing: {', '.join(missing)}")
    return kind(**{name: _value(hints[name], value, f"{where}.{name}") for name, value in content.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """A TOML value as the type `hint` says; `UserError` where it is of another."""
    if hint == Arguments:
        return _a_table(value, where)
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is dict:
        return {key: _table(get_args(hint)[1], item, f"{where}.{key}") for key, item in _a_table(value, where).items()}
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise UserError(f"{where}: takes a list, not {value!r}")
        return tuple(_value(get_args(hint)[0], item, where) for item in value)
    if hint in (Flags, Pair, Start):
        return _table(hint, value, where)
    accepted = (int, float) if hint is float else hint
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        raise UserError(f"{where}: takes {names[hint]}, not {value!r}")
    return value


def _a_table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: takes a table, not {value!r}")
    return value
