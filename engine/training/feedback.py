"""The feedback driver: N loops of Stage 1 and Stage 2 on one persistent model (docs/method.md, "Feedback")."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from engine.config.feedback import TOGETHER, FeedbackConfig, LoopPlan, loop_forward, plan_loops, plan_table
from engine.config.training import LOOP_BATCH
from engine.data.loaders import hold_out
from engine.data.run_location import load_task_of_run
from engine.data.task import TaskData
from engine.detector.detector import Detector
from engine.evaluation.evaluate import METRICS, evaluate, said_of_det_score, summary_table
from engine.runtime.run_folder import CURVES_FILE, FINAL_FILE, loop_file
from engine.training.opening import open_run, prepare
from engine.training.phases import Phase, loaders_of
from engine.training.run import TrainingRun
from engine.training.schedules import Factor, halved_at, warmup_cosine
from engine.training.stage1 import TextStage
from engine.training.stage2 import ImageStage
from engine.training.start import Start, check_something_to_train, read_base, read_whole
from engine.training.turns import BothStage, Turns
from engine.training.verdicts import run_summary
from utils.curves import training_curves
from utils.errors import UserError

logger = logging.getLogger(__name__)

SCRIPT = "train_cross_attention_feedback_v2.py"
# Of a loop's image stage: where `--lr_schedule multistep` halves the rate.
MULTISTEP_AT = (0.5, 0.8)


def train_feedback(config: FeedbackConfig) -> None:
    """Alternate text and image training for all loops, and write a run's files to `config.save_path`.

    Raises `UserError` for whatever the arguments ask for in vain, `NotFiniteError`, and `Stopped` on a signal.
    """
    plan = plan_loops(config)
    opening = prepare(config, SCRIPT, read_start(config))
    config = opening.config
    training, validation = opening.data, None
    if config.val_fraction:
        training, validation = hold_out(training, config.val_fraction, config.seed)
    tested = None
    if config.eval_dataset:
        asked = config.to_dict()
        tested = load_task_of_run(asked, config.eval_dataset, mask_threshold=config.mask_threshold)
    for loop in plan:
        for side in ("text", "image"):
            remedy, forward = f"loop {loop.loop} has no cross-attention there", loop_forward(config, loop.loop)
            check_something_to_train(opening.model, side, config.frozen, 1, remedy, forward)
    logger.info("%d feedback loops, preset %s\n\n%s\n", len(plan), config.preset, plan_table(plan))
    with open_run(opening, {"feedback": True}, partial(loop_forward, config)) as run:
        finisher = LoopFinisher(run, config, validation, tested)
        results = run.run(feedback_phases(config, plan, run, training), finisher)
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


def rate_factor(config: FeedbackConfig, side: str, epochs: int, steps_per_epoch: int) -> Factor:
    """How the rate goes over one stage of one loop (docs/method.md, "Training")."""
    steps = epochs * steps_per_epoch
    if config.lr_schedule == "cosine":
        return warmup_cosine(steps, config.warmup_epochs * steps_per_epoch)
    if config.lr_schedule == "multistep" and side == "image":
        return halved_at([round(share * steps) for share in MULTISTEP_AT])
    return halved_at(())


def feedback_phases(config: FeedbackConfig, plan: list[LoopPlan], run: TrainingRun, data: TaskData) -> list[Phase]:
    """Stage 1 and Stage 2 of every loop as the phases of one run, or as one phase a loop where `order` says so."""
    model, accelerator = run.model, run.accelerator
    stages = {"text": TextStage, "image": ImageStage}
    prompts = data.prompts(model.clip).to(accelerator.device)
    loader = loaders_of(config, data, model.clip, accelerator)

    def phase_of_both(loop: LoopPlan) -> Phase:
        """Both stages in the same epochs: loaders of its own, since each loop spreads its own number of steps."""
        text, image = (
            loader("geometric", config.text_batch_size, stage=1),
            loader("full", config.image_batch_size, stage=2),
        )
        joint = config.order == "joint"
        turns = Turns(text[0], image[0], (text[1], image[1]), loop.text_epochs, loop.image_epochs, joint)
        forward = loop_forward(config, loop.loop)
        return Phase(
            loop.loop,
            BothStage.name,
            loop.image_epochs,
            {"text": loop.text_lr, "image": loop.image_lr},
            rate_factor(config, "image", loop.image_epochs, len(turns)),
            partial(BothStage, model, prompts, data.classes, config, forward, joint),
            turns,
            turns,
            lambda _: [],
            list(model.components),
            max_norm=config.grad_clip or None,
            grows=False,
            fresh_optimizer=config.reset_optimizers and loop.loop > 1,
        )

    if config.order in TOGETHER:
        return [phase_of_both(loop) for loop in plan]
    loaders = {
        "text": loader("geometric", config.text_batch_size, stage=1),
        "image": loader("full", config.image_batch_size, stage=2),
    }

    def phase(loop: LoopPlan, side: str, epochs: int, rate: float) -> Phase:
        forward = loop_forward(config, loop.loop)
        make_stage = partial(stages[side], model, prompts, data.classes, config, forward)
        name, rates = side, {side: rate}
        if side == "image" and config.order == "joint_stages":
            make_stage = partial(BothStage, model, prompts, data.classes, config, forward, True)
            name, rates = BothStage.name, {"text": loop.text_lr, "image": rate}

        def files(epoch: int) -> list[str]:
            return [loop_file(loop.loop, side)] if epoch == epochs else []

        images, sampler = loaders[side]
        factor = rate_factor(config, side, epochs, -(-len(images) // config.accumulate))
        return Phase(
            loop.loop,
            name,
            epochs,
            rates,
            factor,
            make_stage,
            images,
            sampler,
            files,
            list(model.components),
            max_norm=config.grad_clip or None,
            grows=config.lr_schedule == "constant" or (config.lr_schedule == "multistep" and side == "text"),
            fresh_optimizer=config.reset_optimizers and loop.loop > 1,
        )

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
        self, run: TrainingRun, config: FeedbackConfig, validation: TaskData | None, tested: TaskData | None
    ) -> None:
        self.run = run
        self.config = config
        self.model = run.model
        self.evaluated = {"validation": validation, "eval_dataset": tested}

    def files(self, loop: int) -> list[str]:
        """The names of the checkpoint after that loop."""
        return [loop_file(loop), *([FINAL_FILE] if loop == self.config.num_feedback_loops else [])]

    def __call__(self, loop: int) -> dict[str, Any]:
        """Finish loop number `loop`; returns the metrics found, by what they were taken on."""
        if self.run.accelerator.is_main_process:
            training_curves(self.run.history, self.config.save_path / CURVES_FILE)
        found: dict[str, Any] = {}
        for name, data in self.evaluated.items():
            if data is not None:
                forward = loop_forward(self.config, loop)
                detector = Detector(self.model, f"loop {loop}", None, forward, self.config.det_score)
                device = self.run.accelerator.device
                evaluation = evaluate({detector.name: detector}, data, device, LOOP_BATCH, 0, self.config.precision)
                found[name] = {metric: evaluation[detector.name].average(metric)[0] for metric in METRICS}
                what = "held-out training images" if name == "validation" else evaluation[detector.name].dataset
                what += said_of_det_score(detector.det_score)
                logger.info("Loop %d on %s\n\n%s\n", loop, what, summary_table(list(evaluation.values())))
        logger.info(
            "Loop %d of %d is finished: %s",
            loop,
            self.config.num_feedback_loops,
            self.config.save_path / loop_file(loop),
        )
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
