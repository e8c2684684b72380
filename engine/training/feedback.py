"""Feedback training: N loops of Stage 1 and Stage 2 on one model (docs/method.md, "Feedback")."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from engine.config.training import LOOP_BATCH, FeedbackConfig
from engine.data.task import TaskData, load_task
from engine.detector.detector import Detector
from engine.evaluation.evaluate import evaluate
from engine.evaluation.results import METRICS, summary_table
from engine.runtime.run_folder import CURVES_FILE, FINAL_FILE, loop_file
from engine.training.phases import Phase, loader_factory
from engine.training.plan import LoopPlan, loop_forward, plan_loops, plan_table
from engine.training.run import TrainingRun
from engine.training.schedules import Factor, halved_at, warmup_cosine
from engine.training.setup import open_run, prepare
from engine.training.stage1 import TextStage
from engine.training.stage2 import ImageStage, JointStage
from engine.training.stages import Stage
from engine.training.start import Start, read_base, read_whole
from engine.training.verdicts import run_summary, validated_loop
from model.text import Prompts
from utils.curves import training_curves
from utils.errors import UserError

logger = logging.getLogger(__name__)

SCRIPT = "train_cross_attention_feedback_v2.py"
# Shares of a loop's image stage after which `--lr_schedule multistep` halves the rate.
MULTISTEP_AT = (0.5, 0.8)


def train_feedback(config: FeedbackConfig) -> None:
    """Alternate text and image training for all loops, and write a run's files to `config.save_path`.

    Raises:
        UserError: For arguments that cannot be satisfied.
        NotFiniteError: For a loss or gradient that is not finite.
        Stopped: On a signal.
    """
    plan = plan_loops(config)
    setup = prepare(config, SCRIPT, read_start(config))
    config = setup.config
    tested = None
    if config.eval_dataset:
        tested = load_task(config.eval_dataset, mask_threshold=config.mask_threshold, run=config.to_dict())
    logger.info("%d feedback loops, preset %s\n\n%s\n", len(plan), config.preset, plan_table(plan))
    with open_run(setup, partial(loop_forward, config)) as run:
        finisher = LoopFinisher(run, config, {"validation": setup.validation, "eval_dataset": tested})
        results = run.run(feedback_phases(config, plan, run, setup.data), finisher)
        logger.info("\nSummary\n\n%s\n", run_summary(run.history, feedback=True))
        if (selected := validated_loop(results)) is not None:
            logger.info("Best loop by held-out training images: loop %d (mean of pixel and image AUROC)", selected)
        logger.info("Complete: %d loops, in %s", len(plan), config.save_path)


def read_start(config: FeedbackConfig) -> Start:
    """The checkpoints to start from; `UserError` for both a base and a checkpoint."""
    if config.init_from is None:
        return read_base(config)
    if config.load_base_text_adapter or config.load_base_image_adapter:
        raise UserError("--init_from gives all components: leave --load_base_text_adapter and _image_adapter out")
    return read_whole(config.init_from)


def rate_factor(config: FeedbackConfig, side: str, epochs: int, steps_per_epoch: int) -> Factor:
    """The factor of the learning rate over one stage of one loop (docs/method.md, "Training")."""
    steps = epochs * steps_per_epoch
    if config.lr_schedule == "cosine":
        return warmup_cosine(steps, config.warmup_epochs * steps_per_epoch)
    if config.lr_schedule == "multistep" and side == "image":
        return halved_at([round(share * steps) for share in MULTISTEP_AT])
    return halved_at(())


def feedback_phases(config: FeedbackConfig, plan: Sequence[LoopPlan], run: TrainingRun, data: TaskData) -> list[Phase]:
    """Stage 1 and Stage 2 of every loop as the phases of one run."""
    prompts = data.prompts(run.model.clip).to(run.accelerator.device)
    make_loader = loader_factory(config, data, run.model.clip, run.accelerator)
    loaders = {
        "text": make_loader("geometric", config.text_batch_size, 1),
        "image": make_loader("full", config.image_batch_size, 2),
    }
    image_stage = JointStage if config.order == "joint" else ImageStage
    return [
        loop_phase(config, loop, side, stage, run, (prompts, data.classes), loaders[side])
        for loop in plan
        for side, stage in (("text", TextStage), ("image", image_stage))
    ]


def loop_phase(
    config: FeedbackConfig,
    loop: LoopPlan,
    side: str,
    stage: type[Stage],
    run: TrainingRun,
    prompts: tuple[Prompts, Sequence[str]],
    loader: DataLoader,
) -> Phase:
    """The phase of a loop's text or image stage; prompts: with their classes."""
    epochs = loop.epochs[side]
    steps_per_epoch = -(-len(loader) // config.accumulate)
    final = [FINAL_FILE] if loop.loop == config.num_feedback_loops else []

    def files(epoch: int) -> list[str]:
        return [loop_file(loop.loop, side)] if epoch == epochs else []

    return Phase(
        loop=loop.loop,
        stage=stage.name,
        epochs=epochs,
        rates=loop.rates if stage is JointStage else {side: loop.rates[side]},
        factor=rate_factor(config, side, epochs, steps_per_epoch),
        make_stage=partial(stage, run.model, *prompts, config, loop_forward(config, loop.loop)),
        loader=loader,
        files=files,
        parts=list(run.model.components),
        loop_files=[] if side == "text" else [loop_file(loop.loop), *final],
        max_norm=config.grad_clip or None,
        can_grow=config.lr_schedule == "constant" or (config.lr_schedule == "multistep" and side == "text"),
        reset_optimizers=config.reset_optimizers and loop.loop > 1,
    )


class LoopFinisher:
    """The end of a loop: the curves, and the requested evaluations.

    evaluated: the data to evaluate on by the result's name, None for those not requested.
    """

    def __init__(self, run: TrainingRun, config: FeedbackConfig, evaluated: dict[str, TaskData | None]) -> None:
        self.run = run
        self.config = config
        self.model = run.model
        self.evaluated = {name: data for name, data in evaluated.items() if data is not None}

    def __call__(self, loop: int) -> dict[str, Any]:
        """Finish a loop; returns the metrics by the name of the data."""
        if self.run.accelerator.is_main_process:
            training_curves(self.run.history, self.config.save_path / CURVES_FILE)
        results: dict[str, Any] = {}
        for name, data in self.evaluated.items():
            forward = loop_forward(self.config, loop)
            detector = Detector(self.model, f"loop {loop}", None, forward)
            device = self.run.accelerator.device
            evaluation = evaluate({detector.name: detector}, data, device, LOOP_BATCH, 0, self.config.precision)
            results[name] = {metric: evaluation[detector.name].average(metric)[0] for metric in METRICS}
            title = "held-out training images" if name == "validation" else evaluation[detector.name].dataset
            logger.info("Loop %d on %s\n\n%s\n", loop, title, summary_table(list(evaluation.values())))
        logger.info(
            "Loop %d of %d complete: %s", loop, self.config.num_feedback_loops, self.config.save_path / loop_file(loop)
        )
        return results
