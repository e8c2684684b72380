"""The files of a run's folder: their names, and finding the checkpoints among them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from model.config import SHARED_WEIGHTS
from utils.errors import UserError

STATE_FILE = "training_state.pth"
LOG_FILE = "train.log"
WARNINGS_FILE = "warnings.jsonl"
HISTORY_FILE = "history.jsonl"
ARGUMENTS_FILE = "args.json"
CURVES_FILE = "training_curves.png"
FINAL_FILE = "final_model.pth"
REPORT_FILE = "report.html"
# Where the demo puts all that it makes.
DEMO_FOLDER = Path("runs/demo")
EVENTS_FOLDER = "events"
# There while a run is under way (`utils.locks`).
LOCK_FILE = ".run.lock"
# Earlier versions named the files of a cross-attention run so.
OLDER_IMAGE_STEM = "image_adapter_cross_attn"
IMAGE_STEM = "image_adapter"
_NUMBERED = re.compile(r"image_adapter(?:_cross_attn)?_(\d+)\.pth")
_LOOP = re.compile(r"loop_([1-9][0-9]*)_final\.pth")
_LATEST = (f"{IMAGE_STEM}.pth", f"{OLDER_IMAGE_STEM}.pth", FINAL_FILE)


def side_file(side: str, epoch: int | None = None) -> str:
    """The checkpoint of a side, "text" or "image", after its latest epoch or after the one given."""
    return f"{side}_adapter.pth" if epoch is None else f"{side}_adapter_{epoch}.pth"


def loop_file(loop: int, what: str = "final") -> str:
    """The checkpoint of a feedback loop: after its end, or after its "text" or "image" stage."""
    return f"loop_{loop}_final.pth" if what == "final" else f"loop_{loop}_{what}_adapter.pth"


def find_checkpoints(path: Path) -> list[Path]:
    """The checkpoint files that `path` means: itself, or in a folder all epochs (or loops) in numeric order.

    A folder that was made to share a model holds one. A folder's latest file counts only where no numbered one is
    there, since it repeats the last of them.
    Raises `UserError` for a path that is not there, with the checkpoints that are, and for a folder without any.
    """
    if path.is_file():
        return [path]
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and (path / SHARED_WEIGHTS).is_file():
        return [path / SHARED_WEIGHTS]
    numbered = []
    for file in folder.glob("*.pth") if folder.is_dir() else ():
        match = _NUMBERED.fullmatch(file.name) or _LOOP.fullmatch(file.name)
        if match:
            numbered.append((int(match.group(1)), file.name, file))
    latest = [folder / name for name in _LATEST if (folder / name).is_file()]
    found = [file for _, _, file in sorted(numbered)] or latest
    if path.is_dir() and found:
        return found
    there = ", ".join(file.name for file in dict.fromkeys([*found, *latest])) or "no checkpoints"
    raise UserError(
        f"{path}: {'no checkpoints in this folder' if path.is_dir() else f'not there; {folder} holds {there}'}"
    )


def find_loops(save_path: Path) -> dict[int, Path]:
    """The final checkpoints of a run's loops, by number and in order; `UserError` where there are none."""
    if not save_path.is_dir():
        what = "is a file; give its folder" if save_path.is_file() else "no such folder"
        raise UserError(f"--save_path {save_path}: {what}")
    found = {}
    for file in save_path.iterdir():
        match = _LOOP.fullmatch(file.name)
        if match and file.is_file():
            found[int(match.group(1))] = file
    if not found:
        raise UserError(
            f"--save_path {save_path}: no loop_*_final.pth in this folder; it holds {_checkpoints_in(save_path)}"
        )
    return dict(sorted(found.items()))


def demo_checkpoints(folder: Path) -> dict[str, Path]:
    """The base and the loops that the demo has trained; `UserError` where they are not there."""
    try:
        loops = find_loops(folder / "feedback")
        return {"base": find_latest(folder / "base", ""), **{f"loop {loop}": path for loop, path in loops.items()}}
    except UserError as error:
        raise UserError(
            f"{folder} holds no models of the demo: make them with python run.py demo, or give --checkpoint"
        ) from error


def find_latest(path: Path, flag: str) -> Path:
    """The image checkpoint of a base or cross-attention run: the file given, or the latest in a folder.

    Raises `UserError`, naming `flag`, where there is none.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{flag} {path}: no such file or folder")
    if (path / SHARED_WEIGHTS).is_file():
        return path / SHARED_WEIGHTS
    for stem in (IMAGE_STEM, OLDER_IMAGE_STEM):
        latest = path / f"{stem}.pth"
        if latest.is_file():
            return latest
        matches = (re.fullmatch(rf"{stem}_([0-9]+)\.pth", file.name) for file in path.iterdir())
        epochs = [int(match.group(1)) for match in matches if match]
        if epochs:
            return path / f"{stem}_{max(epochs)}.pth"
    raise UserError(f"{flag} {path}: no {IMAGE_STEM}.pth in this folder; it holds {_checkpoints_in(path)}")


def _checkpoints_in(folder: Path, most: int = 8) -> str:
    """The checkpoint files of a folder in words, for the message that another one is missing."""
    names = sorted(file.name for file in folder.glob("*.pth"))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more or "no checkpoints"


def check_unused(save_path: Path, resume: str) -> None:
    """Raise `UserError` for a used folder with `--resume never`, and for one with checkpoints and no state."""
    entries = [entry for entry in save_path.iterdir() if not entry.name.startswith(".")] if save_path.exists() else []
    if resume == "never" and entries:
        raise UserError(f"--save_path {save_path} is not empty, and --resume never starts in a new folder only")
    checkpoints = sorted(entry.name for entry in entries if entry.suffix == ".pth")
    if checkpoints and not (save_path / STATE_FILE).is_file():
        raise UserError(f"--save_path {save_path} holds {checkpoints[0]} of a run without {STATE_FILE}; give another")


def check_same_run(save_path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise `UserError`, with the settings that differ, where a folder holds another run."""
    if differences := describe_differences(before, now):
        raise UserError(f"--save_path {save_path} holds another run ({differences}); give another --save_path")


def describe_differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The settings that differ, as "image_lr was 0.0005, now 0.001"; those that are compared no longer do not count."""
    return "; ".join(
        f"{name} was {before.get(name)}, now {value}" for name, value in now.items() if before.get(name) != value
    )
