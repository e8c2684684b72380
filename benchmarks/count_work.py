"""TFLOP of ViT-L-14-336 for several image sizes, counted on tensors without values; a multiply-add counts as two."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any
from unittest import mock

import open_clip
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dataset.prompts import build_prompts
from engine.config.training import BaseConfig
from engine.training.stage1 import TextStage
from engine.training.stage2 import ImageStage
from engine.training.stages import Stage
from model.adapter import AdaptedCLIP
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.clip import FrozenCLIP
from model.config import LoopForward
from model.text import Prompts
from utils.text import format_table

MODEL = "ViT-L-14-336"
NAMES = ("bottle", "cable", "capsule", "metal nut")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--img_size", type=int, nargs="+", default=[336, 518, 700], help="sizes of images, in pixels")
    return parser.parse_args()


def main() -> None:
    sizes = parse_arguments().img_size
    columns = [
        "pixels",
        "tokens",
        "testing",
        "Stage 1",
        "Stage 2",
        "text attends to images: Stage 1",
        "Stage 2",
        "from loop 2 on: Stage 1",
        "Stage 2",
    ]
    print(f"TFLOP per image, all of one class\n\n{format_table(columns, [row_of(size) for size in sizes])}\n")
    clip = empty_clip(sizes[0])
    one, four = (stage_of(clip, crossed=False, side="text", classes=NAMES[:count]) for count in (1, 4))
    names = [name for name in NAMES for _ in range(2)]
    added = len(names) * (work(four, names) - work(one, [NAMES[0]] * len(names))) / 3
    print(f"Each additional class in a step of Stage 1: {added:.3f} TFLOP")


def row_of(size: int) -> list[str]:
    """TFLOP per image of a size."""
    clip = empty_clip(size)
    plain = {side: stage_of(clip, False, side) for side in ("text", "image")}
    cross = {side: stage_of(clip, True, side) for side in ("text", "image")}
    later = {side: stage_of(clip, True, side, loop=LoopForward("trained", True)) for side in ("text", "image")}
    tokens = clip.grid**2 + 1
    images = torch.empty(1, 3, size, size, device="meta")
    model = plain["image"].model.eval()
    with torch.no_grad():
        tested = counted(lambda: model(images, plain["image"].text_side, torch.zeros(1, dtype=int, device="meta")))
    trained = [work(stages[side], NAMES[:1]) for stages in (plain, cross, later) for side in ("text", "image")]
    return [str(size), str(tokens), *(f"{value:.2f}" for value in (tested, *trained))]


def empty_clip(size: int) -> FrozenCLIP:
    """CLIP without values, for images of `size` pixels."""
    architecture = open_clip.get_model_config(MODEL)
    architecture["vision_cfg"]["image_size"] = size
    with torch.device("meta"):
        clip = open_clip.CLIP(**architecture, quick_gelu=True)
    with mock.patch("model.clip.digest_weights", return_value="none"):
        return FrozenCLIP(clip, MODEL, "quick_gelu")


def stage_of(
    clip: FrozenCLIP, crossed: bool, side: str, classes: Sequence[str] = NAMES[:1], loop: LoopForward | None = None
) -> Stage:
    kind = AdaptedCLIPWithCrossAttention if crossed else AdaptedCLIP
    model = kind(clip, clip.model_config()).to("meta")
    make = {"text": TextStage, "image": ImageStage}[side]
    prompts = Prompts.from_texts(clip, [build_prompts(name) for name in classes]).to("meta")
    stage = make(model, prompts, classes, BaseConfig(), loop)
    stage.begin()
    return stage


def work(stage: Stage, names: Sequence[str]) -> float:
    """TFLOP of a training step per image; `names` are the classes of its images."""
    size = stage.model.clip.img_size
    batch: dict[str, Any] = {
        "image": torch.empty(len(names), 3, size, size, device="meta"),
        "mask": torch.empty(len(names), 1, size, size, device="meta"),
        "label": torch.empty(len(names), dtype=torch.long, device="meta"),
        "class_name": list(names),
    }

    def step() -> Tensor:
        total = stage(batch).losses["total"]
        total.backward()
        return total

    return counted(step) / len(names)


def counted(run: Callable[[], object]) -> float:
    # autocast does not support the meta device.
    no_autocast = mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext())
    with no_autocast, FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e12


if __name__ == "__main__":
    main()
