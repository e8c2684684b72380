"""The table of `tests/bad_inputs.py`: what users, files and machines can do to each script, by kind.

Where it matters which argument is wrong, cases follow from the fields that declare a script's arguments, so that a new
argument is tried too. Paths are relative to the scratch folder's `here`.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, Field, dataclass, fields, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, get_type_hints
from unittest import mock

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from dataset.toy.options import PretrainArguments
from engine.cli.share import SharingArguments
from engine.config.evaluation import ComparisonArguments, InferenceArguments, VisualizationArguments
from engine.config.tools import ExportArguments, GradientTest
from engine.config.training import BaseConfig, CrossAttentionRunConfig, FeedbackConfig
from engine.runtime.run_folder import LOCK_FILE
from tests.bad_inputs import CASE, Case
from tests.damage import damage, nested, sound
from tests.helpers import RunsCode, write_lock
from utils.arguments import Arguments, _value_type

Values = Mapping[str, Any]

TRAIN, CROSS = "train.py", "train_cross_attention.py"
V2, V1 = "train_cross_attention_feedback_v2.py", "train_cross_attention_feedback.py"
TEST, COMPARE, DRAW = "inference.py", "compare_feedback_loops.py", "visualize_comparison.py"
TRAINING = (TRAIN, CROSS, V2, V1)
GRADIENTS, PRETRAIN, RUN = "test_stage2_gradients.py", "pretrain_toy_clip.py", "run.py"
EXPORT = "export.py"
# As `python -m engine.cli.share` and `python -m dataset.convert`.
SHARE = "engine/cli/share.py"
CONVERT = "dataset/convert/__main__.py"

_DATA = {"dataset": "images", "device": "cpu"}
_TRAINING = {
    **_DATA,
    "model_name": "local-dir:clip",
    "shot": 8,
    "text_batch_size": 4,
    "num_workers": 0,
    "tracker": "none",
    "save_path": "new",
}
_EPOCHS = {"text_epoch": 1, "image_epoch": 1}
_LOOPS = {"num_feedback_loops": 1, "text_epochs_per_loop": 1, "image_epochs_per_loop": 1}
_BASE = {"load_base_text_adapter": "base/text_adapter.pth", "load_base_image_adapter": "base/image_adapter.pth"}


@dataclass(frozen=True)
class Script:
    """The arguments that a script takes, and a command that it accepts."""

    arguments: type[Arguments]
    sound: Values


SCRIPTS = {
    TRAIN: Script(BaseConfig, {**_TRAINING, **_EPOCHS}),
    CROSS: Script(CrossAttentionRunConfig, {**_TRAINING, **_EPOCHS, **_BASE}),
    V2: Script(FeedbackConfig, {**_TRAINING, **_LOOPS, **_BASE}),
    V1: Script(FeedbackConfig, {**_TRAINING, **_LOOPS, **_BASE}),
    TEST: Script(
        InferenceArguments, {**_DATA, "num_workers": 0, "checkpoint": "base/image_adapter.pth", "output_dir": "new"}
    ),
    COMPARE: Script(
        ComparisonArguments,
        {**_DATA, "num_workers": 0, "save_path": "feedback", "base_path": "base", "output_dir": "new"},
    ),
    DRAW: Script(VisualizationArguments, {**_DATA, "class_name": "felt", "base_path": "base", "output_dir": "new"}),
    GRADIENTS: Script(GradientTest, {**_DATA, "checkpoint": "base/image_adapter.pth"}),
    SHARE: Script(SharingArguments, {"checkpoint": "base/image_adapter.pth", "output": "new"}),
    EXPORT: Script(
        ExportArguments, {"checkpoint": "base/image_adapter.pth", "class_name": "felt", "output": "new.onnx"}
    ),
    PRETRAIN: Script(PretrainArguments, {"drawings": 256, "epochs": 1, "output": "new"}),
}


def words_of(values: Values) -> tuple[str, ...]:
    """Arguments as a command line has them: True is a flag alone, None is left out."""
    words: list[str] = []
    for name, value in values.items():
        if value is not None:
            words.append(f"--{name}")
            words += [] if value is True else map(str, value) if isinstance(value, (list, tuple)) else [str(value)]
    return tuple(words)


def case(script: str, kind: str, says: str, changes: Values, **more: Any) -> Case:
    """A sound command of a script with changes, which come last; `None` leaves an argument out."""
    kept = {name: value for name, value in SCRIPTS[script].sound.items() if name not in changes}
    return Case(script, kind, words_of({**kept, **changes}), says, **more)


# Arguments


def numbers(script: str) -> Iterator[Case]:
    """Some bad values of each number that a script takes, others at each."""
    bad = cycle(["inf", "nan", "1e300", "9" * 23, "", "three", "-1e300", "0x10", "1" * 5000, "1_0.0.0", "-inf"])
    for item, kind in typed_fields(script):
        if kind in (int, float):
            low, high = item.metadata["between"]
            beyond = [low - 1, high + 1] if kind is int else [low - 1.0, high * 2]
            values = [value for value in [*islice(bad, 3), *beyond] if not within(value, low, high)]
            for value in values:
                yield case(script, "numbers", f"--{item.name}", {item.name: value})


def within(value: Any, low: float, high: float) -> bool:
    """Whether a number that is bad elsewhere is in an argument's range."""
    try:
        return low <= float(value) <= high
    except ValueError:
        return False


def typed_fields(script: str) -> list[tuple[Field[Any], type]]:
    """The arguments of a script, with the type of one value."""
    arguments = SCRIPTS[script].arguments
    hints = get_type_hints(arguments)
    options = [item for item in fields(arguments) if item.name not in arguments.not_options]
    return [(item, _value_type(hints[item.name])[0]) for item in options]


def choices(script: str) -> Iterator[Case]:
    bad = cycle(["nonsense", "", "None", "\udcff"])
    for item, _ in typed_fields(script):
        if item.metadata["choices"]:
            yield case(script, "choices", f"--{item.name}", {item.name: next(bad)})


def flags(script: str) -> Iterator[Case]:
    """Unknown arguments, words that belong to none, arguments without their value, and required ones left out."""
    arguments = words_of(SCRIPTS[script].sound)
    given = set(SCRIPTS[script].sound)
    first = next(iter(SCRIPTS[script].sound))
    for more in (["--nosuch"], ["--nosuch=1"], ["stray"], ["-x"], [f"--{first[:-2]}", "1"], ["--", "x"], ["\udcff"]):
        says = more[-1] if more[0] == "--" else more[0].encode("utf-8", "backslashreplace").decode()
        yield Case(script, "flags", (*arguments, *more), says if len(more) == 1 else "")
    for item in islice((item for item, kind in typed_fields(script) if kind is not bool), 4):
        yield Case(
            script, "flags", (*arguments, f"--{item.name}"), f"--{item.name}" if item.name != "visualize" else ""
        )
    for item in fields(SCRIPTS[script].arguments):
        if item.default is MISSING and item.name in given:
            yield case(script, "flags", f"--{item.name}", {item.name: None})


def run_py() -> Iterator[Case]:
    """`run.py` has no dataclass of arguments, and must not set anything up for a command that is wrong."""
    for arguments, says in (
        ((), "command"),
        (("nosuch",), "nosuch"),
        (("--nosuch",), "command"),
        (("--nosuch", "demo"), "--nosuch"),
        (("",), "''"),
        (("\udcff",), "command"),
        (("demo", "--torch-index"), "--torch-index"),
        (("--torch-index", "https://example.org"), "command"),
        (("--torch-index", "", "demo"), "--torch-index"),
        (("--torch-index", "nosuch", "demo"), "--torch-index"),
        (("--torch-inde", "x", "demo"), "choose from"),
        (("Demo",), "Demo"),
        (("-x", "test"), "-x"),
    ):
        yield Case(RUN, "flags", arguments, says, stand_in=nothing_installed)


@contextmanager
def nothing_installed() -> Iterator[None]:
    with (
        mock.patch("venv.create", side_effect=AssertionError),
        mock.patch("subprocess.Popen", side_effect=AssertionError),
    ):
        yield


def no_environment() -> Iterator[Case]:
    """`run.py` where `.venv` can be neither found nor made."""

    @contextmanager
    def refused() -> Iterator[None]:
        with (
            mock.patch.object(Path, "is_file", return_value=False),
            mock.patch("venv.create", side_effect=PermissionError(errno.EACCES, "Permission denied", ".venv")),
        ):
            yield

    for command in ("demo", "app", "test", "check"):
        yield Case(RUN, "machine", (command,), ".venv", stand_in=refused)


LONG = "x" * 300
TEXTS = {
    "dataset": [
        "nosuch",
        "",
        "  ",
        "\udcff",
        "~nosuchuser/images",
        LONG * 20,
        "clip/nothing",
        "clip",
        "base/args.json",
    ],
    "eval_dataset": ["nosuch", "clip", "VisA"],
    "device": ["", "tpu", "cuda:x", "cuda:99", "cuda:-1", "cpu:0", "mps:1", "CPU", "\udcff"],
    "model_name": [
        "",
        "nosuch",
        "local-dir:",
        "local-dir:nowhere",
        "local-dir:images",
        "../..",
        "\udcff",
        LONG * 20,
        "hf-hub:nobody/nothing",
        "RN50",
        "local-dir:clip/open_clip_config.json",
    ],
    "mask_threshold": ["", "0", "1.01", "-0.5", "half", "Nonzero", "nan", "inf", "\udcff", LONG * 20],
    "clip_weights": ["nowhere.pt", "images", "base/args.json", "base/history.jsonl", LONG * 20, "\udcff"],
}


def texts(script: str) -> Iterator[Case]:
    for name, values in TEXTS.items():
        if name in {item.name for item, _ in typed_fields(script)}:
            for value in values:
                yield case(script, "texts", "", {name: value})


def class_names_of_prompts() -> Iterator[Case]:
    for name in ("", "  ", LONG * 20, "word " * 100):
        yield case(TEST, "texts", "", {"dataset": None, "image": "images/felt/test/good/000.png", "class_name": name})
    for name in ("", "nosuch", "FELT", "../felt", LONG * 20, "\udcff"):
        yield case(DRAW, "texts", "--class_name", {"class_name": name})


# Paths

BAD_PATHS = [
    "",
    " ",
    "a\0b",
    "~nosuchuser/x",
    LONG,
    f"{LONG}/below",
    LONG * 20,
    "\udcff/x",
    "case/circle",
    "case/circle/below",
    "case/file/below",
    "case/dangling",
]
# Those are files, and there: bad as input of another kind, or as a folder to write to.
BAD_INPUTS = [*BAD_PATHS, "nowhere/at/all", "case/locked/x", "case/file", "case/empty", "case/folder", "/dev/null"]
BAD_OUTPUTS = [*BAD_PATHS, "case/file", "/dev/null", "/proc/none/x", "case/locked/x", "case/pipe"]
OUTPUTS = ("save_path", "output_dir", "output", "work")


def strange_files() -> None:
    """What `BAD_INPUTS` and `BAD_OUTPUTS` name."""
    (CASE / "circle").symlink_to("circle")
    (CASE / "dangling").symlink_to("gone")
    (CASE / "file").write_text("neither JSON nor anything else", encoding="utf-8")
    (CASE / "empty").touch()
    (CASE / "folder").mkdir()
    (CASE / "locked").mkdir()
    os.mkfifo(CASE / "pipe")


OPEN = os.open


@contextmanager
def refusing(code: int = errno.EACCES, writing_only: bool = False) -> Iterator[None]:
    """What the system says of all below `case/locked`, for one who is not root; `code`: why."""
    names = [(os, "mkdir")] if writing_only else [(os, "mkdir"), (os, "listdir"), (os, "scandir"), (os, "stat")]
    with ExitStack() as stack:
        for module, name in [*names, (os, "open"), (io, "open"), (builtins, "open")]:
            stack.enter_context(mock.patch.object(module, name, refused(getattr(module, name), code)))
        yield


def refused(real: Callable[..., Any], code: int) -> Callable[..., Any]:
    def call(path: Any = ".", *rest: Any, **more: Any) -> Any:
        # A file without a name is opened by its folder.
        parts = Path(path).parts if isinstance(path, (str, os.PathLike)) else ()
        if "locked" in (parts if real is OPEN else parts[:-1]):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *rest, **more)

    return call


def stand_in_for(path: str) -> dict[str, Any]:
    return {"prepare": strange_files, **({"stand_in": refusing} if "locked" in path else {})}


def paths_in(script: str) -> Iterator[Case]:
    """Bad paths at each input of a script, in turn."""
    bad = cycle(BAD_INPUTS)
    for item, kind in typed_fields(script):
        name = item.name
        is_input = (kind is Path and name not in OUTPUTS) or name in ("checkpoint", "class_names")
        if script == COMPARE and name == "save_path":
            is_input = True
        if not is_input or (script == V1 and name not in ("init_from",)):
            continue
        for path in islice(bad, 10):
            changes: dict[str, Any] = {name: path}
            if name == "data_root":
                changes["dataset"] = "VisA"
            if name == "init_from":
                changes |= dict.fromkeys(_BASE)
            if name in ("image", "calibrate", "calibration", "references", "normal", "anomalous"):
                changes["dataset"] = None
            if name == "calibrate":
                changes["output_dir"] = None
            if name in ("calibration", "references"):
                changes["image"] = IMAGE
            if name in ("normal", "anomalous"):
                changes[{"normal": "anomalous", "anomalous": "normal"}[name]] = "images/felt/test/good"
            if name == "data_root" and path in ("", " ", "~nosuchuser/x"):
                changes["dataset"] = "images"  # refused whatever the dataset
            yield case(script, "paths in", "", changes, **stand_in_for(path))


def paths_out(script: str) -> Iterator[Case]:
    """Each bad path at each output of a script, and at its default."""
    for item, _ in typed_fields(script):
        if item.name in OUTPUTS and not (script == COMPARE and item.name == "save_path"):
            for path in BAD_OUTPUTS:
                yield case(script, "paths out", "", {item.name: path}, **stand_in_for(path))
            if script == EXPORT:  # whose file has the wrong ending
                continue
            yield case(
                script,
                "paths out",
                "disk is full",
                {item.name: "case/locked/x"},
                prepare=strange_files,
                stand_in=partial(refusing, errno.ENOSPC, writing_only=True),
            )


def defaults_out() -> Iterator[Case]:
    """Where a script writes unless told otherwise, something else is."""

    def file_at(path: str) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("a file", encoding="utf-8")

    def checkpoint_beside_a_file() -> None:
        shutil.copytree("base", CASE / "base")
        file_at("case/base/results")

    for script, name, path in (
        (TRAIN, "save_path", "ckpt"),
        (TRAIN, "save_path", "ckpt/base"),
        (CROSS, "save_path", "ckpt/cross_attention"),
        (V2, "save_path", "ckpt/feedback"),
        (V1, "save_path", "ckpt"),
        (DRAW, "output_dir", "results"),
        (DRAW, "output_dir", "results/visualize"),
        (PRETRAIN, "output", "ckpt"),
    ):
        yield case(script, "paths out", path, {name: None}, prepare=partial(file_at, path))
    for checkpoint in ("case/base", "case/base/image_adapter.pth"):
        changes = {"output_dir": None, "checkpoint": checkpoint}
        yield case(TEST, "paths out", "results", changes, prepare=checkpoint_beside_a_file)
    changes = {"output_dir": None, "checkpoint": "none", "model_name": "local-dir:clip"}
    yield case(TEST, "paths out", "results", changes, prepare=partial(file_at, "results"))


# Data


def changed_images(change: Callable[[Path], object]) -> Callable[[], None]:
    """Prepares a copy of the images with a change, without the list that is kept of them."""

    def prepare() -> None:
        shutil.copytree("images", CASE / "data", ignore=shutil.ignore_patterns("*.jsonl"))
        change(CASE / "data")

    return prepare


def overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


IMAGE, MASK = "felt/test/spot/000.png", "felt/ground_truth/spot/000_mask.png"
HUGE = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\x7f\xff\xff\xff\x7f\xff\xff\xff\x08\2\0\0\0"


def replaced_by_a_folder(folder: Path) -> None:
    (folder / MASK).unlink()
    (folder / MASK).mkdir()


def replaced_by_a_pipe(folder: Path) -> None:
    (folder / MASK).unlink()
    os.mkfifo(folder / MASK)


def infinite_values(folder: Path) -> None:
    (folder / IMAGE).unlink()
    Image.new("F", (24, 24), float("inf")).save((folder / IMAGE).with_suffix(".tiff"))


DATASETS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "nothing": ("", lambda folder: [shutil.rmtree(path) for path in folder.iterdir()]),
    "no classes": ("", lambda folder: [shutil.rmtree(path / "test") for path in folder.iterdir()]),
    "an empty class": ("", lambda folder: [shutil.rmtree(path) for path in (folder / "felt" / "test").iterdir()]),
    "mask missing": ("000", lambda folder: (folder / MASK).unlink()),
    "masks missing": ("", lambda folder: shutil.rmtree(folder / "felt" / "ground_truth")),
    "mask of another size": ("same size", lambda folder: Image.new("L", (9, 9)).save(folder / MASK)),
    "mask empty file": (MASK, overwrite(MASK, b"")),
    "mask a folder": ("000", replaced_by_a_folder),
    "mask a pipe": ("000", replaced_by_a_pipe),
    "mask not finite": ("", lambda folder: Image.new("F", (24, 24), float("nan")).save(folder / MASK, format="TIFF")),
    "image empty file": (IMAGE, overwrite(IMAGE, b"")),
    "image text": (IMAGE, overwrite(IMAGE, b"this is no image")),
    "image cut off": (IMAGE, lambda folder: overwrite(IMAGE, (folder / IMAGE).read_bytes()[:100])(folder)),
    "image of a huge size": (IMAGE, overwrite(IMAGE, HUGE)),
    "image not finite": ("000.tiff", infinite_values),
}


WITHOUT_MASKS = ("mask missing", "masks missing", "mask a folder", "mask a pipe")


def datasets() -> Iterator[Case]:
    for script in (TRAIN, V2, TEST, COMPARE, DRAW, GRADIENTS):
        for name, (says, change) in DATASETS.items():
            more: dict[str, Any] = {}
            changes = {"dataset": "case/data", **({"batch_size": 16} if script == GRADIENTS else {})}
            if script in (TRAIN, V2):
                more["begins"] = name.startswith(("image", "mask not", "mask of", "mask empty"))
            # What has no image of felt cannot be drawn, and another class of it still can be tested.
            if name == "an empty class" and script != DRAW:
                continue
            # Only training needs masks.
            if name in WITHOUT_MASKS and script not in (TRAIN, V2, GRADIENTS):
                continue
            yield case(script, "datasets", says, changes, prepare=changed_images(change), what=name, **more)
    for changes, says in (
        ({"shot": 9}, "--shot 9"),
        ({"shot": 100_000}, "--shot"),
        ({"dataset": "VisA", "data_root": "images"}, "VisA"),
        ({"dataset": "MVTec"}, "data"),
        ({"dataset": "Brain"}, "data"),
    ):
        for script in (TRAIN, CROSS, V2):
            yield case(script, "datasets", says, changes)
    for fraction in (0.5,):
        prepare = changed_images(lambda folder: [p.unlink() for p in sorted((folder / "felt/test/good").iterdir())[1:]])
        changes = {"dataset": "case/data", "val_fraction": fraction, "training_mode": "full_shot"}
        yield case(V2, "datasets", "--val_fraction", changes, prepare=prepare)


ROWS = [
    {"image_path": f"images/felt/test/good/{name}.png", "label": 0, "class_name": "felt"} for name in ("000", "001")
]
COCO = {
    "images": [{"id": 1, "file_name": "images/felt/test/good/000.png"}],
    "annotations": [{"image_id": 1, "segmentation": [[1, 1, 5, 1, 5, 5]]}],
}
SOURCES: list[tuple[Any, str]] = [
    *(
        ([{**ROWS[0], "image_path": value}], "list.json: image 1: image_path")
        for value in (None, "", 3, [], "nowhere.png", "a\0b", "\ud800", "images/felt", LONG * 20)
    ),
    *(([{**ROWS[0], "label": value}], "list.json: image 1: label") for value in (2, None, [], "perhaps", 0.5)),
    *(([{**ROWS[0], "class_name": value}], "list.json: image 1: class_name") for value in (None, "", 3, [])),
    ([{**ROWS[0], "label": 1, "mask_path": "nowhere.png"}], "list.json: image 1: mask_path"),
    ([{**ROWS[0], "label": 1, "mask_path": 3}], "list.json: image 1: mask_path"),
    ([{**ROWS[0], "class_name": "Test"}], "a class cannot be called test"),
    ([ROWS[0], {**ROWS[0], "label": 1}], "both normal and anomalous"),
    ([ROWS[0], {**ROWS[0], "image_path": "outside/evil.txt"}], "evil.txt"),
    ([], "no images"),
    ([3], "image 1"),
    ("text", "list.json:1"),
    ({}, "list.json"),
    (3, "list.json:1"),
    ({"test": {"felt": 3}}, "must be a list"),
    ({"test": {"felt": [3]}}, "test, felt, image 1"),
    *(({**COCO, key: value}, f"list.json: {key}") for key in COCO for value in (None, 3, "x", [3], [[]], {})),
    ({"images": COCO["images"]}, "annotations"),
    ({**COCO, "images": []}, "annotations[0].image_id"),
    ({**COCO, "images": COCO["images"] * 2}, "same id"),
    *(
        ({**COCO, "images": [{**COCO["images"][0], key: value}]}, "list.json: images[0]")
        for key, value in (("file_name", "nowhere.png"), ("file_name", 3), ("id", [1]), ("width", "x"))
    ),
    ({**COCO, "images": [{**COCO["images"][0], "width": 9, "height": 9}]}, "9 x 9"),
    *(
        ({**COCO, "annotations": [{"image_id": 1, **annotation}]}, "list.json: annotations[0]")
        for annotation in (
            {},
            {"bbox": [1, 2, 3]},
            {"bbox": [1, 2, -3, 4]},
            {"bbox": "x"},
            {"segmentation": "rle"},
            {"segmentation": {"counts": [1], "size": [2, 2]}},
            {"segmentation": [[1, 2]]},
            {"segmentation": [["x"] * 6]},
            {"segmentation": [3, 4]},
            {"bbox": [None] * 4},
        )
    ),
    ({**COCO, "annotations": [{"image_id": 1, "bbox": [900, 900, 3, 3]}]}, "lie outside"),
    ({**COCO, "annotations": [{"image_id": 7, "bbox": [1, 1, 3, 3]}]}, "names no image"),
]


def conversions() -> Iterator[Case]:
    """`python -m dataset.convert`: sources that are nothing, and targets that cannot be written."""
    for arguments, says in (
        ((), "SOURCE"),
        (("images",), "TARGET"),
        (("images", "new", "more"), "more"),
        (("", "new"), "SOURCE"),
        (("images", "new", "--nosuch"), "--nosuch"),
        (("images", "new"), "MVTec's layout already"),
        (("clip", "new"), "expected a folder good"),
        (("nowhere", "new"), "no such file or folder"),
        (("images/felt/test", ""), "TARGET"),
        (("images/felt/test", "new", "--normal", "nowhere"), "no such folder"),
        (("images/felt/test", "new", "--images", "images"), "--images"),
        (("images/felt/test", "new", "--anomalous", "good", "--normal", "good"), "both normal and anomalous"),
        (("case/list.json", "new", "--normal", "good"), "--normal"),
        (("images/felt/test", "new", "--class_name", " "), "--class_name"),
        (("images/felt/test", "new", "--class_name", "test"), "cannot be called test"),
    ):
        yield Case(CONVERT, "conversions", arguments, says, partial((CASE / "list.json").write_text, "[]"))
    for content, says in SOURCES:
        prepare = partial((CASE / "list.json").write_text, json.dumps(content), encoding="utf-8")
        arguments = ("case/list.json", "new", "--images", ".")
        yield Case(CONVERT, "conversions", arguments, says, prepare, what=ascii(content)[:80])
    for content in (b"", b"\xff", b"{", DEEP.encode(), b"9" * 5000, b"\0"):
        prepare = partial((CASE / "list.json").write_bytes, content)
        yield Case(CONVERT, "conversions", ("case/list.json", "new"), "list.json", prepare, what=ascii(content)[:20])
    for path in BAD_OUTPUTS:
        arguments = ("images/felt/test", path, "--class_name", "felt")
        yield Case(CONVERT, "conversions", arguments, "", **stand_in_for(path))
    for path in BAD_INPUTS:
        yield Case(CONVERT, "conversions", (path, "new"), "", **stand_in_for(path))


def image_folders() -> Iterator[Case]:
    """`inference.py --image`: folders in which nothing is an image, and images that are none."""

    def only(make: Callable[[Path], object], name: str = "x.png") -> Callable[[], None]:
        return lambda: make(CASE / name)

    def a_socket(path: Path) -> None:
        socket.socket(socket.AF_UNIX).bind(str(path))

    for name, make in (
        ("nothing", lambda path: None),
        ("a pipe", os.mkfifo),
        ("a socket", a_socket),
        ("a folder", Path.mkdir),
        ("a dangling link", lambda path: path.symlink_to("gone")),
        ("a circle", lambda path: path.symlink_to(path.name)),
        ("text", lambda path: path.write_text("no image", encoding="utf-8")),
        ("empty", Path.touch),
        ("a device", lambda path: path.symlink_to("/dev/zero")),
    ):
        for image in ("case", "case/x.png"):
            if name != "nothing" or image == "case":
                for changes in ({"image": image}, {"calibrate": image, "output_dir": None}):
                    yield case(TEST, "images", "case", {"dataset": None, **changes}, prepare=only(make))
    name = "\udcff.png"
    for image in ("case", f"case/{name}"):
        yield case(TEST, "images", "case", {"dataset": None, "image": image}, prepare=only(Path.touch, name))


ROW = {"image_path": IMAGE, "label": 1, "class_name": "felt", "mask_path": MASK}
TIE = {"schema": 1, "dataset": "images", "layout": "mvtec", "classes": ["bolt", "felt"]}
DEEP = "[" * 100_000
METADATA: list[tuple[bytes, str]] = [
    *(
        (json.dumps({**ROW, key: value}).encode(), f"own.jsonl:1: {key}")
        for key in ("image_path", "class_name", "mask_path")
        for value in (None, "", " ", 3, True, [], {}, 1e300)
    ),
    *(
        (json.dumps({name: value for name, value in ROW.items() if name != key}).encode(), f"own.jsonl:1: {key}")
        for key in ROW
    ),
    *(
        (json.dumps({**ROW, "label": value}).encode(), "own.jsonl:1: label")
        for value in (2, -1, 0.5, None, "maybe", [], {}, 1e300)
    ),
    *(
        (json.dumps({**ROW, key: value}).encode(), f"own.jsonl:1: {key}")
        for key in ("image_path", "mask_path")
        for value in ("../../outside/evil.txt", "/etc/passwd", "a\0b", "..", "\udcff\ud800")
    ),
    *((json.dumps({**ROW, "image_path": value}).encode(), "") for value in ("gone.png", "felt", LONG * 20)),
    *((json.dumps({**ROW, "mask_path": value}).encode(), "") for value in ("gone.png", "felt", IMAGE + "/x")),
    *(
        (json.dumps({**TIE, key: value}).encode() + b"\n" + json.dumps(ROW).encode(), "own.jsonl")
        for key, value in (
            ("schema", 2),
            ("schema", True),
            ("dataset", 3),
            ("dataset", "VisA"),
            ("classes", "felt"),
            ("classes", [3]),
            ("layout", None),
        )
    ),
    (json.dumps({**ROW, "class_name": LONG * 20}).encode(), "class_name"),
    (json.dumps(TIE).encode(), "lists no image"),
    (b"", "lists no image"),
    (b"\n \n", "lists no image"),
    (b"\xff\xfe\x00", "UTF-8"),
    (b"{", "own.jsonl:1"),
    (b"[]", "own.jsonl:1"),
    (b"3", "own.jsonl:1"),
    (b"null", "own.jsonl:1"),
    (b"\x00", "own.jsonl:1"),
    (DEEP.encode(), "nested"),
    (json.dumps(ROW).encode() + b"\n{]", "own.jsonl:2"),
    (b"9" * 5000, "own.jsonl:1"),
    (b'{"image_path": ' + b"9" * 5000 + b"}", "own.jsonl:1"),
]
CLASS_NAMES: list[tuple[bytes, str]] = [
    (b"", "JSON"),
    (b"\xff", "UTF-8"),
    (b"[]", "object"),
    (b'"felt"', "object"),
    (b"{", "JSON"),
    (DEEP.encode(), "nested"),
    (b'{"felt": 3}', "felt"),
    (b'{"felt": ""}', "felt"),
    (b'{"felt": null}', "felt"),
    (b'{"felt": {"a": 1}}', "felt"),
    (b'{"nosuch": "x"}', "nosuch"),
    (json.dumps({"felt": LONG * 20}).encode(), ""),
    (b"null", "object"),
    (b"9" * 5000, ""),
]


def lists() -> Iterator[Case]:
    """Metadata and class names, each at one of the scripts that read them, in turn."""
    readers = cycle([TRAIN, TEST, DRAW, COMPARE, V2, CROSS])
    for flag, file, contents in (
        ("metadata", CASE / "own.jsonl", METADATA),
        ("class_names", CASE / "names.json", CLASS_NAMES),
    ):
        for content, says in contents:
            changes: dict[str, Any] = {flag: file.as_posix()}
            script = next(readers)
            begins = False
            if flag == "metadata" and script in TRAINING:
                changes |= {"shot": 1}
                begins = not says  # the list is sound, and the files that it names are not
            prepare = partial(file.write_bytes, content)
            yield case(script, flag.replace("_", " "), says, changes, prepare=prepare, begins=begins)
    for name in ("\ud800", "a\0b"):
        for script in TRAINING:
            # Which prompts can take, with a question mark, and checkpoints cannot.
            prepare = partial((CASE / "names.json").write_text, json.dumps({"felt": name}), encoding="utf-8")
            yield case(script, "class names", "felt", {"class_names": "case/names.json"}, prepare=prepare)


# Checkpoints

Damage = tuple[tuple[Any, ...], Callable[[Any], Any] | None, str]
KEY = "layer_adapters.0.fc1.weight"


def at(path: tuple[Any, ...], *values: Any, says: str = "") -> list[Damage]:
    """Values that take a place in a file, `...` for nothing; the error must name the place, or what `says` says."""
    says = says or str(next(part for part in reversed(path) if isinstance(part, str)))
    return [
        (path, None if value is ... else value if callable(value) else partial(_given, value), says) for value in values
    ]


def _given(value: Any, _before: Any) -> Any:
    return value


def sparse(value: Tensor) -> Tensor:
    return value.to_sparse()


TENSORS: list[Any] = [
    ...,
    "text",
    None,
    3,
    [1.0],
    sparse,
    Tensor.long,
    lambda value: value.to(torch.complex64),
    lambda value: value.to("meta"),
    lambda value: value * float("nan"),
    lambda value: value / 0,
    Tensor.flatten,
    lambda value: value[:0],
    lambda value: value.bool(),
    lambda value: torch.zeros(1).expand(10**7),
    lambda value: {"inside": value},
    lambda value: value[None],
    lambda value: torch.zeros(3),
]
CONFIG = ("config", "model")
OF_CHECKPOINTS: list[Damage] = [
    *at(("image_adapter",), ..., "text", 3, [], {0: torch.zeros(1)}, {"x": torch.zeros(1)}, nested, {}),
    *at(("image_adapter", KEY), *TENSORS),
    *at(("config",), "text", 3, [], {}),
    *at(("config", "schema"), ..., 99, "1", None, True),
    *at(("config", "dataset"), ..., 3, None, "a\0b"),
    *at(("config", "prompt_names"), ..., {"felt": 3}, [], {3: "felt"}),
    *at(("config", "arguments"), ..., [], {"dataset": 3}, {}, nested),
    *at(("config", "metadata_digest"), ..., 3),
    *at(("config", "seed"), ..., "0", 10**30),
    *at((*CONFIG,), ..., "text", {}),
    *(
        damaged
        for name in (
            "model_name",
            "weights_digest",
            "activation",
            "img_size",
            "levels",
            "text_adapt_until",
            "image_adapt_until",
            "surgery_until_layer",
            "text_adapt_weight",
            "adapter",
            "relu",
            "surgery",
        )
        for damaged in at((*CONFIG, name), ..., None, {"a": 1})
    ),
    *at((*CONFIG, "img_size"), "24", 0, -8, 10**9, 25, 24.0, float("nan"), True),
    *at((*CONFIG, "levels"), "all", [0], [99], [1, "x"], [1.5], says="levels"),
    *at((*CONFIG, "activation"), "relu"),
    *at((*CONFIG, "weights_digest"), "0", says="weights"),
    *at((*CONFIG, "text_adapt_until"), 99, -1, "2", 3, says="text_adapt"),
    *at((*CONFIG, "surgery_until_layer"), 0, 99, "x", says="surgery"),
    *at((*CONFIG, "text_adapt_weight"), 7.0, float("inf"), "0.1"),
    *at((*CONFIG, "nosuch"), says="nosuch"),
]
OF_CHECKPOINTS += [
    *at(("epoch",), -1, "x", float("nan"), 10**30, [1], True),
    *at(("loop",), 0, "x", 1.5),
    *at(("steps",), 3, {"text": "x"}, []),
    *at(("image_optimizer",), "text", 3, [], {"state": {}}),
    *at(("image_optimizer", "param_groups"), ..., {}, [3], [{}]),
    *at(("image_optimizer", "state", 0), [], "x", {"exp_avg": "x"}, says="image_optimizer"),
]
OF_CROSSED: list[Damage] = [
    *at(("image_cross_attn",), ..., "text", {"x": torch.zeros(1)}),
    *at(("config", "cross_attention"), "text", 3, [1], {"nosuch": 1}),
    *at(("config", "cross_attention", "cross_attn_heads"), 3, 0, "8", 10**9, 1.5, says="heads"),
    *at(("config", "cross_attention", "context_norm"), "nonsense", None, 3),
    *at(("config", "cross_attention", "text_context"), "nonsense"),
    *at(("config", "cross_attention", "image_cross_attn_weight"), float("inf"), -1.0, "0.1", 1e300),
]

# What reads a checkpoint, and the flag that names it; a base takes no cross-attention.
READERS = [
    (TEST, "checkpoint"),
    (V2, "init_from"),
    (DRAW, "base_path"),
    (COMPARE, "base_path"),
    (GRADIENTS, "checkpoint"),
]
FILE = CASE / "image_adapter.pth"


def checkpoints() -> Iterator[Case]:
    """Damaged checkpoints, each at one of the scripts that read them, in turn; all ways to be no checkpoint at all."""
    readers = cycle(READERS)
    for path, change, says in OF_CHECKPOINTS:
        prepare = partial(write_damaged, "base/training_state.pth", path, change)
        yield reading(*next(readers), says, prepare, (path, change))
    for name in ("nosuch", "local-dir:nowhere", "../.."):
        path, change, _ = at((*CONFIG, "model_name"), name)[0]
        prepare = partial(write_damaged, "base/training_state.pth", path, change)
        yield reading(TEST, "checkpoint", name, prepare, name)
    crossed = cycle([(TEST, "checkpoint"), (GRADIENTS, "checkpoint"), (DRAW, "cross_path"), (V2, "init_from")])
    for path, change, says in OF_CROSSED:
        prepare = partial(write_damaged, "cross/training_state.pth", path, change)
        yield reading(*next(crossed), says, prepare, (path, change))
    for script, flag in [
        *READERS,
        (DRAW, "cross_path"),
        (COMPARE, "cross_path"),
        (CROSS, "load_base_image_adapter"),
        (CROSS, "load_base_text_adapter"),
    ]:
        for content in (b"", b"no checkpoint", b"PK\3\4 and no more", b"\x80\2.", None):
            prepare = truncated if content is None else partial(FILE.write_bytes, content)
            yield reading(script, flag, "case", prepare)
        for value in ([], {}, 3, torch.zeros(2), {"state_dict": {}}, RunsCode(Path("new"))):
            yield reading(script, flag, "case", partial(torch.save, value, FILE))


def reading(script: str, flag: str, says: str, prepare: Callable[[], object], what: object = "") -> Case:
    changes = {flag: FILE.as_posix(), **(dict.fromkeys(_BASE) if flag == "init_from" else {})}
    if script == DRAW:
        changes = {"base_path": None, **changes}
    return case(script, "checkpoints", says, changes, prepare=prepare, what=ascii(what))


def write_damaged(name: str, path: tuple[Any, ...], change: Callable[[Any], Any] | None, file: Path = FILE) -> None:
    """A kept run's file with a damage; the state of a run holds all that a checkpoint can."""
    torch.save(damage(dict(sound(name)), path, change), file)


def truncated() -> None:
    content = Path("base/image_adapter.pth").read_bytes()
    FILE.write_bytes(content[: len(content) // 2])


def older_files() -> Iterator[Case]:
    """Files without config: sides missing, depths and widths of another model."""

    def write(change: Callable[[dict[str, Any]], object], name: str = "feedback/training_state.pth") -> None:
        content = {key: value for key, value in sound(name).items() if key != "config" and "optimizer" not in key}
        content = {key: dict(value) if isinstance(value, dict) else value for key, value in content.items()}
        change(content)
        torch.save(content, FILE)

    for says, change in (
        ("text", lambda content: content.pop("text_adapter")),
        ("only a text side", lambda content: content.pop("image_adapter")),
        ("", lambda content: content["image_adapter"].pop("det_proj.fc.weight")),
        ("", lambda content: content["image_adapter"].pop("seg_proj.0.fc.weight")),
        ("", lambda content: content["text_adapter"].clear()),
        ("", lambda content: content["image_adapter"].update({"layer_adapters": torch.zeros(2)})),
        ("", lambda content: content["image_adapter"].update({"": torch.zeros(2)})),
        ("", lambda content: content["image_adapter"].update({"seg_proj.x.y.z": torch.zeros(2)})),
        ("", lambda content: content["image_adapter"].update({KEY: torch.zeros(3, 3)})),
        ("", lambda content: content["text_cross_attn"].clear() or content["image_cross_attn"].pop("q_proj.weight")),
        ("scale", lambda content: content["image_cross_attn"].update({"scale": torch.zeros(())})),
    ):
        for script, flag in ((TEST, "checkpoint"), (GRADIENTS, "checkpoint")):
            found = reading(script, flag, says, partial(write, change))
            extra = () if script == DRAW else ("--model_name", "local-dir:clip")
            yield replace(found, arguments=(*found.arguments, *extra), kind="older files")


def folders_of_checkpoints() -> Iterator[Case]:
    """Folders in which no run is, or not the one that is meant, and files given for folders."""
    for script, flag, path, says in (
        (TEST, "checkpoint", "clip", "no checkpoints"),
        (TEST, "checkpoint", "base/nosuch.pth", "image_adapter"),
        (TEST, "checkpoint", "base/text_adapter.pth", "only a text side"),
        (COMPARE, "save_path", "base", "loop"),
        (COMPARE, "save_path", "base/image_adapter.pth", "folder"),
        (COMPARE, "save_path", "nowhere", "no such"),
        (COMPARE, "base_path", "images", "--base_path"),
        (COMPARE, "cross_path", "base", "no cross-attention"),
        (COMPARE, "base_path", "base/nosuch.pth", "--base_path"),
        (DRAW, "cross_path", "base", "no cross-attention"),
        (DRAW, "feedback_path", "base", "loop"),
        (DRAW, "base_path", "clip", "--base_path"),
        (DRAW, "feedback_loop", "1", ""),
        (GRADIENTS, "checkpoint", "base/text_adapter.pth", "only a text side"),
        (CROSS, "load_base_image_adapter", "base/text_adapter.pth", "image_adapter"),
        (CROSS, "load_base_text_adapter", "cross/text_adapter.pth", "not a base"),
        (CROSS, "load_base_image_adapter", "feedback/loop_1_final.pth", "feedback checkpoint"),
        (CROSS, "load_base_text_adapter", "base", "base"),
        (V2, "load_base_text_adapter", "clip/nosuch", "no such"),
    ):
        changes = {"feedback_path": "feedback", flag: 7} if flag == "feedback_loop" else {flag: path}
        yield case(script, "checkpoints", says, changes)


# Runs to go on with

RUNS = {
    "base": (TRAIN, {**_TRAINING, "shot": 4, "text_lr": 1e-3, "image_lr": 1e-3, "text_epoch": 1, "image_epoch": 3}),
    "cross": (
        CROSS,
        {
            **_TRAINING,
            "shot": 4,
            "text_lr": 1e-3,
            "image_lr": 1e-3,
            "text_epoch": 1,
            "image_epoch": 3,
            **_BASE,
            "load_base_image_adapter": "base/image_adapter_1.pth",
        },
    ),
    "feedback": (
        V2,
        {
            **_TRAINING,
            "shot": 4,
            "text_lr": 1e-3,
            "image_lr": 1e-3,
            "num_feedback_loops": 2,
            "text_epochs_per_loop": 1,
            "image_epochs_per_loop": 3,
            **_BASE,
            "load_base_image_adapter": "base/image_adapter_1.pth",
        },
    ),
}
STATE = "training_state.pth"
OF_STATES: list[Damage] = [
    *(
        damaged
        for name in ("signature", "done", "planned", "history", "schedule_step", "loops", "schema")
        for damaged in at((name,), ..., "text", -3, {0: 1}, [[1]])
    ),
    *at(("schema",), 99, "2", None, True, says="version"),
    *at(("done", 0), -1, "1", 1.5, None, True, 10**30, says="done"),
    *at(("planned", 0), ..., "x", says="planned"),
    *at(("history", 0), ..., "x", {}, says="")[1:],
    *at(("history", 0, "stage"), ..., "sound", 3),
    *at(("history", 0, "loss"), ..., "x", None),
    *at(("history", 0, "steps"), ..., -1, "x"),
    *at(("history", 0, "grad_norm/total"), ..., "x"),
    *at(("image_adapter",), ..., {}, "x"),
    *at(("image_adapter", KEY), *TENSORS),
    *at(("text_optimizer",), ..., {}, "x", None),
    *at(("image_optimizer", "param_groups", 0, "lr"), ..., "fast", float("nan")),
    *at(("image_optimizer", "param_groups", 0, "betas"), ..., [0.1], "x"),
    *at(("image_optimizer", "state", 0, "exp_avg"), ..., *TENSORS[4:8], says="image_optimizer"),
    *at(("config",), 3, {}, says="config"),
]


def states() -> Iterator[Case]:
    runs = cycle(["base", "feedback", "cross"])
    for path, change, says in OF_STATES:
        run = next(runs)
        if path[0] == "schema":
            says = "version"
        prepare = partial(copy_run, run, partial(write_damaged, f"{run}/{STATE}", path, change, CASE / "run" / STATE))
        yield going_on(run, says, prepare)
    for content in (b"", b"text", b"PK\3\4", None):
        for run in RUNS:
            yield going_on(run, STATE, partial(copy_run, run, partial(write_state, content)))
    for run in RUNS:
        for value in ([], {}, RunsCode(Path("new"))):
            prepare = partial(torch.save, value, CASE / "run" / STATE)
            yield going_on(run, STATE, partial(copy_run, run, prepare))


def write_state(content: bytes | None) -> None:
    file = CASE / "run" / STATE
    file.write_bytes(file.read_bytes()[:9000] if content is None else content)


def going_on(run: str, says: str, prepare: Callable[[], object], **changes: Any) -> Case:
    script, values = RUNS[run]
    changed = {**values, "save_path": "case/run", **changes}
    return Case(script, "states", words_of(changed), says, prepare)


def copy_run(run: str, change: Callable[[], object]) -> None:
    shutil.copytree(run, CASE / "run")
    change()


def held_by_another() -> None:
    """A lock of a run on another machine."""
    write_lock(CASE / "run" / LOCK_FILE)


def save_paths() -> Iterator[Case]:
    nothing = lambda: None  # noqa: E731
    without_state = lambda: (CASE / "run" / STATE).unlink()  # noqa: E731
    for run, own in RUNS.items():
        script = own[0]
        for says, change, changes in (
            ("being written by another run", held_by_another, {}),
            ("another run", nothing, {"image_lr": 0.5}),
            ("another run", nothing, {"shot": 8}),
            ("another run", nothing, {"seed": 1}),
            (STATE, without_state, {}),
        ):
            found = going_on(run, says, partial(copy_run, run, change), **changes)
            yield replace(found, kind="save paths")
        for other in RUNS:
            if other != run:
                found = going_on(run, "another run", partial(copy_run, other, nothing))
                yield replace(found, kind="save paths", script=script)
    yield replace(going_on("base", "epochs", partial(copy_run, "base", nothing), text_epoch=9), kind="save paths")
    yield replace(going_on("base", "epochs", partial(copy_run, "base", nothing), image_epoch=0), kind="save paths")
    found = going_on("feedback", "epochs", partial(copy_run, "feedback", nothing), image_epochs_per_loop=9)
    yield replace(found, kind="save paths")
    found = going_on("feedback", "longer run", partial(copy_run, "feedback", nothing), num_feedback_loops=1)
    yield replace(found, kind="save paths")


# CLIP

OF_CLIP: list[tuple[tuple[str, ...], Any]] = [
    *(
        (path, value)
        for path in (("model_cfg",), ("model_cfg", "embed_dim"), ("model_cfg", "vision_cfg"), ("model_cfg", "text_cfg"))
        for value in (..., "x", 3.5, [], None)
    ),
    *(
        (("model_cfg", "vision_cfg", key), value)
        for key in ("layers", "width", "head_width", "patch_size", "image_size")
        for value in ("x", 0, -1, 10**30, 1.5, None, [7])
    ),
    *(
        (("model_cfg", "text_cfg", key), value)
        for key in ("layers", "width", "heads", "context_length", "vocab_size")
        for value in ("x", 0, 10**9, None)
    ),
    (("model_cfg", "quick_gelu"), "yes"),
    (("model_cfg", "vision_cfg", "nosuch"), 1),
    (("preprocess_cfg",), [1]),
    (("preprocess_cfg", "mean"), [1, 2]),
    (("preprocess_cfg", "std"), [0, 0, 0]),
    (("preprocess_cfg", "std"), "x"),
    (("preprocess_cfg", "mean"), ["a", "b", "c"]),
]
CLIP = CASE / "clip"


def clips() -> Iterator[Case]:
    readers = cycle([TRAIN, TEST, GRADIENTS, V2])
    for path, value in OF_CLIP:
        yield loading(next(readers), partial(copy_clip, partial(change_config, path, value)), "open_clip_config.json")
    for content in (b"", b"{", b"[]", b"\xff", DEEP.encode(), b"null"):
        prepare = partial(copy_clip, partial((CLIP / "open_clip_config.json").write_bytes, content))
        yield loading(next(readers), prepare, "open_clip_config.json")
    for change in TENSORS[6:8] + TENSORS[9:14] + [..., Tensor.half]:
        if change is Tensor.half:
            continue
        yield loading(next(readers), partial(copy_clip, partial(change_weights, change)), "case/clip")
    weights = CLIP / "open_clip_model.safetensors"
    for content in (b"", b"no weights", b"\xff" * 100, Path.unlink, Path.mkdir):
        prepare = (
            (lambda: (weights.unlink(), weights.mkdir()))
            if content is Path.mkdir
            else (weights.unlink if content is Path.unlink else partial(weights.write_bytes, content))
        )
        yield loading(next(readers), partial(copy_clip, prepare), "case/clip")
    for name, value in (
        ("img_size", 25),
        ("img_size", 8),
        ("img_size", 8191),
        ("levels", ["9"]),
        ("levels", ["1", "1"]),
        ("levels", ["4", "2"]),
        ("text_adapt_until", 9),
        ("image_adapt_until", 99),
        ("surgery_until_layer", 99),
    ):
        yield case(TRAIN, "CLIP", "", {name: value})
    for script in (TEST, COMPARE, GRADIENTS):
        yield case(script, "CLIP", "--img_size", {"img_size": 25})
        yield case(script, "CLIP", "trained on", {"model_name": "toy"})


def loading(script: str, prepare: Callable[[], object], says: str) -> Case:
    changes: dict[str, Any] = {"model_name": f"local-dir:{CLIP.as_posix()}"}
    if script == TEST:
        changes["checkpoint"] = "none"
    if script == GRADIENTS:
        changes["checkpoint"] = None
    if script == V2:
        changes |= dict.fromkeys(_BASE)
    return case(script, "CLIP", says, changes, prepare=prepare)


def copy_clip(change: Callable[[], object]) -> None:
    shutil.copytree("clip", CLIP)
    change()


def change_config(path: tuple[str, ...], value: Any) -> None:
    file = CLIP / "open_clip_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    holder = config
    for key in path[:-1]:
        holder = holder[key]
    if value is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    file.write_text(json.dumps(config), encoding="utf-8")


def change_weights(change: Any) -> None:
    file = CLIP / "open_clip_model.safetensors"
    state, key = load_file(file), "visual.conv1.weight"
    if change is ...:
        del state[key]
    else:
        state[key] = change(state[key]).contiguous()
    save_file(state, file)


# What does not go together


def combinations() -> Iterator[Case]:
    partial_base = {"load_base_image_adapter": None}
    for script, says, changes in (
        (CROSS, "--load_base_image_adapter", partial_base),
        (CROSS, "--load_base_text_adapter", {"load_base_text_adapter": None}),
        (V1, "--load_base_image_adapter", partial_base),
        (V2, "--init_from", {"init_from": "feedback/loop_1_final.pth"}),
        (CROSS, "--freeze_base", {"freeze_base": True, "text_cross_attn_weight": 0}),
        (V2, "--cross_attn_start_loop", {"cross_attn_start_loop": 2}),
        (V2, "text_epochs_per_loop", {"num_feedback_loops": 3, "text_epochs_per_loop": ["1", "1"]}),
        (V2, "image_epochs_per_loop", {"num_feedback_loops": 3, "image_epochs_per_loop": ["1", "1"]}),
        (V2, "--preset v1", {"preset": "v1", "num_feedback_loops": 4, "text_epochs_per_loop": None}),
        (V1, "text_epochs_per_loop", {"preset": "v1_original", "num_feedback_loops": 9, "text_epochs_per_loop": None}),
        (V2, "heads", {"cross_attn_heads": 3}),
        (CROSS, "heads", {"cross_attn_heads": 7}),
        (V2, "cross_attn_residual", {"cross_attn_init": "zero"}),
        (V2, "text_cross_attn_weight", {"text_cross_attn_weight": 1.5}),
        (TEST, "det_score", {"det_score": "nonsense"}),
        (V2, "activation", {"activation": "gelu"}),
        (CROSS, "adapter", {"adapter": "linear"}),
        (CROSS, "relu", {"relu": True}),
        (V2, "levels", {"levels": ["1", "2"]}),
        (V2, "img_size", {"img_size": 32}),
        (V2, "--init_from", {"init_from": "base/text_adapter.pth", **dict.fromkeys(_BASE)}),
        (
            V2,
            "cross_attn_heads",
            {"init_from": "feedback/loop_1_final.pth", "cross_attn_heads": 4, **dict.fromkeys(_BASE)},
        ),
        (TEST, "--dataset", {"image": "images/felt/test/good"}),
        (TEST, "--visualize", {"image": "images/felt/test/good", "dataset": None, "visualize": 3}),
        (
            TEST,
            "--class_name",
            {"image": "images/felt/test/good", "dataset": None, "class_from_folder": True, "class_name": "felt"},
        ),
        (TEST, "--class_from_folder", {"class_from_folder": True}),
        (TEST, "--class_name", {"class_name": "felt"}),
        (TEST, "--domain", {"domain": "medical"}),
        (TEST, "--reference_weight", {"reference_weight": 0.3}),
        (TEST, "--reference_seed", {"reference_seed": 1}),
        (TEST, "--reference_features", {"reference_features": "both"}),
        (COMPARE, "--reference_weight", {"reference_weight": 0.3}),
        (TEST, "--anomalous", {"dataset": None, "normal": "images/felt/test/good"}),
        (TEST, "--normal", {"dataset": None, "anomalous": "images/felt/test/good"}),
        (TEST, "--dataset", {"normal": "images/felt/test/good", "anomalous": "images/felt/test/spot"}),
        (TEST, "share", {"dataset": None, "normal": "images/felt/test", "anomalous": "images/felt/test/spot"}),
        (TRAIN, "--text_epoch", {"image_loss_only": True, "text_epoch": 2}),
        (CROSS, "--text_epoch", {"image_loss_only": True}),
        (V2, "--image_loss_only", {"image_loss_only": True}),
        (TEST, "--visualize", {"visualize": 0}),
        (TEST, "--visualize", {"visualize": "some"}),
        (TEST, "cross_attn", {"image_cross_attn_weight": 1}),
        (TEST, "cross_attn", {"cross_attn_heads": 4}),
        (TEST, "--dataset", {"checkpoint": "none", "dataset": None, "model_name": "local-dir:clip"}),
        (COMPARE, "--dataset", {"dataset": None}),
        (COMPARE, "trained on", {"model_name": "nosuch"}),
        (DRAW, "--dataset", {"list_images": True, "dataset": None}),
        (DRAW, "--image_idx", {"image_idx": ["0", "all"]}),
        (DRAW, "--image_idx", {"image_idx": 4}),
        (DRAW, "--image_idx", {"image_idx": "some"}),
        (DRAW, "at least one", {"base_path": None}),
        (DRAW, "--feedback_loop", {"feedback_path": "feedback", "feedback_loop": 2}),
        (GRADIENTS, "trained on", {"model_name": "toy"}),
        (EXPORT, "trained on", {"model_name": "toy"}),
        (EXPORT, "--output", {"class_name": ["felt", "bolt"]}),
        (EXPORT, ".pt2", {"format": "torch"}),
        (EXPORT, ".onnx", {"output": "new.pt2"}),
        (EXPORT, "--output", {"output": "base"}),
        (EXPORT, "--reference_shots", {"reference_shots": 2}),
        (EXPORT, "--references", {"reference_weight": 0.3}),
        (EXPORT, "class name", {"class_name": "word " * 100}),
        (EXPORT, "hf://", {"checkpoint": "hf://nobody"}),
        (EXPORT, "cannot be had", {"checkpoint": "hf://no/body"}),
        (SHARE, "nothing trained", {"checkpoint": "none"}),
        (SHARE, "no model to share", {"output": "base"}),
        (SHARE, "--push", {"push": "nobody"}),
        (SHARE, "hf://", {"checkpoint": "hf://a/b/c"}),
        *((script, "fp16", {"precision": "fp16"}) for script in (TRAIN, CROSS, V2, V1, TEST, COMPARE)),
        *((script, "wandb", {"tracker": "wandb"}) for script in (TRAIN, CROSS, V2)),
        *(
            (script, "--device", {"device": device})
            for script in (TRAIN, V1, TEST, DRAW, GRADIENTS, PRETRAIN)
            for device in ("cuda", "mps")
        ),
        (PRETRAIN, "--batch_size", {"drawings": 100}),
        *((script, "--recipe", {"recipe": "nosuch"}) for script in (TRAIN, V1)),
    ):
        more = {"stand_in": without_gpu} if says == "--device" else {}
        yield case(script, "combinations", says, changes, **more)


@contextmanager
def without_gpu() -> Iterator[None]:
    with (
        mock.patch("torch.cuda.is_available", return_value=False),
        mock.patch("torch.backends.mps.is_available", return_value=False),
    ):
        yield


def all_cases() -> Iterator[Case]:
    for of_script in (numbers, choices, flags, texts, paths_in, paths_out):
        for script in SCRIPTS:
            yield from of_script(script)
    for cases in (
        run_py,
        no_environment,
        class_names_of_prompts,
        defaults_out,
        datasets,
        image_folders,
        conversions,
        lists,
        checkpoints,
        older_files,
        folders_of_checkpoints,
        states,
        save_paths,
        clips,
        combinations,
    ):
        yield from cases()


CASES: Sequence[Case] = tuple(all_cases())
