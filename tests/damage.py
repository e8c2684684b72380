"""Valid files of small runs and ways to damage them, for all tests of damaged files."""

import atexit
import contextlib
import copy
import functools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

from engine.config.training import BaseConfig, CrossAttentionRunConfig, FeedbackConfig
from engine.training.base import train_base
from engine.training.cross_attention import train_cross_attention
from engine.training.feedback import train_feedback
from engine.training.trainer import Trainer
from tests.scripts import write_clip, write_dataset

SOUND = ("base/image_adapter.pth", "base/training_state.pth", "cross/image_adapter.pth", "feedback/training_state.pth")
COMMON: dict[str, Any] = {
    "model_name": "local-dir:clip",
    "dataset": "images",
    "shot": 4,
    "text_batch_size": 4,
    "num_workers": 0,
    "device": "cpu",
    "tracker": "none",
    "text_lr": 1e-3,
    "image_lr": 1e-3,
}
EPOCHS = {"text_epoch": 1, "image_epoch": 3}
BASE = {
    "load_base_text_adapter": Path("base/text_adapter.pth"),
    "load_base_image_adapter": Path("base/image_adapter_1.pth"),
}
LOOPS = {"num_feedback_loops": 2, "text_epochs_per_loop": (1,), "image_epochs_per_loop": (3,)}


class Halt(BaseException):
    """Ends a run like a kill."""


@contextlib.contextmanager
def halting_after(epochs: int) -> Iterator[None]:
    """Training stops in the middle of the epoch after this many."""
    train_epoch, started = Trainer.train_epoch, []

    def count(*arguments: Any) -> Any:
        started.append(arguments)
        if len(started) > epochs:
            raise Halt
        return train_epoch(*arguments)

    with mock.patch.object(Trainer, "train_epoch", count), contextlib.suppress(Halt):
        yield


@functools.cache
def world() -> Path:
    """A folder with `clip`, the dataset `images`, and the unfinished runs `base`, `cross` and `feedback`, made once."""
    folder, before = Path(tempfile.mkdtemp(prefix="damaged")), Path.cwd()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    os.chdir(folder)
    try:
        write_clip(folder / "clip")
        write_dataset(folder / "images", count=4)
        with halting_after(2):
            train_base(BaseConfig.of(**COMMON, **EPOCHS, save_path=Path("base")))
        with halting_after(2):
            train_cross_attention(CrossAttentionRunConfig.of(**COMMON, **EPOCHS, **BASE, save_path=Path("cross")))
        with halting_after(6):
            train_feedback(FeedbackConfig.of(**COMMON, **BASE, **LOOPS, save_path=Path("feedback")))
    finally:
        os.chdir(before)
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(False)
    return folder


@functools.cache
def sound(name: str) -> dict[str, Any]:
    """A file's content; without its config if "without config" follows the name."""
    name, _, older = name.partition(" ")
    content = torch.load(world() / name, weights_only=True)
    return {key: value for key, value in content.items() if not older or key != "config"}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values nested in a value."""
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
    """A damaged file's content, the original file, and the place of the damage."""

    content: dict[str, Any]
    name: str
    path: tuple[Any, ...]


@st.composite
def damaged_files(draw: st.DrawFn) -> Damaged:
    """A valid file in which a value at any depth is replaced or missing; some without a config."""
    name = draw(st.sampled_from([*SOUND, *(f"{name} without config" for name in SOUND)]))
    found = places(sound(name))
    depth = draw(st.sampled_from(sorted({len(path) for path in found})))
    path = draw(st.sampled_from([path for path in found if len(path) == depth]))
    change = draw(st.none() | st.sampled_from(OTHERS))
    return Damaged(damage(sound(name), path, change), name, path)
