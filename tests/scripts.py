"""The scripts as a user runs them, with a tiny CLIP and a tiny dataset."""

import csv
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image
from safetensors.torch import save_file

from engine.config.training import BaseConfig, FeedbackConfig
from engine.training.base import train_base
from engine.training.feedback import train_feedback
from tests.forked import CAN_FORK, Forked
from tests.helpers import TINY_ARCHITECTURE, tiny_open_clip
from tests.in_process import ROOT, answer

SIZE = 40
# Values of the history that differ from one run to the next.
TIMED = ("seconds", "images_per_second", "memory_gib")


def flags(**values: object) -> list[object]:
    """The options of a command; a tuple is an option with several values."""
    several = {name: value if isinstance(value, tuple) else (value,) for name, value in values.items()}
    return [word for name, words in several.items() for word in (f"--{name}", *words)]


def environment() -> dict[str, str]:
    """The environment of processes that tests start. Nothing may be downloaded."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}


def start(script: str, *arguments: object, cwd: Path = ROOT, slowly: bool = False) -> subprocess.Popen[str] | Forked:
    """Start a script; `slowly` to stop it in the middle (only from the repository's root)."""
    words = [str(ROOT / script), *map(str, arguments)]
    if slowly and CAN_FORK:
        return Forked(words, cwd, environment(), slowly)
    command = [sys.executable, *(["-m", "tests.slowly"] if slowly else []), *words]
    return start_command(command, cwd)


def start_command(command: list[str], cwd: Path = ROOT) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cwd, env=environment(), text=True, encoding="utf-8", **pipes)


def launch(processes: int, *words: object, slowly: bool = False) -> subprocess.Popen[str]:
    """Start a script (or `-m` and a module), on the CPU, in several processes that accelerate launches."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    # Said, so that the launcher has nothing to remark upon; a port of this launch's own.
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--main_process_port", str(free_port()), *(["-m", "tests.slowly"] if slowly else [])]
    return start_command([sys.executable, *launcher, *map(str, words)])


def fork(processes: int, script: str, *arguments: object) -> list[Forked]:
    """Start a script in several processes as `launch` does, without the launcher."""
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = free_port()
    started = []
    for rank in range(processes):
        told = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        told = {**environment(), **{name: str(value) for name, value in told.items()}}
        started.append(Forked([str(ROOT / script), *map(str, arguments)], ROOT, told, slowly=False))
    return started


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run(script: str, *arguments: object, cwd: Path = ROOT, status: int = 0, apart: bool = False) -> str:
    """Run a script to its end and return its standard error; its exit status must be `status`.

    It runs in this process, which has the libraries; `apart`, in one of its own, as a user's does.
    """
    if apart:
        process = start(script, *arguments, cwd=cwd)
        _, errors = process.communicate(timeout=300)
        found: object = process.returncode
    else:
        found, errors = _run_here(script, [str(argument) for argument in arguments], cwd)
    assert found == status, errors
    return errors


def _run_here(script: str, arguments: list[str], cwd: Path) -> tuple[object, str]:
    before = Path.cwd()
    os.chdir(cwd)
    try:
        with mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}):
            found = answer(script, arguments)
    finally:
        os.chdir(before)
    return found.status, found.errors


def error_line(script: str, *arguments: object, cwd: Path = ROOT, apart: bool = False) -> str:
    """The last line of a run that must end in one error line with status 2 and no traceback."""
    errors = run(script, *arguments, cwd=cwd, status=2, apart=apart)
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors
    assert errors.rstrip().endswith(lines[0])
    return lines[0]


def wait_for_rows(history: Path, rows: int, process: subprocess.Popen[str] | Forked) -> None:
    """Wait until a run has finished this many epochs."""

    def is_there() -> bool:
        assert process.poll() is None, process.communicate()
        return history.is_file() and len(history.read_text(encoding="utf-8").splitlines()) >= rows

    wait_until(is_there)


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_after(rows: int, save_path: Path, script: str, *arguments: object) -> None:
    """Start a run, and kill it at a random moment after this many epochs."""
    process = start(script, *arguments, slowly=True)
    wait_for_rows(save_path / "history.jsonl", rows, process)
    time.sleep(random.SystemRandom().uniform(0, 0.2))
    process.kill()
    process.wait()


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def read_history(save_path: Path) -> list[dict[str, Any]]:
    """The history of a run without what differs from one run to the next."""
    lines = (save_path / "history.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMED} for line in lines]


def write_clip(folder: Path) -> Path:
    """A tiny random CLIP as an open_clip model folder."""
    folder.mkdir(parents=True)
    config = {"model_cfg": {**TINY_ARCHITECTURE, "quick_gelu": True}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    state = {key: value.contiguous() for key, value in tiny_open_clip().state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def write_dataset(folder: Path, classes: tuple[str, ...] = ("bolt", "felt"), count: int = 6, seed: int = 0) -> Path:
    """Noise with bright squares as anomalies, in MVTec's layout: `count` normal and `count` anomalous a class."""
    rng = np.random.default_rng(seed)
    for name in classes:
        for index in range(count):
            save(folder / name / "test" / "good" / f"{index:03d}.png", rng.integers(60, 120, (SIZE, SIZE, 3)))
            pixels = rng.integers(60, 120, (SIZE, SIZE, 3))
            mask = np.zeros((SIZE, SIZE))
            top, left = rng.integers(0, SIZE - 14, 2)
            pixels[top : top + 14, left : left + 14] += 130
            mask[top : top + 14, left : left + 14] = 255
            save(folder / name / "test" / "spot" / f"{index:03d}.png", pixels)
            save(folder / name / "ground_truth" / "spot" / f"{index:03d}_mask.png", mask)
    return folder


def write_world(folder: Path, classes: tuple[str, ...], count: int = 6) -> Path:
    """In `folder`: a tiny CLIP as `clip`, a dataset `train`, and `test` of these classes."""
    write_clip(folder / "clip")
    write_dataset(folder / "train")
    write_dataset(folder / "test", classes=classes, count=count, seed=1)
    return folder


def common_arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    """The arguments of a short run on the tiny CLIP and the dataset `train` of a folder."""
    return {
        "model_name": f"local-dir:{folder / 'clip'}",
        "dataset": str(folder / "train"),
        "shot": 4,
        "text_batch_size": 4,
        "num_workers": 0,
        "device": "cpu",
        "tracker": "none",
        **changes,
    }


def base_arguments(folder: Path) -> dict[str, Any]:
    """The arguments of a run that starts from the run `base` of a folder."""
    return {f"load_base_{side}_adapter": folder / "base" / f"{side}_adapter.pth" for side in ("text", "image")}


def small_runs(folder: Path, **changes: Any) -> tuple[BaseConfig, FeedbackConfig]:
    """A run `base`, and two loops of `feedback` from scratch, on the tiny CLIP and the dataset `train` of a folder."""
    common = common_arguments(folder, **changes)
    loops = {"num_feedback_loops": 2, "text_epochs_per_loop": (1,), "image_epochs_per_loop": (1,)}
    return (
        BaseConfig.of(**common, text_epoch=1, image_epoch=1, save_path=folder / "base"),
        FeedbackConfig.of(**common, **loops, save_path=folder / "feedback"),
    )


def train_small_runs(folder: Path, count: int = 3) -> Path:
    """In `folder`: a tiny CLIP, datasets `train` and `test`, and `small_runs`, trained."""
    write_world(folder, ("cork", "reed"), count=count)
    base, feedback = small_runs(folder)
    train_base(base)
    train_feedback(feedback)
    return folder


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
