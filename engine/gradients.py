"""Does cross-attention leave the image adapter its gradient? Measured on real batches with Stage 2's own loss."""

from __future__ import annotations

import csv
import io
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from engine.data import TaskData, choose_training_images, load_task, training_loader
from engine.detector import checkpoint_config, load_clip_for
from engine.device import check_device
from engine.training.arguments import RunConfig
from engine.training.stage1 import TextStage
from engine.training.stage2 import ImageStage
from engine.training.stages import Stage, class_rows
from engine.training.trainer import gradient_norms
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.blocks import run_block
from model.checkpoint import load_component, read_checkpoint
from model.clip_loading import load_clip
from model.config import CrossAttentionConfig
from model.text import Prompts
from utils.errors import UserError
from utils.figures import save_png
from utils.files import write_text
from utils.seeding import derive_seed

logger = logging.getLogger(__name__)

HEALTHY_RATIO = 0.8


@dataclass(frozen=True)
class GradientTest:
    """What is measured: which model, on which images, with which cross-attention."""

    model_name: str = "toy"
    clip_weights: str | None = None
    activation: str | None = None
    img_size: int | None = None
    checkpoint: Path | None = None
    dataset: str = "toy_train"
    data_root: Path | None = None
    batches: int = 1
    batch_size: int = 8
    seed: int = 0
    device: str = "auto"
    image_cross_attn_weight: float = 0.1
    text_cross_attn_weight: float = 0.1
    context_norm: str = "unit"


class Measurement(NamedTuple):
    """Norms of the image adapter's gradient over the batches, and the contribution |w * out| / |x| of the branch."""

    weight: float
    without: list[float]
    with_: list[float]
    contribution: list[float]

    @property
    def ratio(self) -> float:
        return statistics.mean(self.with_) / statistics.mean(self.without)


class Bench:
    """A model and a few batches, on which weights of the image cross-attention are compared."""

    def __init__(self, test: GradientTest) -> None:
        device = check_device(test.device, "fp32")
        data = choose_training_images(load_task(test.dataset, test.data_root), "full_shot", 0, test.seed)
        self.model = build_model(test).to(device)
        self.prompts = data.prompts(self.model.clip).to(device)
        self.classes = data.classes
        self.seed = test.seed
        self.batches = take_batches(data, self.model, test, device)

    def stage2(self) -> ImageStage:
        return ImageStage(self.model, self.prompts, self.classes, RunConfig())

    def stage1(self) -> TextStage:
        return TextStage(self.model, self.prompts, self.classes, RunConfig())

    def norms(self, stage: Stage, batch: dict[str, Any]) -> dict[str, float]:
        """Gradient norms of every component that a stage trains, on one batch."""
        stage.begin()
        self.model.zero_grad(set_to_none=True)
        torch.manual_seed(self.seed)  # the same dropout with and without
        stage(batch).losses["total"].backward()
        return {name: norm.item() for name, norm in gradient_norms(stage.trained).items()}

    def measure(self, weight: float) -> Measurement:
        """The image adapter's gradient at `weight` and at 0, which is without cross-attention."""
        found = Measurement(weight, [], [], [])
        for batch in self.batches:
            for value, norms in ((0.0, found.without), (weight, found.with_)):
                self.model.image_cross_attn.scale = value
                norms.append(self.norms(self.stage2(), batch)["image_adapter"])
            found.contribution.append(contribution(self.model, self.prompts, batch, self.classes))
        return found


def build_model(test: GradientTest) -> AdaptedCLIPWithCrossAttention:
    """A model with fresh modules, or with those that a base or cross-attention checkpoint holds."""
    torch.manual_seed(derive_seed(test.seed))
    asked = {
        "image_cross_attn_weight": test.image_cross_attn_weight,
        "text_cross_attn_weight": test.text_cross_attn_weight,
        "context_norm": test.context_norm,
    }
    if test.checkpoint is None:
        clip = load_clip(test.model_name, test.clip_weights, test.img_size, test.activation)
        return AdaptedCLIPWithCrossAttention(clip, clip.model_config(), cross=CrossAttentionConfig(**asked))
    checkpoint = read_checkpoint(test.checkpoint)
    clip = load_clip_for(checkpoint, test.clip_weights)
    choices = CrossAttentionConfig(**asked)
    crossed = checkpoint.cross_attention()
    if crossed:
        if crossed.cross_attn_scale == "learned":
            raise UserError(f"{test.checkpoint}: its weight is learned; this test compares fixed ones")
        choices = replace(crossed, **asked)
    model = AdaptedCLIPWithCrossAttention(clip, checkpoint_config(checkpoint, clip), cross=choices)
    for name, part in model.components.items():
        if name in checkpoint.components:
            load_component(part, checkpoint.components[name], name, checkpoint.path)
    return model


def take_batches(
    data: TaskData, model: AdaptedCLIPWithCrossAttention, test: GradientTest, device: str
) -> list[dict[str, Any]]:
    """The first batches that Stage 2 would train on."""
    loader, sampler = training_loader(data, model.clip, "full", test.batch_size, 2, test.seed, 0)
    if test.batches > len(loader):
        raise UserError(
            f"--batches {test.batches}: {data.located.spec.name} has {len(loader)} of {test.batch_size} images"
        )
    sampler.set_position(1, 1)
    batches = list(islice(loader, test.batches))
    return [
        {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        for batch in batches
    ]


@torch.no_grad()
def contribution(
    model: AdaptedCLIPWithCrossAttention, prompts: Prompts, batch: dict[str, Any], classes: Sequence[str]
) -> float:
    """Mean over tokens of |w * out| / |x| of the image cross-attention, without dropout."""
    model.eval()
    rows = class_rows(batch, {name: row for row, name in enumerate(classes)})
    side = model.text_side(prompts)
    x = run_block(model.clip.clip.visual.transformer.resblocks[0], model.clip.embed_image(batch["image"]))
    added: Tensor = model.i_ca_w * model.image_cross_attn(x, side.context[rows], side.mask[rows])
    return (added.norm(dim=-1) / x.norm(dim=-1)).mean().item()


def spread(values: Sequence[float]) -> str:
    """A mean, with its standard deviation where there are several values."""
    mean = f"{statistics.mean(values):.6f}"
    return f"{mean} (sd {statistics.stdev(values):.6f} over {len(values)} batches)" if len(values) > 1 else mean


def ratio_report(found: Measurement) -> str:
    """What `test_stage2_gradients.py` prints of one weight."""
    verdict = (
        "[OK] Cross-attention doesn't harm gradient flow significantly"
        if found.ratio >= HEALTHY_RATIO
        else f"[CAUTION] Cross-attention changes the image adapter's gradient: ratio below {HEALTHY_RATIO}"
    )
    return "\n".join(
        [
            "Image adapter gradient norm:",
            f"  Without cross-attention: {spread(found.without)}",
            f"  With cross-attention:    {spread(found.with_)}",
            f"  Ratio: {found.ratio:.4f}x",
            f"Contribution to the stream, |w * out| / |x|: {spread(found.contribution)}",
            verdict,
        ]
    )


def component_report(bench: Bench) -> str:
    """Gradient norm of every trainable component in both stages, mean over the batches."""
    lines = []
    for title, make in (("Stage 1 (text)", bench.stage1), ("Stage 2 (image)", bench.stage2)):
        each = [bench.norms(make(), batch) for batch in bench.batches]
        lines.append(f"{title}:")
        lines += [f"  {name}: {spread([norms[name] for norms in each])}" for name in each[0]]
    return "\n".join(lines)


def write_sweep(measurements: Sequence[Measurement], folder: Path) -> None:
    """`gradient_sweep.csv` and `gradient_sweep.png`: ratio and contribution at each weight."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["weight", "without", "with", "ratio", "contribution"])
    for found in measurements:
        means = [statistics.mean(values) for values in (found.without, found.with_)]
        writer.writerow([found.weight, *means, found.ratio, statistics.mean(found.contribution)])
    write_text(folder / "gradient_sweep.csv", text.getvalue())
    weights = [found.weight for found in measurements]
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(weights, [found.ratio for found in measurements], marker="o")
    left.axhline(HEALTHY_RATIO, color="grey", linestyle="--", linewidth=1)
    left.set_ylabel("gradient with / without")
    right.plot(weights, [statistics.mean(found.contribution) for found in measurements], marker="o", color="tab:orange")
    right.set_ylabel("|w · out| / |x|")
    for axis in (left, right):
        axis.set_xlabel("image_cross_attn_weight")
        axis.grid(alpha=0.3)
    save_png(figure, folder / "gradient_sweep.png")
