"""What all training scripts do before training: check everything, build the model, then lock the run's folder."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator

from dataset.prompts import NAMES
from engine.config.training import FROM_BASE, LOOP_BATCH, CrossAttentionArguments, FeedbackConfig, RunConfig
from engine.data.loaders import hold_out
from engine.data.task import TaskData, choose_training_images, load_task
from engine.runtime.device import check_compiler
from engine.runtime.distributed import make_accelerator
from engine.runtime.run_folder import STATE_FILE, arguments_in
from engine.training.image_loss import check_anomalies, check_labels
from engine.training.optimizers import make_optimizer
from engine.training.restart import locked_folder
from engine.training.run import TrainingRun
from engine.training.start import Start, carry_over_moments, check_start, load_start, log_initialisation
from model.adapter import AdaptedCLIP
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.blocks import BlockRunner
from model.checkpoint_schema import SCHEMA, SavedConfig
from model.clip import FrozenCLIP
from model.clip_loading import load_clip
from model.config import SIDES, LoopForward, ModelConfig
from utils.schema import check
from utils.seeding import derive_seed
from utils.version import PROJECT, project_version

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound=RunConfig)

LIBRARIES = ("torch", "torchvision", "open_clip_torch", "accelerate", "numpy", "pillow")


@dataclass(frozen=True)
class RunSetup(Generic[Config]):
    """A checked run before anything is written.

    validation: the images held out to select a loop; signature: what a restart must equal; description: the `config`
    of checkpoints without a loop's choices.
    """

    config: Config
    start: Start
    accelerator: Accelerator
    data: TaskData
    validation: TaskData | None
    model: AdaptedCLIP
    signature: dict[str, Any]
    description: dict[str, Any]


def prepare(config: Config, script: str, start: Start | None = None, text_adapted: bool = True) -> RunSetup[Config]:
    """Check the arguments, load data and CLIP, and build the model; writes nothing to the save path.

    Args:
        config: The script's arguments.
        script: The script's name.
        start: The checkpoints to start from; None for a base, whose model has no cross-attention.
        text_adapted: Whether the text side is trained, now or before.

    Raises:
        UserError: For arguments that cannot be satisfied.
    """
    start = start or Start()
    config, earlier = continue_settings(config, start)
    accelerator, precision = make_accelerator(
        config.device, config.precision, config.tf32, config.tracker, config.save_path
    )
    config = replace(config, precision=precision)
    config.check_processes(accelerator.num_processes)
    with accelerator.main_process_first():  # it writes the metadata, and draws the toy datasets, on first use
        data = load_task(config.dataset, *config.image_choices(), run=earlier)
    check_labels(config, data)
    data = choose_training_images(data, config.training_mode, config.shot, config.seed)
    check_anomalies(config, data)
    validation = None
    if isinstance(config, FeedbackConfig) and config.val_fraction:
        data, validation = hold_out(data, config.val_fraction, config.seed)
    if config.compile:
        check_compiler(str(accelerator.device))
    clip = load_clip(config.model_name, config.clip_weights, config.img_size, config.activation or start.activation)
    clip.run = BlockRunner(config.checkpoint_blocks, compiled_sizes(config, accelerator.num_processes))
    chosen = resolve_model(config, clip, start, text_adapted)
    torch.manual_seed(derive_seed(config.seed))
    model: AdaptedCLIP
    if isinstance(config, CrossAttentionArguments):
        check_start(start, chosen, config, data.names)
        model = AdaptedCLIPWithCrossAttention(clip, chosen, cross=config.cross_attention())
        load_start(model, start)
    else:
        model = AdaptedCLIP(clip, chosen)
    description = describe_run(config, script, accelerator, data, model, start)
    check(description, SavedConfig, "the config of this run's checkpoints")
    signature = {
        "script": script,
        **config.signature(),
        **chosen.to_dict(),
        "metadata_digest": data.digest,
        "prompt_names": data.names,
        **(start.signature() if isinstance(config, CrossAttentionArguments) else {}),
    }
    del signature["text_adapted"]  # follows from the number of epochs, which is compared as such
    return RunSetup(config, start, accelerator, data, validation, model, signature, description)


def continue_settings(config: Config, start: Start) -> tuple[Config, Mapping[str, Any]]:
    """`config` with settings of the run that it resumes or starts from, and that run's arguments."""
    earlier = arguments_in(config.save_path) or start.arguments
    if config.class_names is None and earlier.get("class_names") in NAMES:
        # Stored with this run, so that its checkpoints are tested with names of the same kind.
        config = replace(config, class_names=earlier["class_names"])
        logger.info("--class_names %s: taken from the earlier run", config.class_names)
    return config, earlier


def compiled_sizes(config: RunConfig, processes: int) -> tuple[int, ...]:
    """The batch sizes to compile a process's blocks for: its shares of a step, and those of testing."""
    if not config.compile:
        return ()
    return config.text_batch_size // processes, config.image_batch_size // processes, LOOP_BATCH


def resolve_model(config: RunConfig, clip: FrozenCLIP, start: Start, text_adapted: bool = True) -> ModelConfig:
    """The model's configuration, with unset depths filled in from the CLIP model.

    Choices that a script does not offer as options are those of the checkpoint to start from.
    """
    depths = ("levels", "text_adapt_until", "image_adapt_until", "surgery_until_layer")
    names = ("text_adapt_weight", "image_adapt_weight", "adapter", "relu", "surgery")
    choices = {name: getattr(config, name) for name in (*names, "text_side") if hasattr(config, name)}
    choices |= {name: depth for name in depths if (depth := getattr(config, name)) is not None}
    if (base := start.model_config()) is not None:
        choices |= {name: getattr(base, name) for name in FROM_BASE if name in config.not_options}
    return clip.model_config(**choices, text_adapted=text_adapted)


def describe_run(
    config: RunConfig, script: str, accelerator: Accelerator, data: TaskData, model: AdaptedCLIP, start: Start
) -> dict[str, Any]:
    """The `config` of a checkpoint: model, data, seed, library versions (docs/training.md, "Files")."""
    return {
        "schema": SCHEMA,
        "script": script,
        "model": model.config.to_dict(),
        "cross_attention": None,
        "base": start.origins() if isinstance(config, CrossAttentionArguments) else None,
        "feedback": isinstance(config, FeedbackConfig),
        "dataset": data.located.spec.name,
        "domain": data.located.spec.domain,
        "metadata_digest": data.digest,
        "prompt_names": dict(data.names),
        "training_mode": config.training_mode,
        "shot": config.shot if config.training_mode == "few_shot" else None,
        "seed": config.seed,
        "arguments": config.to_dict(),
        "processes": accelerator.num_processes,
        "versions": {PROJECT: project_version(), **{name: version(name) for name in LIBRARIES}},
    }


@contextmanager
def open_run(setup: RunSetup, loop_forward: Callable[[int], LoopForward] | None = None) -> Iterator[TrainingRun]:
    """Lock the save path and keep its log during the run that is yielded.

    loop_forward: a feedback run's choices for the forward of each loop.
    """
    config, accelerator, model = setup.config, setup.accelerator, setup.model

    def describe(loop: int) -> dict[str, Any]:
        if not isinstance(model, AdaptedCLIPWithCrossAttention):
            return setup.description
        choices = loop_forward(loop)._asdict() if loop_forward else {}
        return {**setup.description, "cross_attention": {**model.cross_config.to_dict(), **choices}}

    with locked_folder(config.save_path, setup.signature, accelerator) as begin_log:
        log_initialisation(model.components, setup.start, isinstance(config, CrossAttentionArguments))
        model.to(accelerator.device)
        optimizers = {side: make_optimizer(model, side, config) for side in SIDES}
        if not (config.save_path / STATE_FILE).is_file():
            carry_over_moments(optimizers, setup.start)
        yield TrainingRun(
            model, optimizers, accelerator, config, setup.signature, describe, begin_log, setup.start.steps()
        )
