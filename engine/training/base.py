"""The base method: Stage 1, then Stage 2, on a frozen CLIP (AA-CLIP, CVPR 2025)."""

from __future__ import annotations

import logging
from functools import partial

from engine.config.training import BaseConfig
from engine.data.task import TaskData
from engine.runtime.run_folder import side_file
from engine.training.image_loss import ImageLossStage
from engine.training.opening import open_run, prepare
from engine.training.phases import Phase, loaders_of
from engine.training.run import TrainingRun
from engine.training.schedules import halved_at
from engine.training.stage1 import TextStage
from engine.training.stage2 import ImageStage

logger = logging.getLogger(__name__)

IMAGE_MILESTONES = (16000, 32000)


def train_base(config: BaseConfig) -> None:
    """Train text adapters, then image adapters, and write a run's files to `config.save_path`.

    Raises `UserError` for whatever the arguments ask for in vain, `NotFiniteError`, and `Stopped` on a signal.
    """
    opening = prepare(config, "train.py", text_adapted=config.text_epoch > 0)
    with open_run(opening) as run:
        run.run(two_phases(config, run, opening.data))
        logger.info(
            "Complete: %d text and %d image epochs, in %s", config.text_epoch, config.image_epoch, config.save_path
        )


def two_phases(config: BaseConfig, run: TrainingRun, data: TaskData) -> list[Phase]:
    """Stage 1 and Stage 2 as the phases of a run."""
    model, classes = run.model, data.classes
    prompts = data.prompts(model.clip).to(run.accelerator.device)
    loader = loaders_of(config, data, model.clip, run.accelerator)
    text_parts = [name for name in model.components if name.startswith("text")]
    image_parts = [name for name in model.components if name.startswith("image")]
    carried = text_parts if model.config.text_adapted else []

    def text_files(_: int) -> list[str]:
        return [side_file("text")]

    def image_files(epoch: int) -> list[str]:
        return [side_file("image", epoch), side_file("image")]

    kinds = (TextStage, ImageLossStage if config.image_loss_only else ImageStage)
    text_stage, image_stage = (partial(stage, model, prompts, classes, config) for stage in kinds)
    return [
        Phase(
            1,
            "text",
            config.text_epoch,
            config.text_lr,
            halved_at(()),
            text_stage,
            *loader("geometric", config.text_batch_size, stage=1),
            text_files,
            text_parts,
        ),
        Phase(
            1,
            "image",
            config.image_epoch,
            config.image_lr,
            halved_at(IMAGE_MILESTONES),
            image_stage,
            *loader("full", config.image_batch_size, stage=2),
            image_files,
            [*carried, *image_parts],
        ),
    ]
