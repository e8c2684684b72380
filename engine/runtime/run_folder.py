"""The files of a run's folder: their names, and finding the checkpoints among them."""

import logging
import re
from pathlib import Path
from typing import Any

from model.config import SHARED_WEIGHTS, SavedArguments
from utils.errors import UserError
from utils.reading import read_json
from utils.text import list_names

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.pth"
LOG_FILE = "train.log"
WARNINGS_FILE = "warnings.jsonl"
HISTORY_FILE = "history.jsonl"
ARGUMENTS_FILE = "args.json"
CURVES_FILE = "training_curves.png"
FINAL_FILE = "final_model.pth"
REPORT_FILE = "report.html"
# All results of the demo.
DEMO_FOLDER = Path("runs/demo")
EVENTS_FOLDER = "events"
# Exists while a run is in progress (`utils.locks`).
LOCK_FILE = ".run.lock"
IMAGE_STEM = "image_adapter"
_EPOCH = re.compile(r"image_adapter_([0-9]+)\.pth")
_LOOP = re.compile(r"loop_([1-9][0-9]*)_final\.pth")
_LATEST = (f"{IMAGE_STEM}.pth", FINAL_FILE)


def side_file(side: str, epoch: int | None = None) -> str:
    """The checkpoint of a side ("text" or "image") after an epoch; by default, after the latest one."""
    return f"{side}_adapter.pth" if epoch is None else f"{side}_adapter_{epoch}.pth"


def loop_file(loop: int, stage: str = "final") -> str:
    """The checkpoint of a feedback loop after its "text" or "image" stage; by default, after its end."""
    return f"loop_{loop}_final.pth" if stage == "final" else f"loop_{loop}_{stage}_adapter.pth"


def arguments_in(folder: Path) -> dict[str, Any]:
    """The arguments of the run in a folder; empty if there is no run, or (with a warning) its file is damaged."""
    file = folder / ARGUMENTS_FILE
    if not file.is_file():
        return {}
    try:
        return read_json(file, SavedArguments)
    except UserError as error:
        logger.warning("%s; it is ignored", error)
        return {}


def find_checkpoints(path: Path) -> list[Path]:
    """The checkpoint files at `path`.

    Args:
        path: A file, or a folder: of a run, or made to share a model.

    Returns:
        The file itself, or the folder's epochs or loops in numeric order. The latest file of a folder, which repeats
        the last of them, counts only if there is no numbered one.

    Raises:
        UserError: The path does not exist, or is a folder without checkpoints.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: does not exist; {path.parent} contains {_checkpoints_in(path.parent)}")
    if (path / SHARED_WEIGHTS).is_file():
        return [path / SHARED_WEIGHTS]
    checkpoints = [*_numbered(path, _EPOCH).values(), *_numbered(path, _LOOP).values()]
    checkpoints = checkpoints or [path / name for name in _LATEST if (path / name).is_file()]
    if not checkpoints:
        raise UserError(f"{path}: no checkpoints in this folder")
    return checkpoints


def _numbered(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """The files of a folder whose names match, by their number and in its order."""
    matches = ((pattern.fullmatch(file.name), file) for file in folder.iterdir())
    return dict(sorted((int(match.group(1)), file) for match, file in matches if match and file.is_file()))


def find_loops(save_path: Path) -> dict[int, Path]:
    """The final checkpoints of a run's loops, by number and in order; `UserError` if there are none."""
    if not save_path.is_dir():
        raise UserError(f"--save_path {save_path}: no such folder")
    loops = _numbered(save_path, _LOOP)
    if not loops:
        raise UserError(f"--save_path {save_path}: no loop_*_final.pth; the folder holds {_checkpoints_in(save_path)}")
    return loops


def demo_checkpoints(folder: Path) -> dict[str, Path]:
    """The base and the loops that the demo has trained, by name; `UserError` if they do not exist."""
    try:
        loops = find_loops(folder / "feedback")
        return {"base": find_latest(folder / "base", ""), **{f"loop {loop}": path for loop, path in loops.items()}}
    except UserError as error:
        raise UserError(f"{folder} holds no models: python run.py demo trains them, or give --checkpoint") from error


def find_latest(path: Path, flag: str) -> Path:
    """The image checkpoint of a base or cross-attention run: the file itself, or the latest in a folder.

    Raises `UserError`, naming `flag`, if there is none.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{flag} {path}: no such file or folder")
    files = [*_numbered(path, _EPOCH).values(), path / f"{IMAGE_STEM}.pth", path / SHARED_WEIGHTS]
    latest = [file for file in files if file.is_file()]
    if not latest:
        raise UserError(f"{flag} {path}: no {IMAGE_STEM}.pth in this folder; it holds {_checkpoints_in(path)}")
    return latest[-1]


def _checkpoints_in(folder: Path) -> str:
    """The names of a folder's checkpoint files, for an error message."""
    return list_names(sorted(file.name for file in folder.glob("*.pth")), 8) or "no checkpoints"


def check_resumable(save_path: Path) -> None:
    """Raise `UserError` for a folder that contains checkpoints, but no state to resume from."""
    checkpoints = sorted(entry.name for entry in save_path.glob("*.pth") if not entry.name.startswith("."))
    if checkpoints and STATE_FILE not in checkpoints:
        raise UserError(
            f"--save_path {save_path} contains {checkpoints[0]} but no {STATE_FILE}, so it cannot be resumed; give "
            "another --save_path"
        )


def check_same_run(save_path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise `UserError`, with the settings that differ, if a folder holds another run."""
    if differences := describe_differences(before, now):
        raise UserError(f"--save_path {save_path} holds another run ({differences}); give another --save_path")


def describe_differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The settings that differ, as "image_lr was 0.0005, now 0.001"; settings that only `before` has do not count."""
    return "; ".join(
        f"{name} was {before.get(name)}, now {value}" for name, value in now.items() if before.get(name) != value
    )
