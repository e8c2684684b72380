"""The base method: Stage 1, then Stage 2, on a frozen CLIP (AA-CLIP; DESIGN 1, 5)."""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Any

import torch

from engine.config import BaseConfig, build_clip, resolve_model
from engine.data import TaskData, choose_training_images, load_task, training_loader
from engine.run import (
    Phase,
    TrainingRun,
    check_save_path,
    constant_then_halved,
    describe_initialisation,
    make_accelerator,
    write_arguments,
)
from engine.stage1 import TextStage
from engine.stage2 import ImageStage
from model.adapter import AdaptedCLIP
from model.checkpoint import SCHEMA, save, state_of
from model.config import ModelConfig
from utils.logging import set_up_logging
from utils.seeding import derive_seed

logger = logging.getLogger(__name__)

IMAGE_MILESTONES = (16000, 32000)
BETAS = (0.5, 0.999)
LIBRARIES = ("torch", "torchvision", "open_clip_torch", "accelerate", "numpy")


def train_base(config: BaseConfig) -> None:
    """Train text adapters, then image adapters, and write the files of DESIGN 6 to `config.save_path`.

    Raises `UserError` for whatever the arguments ask for in vain, `NotFiniteError`, and `Stopped` on a signal.
    """
    accelerator = make_accelerator(config.device, config.precision, config.accumulate, config.tracker, config.save_path)
    with accelerator.main_process_first():  # it writes the metadata, and draws the toy datasets, on first use
        data = load_task(config.dataset, config.data_root, config.metadata, config.class_names, config.skip_bad_images)
    data = choose_training_images(data, config.training_mode, config.shot, config.seed)
    clip = build_clip(config)
    model_config = resolve_model(config, clip)
    signature = {
        "script": "train.py", **config.signature(), **model_config.to_dict(),
        "metadata_digest": data.digest, "prompt_names": data.names,
    }  # fmt: skip
    del signature["text_adapted"]  # follows from the number of epochs, which is compared as such
    check_save_path(config.save_path, config.resume, signature)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        set_up_logging(config.save_path / "train.log")
        write_arguments(config.save_path, config.to_dict())
    torch.manual_seed(derive_seed(config.seed))
    model = AdaptedCLIP(clip, model_config).to(accelerator.device)
    describe_initialisation(model.components)
    optimizers = {
        "text": torch.optim.Adam(model.text_adapter.named_parameters(), lr=config.text_lr, betas=BETAS),
        "image": torch.optim.Adam(model.image_adapter.named_parameters(), lr=config.image_lr, betas=BETAS),
    }
    run = TrainingRun(model, optimizers, accelerator, config.save_path, config.seed, signature)
    phases = base_phases(config, model, data, run)
    run.run(phases)
    logger.info("Complete: %d text and %d image epochs, in %s", config.text_epoch, config.image_epoch, config.save_path)


def base_phases(config: BaseConfig, model: AdaptedCLIP, data: TaskData, run: TrainingRun) -> list[Phase]:
    """Stage 1 and Stage 2 as the phases of a run."""
    clip, device = model.clip, run.accelerator.device
    prompts = data.prompts(clip).to(device)
    text_loader, text_sampler = training_loader(
        data, clip, "geometric", config.text_batch_size, 1, config.seed, config.num_workers
    )
    image_loader, image_sampler = training_loader(
        data, clip, "full", config.image_batch_size, 2, config.seed, config.num_workers
    )
    described = describe_run(config, model.config, data)

    def write_text_side(epoch: int) -> None:
        checkpoint = {
            "text_adapter": state_of(model.text_adapter),
            "text_optimizer": run.optimizer_state("text"),
            "epoch": epoch,
            "config": described,
        }
        save(checkpoint, config.save_path / "text_adapter.pth")

    def write_image_side(epoch: int) -> None:
        checkpoint: dict[str, Any] = {
            "image_adapter": state_of(model.image_adapter),
            "image_optimizer": run.optimizer_state("image"),
            "epoch": epoch,
            "config": described,
        }
        if model.config.text_adapted:
            checkpoint["text_adapter"] = state_of(model.text_adapter)
        save(checkpoint, config.save_path / f"image_adapter_{epoch}.pth")
        save(checkpoint, config.save_path / "image_adapter.pth")

    text = Phase(
        1, "text", config.text_epoch,
        lambda: TextStage(model, prompts, data.classes, config.text_norm_weight, config.stage1_levels),
        constant_then_halved(()), text_loader, text_sampler, write_text_side,
    )  # fmt: skip
    image = Phase(
        1, "image", config.image_epoch,
        lambda: ImageStage(model, model.text_side(prompts), data.classes),
        constant_then_halved(IMAGE_MILESTONES), image_loader, image_sampler, write_image_side,
    )  # fmt: skip
    return [text, image]


def describe_run(config: BaseConfig, model_config: ModelConfig, data: TaskData) -> dict[str, Any]:
    """The `config` of a checkpoint: the forward, the data, the seed, the libraries (DESIGN 6)."""
    return {
        "schema": SCHEMA,
        "model": model_config.to_dict(),
        "dataset": data.located.spec.name,
        "domain": data.located.spec.domain,
        "metadata_digest": data.digest,
        "prompt_names": dict(data.names),
        "training_mode": config.training_mode,
        "shot": config.shot if config.training_mode == "few_shot" else None,
        "text_epochs": config.text_epoch,
        "seed": config.seed,
        "cross_attention": False,
        "arguments": config.to_dict(),
        "versions": {name: version(name) for name in LIBRARIES},
    }
