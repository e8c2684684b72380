"""The feedback driver: N loops of Stage 1 and Stage 2 on one persistent model (docs/method.md, "Feedback")."""

from __future__ import annotations

import logging
from typing import Any

import torch

from engine.data import TaskData, hold_out, load_task, training_loader
from engine.detector import Detector
from engine.evaluation.evaluate import METRICS, evaluate, summary_table
from engine.run_folder import CURVES_FILE, FINAL_FILE, STATE_FILE, loop_file
from engine.training.base import BETAS, Setup, describe_run, open_run, set_up
from engine.training.cross_attention import check_something_to_train, frozen_components
from engine.training.feedback_arguments import FeedbackConfig, LoopPlan, plan_loops, plan_table
from engine.training.run import Phase, TrainingRun
from engine.training.schedules import Factor, halved_at, warmup_cosine
from engine.training.stage1 import TextStage
from engine.training.stage2 import ImageStage
from engine.training.start import (
    Start,
    carry_over_moments,
    check_start,
    load_start,
    log_initialisation,
    named_groups,
    read_base,
    read_whole,
)
from engine.training.verdicts import run_summary
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.config import check_cross_attention
from utils.curves import training_curves
from utils.errors import UserError

logger = logging.getLogger(__name__)

SCRIPT = "train_cross_attention_feedback_v2.py"
ADAMW_BETAS = (0.9, 0.999)
# Of a loop's image stage: where `--lr_schedule multistep` halves the rate.
MULTISTEP_AT = (0.5, 0.8)


def train_feedback(config: FeedbackConfig) -> None:
    """Alternate text and image training for all loops, and write a run's files to `config.save_path`.

    Raises `UserError` for whatever the arguments ask for in vain, `NotFiniteError`, and `Stopped` on a signal.
    """
    plan = plan_loops(config)
    start = read_start(config)
    setup = set_up(config, SCRIPT, start.signature())
    check_cross_attention(config.cross_attention(), setup.clip.text_width)
    check_start(start, setup.model_config, config)
    training, validation = setup.data, None
    if config.val_fraction:
        training, validation = hold_out(setup.data, config.val_fraction, config.seed)
    tested = load_task(config.eval_dataset, config.data_root) if config.eval_dataset else None
    model = AdaptedCLIPWithCrossAttention(setup.clip, setup.model_config, **config.cross_attention().to_dict())
    frozen = frozen_components(config)
    for loop in plan:
        enter_loop(model, config, loop)
        for side in ("text", "image"):
            check_something_to_train(model, side, frozen, 1, f"loop {loop.loop} has no cross-attention there")
    enter_loop(model, config, plan[0])
    load_start(model, start)
    open_run(setup, config)
    logger.info("%d feedback loops, preset %s\n\n%s\n", len(plan), config.preset, plan_table(plan))
    log_initialisation(model.components, start)
    model = model.to(setup.accelerator.device)
    optimizers = {side: make_optimizer(model, side, config) for side in ("text", "image")}
    if not config.reset_base_optimizer and not (config.save_path / STATE_FILE).is_file():
        carry_over_moments(optimizers, start)
    described = describe_run(config, setup) | {"feedback": True, "base": start.stories()}

    def describe() -> dict[str, Any]:
        return described | {"cross_attention": model.cross_config.to_dict()}

    run = TrainingRun(
        model, optimizers, setup.accelerator, config.save_path, config.seed, setup.signature, describe, start.steps(),
        feedback=True,
    )  # fmt: skip
    finisher = LoopFinisher(run, plan, config, model, validation, tested)
    results = run.run(feedback_phases(config, plan, model, setup, training, run), finisher)
    logger.info("\nSummary\n\n%s\n", run_summary(run.history, feedback=True))
    if validation is not None:
        say_best_loop(results)
    logger.info("Complete: %d loops, in %s", len(plan), config.save_path)


def read_start(config: FeedbackConfig) -> Start:
    """What the run starts from; `UserError` for both a base and a checkpoint."""
    if config.init_from is None:
        return read_base(config)
    if config.load_base_text_adapter or config.load_base_image_adapter:
        raise UserError("--init_from gives all components: leave --load_base_text_adapter and _image_adapter out")
    return read_whole(config.init_from)


def enter_loop(model: AdaptedCLIPWithCrossAttention, config: FeedbackConfig, loop: LoopPlan) -> None:
    """Let the model be what it is in this loop: from loop 2 on, Stage 1 sees what Stage 2 has learned."""
    later = {"branch": "trained", "projectors": "projectors"}[config.feedback_features]
    model.enter_loop("frozen" if loop.loop == 1 else later, loop.loop >= config.cross_attn_start_loop)


def make_optimizer(model: AdaptedCLIPWithCrossAttention, side: str, config: FeedbackConfig) -> torch.optim.Optimizer:
    """A side's one optimizer for the whole run; its rates come from the schedule of each stage."""
    groups = named_groups(model, side)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=ADAMW_BETAS, weight_decay=config.weight_decay)
    return torch.optim.Adam(groups, betas=BETAS, weight_decay=config.weight_decay)


def rate_factor(config: FeedbackConfig, side: str, epochs: int, steps_per_epoch: int) -> Factor:
    """How the rate goes over one stage of one loop (docs/method.md, "Training")."""
    steps = epochs * steps_per_epoch
    if config.lr_schedule == "cosine":
        return warmup_cosine(steps, config.warmup_epochs * steps_per_epoch)
    if config.lr_schedule == "multistep" and side == "image":
        return halved_at([round(share * steps) for share in MULTISTEP_AT])
    return halved_at(())


def feedback_phases(
    config: FeedbackConfig,
    plan: list[LoopPlan],
    model: AdaptedCLIPWithCrossAttention,
    setup: Setup,
    data: TaskData,
    run: TrainingRun,
) -> list[Phase]:
    """Stage 1 and Stage 2 of every loop as the phases of one run."""
    prompts = data.prompts(setup.clip).to(setup.accelerator.device)
    workers, frozen = config.num_workers, frozen_components(config)
    loaders = {
        "text": training_loader(data, setup.clip, "geometric", config.text_batch_size, 1, config.seed, workers),
        "image": training_loader(data, setup.clip, "full", config.image_batch_size, 2, config.seed, workers),
    }

    def phase(loop: LoopPlan, side: str, epochs: int, rate: float) -> Phase:
        def make_stage() -> TextStage | ImageStage:
            enter_loop(model, config, loop)
            if side == "text":
                return TextStage(model, prompts, data.classes, config.text_norm_weight, config.stage1_levels, frozen)
            return ImageStage(model, model.text_side(prompts), data.classes, frozen)

        def write(epoch: int) -> None:
            if epoch == epochs:
                names = [loop_file(loop.loop, side)]
                run.write_checkpoint(names, list(model.components), [side], loop.loop)

        loader, sampler = loaders[side]
        batches = -(-len(loader) // setup.accelerator.num_processes)
        factor = rate_factor(config, side, epochs, -(-batches // config.accumulate))
        return Phase(
            loop.loop, side, epochs, rate, factor, make_stage, loader, sampler, write,
            max_norm=config.grad_clip or None,
            grows=config.lr_schedule == "constant" or (config.lr_schedule == "multistep" and side == "text"),
            fresh_optimizer=config.reset_optimizers and loop.loop > 1,
        )  # fmt: skip

    return [
        phase(loop, side, epochs, rate)
        for loop in plan
        for side, epochs, rate in (
            ("text", loop.text_epochs, loop.text_lr),
            ("image", loop.image_epochs, loop.image_lr),
        )
    ]


class LoopFinisher:
    """What is done at the end of a loop: its checkpoint, the curves, and evaluations where they are asked for."""

    def __init__(
        self,
        run: TrainingRun,
        plan: list[LoopPlan],
        config: FeedbackConfig,
        model: AdaptedCLIPWithCrossAttention,
        validation: TaskData | None,
        tested: TaskData | None,
    ) -> None:
        self.run = run
        self.plan = plan
        self.config = config
        self.model = model
        self.evaluated = {"validation": validation, "eval_dataset": tested}

    def __call__(self, loop: int) -> dict[str, Any]:
        """Finish loop number `loop`; returns the metrics found, by what they were taken on."""
        enter_loop(self.model, self.config, self.plan[loop - 1])
        names = [loop_file(loop), *([FINAL_FILE] if loop == len(self.plan) else [])]
        self.run.write_checkpoint(names, list(self.model.components), ["text", "image"], loop)
        training_curves(self.run.history, self.config.save_path / CURVES_FILE)
        found: dict[str, Any] = {}
        for name, data in self.evaluated.items():
            if data is not None:
                detector, device = Detector(self.model, f"loop {loop}"), self.run.accelerator.device
                evaluation = evaluate({detector.name: detector}, data, device, 8, 0, self.config.precision)
                found[name] = {metric: evaluation[detector.name].average(metric)[0] for metric in METRICS}
                what = "held-out training images" if name == "validation" else evaluation[detector.name].dataset
                logger.info("Loop %d on %s\n\n%s\n", loop, what, summary_table(list(evaluation.values())))
        logger.info("Loop %d of %d is finished: %s", loop, len(self.plan), self.config.save_path / names[0])
        return found


def say_best_loop(results: list[dict[str, Any]]) -> None:
    """Name the loop that is best on the held-out images, by the mean of pixel and image AUROC."""
    scored = []
    for result in results:
        values = [result.get("validation", {}).get(metric) for metric in ("pixel_auroc", "image_auroc")]
        known = [value for value in values if value is not None]
        if known:
            scored.append((sum(known) / len(known), -result["loop"]))
    if scored:
        best, loop = max(scored)
        logger.info("Best loop by held-out training images: loop %d (mean of pixel and image AUROC %.2f)", -loop, best)
