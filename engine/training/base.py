"""The base method: Stage 1, then Stage 2, on a frozen CLIP (AA-CLIP, CVPR 2025)."""

import logging
from functools import partial

from engine.config.training import BaseConfig, Config
from engine.data.task import TaskData
from engine.runtime.run_folder import side_file
from engine.training.image_loss import ImageLossStage
from engine.training.phases import Phase, loader_factory
from engine.training.run import TrainingRun
from engine.training.schedules import halved_at
from engine.training.setup import RunSetup, open_run, prepare
from engine.training.stage1 import TextStage
from engine.training.stage2 import ImageStage

logger = logging.getLogger(__name__)

IMAGE_MILESTONES = (16000, 32000)


def train_base(config: BaseConfig) -> None:
    """Train text adapters, then image adapters, and write a run's files to `config.save_path`.

    Raises:
        UserError: For arguments that cannot be satisfied.
        NotFiniteError: For a loss or gradient that is not finite.
        Stopped: On a signal.
    """
    train_two_stages(prepare(config, "train.py", text_adapted=config.text_epoch > 0))


def train_two_stages(setup: RunSetup[Config]) -> None:
    """Stage 1, then Stage 2, of a run that is set up."""
    config = setup.config
    with open_run(setup) as run:
        run.run(two_phases(config, run, setup.data))
        logger.info(
            "Complete: %d text and %d image epochs, in %s", config.text_epoch, config.image_epoch, config.save_path
        )


def two_phases(config: BaseConfig, run: TrainingRun, data: TaskData) -> list[Phase]:
    """Stage 1 and Stage 2 as the phases of a run."""
    model, classes = run.model, data.classes
    prompts = data.prompts(model.clip).to(run.accelerator.device)
    loader = loader_factory(config, data, model.clip, run.accelerator)
    text_parts = [name for name in model.components if name.startswith("text")]
    image_parts = [name for name in model.components if name.startswith("image")]

    def image_files(epoch: int) -> list[str]:
        return [side_file("image", epoch), side_file("image")]

    image_stage = ImageLossStage if config.image_loss_only else ImageStage
    return [
        Phase(
            loop=1,
            stage=TextStage.name,
            epochs=config.text_epoch,
            rates={"text": config.text_lr},
            factor=halved_at(()),
            make_stage=partial(TextStage, model, prompts, classes, config),
            loader=loader("geometric", config.text_batch_size, 1),
            files=lambda _: [side_file("text")],
            parts=text_parts,
        ),
        Phase(
            loop=1,
            stage=ImageStage.name,
            epochs=config.image_epoch,
            rates={"image": config.image_lr},
            factor=halved_at(IMAGE_MILESTONES),
            make_stage=partial(image_stage, model, prompts, classes, config),
            loader=loader("full", config.image_batch_size, 2),
            files=image_files,
            parts=[*(text_parts if model.config.text_adapted else []), *image_parts],
        ),
    ]
