"""The base method: Stage 1, then Stage 2, on a frozen CLIP (AA-CLIP; docs/method.md)."""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from engine.data import TaskData, choose_training_images, load_task, training_loader
from engine.device import make_accelerator
from engine.run_folder import LOG_FILE, side_file
from engine.training.arguments import BaseConfig, RunConfig, build_clip, resolve_model
from engine.training.run import Phase, TrainingRun, check_save_path
from engine.training.schedules import halved_at
from engine.training.stage1 import TextStage
from engine.training.stage2 import ImageStage
from model.adapter import AdaptedCLIP
from model.checkpoint import SCHEMA
from model.clip import FrozenCLIP
from model.config import ModelConfig
from utils.logging import set_up_logging
from utils.seeding import derive_seed

logger = logging.getLogger(__name__)

IMAGE_MILESTONES = (16000, 32000)
BETAS = (0.5, 0.999)
LIBRARIES = ("torch", "torchvision", "open_clip_torch", "accelerate", "numpy")


class Setup(NamedTuple):
    """The parts that a training script builds before its model."""

    accelerator: Accelerator
    data: TaskData
    clip: FrozenCLIP
    model_config: ModelConfig
    signature: dict[str, Any]


def train_base(config: BaseConfig) -> None:
    """Train text adapters, then image adapters, and write a run's files to `config.save_path`.

    Raises `UserError` for whatever the arguments ask for in vain, `NotFiniteError`, and `Stopped` on a signal.
    """
    setup = set_up(config, "train.py", text_adapted=config.text_epoch > 0)
    open_run(setup, config)
    model = AdaptedCLIP(setup.clip, setup.model_config).to(setup.accelerator.device)
    for name, part in model.components.items():
        logger.info("%s: %s trainable parameters", name, f"{sum(p.numel() for p in part.parameters()):,}")
    optimizers = {
        side: torch.optim.Adam(model.components[f"{side}_adapter"].named_parameters(), lr=rate, betas=BETAS)
        for side, rate in (("text", config.text_lr), ("image", config.image_lr))
    }
    described = describe_run(config, setup)
    run = TrainingRun(
        model, optimizers, setup.accelerator, config.save_path, config.seed, setup.signature, lambda: described
    )
    run.run(two_phases(config, model, setup.data, run))
    logger.info("Complete: %d text and %d image epochs, in %s", config.text_epoch, config.image_epoch, config.save_path)


def set_up(
    config: RunConfig, script: str, more_signature: dict[str, Any] | None = None, text_adapted: bool = True
) -> Setup:
    """Find data and CLIP, and seed the weights to come; writes nothing to the save path."""
    accelerator = make_accelerator(config.device, config.precision, config.accumulate, config.tracker, config.save_path)
    with accelerator.main_process_first():  # it writes the metadata, and draws the toy datasets, on first use
        data = load_task(config.dataset, config.data_root, config.metadata, config.class_names, config.skip_bad_images)
    data = choose_training_images(data, config.training_mode, config.shot, config.seed)
    clip = build_clip(config)
    model_config = resolve_model(config, clip, text_adapted)
    signature = {
        "script": script,
        **config.signature(),
        **model_config.to_dict(),
        "metadata_digest": data.digest,
        "prompt_names": data.names,
        **(more_signature or {}),
    }
    del signature["text_adapted"]  # follows from the number of epochs, which is compared as such
    torch.manual_seed(derive_seed(config.seed))
    return Setup(accelerator, data, clip, model_config, signature)


def open_run(setup: Setup, config: RunConfig) -> None:
    """Check that the save path may be written, and begin its log.

    Comes after every other check, so that a mistake leaves nothing behind.
    """
    check_save_path(config.save_path, config.resume, setup.signature)
    setup.accelerator.wait_for_everyone()
    if setup.accelerator.is_main_process:
        set_up_logging(config.save_path / LOG_FILE)


def two_phases(
    config: BaseConfig,
    model: AdaptedCLIP,
    data: TaskData,
    run: TrainingRun,
    frozen: tuple[str, ...] = (),
) -> list[Phase]:
    """Stage 1 and Stage 2 as the phases of a run.

    frozen: components that are not trained.
    """
    clip, device = model.clip, run.accelerator.device
    prompts = data.prompts(clip).to(device)
    workers = config.num_workers
    text_loader = training_loader(data, clip, "geometric", config.text_batch_size, 1, config.seed, workers)
    image_loader = training_loader(data, clip, "full", config.image_batch_size, 2, config.seed, workers)

    text_parts = [name for name in model.components if name.startswith("text")]
    image_parts = [name for name in model.components if name.startswith("image")]
    carried = text_parts if model.config.text_adapted else []

    def write_text_side(_: int) -> None:
        run.write_checkpoint([side_file("text")], text_parts, ["text"])

    def write_image_side(epoch: int) -> None:
        names = [side_file("image", epoch), side_file("image")]
        run.write_checkpoint(names, [*carried, *image_parts], ["image"])

    def text_stage() -> TextStage:
        return TextStage(model, prompts, data.classes, config.text_norm_weight, config.stage1_levels, frozen)

    def image_stage() -> ImageStage:
        return ImageStage(model, model.text_side(prompts), data.classes, frozen)

    constant, halved = halved_at(()), halved_at(IMAGE_MILESTONES)
    return [
        Phase(1, "text", config.text_epoch, config.text_lr, constant, text_stage, *text_loader, write_text_side),
        Phase(1, "image", config.image_epoch, config.image_lr, halved, image_stage, *image_loader, write_image_side),
    ]


def describe_run(config: RunConfig, setup: Setup) -> dict[str, Any]:
    """The `config` of a checkpoint: the forward, the data, the seed, the libraries."""
    data = setup.data
    return {
        "schema": SCHEMA,
        "model": setup.model_config.to_dict(),
        "cross_attention": None,
        "dataset": data.located.spec.name,
        "domain": data.located.spec.domain,
        "metadata_digest": data.digest,
        "prompt_names": dict(data.names),
        "training_mode": config.training_mode,
        "shot": config.shot if config.training_mode == "few_shot" else None,
        "seed": config.seed,
        "arguments": config.to_dict(),
        "processes": setup.accelerator.num_processes,
        "versions": {name: version(name) for name in LIBRARIES},
    }
