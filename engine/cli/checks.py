"""Mistakes that show without a model: said before torch is imported, which takes seconds.

All of it is checked again where it is used. What only a checkpoint can tell, such as where its run's data were, is left
to that.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dataset.class_names import read_class_names
from dataset.folders import find_images
from dataset.locate import known_dataset, locate_dataset
from dataset.metadata import read_list
from dataset.options import NAMES
from dataset.toy.classes import TOY_DATASETS
from engine.config.app import AppArguments
from engine.config.evaluation import (
    NO_CHECKPOINT,
    ComparisonArguments,
    InferenceArguments,
    ReferenceArguments,
    VisualizationArguments,
)
from engine.config.export import ExportArguments, check_export
from engine.config.training import RunConfig
from engine.data.run_location import arguments_in, as_begun
from engine.detector.calibration import FALSE_ALARMS, check_enough, read_calibration
from engine.detector.hub import check_checkpoint
from engine.runtime.run_folder import (
    DEMO_FOLDER,
    STATE_FILE,
    check_same_run,
    check_unused,
    demo_checkpoints,
    find_latest,
    find_loops,
)
from utils.errors import UserError
from utils.files import check_folder
from utils.paths import is_file, is_folder
from utils.processes import env_world_size


def check_training(config: RunConfig) -> None:
    """What a training script can say of its arguments: files, dataset, save path."""
    config.check_processes(env_world_size())
    for name in ("init_from", "load_base_text_adapter", "load_base_image_adapter"):
        check_there(getattr(config, name, None))
    check_folder(config.save_path, "--save_path")
    check_unused(config.save_path, config.resume)
    before = _silent_arguments(config.save_path)
    if before and (config.save_path / STATE_FILE).is_file():
        # A run takes its class names from what it starts from where it is not given any.
        now = as_begun(config, before).signature()
        asked = {name: value for name, value in now.items() if name in before and name != "class_names"}
        check_same_run(config.save_path, before, asked)
    starts_elsewhere = any(getattr(config, name, None) for name in ("init_from", "load_base_image_adapter"))
    check_data(config.dataset, config.data_root, before, starts_elsewhere, config.metadata, config.class_names)


def check_there(file: Path | None) -> None:
    """Refuse a checkpoint that is named and not there."""
    if file is not None and not file.exists():
        raise UserError(f"{file}: no such file")


def check_testing(arguments: InferenceArguments | ComparisonArguments | VisualizationArguments) -> None:
    """What a script that tests or draws can say of its arguments: checkpoints, images, dataset, output."""
    for name in ("image", "calibrate", "references", "normal", "anomalous"):
        path = getattr(arguments, name, None)
        if path is not None and not is_file(path) and not is_folder(path):
            find_images(path, f"--{name}")
    if isinstance(arguments, ReferenceArguments):
        arguments.check_references()
    if isinstance(arguments, InferenceArguments):
        if arguments.checkpoint != NO_CHECKPOINT:
            check_checkpoint(arguments.checkpoint)
    elif isinstance(arguments, ComparisonArguments):
        find_loops(arguments.save_path)
    elif arguments.feedback_path is not None:
        find_loops(arguments.feedback_path)
    for flag in ("base_path", "cross_path"):
        if getattr(arguments, flag, None) is not None:
            find_latest(getattr(arguments, flag), f"--{flag}")
    if arguments.output_dir is not None:
        check_folder(arguments.output_dir, "--output_dir")
    if getattr(arguments, "calibration", None) is not None and arguments.image:
        read_calibration(arguments.calibration)
    if getattr(arguments, "calibrate", None) is not None and not arguments.class_from_folder:
        rate = FALSE_ALARMS if arguments.false_alarms is None else arguments.false_alarms
        found = find_images(arguments.calibrate, "--calibrate")
        check_enough(len(found.images), rate, f"--calibrate {arguments.calibrate}")
    check_data(arguments.dataset, arguments.data_root, {}, True, arguments.metadata, arguments.class_names)


def check_exporting(arguments: ExportArguments) -> None:
    """What `export.py` can say of its arguments: what goes together, checkpoint, thresholds, output, packages."""
    if arguments.output is not None:
        check_folder(arguments.output.parent, "--output")
        if is_folder(arguments.output):
            raise UserError(f"--output {arguments.output}: is a folder, not a file")
    check_export(arguments)
    if arguments.checkpoint != NO_CHECKPOINT:
        check_checkpoint(arguments.checkpoint)
    if arguments.calibration is not None:
        read_calibration(arguments.calibration)
    if arguments.references is not None:
        find_images(arguments.references, "--references")


def check_page(arguments: AppArguments) -> None:
    """What the page can say of its arguments: its library, checkpoints, and where it is to listen."""
    if find_spec("gradio") is None:
        raise UserError("Gradio is not installed: pip install -r requirements-app.txt, or start with python run.py app")
    if arguments.checkpoint is None:
        demo_checkpoints(DEMO_FOLDER)
    for checkpoint in arguments.checkpoint or ():
        if checkpoint != NO_CHECKPOINT:
            check_checkpoint(checkpoint)
    check_address(arguments.host, arguments.port)


def check_address(host: str, port: int) -> None:
    """Refuse a place where nothing can listen, or another program does."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise UserError(f"--host {host}: this machine has no such address; 127.0.0.1 is this machine alone") from None
    with socket.socket(family, kind) as tried:
        if os.name != "nt":
            # A port that was in use a moment ago is free.
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(address)
        except OSError as error:
            raise UserError(
                f"--host {host} --port {port}: cannot listen there ({error.strerror or error}); give another --port"
            ) from None


def check_data(
    dataset: str | None,
    data_root: Path | None,
    run: Mapping[str, Any],
    may_be_remembered: bool,
    metadata: Path | None = None,
    class_names: str | Path | None = None,
) -> None:
    """Whether a dataset is known, and is where it is said to be.

    run: what was asked for before; may_be_remembered: whether a checkpoint may know another data root.
    """
    if dataset is None:
        return
    if metadata is not None:
        read_list(metadata)
    if class_names is not None and class_names not in NAMES:
        read_class_names(Path(class_names))
    remembers = data_root is None and (may_be_remembered or run.get("data_root"))
    spec = known_dataset(dataset)
    # A toy dataset is drawn on first use, which is not now.
    if spec is None or not (remembers or spec.name in TOY_DATASETS):
        with _quiet():
            locate_dataset(dataset, data_root)


def _silent_arguments(folder: Path) -> dict[str, Any]:
    with _quiet():
        return arguments_in(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing is logged: the script itself will say it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
