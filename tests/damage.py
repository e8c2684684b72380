"""Sound files of the runs that are kept, and what damages them: for all tests of files that somebody else made."""

from __future__ import annotations

import copy
import functools
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.data.present_version import make

SOUND = (
    "base/image_adapter.pth",
    "base/training_state.pth",
    "cross/image_adapter_cross_attn.pth",
    "feedback/training_state.pth",
)


@functools.cache
def world() -> Path:
    """A folder with `clip`, the dataset `images`, and the kept runs `base`, `cross` and `feedback`, made once."""
    folder = Path(tempfile.mkdtemp(prefix="damaged"))
    make.write_world(folder)
    with zipfile.ZipFile(Path(make.__file__).with_name("runs.zip")) as archive:
        archive.extractall(folder)
    return folder


@functools.cache
def sound(name: str) -> dict[str, Any]:
    """A kept file's content; with "without config" behind its name, as an older version would have written it."""
    name, _, older = name.partition(" ")
    content = torch.load(world() / name, weights_only=True)
    return {key: value for key, value in content.items() if not older or key != "config"}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all that is nested in a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return [place for key, item in inside for place in [(*path, key), *places(item, (*path, key))]]


def nested(value: Any) -> Any:
    for _ in range(40):
        value = [value]
    return value


# What takes the place of a value.
OTHERS: list[Callable[[Any], Any]] = [
    lambda _: None,
    lambda _: "text",
    lambda _: -3,
    lambda _: True,
    lambda _: 1.5,
    lambda _: float("nan"),
    lambda _: 10**30,
    lambda _: [],
    lambda _: {},
    lambda _: {0: 1},
    lambda value: [value],
    lambda value: {"inside": value},
    nested,
    lambda _: torch.zeros(3),
    lambda _: torch.zeros(2, 2).to_sparse(),
    lambda _: torch.zeros(2, dtype=torch.complex64),
    lambda _: torch.zeros(2, device="meta"),
    lambda value: value.long() if isinstance(value, Tensor) else str(value),
    lambda value: value * float("nan") if isinstance(value, Tensor) else 0,
    lambda value: value.flatten() if isinstance(value, Tensor) else {1: value},
]


def damage(content: dict[str, Any], path: tuple[Any, ...], change: Callable[[Any], Any] | None) -> dict[str, Any]:
    """A copy in which the value at `path` is changed, added, or left out; tuples become lists on the way."""
    content = copy.deepcopy(content)
    holder: Any = content
    for key in path[:-1]:
        if isinstance(holder[key], tuple):
            holder[key] = list(holder[key])
        holder = holder[key]
    if change is None:
        del holder[path[-1]]
    else:
        is_new = isinstance(holder, dict) and path[-1] not in holder
        holder[path[-1]] = change(None if is_new else holder[path[-1]])
    return content


class Damaged(NamedTuple):
    """What a damaged file holds, the sound file that it was, and where the damage is."""

    content: dict[str, Any]
    name: str
    path: tuple[Any, ...]


@st.composite
def damaged_files(draw: st.DrawFn) -> Damaged:
    """A kept file in which something is another, each depth as likely, or is gone; some without a config."""
    name = draw(st.sampled_from([*SOUND, *(f"{name} without config" for name in SOUND)]))
    found = places(sound(name))
    depth = draw(st.sampled_from(sorted({len(path) for path in found})))
    path = draw(st.sampled_from([path for path in found if len(path) == depth]))
    change = draw(st.none() | st.sampled_from(OTHERS))
    return Damaged(damage(sound(name), path, change), name, path)
