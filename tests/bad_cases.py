"""The table of `tests/bad_inputs.py`: wrong arguments, and damaged files and folders, for each script.

Cases of arguments follow from the fields that declare them, so that a new option is tested too. Paths are relative to
the scratch folder's `here`.
"""

import builtins
import errno
import io
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, Field, fields, replace
from functools import partial
from itertools import cycle, islice, permutations
from pathlib import Path
from typing import Any, get_type_hints
from unittest import mock

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from dataset.toy.options import PretrainArguments
from engine.cli.checks import OUTPUTS
from engine.cli.share import SharingArguments
from engine.config.evaluation import ComparisonArguments, InferenceArguments, VisualizationArguments
from engine.config.tools import ExportArguments, GradientTest
from engine.config.training import BaseConfig, CrossAttentionRunConfig, FeedbackConfig
from engine.runtime.run_folder import LOCK_FILE
from model.config import ModelConfig
from tests.bad_inputs import CASE, Case
from tests.damage import BASE, COMMON, EPOCHS, LOOPS, damage, nested, sound
from tests.helpers import RunsCode, write_lock
from utils.arguments import Arguments, _value_type

Values = Mapping[str, Any]
Prepare = Callable[[], object]
Damage = tuple[list[Any], Callable[[Any], Any] | None]

TRAIN, CROSS = "train.py", "train_cross_attention.py"
V2, V1 = "train_cross_attention_feedback_v2.py", "train_cross_attention_feedback.py"
TEST, COMPARE, DRAW, EXPORT = "inference.py", "compare_feedback_loops.py", "visualize_comparison.py", "export.py"
GRADIENTS, PRETRAIN, RUN = "test_stage2_gradients.py", "pretrain_toy_clip.py", "run.py"
# As `python -m engine.cli.share` and `python -m dataset.convert`.
SHARE, CONVERT = "engine/cli/share.py", "dataset/convert/__main__.py"

_DATA = {"dataset": "images", "device": "cpu"}
_TRAINING = {**COMMON, "shot": 8, "save_path": "new", "text_epoch": 1, "image_epoch": 1}
_BASE = {"load_base_text_adapter": "base/text_adapter.pth", "load_base_image_adapter": "base/image_adapter.pth"}
_FEEDBACK = {**COMMON, "shot": 8, "save_path": "new", **dict.fromkeys(LOOPS, 1), **_BASE}
_NO_BASE = dict.fromkeys(_BASE)
_MODEL = {"checkpoint": "base/image_adapter.pth"}
_TEST = {**_DATA, "num_workers": 0, "output_dir": "new"}
# The arguments of each script, and a command that it accepts.
SCRIPTS: dict[str, tuple[type[Arguments], Values]] = {
    TRAIN: (BaseConfig, _TRAINING),
    CROSS: (CrossAttentionRunConfig, {**_TRAINING, **_BASE}),
    V2: (FeedbackConfig, _FEEDBACK),
    V1: (FeedbackConfig, _FEEDBACK),
    TEST: (InferenceArguments, {**_TEST, **_MODEL}),
    COMPARE: (ComparisonArguments, {**_TEST, "save_path": "feedback", "base_path": "base"}),
    DRAW: (VisualizationArguments, {**_DATA, "class_name": "felt", "base_path": "base", "output_dir": "new"}),
    GRADIENTS: (GradientTest, {**_DATA, **_MODEL}),
    SHARE: (SharingArguments, {**_MODEL, "output": "new"}),
    EXPORT: (ExportArguments, {**_MODEL, "class_name": "felt", "output": "new.onnx"}),
    PRETRAIN: (PretrainArguments, {"drawings": 256, "epochs": 1, "output": "new"}),
}
# Unfinished runs to resume, as `tests.damage` starts them.
RUNS: dict[str, tuple[str, Values]] = {
    "base": (TRAIN, {**COMMON, **EPOCHS}),
    "cross": (CROSS, {**COMMON, **EPOCHS, **BASE}),
    "feedback": (V2, {**COMMON, **BASE, **LOOPS}),
}


def words_of(values: Values) -> tuple[str, ...]:
    """Arguments as a command line has them: True is a flag alone, None is left out."""
    words: list[str] = []
    for name, value in values.items():
        if value is not None:
            words.append(f"--{name}")
            words += [] if value is True else map(str, value) if isinstance(value, (list, tuple)) else [str(value)]
    return tuple(words)


def case(script: str, kind: str, says: str, changes: Values, prepare: Prepare | None = None, **more: Any) -> Case:
    """A sound command of a script with changes, which come last; `None` leaves an argument out."""
    kept = {name: value for name, value in SCRIPTS[script][1].items() if name not in changes}
    return Case(script, kind, words_of({**kept, **changes}), says, prepare, **more)


def resuming(run: str, says: str, change: Prepare = lambda: None, kind: str = "states", **changes: Any) -> Case:
    """The command of an unfinished run, in a copy of its folder with a change."""
    script, values = RUNS[run]
    prepare = lambda: (shutil.copytree(run, CASE / "run"), change())  # noqa: E731
    return Case(script, kind, words_of({**values, "save_path": "case/run", **changes}), says, prepare)


# Arguments


def options(script: str) -> list[tuple[Field[Any], type]]:
    """The options of a script, with the type of one value."""
    arguments = SCRIPTS[script][0]
    hints = get_type_hints(arguments)
    return [(i, _value_type(hints[i.name])[0]) for i in fields(arguments) if i.name not in arguments.not_options]


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
    "model_name": ["", "nosuch", "local-dir:", "local-dir:nowhere", "local-dir:images", "../..", "\udcff", LONG * 20],
    "mask_threshold": ["", "0", "1.01", "-0.5", "half", "Nonzero", "nan", "inf", "\udcff", LONG * 20],
    "clip_weights": ["nowhere.pt", "images", "base/args.json", "base/history.jsonl", LONG * 20, "\udcff"],
}


def values(script: str) -> Iterator[Case]:
    """Bad values of each number, choice and text."""
    bad = cycle(["inf", "nan", "1e300", "9" * 40, "", "three", "-1e300", "0x10", "1" * 5000, "-inf"])
    for item, kind in options(script):
        if kind in (int, float):
            low, high = item.metadata["between"]
            for value in [*islice(bad, 3), low - 1, high * 2 + 1]:
                yield case(script, "numbers", f"--{item.name}", {item.name: value})
        if item.metadata["choices"]:
            for value in ("nonsense", "", "\udcff"):
                yield case(script, "choices", f"--{item.name}", {item.name: value})
        for value in TEXTS.get(item.name, ()):
            yield case(script, "texts", "", {item.name: value})


def flags(script: str) -> Iterator[Case]:
    """Unknown options, stray words, options without a value, and required ones left out."""
    sound_words, first = words_of(SCRIPTS[script][1]), next(iter(SCRIPTS[script][1]))
    for more in ("--nosuch", "--nosuch=1", "stray", "-x", f"--{first[:-2]}", "\udcff"):
        yield Case(script, "flags", (*sound_words, more), more.encode("utf-8", "backslashreplace").decode())
    for item in islice((item for item, kind in options(script) if kind is not bool), 2):
        yield Case(script, "flags", (*sound_words, f"--{item.name}"), f"--{item.name}")
    for item, _ in options(script):
        if item.default is MISSING:
            yield case(script, "flags", f"--{item.name}", {item.name: None})


@contextmanager
def without_environment() -> Iterator[None]:
    """`run.py` finds no `.venv` and must not create one."""
    error = PermissionError(errno.EACCES, "Permission denied", ".venv")
    with mock.patch.object(Path, "is_file", return_value=False), mock.patch("venv.create", side_effect=error):
        yield


def run_py() -> Iterator[Case]:
    wrong = [
        "nosuch",
        "--nosuch",
        "--nosuch demo",
        "\udcff",
        "demo --torch-index",
        "--torch-index nosuch demo",
        "-x test",
        "demo --shot 3",
    ]
    for words in wrong:
        yield Case(RUN, "flags", tuple(words.split()), "", stand_in=without_environment)
    for command in ("demo", "app", "test", "check"):
        yield Case(RUN, "flags", (command,), ".venv", stand_in=without_environment)


# Paths

BAD_PATHS = ["", " ", "a\0b", "~nosuchuser/x", LONG, f"{LONG}/below", LONG * 20, "\udcff/x"]
BAD_PATHS += ["case/circle", "case/circle/below", "case/file/below", "case/dangling", "case/file", "case/locked/x"]
BAD_INPUTS = [*BAD_PATHS, "nowhere/at/all", "case/empty", "case/folder", "/dev/null"]
BAD_OUTPUTS = [*BAD_PATHS, "/dev/null", "/proc/none/x", "case/pipe"]
GOOD, SPOT = "images/felt/test/good", "images/felt/test/spot"
OF_INPUTS: dict[str, Values] = {
    "data_root": {"dataset": "VisA"},
    "init_from": _NO_BASE,
    "image": {"dataset": None},
    "calibrate": {"dataset": None, "output_dir": None},
    "calibration": {"dataset": None, "image": GOOD},
    "references": {"dataset": None, "image": GOOD},
    "normal": {"dataset": None, "anomalous": SPOT},
    "anomalous": {"dataset": None, "normal": GOOD},
}
OPEN = os.open


def strange_files() -> None:
    """The files and folders that `BAD_INPUTS` and `BAD_OUTPUTS` name."""
    (CASE / "circle").symlink_to("circle")
    (CASE / "dangling").symlink_to("gone")
    (CASE / "file").write_text("neither JSON nor anything else", encoding="utf-8")
    (CASE / "empty").touch()
    (CASE / "folder").mkdir()
    (CASE / "locked").mkdir()
    os.mkfifo(CASE / "pipe")


@contextmanager
def refusing(
    code: int = errno.EACCES, names: Sequence[str] = ("mkdir", "listdir", "scandir", "stat")
) -> Iterator[None]:
    """The system refuses access to all below `case/locked`, which it does not refuse root; `code`: why."""
    with ExitStack() as stack:
        for module, name in [*((os, name) for name in names), (os, "open"), (io, "open"), (builtins, "open")]:
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


def paths(script: str) -> Iterator[Case]:
    """Bad paths at each input of a script, in turn, and at each output."""
    bad = cycle(BAD_INPUTS)
    for item, kind in options(script):
        name = item.name
        if name in OUTPUTS and (script, name) != (COMPARE, "save_path"):
            for path in BAD_OUTPUTS:
                more = {"stand_in": refusing} if "locked" in path else {}
                yield case(script, "paths out", "", {name: path}, strange_files, **more)
            if script != EXPORT:  # whose file has the wrong ending
                full = partial(refusing, errno.ENOSPC, ["mkdir"])
                yield case(script, "paths out", "full", {name: "case/locked/x"}, strange_files, stand_in=full)
        elif (kind is Path or name in ("checkpoint", "class_names")) and script != V1 and not item.metadata["choices"]:
            for path in islice(bad, 7):
                more = {"stand_in": refusing} if "locked" in path else {}
                yield case(script, "paths in", "", {**OF_INPUTS.get(name, {}), name: path}, strange_files, **more)


def default_outputs() -> Iterator[Case]:
    """A file is where a script writes by default."""

    def file_at(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a file", encoding="utf-8")

    unadapted = {"checkpoint": "none", "model_name": "local-dir:clip"}
    for script, path, changes in (
        (TRAIN, "ckpt", {"save_path": None}),
        (V2, "ckpt/feedback", {"save_path": None}),
        (DRAW, "results/visualize", {"output_dir": None}),
        (PRETRAIN, "ckpt", {"output": None}),
        (TEST, "results", {"output_dir": None, **unadapted}),
    ):
        yield case(script, "paths out", path, changes, partial(file_at, Path(path)))


# Images

IMAGE, MASK = "felt/test/spot/000.png", "felt/ground_truth/spot/000_mask.png"
HUGE = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\x7f\xff\xff\xff\x7f\xff\xff\xff\x08\2\0\0\0"
NAN = Image.new("F", (24, 24), float("nan"))
# What is damaged, a word of the error, and the damage to a copy of the images.
DATASETS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "nothing": ("", lambda folder: [shutil.rmtree(path) for path in folder.iterdir()]),
    "no classes": ("", lambda folder: [shutil.rmtree(path / "test") for path in folder.iterdir()]),
    "mask missing": ("000", lambda folder: (folder / MASK).unlink()),
    "masks missing": ("", lambda folder: shutil.rmtree(folder / "felt" / "ground_truth")),
    "bad mask, a folder": ("000", lambda folder: (folder / MASK).unlink() or (folder / MASK).mkdir()),
    "mask a pipe": ("000", lambda folder: (folder / MASK).unlink() or os.mkfifo(folder / MASK)),
    "bad mask, of another size": ("9 x 9", lambda folder: Image.new("L", (9, 9), 255).save(folder / MASK)),
    "bad mask, empty": (MASK, lambda folder: (folder / MASK).write_bytes(b"")),
    "bad mask, not finite": ("", lambda folder: NAN.save(folder / MASK, format="TIFF")),
    "bad image, empty": (IMAGE, lambda folder: (folder / IMAGE).write_bytes(b"")),
    "bad image, text": (IMAGE, lambda folder: (folder / IMAGE).write_bytes(b"this is no image")),
    "bad image, cut off": (IMAGE, lambda folder: os.truncate(folder / IMAGE, 100)),
    "bad image, huge": (IMAGE, lambda folder: (folder / IMAGE).write_bytes(HUGE)),
    "bad image, not finite": ("000", lambda folder: NAN.save(folder / IMAGE, format="TIFF")),
}


def changed_images(change: Callable[[Path], object]) -> Prepare:
    """Prepares a copy of the images with a change, without their saved list."""
    unlisted = shutil.ignore_patterns("*.jsonl")
    return lambda: (shutil.copytree("images", CASE / "data", ignore=unlisted), change(CASE / "data"))


def datasets() -> Iterator[Case]:
    changes = {"dataset": "case/data"}
    for script in (TRAIN, V2, TEST, COMPARE, DRAW, GRADIENTS):
        more = {"batch_size": 16} if script == GRADIENTS else {}
        for name, (says, change) in DATASETS.items():
            if name.startswith("mask") and script not in (TRAIN, V2, GRADIENTS):
                continue  # only training needs masks
            begins = name.startswith("bad") and script in (TRAIN, V2)
            prepare = changed_images(change)
            yield case(script, "datasets", says, {**changes, **more}, prepare, what=name, begins=begins)
    empty = changed_images(lambda folder: [shutil.rmtree(path) for path in (folder / "felt" / "test").iterdir()])
    yield case(DRAW, "datasets", "", changes, empty)
    few = changed_images(lambda folder: [path.unlink() for path in sorted((folder / "felt/test/good").iterdir())[1:]])
    changes |= {"val_fraction": "0.5", "training_mode": "full_shot", "shot": None}
    yield case(V2, "datasets", "--val_fraction", changes, few)


def image_folders() -> Iterator[Case]:
    """`--image` and `--calibrate`: a file that is no image, and a folder with only this file."""
    for make in (
        os.mkfifo,
        lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
        Path.mkdir,
        Path.touch,
        *(partial(lambda target, path: path.symlink_to(target), target) for target in ("gone", "x.png", "/dev/zero")),
        lambda path: path.write_text("no image", encoding="utf-8"),
    ):
        for path in ("case", "case/x.png"):
            for changes in ({"image": path}, {"calibrate": path, "output_dir": None}):
                yield case(TEST, "images", "case", {"dataset": None, **changes}, partial(make, CASE / "x.png"))


# Damaged files


def at(places: str, *values: Any) -> list[Damage]:
    """Values for places in a file, given by their keys and indices, with "," between the last ones.

    `...` removes a value, a function changes it.
    """
    *start, last = places.split()
    changes = [None if v is ... else v if callable(v) else (lambda _, value=v: value) for v in values]
    keys = [[int(key) if key.isdigit() else key for key in (*start, name)] for name in last.split(",")]
    return [(path, change) for path in keys for change in changes]


def place_of(keys: Sequence[Any]) -> str:
    """Words of which an error must contain one: the keys of the place, or the file."""
    return "|".join(["case/", *(key for key in keys if isinstance(key, str))])


DEEP = b"[" * 100_000
NO_JSON = [b"", b"\xff", b"{", b"3", b"null", b"\0", b"9" * 5000, DEEP]
ROW = {"image_path": IMAGE, "label": 1, "class_name": "felt", "mask_path": MASK}
OUTSIDE = ("../../outside/evil.txt", "/etc/passwd", "a\0b", "..", "\udcff\ud800", "gone.png", "felt", LONG * 20)
OF_ROWS = [
    *at("image_path", ..., None, "", " ", 3, [], *OUTSIDE),
    *at("mask_path", ..., None, "", 3, {}, *OUTSIDE, f"{IMAGE}/x"),
    *at("class_name", ..., None, "", " ", True, [], LONG * 20),
    *at("label", ..., 2, -1, 0.5, None, "maybe", [], 1e300),
]
OF_NAMES = at("felt", 3, "", None, {"a": 1}) + at("nosuch", "x")
SOURCE = {"image_path": f"{GOOD}/000.png", "label": 0, "class_name": "felt"}
COCO = {"images": [{"id": 1, "file_name": f"{GOOD}/000.png"}], "annotations": [{"image_id": 1, "bbox": [1, 1, 3, 3]}]}
OF_SOURCES = [
    *at("0 image_path", ..., None, "", 3, [], "nowhere.png", "a\0b", "\ud800", "images/felt", LONG * 20),
    *at("0 label", 2, None, [], "perhaps", 0.5),
    *at("0 class_name", None, "", 3, [], "Test"),
    *at("0", 3, "x", []),
]
OF_COCO = [
    *at("images", None, 3, "x", [3], {}, []),
    *at("annotations", ..., None, 3, "x", [3], [[]], {}),
    *at("images 0 file_name", "nowhere.png", 3),
    *at("images 0 id", [1], 7),
    *at("images 0 width", "x"),
    *at("annotations 0 bbox", ..., [1, 2, 3], [1, 2, -3, 4], "x", [None] * 4, [900, 900, 3, 3]),
    *at("annotations 0 segmentation", "rle", {"counts": [1], "size": [2, 2]}, [["x"] * 6], [3, 4, 5]),
]


def documents(document: Any, damages: Sequence[Damage]) -> Iterator[tuple[bytes, str]]:
    """Damaged JSON, with words of which an error must contain one."""
    yield from ((content, "case/") for content in NO_JSON)
    for keys, change in damages:
        yield json.dumps(damage(document, tuple(keys), change)).encode(), place_of([*keys, "images/", "class"])


def lists() -> Iterator[Case]:
    """Metadata and class names, each read by one of the scripts, in turn; image lists to convert."""
    readers = cycle([TRAIN, TEST, DRAW, COMPARE, V2, CROSS])
    for option, file, document, damages in (
        ("metadata", CASE / "own.jsonl", ROW, OF_ROWS),
        ("class_names", CASE / "names.json", {"felt": "felt"}, OF_NAMES),
    ):
        for content, says in documents(document, damages):
            script = next(readers)
            few = {"shot": 1} if option == "metadata" and "shot" in SCRIPTS[script][1] else {}
            prepare, begins = partial(file.write_bytes, content), "path" in says and bool(few)
            changes = {option: file.as_posix(), **few}
            yield case(script, option, says, changes, prepare, what=ascii(content)[:80], begins=begins)
    words = ("case/list.json", "new", "--images", ".")
    for content, says in [*documents([SOURCE], OF_SOURCES), *documents(COCO, OF_COCO)]:
        prepare = partial((CASE / "list.json").write_bytes, content)
        yield Case(CONVERT, "conversions", words, says, prepare, what=ascii(content)[:80])


def conversions() -> Iterator[Case]:
    for words, says in (
        ("", "SOURCE"),
        ("images", "TARGET"),
        ("images new more", "more"),
        ("images new --nosuch", "--nosuch"),
        ("images new", "layout"),
        ("clip new", "good"),
        (f"{GOOD}/.. new --normal nowhere", "nowhere"),
        (f"{GOOD}/.. new --images images", "--images"),
        (f"{GOOD}/.. new --anomalous good --normal good", "good"),
        (f"{GOOD}/.. new --class_name test", "test"),
    ):
        yield Case(CONVERT, "conversions", tuple(words.split()), says)
    for path in BAD_PATHS:
        more = {"stand_in": refusing} if "locked" in path else {}
        for arguments in (("images/felt/test", path, "--class_name", "felt"), (path, "new")):
            yield Case(CONVERT, "conversions", arguments, "", strange_files, **more)


KEY = "image_adapter layer_adapters.0.fc1.weight"
TENSORS: list[Any] = [..., "text", None, [1.0], Tensor.to_sparse, Tensor.long, Tensor.bool, Tensor.flatten]
TENSORS += [lambda value: value.to(torch.complex64), lambda value: value.to("meta"), lambda value: value[:0]]
TENSORS += [lambda value: value * float("nan"), lambda value: torch.zeros(1).expand(10**7), lambda value: value[None]]
OF_CHECKPOINTS: list[Damage] = [
    *at("image_adapter", ..., "text", 3, [], {0: torch.zeros(1)}, {"x": torch.zeros(1)}, nested, {}),
    *at(KEY, *TENSORS),
    *at("config", "text", 3, [], {}),
    *at("config schema", ..., 99, "1", None, True),
    *at("config dataset", ..., 3, None, "a\0b"),
    *at("config prompt_names", ..., {"felt": 3}, [], {3: "felt"}),
    *at("config arguments", ..., [], {"dataset": 3}, nested),
    *at("config metadata_digest,seed,model", ..., [3]),
    *at(f"config model {','.join(item.name for item in fields(ModelConfig))}", ..., None, {"a": 1}),
    *at("config model img_size", "24", 0, -8, 10**9, 25, 24.0, float("nan"), True),
    *at("config model levels", "all", [0], [99], [1, "x"], [1.5]),
    *at("config model activation", "relu"),
    *at("config model weights_digest", "0"),
    *at("config model text_adapt_until", 99, -1, "2", 3),
    *at("config model surgery_until_layer", 0, 99, "x"),
    *at("config model text_adapt_weight", 7.0, float("inf"), "0.1"),
    *at("config model nosuch", 1),
    *at("epoch", -1, "x", float("nan"), 10**30, [1], True),
    *at("loop", 0, "x", 1.5),
    *at("steps", 3, {"text": "x"}, []),
    *at("image_optimizer", "text", 3, [], {"state": {}}),
    *at("image_optimizer param_groups", ..., {}, [3], [{}]),
    *at("image_optimizer state 0", [], "x", {"exp_avg": "x"}),
]
OF_CROSSED: list[Damage] = [
    *at("image_cross_attn", ..., "text", {"x": torch.zeros(1)}),
    *at("config cross_attention", "text", 3, [1], {"nosuch": 1}),
    *at("config cross_attention cross_attn_heads", 3, 0, "8", 10**9, 1.5),
    *at("config cross_attention context_norm", "nonsense", None, 3),
    *at("config cross_attention text_context", "nonsense"),
    *at("config cross_attention image_cross_attn_weight", float("inf"), -1.0, "0.1", 1e300),
]
# Files without a config.
OF_FOREIGN: list[Damage] = [
    *at("text_adapter", ..., {}),
    *at("image_adapter", ...),
    *at("image_adapter det_proj.fc.weight", ...),
    *at("image_adapter seg_proj.0.fc.weight", ...),
    *at("image_adapter layer_adapters", torch.zeros(2)),
    *at("image_adapter seg_proj.x.y.z", torch.zeros(2)),
    *at(KEY, torch.zeros(3, 3)),
    *at("image_cross_attn q_proj.weight", ...),
    *at("image_cross_attn scale", torch.zeros(())),
]
OF_STATES: list[Damage] = [
    *at("signature,done,planned,history,schedule_step,loops,schema", ..., "text", -3, {0: 1}, [[1]]),
    *at("schema", 99, "2", None, True),
    *at("done 0", -1, "1", 1.5, None, True, 10**30),
    *at("planned 0", ..., "x"),
    *at("history 0", "x", {}),
    *at("history 0 stage,loss,steps,grad_norm/total", ..., "x"),
    *at("image_adapter", ..., {}, "x"),
    *at(KEY, *TENSORS),
    *at("text_optimizer", ..., {}, "x", None),
    *at("image_optimizer param_groups 0 lr", ..., "x", float("nan")),
    *at("image_optimizer state 0 exp_avg", ..., *TENSORS[3:8]),
    *at("config", 3, {}),
]
STATE = "training_state.pth"
FILE, STATE_FILE = CASE / "image_adapter.pth", CASE / "run" / STATE
# The scripts that read a checkpoint, and the option that names it.
READERS = [
    (TEST, "checkpoint"),
    (V2, "init_from"),
    (DRAW, "base_path"),
    (COMPARE, "base_path"),
    (GRADIENTS, "checkpoint"),
]
BASES = [(CROSS, "load_base_image_adapter"), (CROSS, "load_base_text_adapter"), (COMPARE, "cross_path")]
NO_CHECKPOINT = [b"", b"no checkpoint", b"PK\3\4 and no more", b"\x80\2."]
NO_TABLE = [[], {}, 3, torch.zeros(2), {"state_dict": {}}, RunsCode(Path("new"))]


def write_damaged(name: str, damaged: Damage, file: Path = FILE, drop: str = "nothing") -> None:
    """A sound file with a damage, without the keys that contain a word."""
    content = {key: value for key, value in sound(name).items() if not any(word in key for word in drop.split())}
    torch.save(damage(content, tuple(damaged[0]), damaged[1]), file)


def reading(script: str, option: str, says: str, prepare: Prepare, what: object = "", **changes: Any) -> Case:
    changes = {option: FILE.as_posix(), **(_NO_BASE if option == "init_from" else {}), **changes}
    return case(script, "checkpoints", says, changes, prepare, what=ascii(what))


def checkpoints() -> Iterator[Case]:
    """Damaged checkpoints, each read by one of the scripts, in turn; files that are no checkpoint, by each."""
    crossed = [(TEST, "checkpoint"), (GRADIENTS, "checkpoint"), (DRAW, "cross_path"), (V2, "init_from")]
    clip = at("config model model_name", "nosuch", "local-dir:nowhere", "../..")
    tables = (("base", OF_CHECKPOINTS, READERS), ("cross", OF_CROSSED, crossed), ("base", clip, READERS[:1]))
    for name, damages, scripts in tables:
        for damaged, (script, option) in zip(damages, cycle(scripts), strict=False):
            says = place_of([*damaged[0], "weights", "text_adapt", "heads", "nosuch", "nowhere", ".."])
            yield reading(script, option, says, partial(write_damaged, f"{name}/{STATE}", damaged), damaged)
    for damaged in OF_FOREIGN:
        prepare = partial(write_damaged, f"feedback/{STATE}", damaged, drop="config optimizer")
        yield reading(
            TEST, "checkpoint", place_of([*damaged[0], "side"]), prepare, damaged, model_name="local-dir:clip"
        )
    for script, option in READERS + BASES:
        for content in NO_CHECKPOINT:
            yield reading(script, option, "case", partial(FILE.write_bytes, content))
        for value in NO_TABLE:
            yield reading(script, option, "case", partial(torch.save, value, FILE))


def states() -> Iterator[Case]:
    for damaged, run in zip(OF_STATES, cycle(RUNS), strict=False):
        says = place_of([*damaged[0], "version"])
        prepare = partial(write_damaged, f"{run}/{STATE}", damaged, STATE_FILE)
        yield replace(resuming(run, says, prepare), what=ascii(damaged))
    for run in RUNS:
        for content in NO_CHECKPOINT:
            yield resuming(run, STATE, partial(STATE_FILE.write_bytes, content))
        for value in ([], {}, RunsCode(Path("new"))):
            yield resuming(run, STATE, partial(torch.save, value, STATE_FILE))
        yield resuming(run, STATE, partial(os.truncate, STATE_FILE, 9000))


def save_paths() -> Iterator[Case]:
    """Runs that cannot be resumed with this command."""
    for run in RUNS:
        for changes in ({"image_lr": 0.5}, {"shot": 8}, {"seed": 1}):
            yield resuming(run, "another run", kind="save paths", **changes)
        # A lock of another machine.
        yield resuming(run, "another run", partial(write_lock, CASE / "run" / LOCK_FILE), kind="save paths")
        yield resuming(run, STATE, STATE_FILE.unlink, kind="save paths")
    for run, other in permutations(RUNS, 2):
        command = resuming(run, "another run").arguments
        yield replace(resuming(other, "another run", kind="save paths"), script=RUNS[run][0], arguments=command)
    for run, says, changes in (
        ("base", "epochs", {"text_epoch": 9}),
        ("base", "epochs", {"image_epoch": 0}),
        ("feedback", "epochs", {"image_epochs_per_loop": 9}),
        ("feedback", "longer run", {"num_feedback_loops": 1}),
    ):
        yield resuming(run, says, kind="save paths", **changes)


# CLIP

OF_CLIP: list[Damage] = [
    *at("model_cfg", ..., "x", 3.5, [], None),
    *at("model_cfg embed_dim,vision_cfg,text_cfg", ..., "x", 3.5, [], None),
    *at("model_cfg vision_cfg layers,width,head_width,patch_size,image_size", "x", 0, -1, 10**30, 1.5, None, [7]),
    *at("model_cfg text_cfg layers,width,heads,context_length,vocab_size", "x", 0, 10**9, None),
    *at("model_cfg quick_gelu", "yes"),
    *at("model_cfg vision_cfg nosuch", 1),
    *at("preprocess_cfg", [1]),
    *at("preprocess_cfg mean", [1, 2], ["a", "b", "c"]),
    *at("preprocess_cfg std", [0, 0, 0], "x"),
]
CLIP = CASE / "clip"
WEIGHTS, CLIP_CONFIG = CLIP / "open_clip_model.safetensors", CLIP / "open_clip_config.json"
CLIP_READERS: dict[str, Values] = {
    TRAIN: {},
    TEST: {"checkpoint": "none"},
    GRADIENTS: {"checkpoint": None},
    V2: _NO_BASE,
}


def change_config(damaged: Damage) -> None:
    config = json.loads(CLIP_CONFIG.read_text(encoding="utf-8"))
    CLIP_CONFIG.write_text(json.dumps(damage(config, tuple(damaged[0]), damaged[1])), encoding="utf-8")


def change_weights(change: Any) -> None:
    content = load_file(WEIGHTS)
    changed = damage(content, ("visual.conv1.weight",), None if change is ... else change)
    save_file({name: value.contiguous() for name, value in changed.items()}, WEIGHTS)


def clips() -> Iterator[Case]:
    changes: list[Prepare] = [partial(change_config, damaged) for damaged in OF_CLIP]
    changes += [partial(CLIP_CONFIG.write_bytes, content) for content in NO_JSON]
    changes += [partial(change_weights, change) for change in (..., Tensor.long, *TENSORS[7:9], *TENSORS[10:12])]
    changes += [partial(WEIGHTS.write_bytes, content) for content in (b"", b"no weights", b"\xff" * 100)]
    changes += [WEIGHTS.unlink, lambda: WEIGHTS.unlink() or WEIGHTS.mkdir()]
    for change, script in zip(changes, cycle(CLIP_READERS), strict=False):
        prepare = partial(lambda change: (shutil.copytree("clip", CLIP), change()), change)
        options = {"model_name": f"local-dir:{CLIP.as_posix()}", **CLIP_READERS[script]}
        yield case(script, "CLIP", "case/clip", options, prepare)


# What does not go together

_OF_IMAGE = {"dataset": None, "image": GOOD}
COMBINATIONS: list[tuple[str, str, Values]] = [
    *((script, "--shot", {"shot": shot}) for script in (TRAIN, CROSS, V2) for shot in (9, 100_000)),
    *((script, "data", {"dataset": name}) for script in (TRAIN, CROSS, V2) for name in ("MVTec", "Brain")),
    (TRAIN, "VisA", {"dataset": "VisA", "data_root": "images"}),
    *((TRAIN, "", {"img_size": size}) for size in (25, 8, 8191)),
    *((TRAIN, "--levels", {"levels": levels}) for levels in (["9"], ["1", "1"], ["4", "2"])),
    *((TRAIN, name, {name: 99}) for name in ("text_adapt_until", "image_adapt_until", "surgery_until_layer")),
    *((script, "--img_size", {"img_size": 25}) for script in (TEST, COMPARE, GRADIENTS)),
    *((script, "trained on", {"model_name": "toy"}) for script in (TEST, COMPARE, GRADIENTS, EXPORT)),
    *((script, "fp16", {"precision": "fp16"}) for script in (TRAIN, CROSS, V2, V1, TEST, COMPARE)),
    *((script, "wandb", {"tracker": "wandb"}) for script in (TRAIN, CROSS, V2)),
    *((script, "--load_base_image_adapter", {"load_base_image_adapter": None}) for script in (CROSS, V1)),
    (CROSS, "--load_base_text_adapter", {"load_base_text_adapter": None}),
    (CROSS, "image_adapter", {"load_base_image_adapter": "base/text_adapter.pth"}),
    (CROSS, "not a base", {"load_base_text_adapter": "cross/text_adapter.pth"}),
    (CROSS, "feedback checkpoint", {"load_base_image_adapter": "feedback/loop_1_final.pth"}),
    (V2, "--init_from", {"init_from": "feedback/loop_1_final.pth"}),
    (V2, "cross_attn_heads", {"init_from": "feedback/loop_1_final.pth", "cross_attn_heads": 4, **_NO_BASE}),
    (CROSS, "--freeze_base", {"freeze_base": True, "text_cross_attn_weight": 0}),
    (CROSS, "--freeze_base", {"freeze_base": True, **_NO_BASE}),
    (V2, "unknown dataset 'gone'", {"eval_dataset": "gone"}),
    *((script, "--shot", {"training_mode": "full_shot"}) for script in (TRAIN, CROSS, V1)),
    (TRAIN, "--shot", {"recipe": "toy", "model_name": None}),
    (V2, "--warmup_epochs", {"lr_schedule": "constant", "warmup_epochs": 5}),
    (V2, "--warmup_epochs", {"preset": "v3", "warmup_epochs": 5}),
    (V2, "--feedback_features", {"feedback_features": "projectors"}),
    (V2, "--cross_attn_start_loop", {"cross_attn_start_loop": 2}),
    (V2, "text_epochs_per_loop", {"num_feedback_loops": 3, "text_epochs_per_loop": ["1", "1"]}),
    (V2, "text_epochs_per_loop", {"preset": "v1", "num_feedback_loops": 4, "text_epochs_per_loop": None}),
    (V2, "heads", {"cross_attn_heads": 3}),
    (V2, "cross_attn_residual", {"cross_attn_init": "zero"}),
    (V2, "text_cross_attn_weight", {"text_cross_attn_weight": 1.5}),
    (V2, "activation", {"activation": "gelu"}),
    (CROSS, "adapter", {"adapter": "linear"}),
    (CROSS, "relu", {"relu": True}),
    (V2, "levels", {"levels": ["1", "2"]}),
    (TRAIN, "--text_epoch", {"image_loss_only": True, "text_epoch": 2}),
    (TEST, "--dataset", {"image": GOOD}),
    (TEST, "--visualize", {**_OF_IMAGE, "visualize": 3}),
    (TEST, "--class_name", {**_OF_IMAGE, "class_from_folder": True, "class_name": "felt"}),
    *((TEST, "", {**_OF_IMAGE, "class_name": name}) for name in ("", "  ", LONG * 20, "word " * 100)),
    (TEST, "--class_from_folder", {"class_from_folder": True}),
    *((script, "--reference_weight", {"reference_weight": 0.3}) for script in (TEST, COMPARE)),
    (TEST, "--anomalous", {"dataset": None, "normal": GOOD}),
    (TEST, "--dataset", {"normal": GOOD, "anomalous": SPOT}),
    (TEST, "share", {"dataset": None, "normal": "images/felt/test", "anomalous": SPOT}),
    *((TEST, "--visualize", {"visualize": value}) for value in (0, "some")),
    (TEST, "cross_attn", {"image_cross_attn_weight": 1}),
    (TEST, "--dataset", {"checkpoint": "none", "dataset": None, "model_name": "local-dir:clip"}),
    (TEST, "no checkpoints", {"checkpoint": "clip"}),
    *((script, "only a text side", {"checkpoint": "base/text_adapter.pth"}) for script in (TEST, GRADIENTS)),
    (COMPARE, "--dataset", {"dataset": None}),
    (COMPARE, "loop", {"save_path": "base"}),
    *((script, "no cross-attention", {"cross_path": "base"}) for script in (COMPARE, DRAW)),
    (DRAW, "loop", {"feedback_path": "base"}),
    *((DRAW, "", {"feedback_path": "feedback", "feedback_loop": loop}) for loop in (2, 7)),
    *((DRAW, "--class_name", {"class_name": name}) for name in ("", "nosuch", "FELT", "../felt", "\udcff")),
    *((DRAW, "--image_idx", {"image_idx": value}) for value in (["0", "all"], 4, "some")),
    (DRAW, "at least one", {"base_path": None}),
    (DRAW, "--image_idx", {"image_idx": 0, "worst": 2}),
    *((DRAW, f"--{name}", {"list_images": True, name: value}) for name, value in (("worst", 2), ("attention", True))),
    (DRAW, "--feedback_loop", {"feedback_loop": 1}),
    (DRAW, "--attention", {"attention": True}),
    (EXPORT, "--output", {"class_name": ["felt", "bolt"]}),
    (EXPORT, ".pt2", {"format": "torch"}),
    (EXPORT, "--reference_shots", {"reference_shots": 2}),
    (EXPORT, "class name", {"class_name": "word " * 100}),
    (EXPORT, "hf://", {"checkpoint": "hf://nobody"}),
    (SHARE, "nothing trained", {"checkpoint": "none"}),
    (SHARE, "output", {"output": "base"}),
    (SHARE, "--push", {"push": "nobody"}),
    (PRETRAIN, "--batch_size", {"drawings": 100}),
]


@contextmanager
def without_gpu() -> Iterator[None]:
    cuda, mps = "torch.cuda.is_available", "torch.backends.mps.is_available"
    with mock.patch(cuda, return_value=False), mock.patch(mps, return_value=False):
        yield


def combinations() -> Iterator[Case]:
    yield from (case(script, "combinations", says, changes) for script, says, changes in COMBINATIONS)
    for script in (TRAIN, V1, TEST, DRAW, GRADIENTS, PRETRAIN):
        for device in ("cuda", "mps"):
            yield case(script, "combinations", "--device", {"device": device}, stand_in=without_gpu)


OF_SCRIPTS = (values, flags, paths)
OTHERS = (run_py, default_outputs, datasets, image_folders, lists, conversions, checkpoints, states, save_paths, clips)
CASES: Sequence[Case] = (
    *(case for make in OF_SCRIPTS for script in SCRIPTS for case in make(script)),
    *(case for make in (*OTHERS, combinations) for case in make()),
)
