"""Trainings and tests of tiny models that several processes share: `accelerate launch -m tests.launched FOLDER OUTPUT`.

Called in one process, `run_all` does the same, which the figures of several must equal.
"""

import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

import engine.training.trainer as trainer
from engine.config.training import BaseConfig, CrossAttentionRunConfig, FeedbackConfig
from engine.training.base import train_base
from engine.training.cross_attention import train_cross_attention
from engine.training.feedback import train_feedback
from tests.evaluating import compare_feedback_loops, evaluate_checkpoints
from utils.errors import Stopped
from utils.metrics import FPR_LIMIT, PixelCounter
from utils.pixel_counts import COARSE_BINS
from utils.processes import env_rank, env_world_size, is_main_process

# 14 images: steps of 6, 6 and 2, of which one of three processes has none.
COMMON = {"shot": 7, "text_batch_size": 6, "image_batch_size": 6, "num_workers": 0, "device": "cpu", "tracker": "none"}
EPOCHS = {"text_epoch": 1, "image_epoch": 1}
# Each process draws its own dropout.
NO_DROPOUT = {"cross_attn_dropout": 0.0}
BOTH_SIDES = {"text_cross_attn_weight": 0.1, "image_cross_attn_weight": 0.1, "cross_attn_init": "xavier"}
LOOPS = {
    **NO_DROPOUT,
    "num_feedback_loops": 2,
    "text_epochs_per_loop": (1,),
    "image_epochs_per_loop": (1,),
    "val_fraction": 0.2,
}

JOINT = {
    **NO_DROPOUT,
    "preset": "v3",
    "order": "joint",
    "num_feedback_loops": 1,
    "text_epochs_per_loop": (1,),
    "image_epochs_per_loop": (2,),
    "cross_attn_init": "xavier",
}


def common_arguments(folder: Path) -> dict[str, Any]:
    return {"model_name": f"local-dir:{folder / 'clip'}", "dataset": str(folder / "train"), **COMMON}


def base_config(folder: Path, save_path: Path) -> BaseConfig:
    return BaseConfig.of(**common_arguments(folder), **EPOCHS, accumulate=2, save_path=save_path)


def run_all(folder: Path, output: Path) -> None:
    """Train all kinds on the dataset `train` of `folder`, and test the `small_runs` there, below `output`."""
    common = common_arguments(folder)
    cross = CrossAttentionRunConfig.of(**common, **EPOCHS, **NO_DROPOUT, **BOTH_SIDES, save_path=output / "cross")
    runs = {
        "base": (train_base, base_config(folder, output / "base")),
        "cross": (train_cross_attention, cross),
        "feedback": (train_feedback, FeedbackConfig.of(**common, **LOOPS, save_path=output / "feedback")),
        "joint": (train_feedback, FeedbackConfig.of(**{**common, **JOINT}, save_path=output / "joint")),
    }
    for name, (train, config) in runs.items():
        with first_gradients(output / f"{name}_gradients.pth"):
            train(config)
    # 5 images of a class in batches of 2: of the last ones some processes have none.
    tested = {"device": "cpu", "batch_size": 2}
    test, base = str(folder / "test"), folder / "base"
    # So small a buffer that bins are chosen, which follow from the order of images.
    with mock.patch.object(PixelCounter.__init__, "__defaults__", (COARSE_BINS, 4 * 40**2, FPR_LIMIT)):
        evaluate_checkpoints(str(base), test, output_dir=output / "tested", **tested)
        compare_feedback_loops(folder / "feedback", test, base_path=base, unadapted=True, output_dir=output, **tested)


@contextmanager
def first_gradients(file: Path) -> Iterator[None]:
    """Write the gradients of the first step in each phase of a run, by their order and names."""
    found: dict[str, Tensor] = {}
    gradient_norms = trainer.gradient_norms
    seen: set[str] = set()

    def look(components: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        side = "/".join(components)
        if side not in seen:
            seen.add(side)
            for part, module in components.items():
                for name, value in module.named_parameters():
                    found[f"{part}.{name}"] = value.grad.clone()
        return gradient_norms(components)

    with mock.patch.object(trainer, "gradient_norms", look):
        yield
    if is_main_process():
        torch.save(found, file)


def stop_one_and_go_on(config: BaseConfig) -> None:
    """Train; only the last process gets a stop request before Stage 2's second step, and all stop; then resume."""
    gradient_norms, steps = trainer.gradient_norms, 0

    def look(components: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        nonlocal steps
        steps += "image_adapter" in components
        if steps == 2 and env_rank() == env_world_size() - 1:
            signal.raise_signal(signal.SIGTERM)
        return gradient_norms(components)

    try:
        with mock.patch.object(trainer, "gradient_norms", look):
            train_base(config)
    except Stopped as stopped:
        (config.save_path.parent / f"stopped_{env_rank()}.txt").write_text(f"{stopped}", encoding="utf-8")
    dist.barrier()
    train_base(config)


def main() -> None:
    folder, output = map(Path, sys.argv[1:])
    # The processes are to stay together for the next run.
    with mock.patch.object(Accelerator, "end_training", lambda self: None):
        run_all(folder, output)
        stop_one_and_go_on(base_config(folder, output / "stopped"))


if __name__ == "__main__":
    main()
