"""The opening that all training scripts share: everything is checked first, then the run's folder is opened."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from dataset.options import NAMES
from engine.config.training import LOOP_BATCH, CrossAttentionArguments, RunConfig
from engine.data.run_location import arguments_in, as_begun, load_task_of_run
from engine.data.task import TaskData, choose_training_images
from engine.runtime.device import check_compiler, make_accelerator
from engine.runtime.run_folder import STATE_FILE
from engine.training.image_loss import check_labels
from engine.training.restart import run_folder
from engine.training.run import TrainingRun
from engine.training.start import Start, carry_over_moments, check_start, load_start, log_initialisation
from engine.training.state import signature_in
from model.adapter import AdaptedCLIP
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.blocks import BlockRunner
from model.checkpoint import SCHEMA, check_config
from model.clip import FrozenCLIP
from model.clip_loading import load_clip
from model.config import SIDES, LoopForward, ModelConfig
from utils.seeding import derive_seed

logger = logging.getLogger(__name__)

ADAM_BETAS, ADAMW_BETAS = (0.5, 0.999), (0.9, 0.999)
LIBRARIES = ("torch", "torchvision", "open_clip_torch", "accelerate", "numpy")


class Opening(NamedTuple):
    """What a training script works with once everything is checked, before anything is written.

    signature: what a restart must agree in; described: the `config` of checkpoints, but for what a loop decides.
    """

    config: RunConfig
    start: Start
    accelerator: Accelerator
    data: TaskData
    model: AdaptedCLIP
    signature: dict[str, Any]
    described: dict[str, Any]


def prepare(config: RunConfig, script: str, start: Start | None = None, text_adapted: bool = True) -> Opening:
    """Find data and CLIP, build the model and load what it starts from; writes nothing to the save path.

    start: None for the base; otherwise the model has cross-attention. text_adapted: whether the text side is trained,
    now or before. Raises `UserError` for whatever the arguments ask for in vain.
    """
    start = start or Start()
    remembered = arguments_in(config.save_path) or start.arguments
    if config.class_names is None and remembered.get("class_names") in NAMES:
        # Its own from now on, so that what it trains is tested by the same kind of names.
        config = replace(config, class_names=remembered["class_names"])
        logger.info("--class_names is that of the training before: %s", config.class_names)
    config = as_begun(config, arguments_in(config.save_path) or signature_in(config.save_path))
    accelerator, precision = make_accelerator(
        config.device, config.precision, config.tf32, config.accumulate, config.tracker, config.save_path
    )
    config = replace(config, precision=precision)
    config.check_processes(accelerator.num_processes)
    with accelerator.main_process_first():  # it writes the metadata, and draws the toy datasets, on first use
        data = load_task_of_run(
            remembered,
            config.dataset,
            config.data_root,
            config.metadata,
            config.class_names,
            config.skip_bad_images,
            config.mask_threshold,
        )
    check_labels(config, data)
    data = choose_training_images(data, config.training_mode, config.shot, config.seed)
    activation = config.activation or start.activation
    if config.compile:
        check_compiler(str(accelerator.device))
    clip = load_clip(config.model_name, config.clip_weights, config.img_size, activation)
    clip.run = BlockRunner(config.checkpoint_blocks, compiled_sizes(config, accelerator.num_processes))
    chosen = resolve_model(config, clip, text_adapted)
    torch.manual_seed(derive_seed(config.seed))
    if isinstance(config, CrossAttentionArguments):
        check_start(start, chosen, config, data.names)
        model = AdaptedCLIPWithCrossAttention(clip, chosen, cross=config.cross_attention())
        load_start(model, start)
    else:
        model = AdaptedCLIP(clip, chosen)
    described = describe_run(config, script, accelerator, data, model)
    check_config(described, "what this run's checkpoints would hold")
    signature = {
        "script": script,
        **config.signature(),
        **chosen.to_dict(),
        "metadata_digest": data.digest,
        "prompt_names": data.names,
        **(start.signature() if isinstance(config, CrossAttentionArguments) else {}),
    }
    del signature["text_adapted"]  # follows from the number of epochs, which is compared as such
    return Opening(config, start, accelerator, data, model, signature, described)


def compiled_sizes(config: RunConfig, processes: int) -> tuple[int, ...]:
    """The batches of images that a process's blocks are compiled for: its shares of a step, and those of testing."""
    if not config.compile:
        return ()
    return config.text_batch_size // processes, config.image_batch_size // processes, LOOP_BATCH


def resolve_model(config: RunConfig, clip: FrozenCLIP, text_adapted: bool = True) -> ModelConfig:
    """The forward that a run asks for, with the depths that were left open filled in from the CLIP model."""
    open_ones = ("levels", "text_adapt_until", "image_adapt_until", "surgery_until_layer")
    closed = ("text_adapt_weight", "image_adapt_weight", "adapter", "relu", "surgery")
    asked = {name: value for name in open_ones if (value := getattr(config, name)) is not None}
    chosen = {name: getattr(config, name) for name in closed}
    return clip.model_config(**chosen, text_adapted=text_adapted, **asked)


def describe_run(
    config: RunConfig, script: str, accelerator: Accelerator, data: TaskData, model: AdaptedCLIP
) -> dict[str, Any]:
    """The `config` of a checkpoint: the forward, the data, the seed, the libraries (docs/training.md, "Files")."""
    return {
        "schema": SCHEMA,
        "script": script,
        "model": model.config.to_dict(),
        "cross_attention": None,
        "dataset": data.located.spec.name,
        "domain": data.located.spec.domain,
        "metadata_digest": data.digest,
        "prompt_names": dict(data.names),
        "training_mode": config.training_mode,
        "shot": config.shot if config.training_mode == "few_shot" else None,
        "seed": config.seed,
        "arguments": config.to_dict(),
        "processes": accelerator.num_processes,
        # In earlier runs, of a process.
        "batch_of": "step",
        "versions": {name: version(name) for name in LIBRARIES},
    }


@contextmanager
def open_run(
    opening: Opening,
    more_described: Mapping[str, Any] | None = None,
    loop_forward: Callable[[int], LoopForward] | None = None,
) -> Iterator[TrainingRun]:
    """Hold the save path, and keep its log, for the run that is made with its optimizers (`run_folder`).

    more_described: more of the `config`; loop_forward: what each loop decides of the forward, for the `config` of its
    checkpoints.
    """
    config = opening.config
    earlier = {**type(config)().signature(), **type(config).of_before()}
    with run_folder(config.save_path, config.resume, opening.signature, earlier, opening.accelerator) as begin_log:
        yield make_run(opening, begin_log, more_described, loop_forward)


def make_run(
    opening: Opening,
    begin_log: Callable[[], None],
    more_described: Mapping[str, Any] | None,
    loop_forward: Callable[[int], LoopForward] | None,
) -> TrainingRun:
    """The run of an opening, with its optimizers; the arguments are those of `open_run` and `TrainingRun`."""
    config, accelerator, model = opening.config, opening.accelerator, opening.model
    log_initialisation(model.components, opening.start, isinstance(config, CrossAttentionArguments))
    model.to(accelerator.device)
    optimizers = {side: make_optimizer(model, side, config) for side in SIDES}
    described = {**opening.described, **(more_described or {})}
    if isinstance(config, CrossAttentionArguments):
        described["base"] = opening.start.stories()
        if not config.reset_base_optimizer and not (config.save_path / STATE_FILE).is_file():
            carry_over_moments(optimizers, opening.start)

    def describe(loop: int) -> dict[str, Any]:
        if not isinstance(model, AdaptedCLIPWithCrossAttention):
            return described
        decided = loop_forward(loop)._asdict() if loop_forward else {}
        return {**described, "cross_attention": {**model.cross_config.to_dict(), **decided}}

    return TrainingRun(
        model,
        optimizers,
        accelerator,
        config.save_path,
        config.seed,
        opening.signature,
        describe,
        begin_log,
        opening.start.steps(),
        feedback=loop_forward is not None,
    )


def make_optimizer(model: AdaptedCLIP, side: str, config: RunConfig) -> torch.optim.Optimizer:
    """A side's one optimizer for the whole run, a group for each component; the schedules set its rates."""
    parts = [part for name, part in model.components.items() if name.startswith(side)]
    groups = [{"params": list(part.named_parameters())} for part in parts]
    rate, decay = getattr(config, f"{side}_lr"), getattr(config, "weight_decay", 0.0)
    if getattr(config, "optimizer", "adam") == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=ADAMW_BETAS, weight_decay=decay)
    return torch.optim.Adam(groups, lr=rate, betas=ADAM_BETAS, weight_decay=decay)
