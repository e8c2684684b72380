"""Whether cross-attention leaves the image adapter its gradient, in length and direction; on batches of Stage 2."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from engine.config.feedback import FeedbackConfig
from engine.config.gradients import DEFAULT_WEIGHT, GradientTest
from engine.config.training import RunConfig
from engine.data.loaders import make_dataset, training_loader
from engine.data.task import TaskData, check_masks, choose_training_images, load_task
from engine.detector.detector import checkpoint_config, cross_attention_choices, load_clip_for
from engine.runtime.device import check_device
from engine.training.stage1 import TextStage
from engine.training.stage2 import ImageStage
from engine.training.stages import Stage, class_rows
from engine.training.trainer import gradient_norms
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.adapter_modules import match_length
from model.blocks import run_block
from model.checkpoint import Checkpoint, load_component, read_checkpoint
from model.clip_loading import load_clip
from model.config import CrossAttentionConfig
from model.text import Prompts
from utils.errors import UserError
from utils.figures import save_png
from utils.files import write_text
from utils.seeding import derive_seed

# What the defaults must keep to: how much longer or shorter the gradient may get, and how far it may turn.
HEALTHY_RATIOS = (0.8, 1.25)
HEALTHY_COSINE = 0.95


class Measurement(NamedTuple):
    """The image adapter's gradient with the branch at `weight` beside the one without it, a value for each batch.

    without, with_: its norm; cosine: between the two; contribution: |w * out| / |x| of the branch.
    """

    weight: float
    without: list[float]
    with_: list[float]
    cosine: list[float]
    contribution: list[float]

    @property
    def ratio(self) -> float:
        return statistics.mean(self.with_) / statistics.mean(self.without)

    @property
    def is_healthy(self) -> bool:
        low, high = HEALTHY_RATIOS
        return low <= self.ratio <= high and statistics.mean(self.cosine) >= HEALTHY_COSINE


class Bench:
    """A model and a few batches, on which weights of the image cross-attention are compared.

    subject: what the model is, in words; chosen_by: who set a larger weight than the default on purpose, if anyone;
    matched_by: who matched the residual's length on purpose, if anyone.
    """

    def __init__(self, test: GradientTest) -> None:
        device = check_device(test.device, "fp32")
        data = load_task(test.dataset, test.data_root)
        check_masks(data, "the losses of both stages need them")
        data = choose_training_images(data, "full_shot", 0, test.seed)
        checkpoint = None if test.checkpoint is None else read_checkpoint(test.checkpoint)
        self.model = build_model(test, checkpoint).to(device)
        self.subject = describe(self.model, test, checkpoint)
        self.chosen_by = who_chose_more(self.model, test)
        self.matched_by = who_matched(self.model, test)
        self.prompts = data.prompts(self.model.clip).to(device)
        self.classes = data.classes
        self.seed = test.seed
        self.batches = take_batches(data, self.model, test, device)

    @property
    def weight(self) -> float:
        """The model's own weight of the image side's residual."""
        return self.model.i_ca_w

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

    def image_gradient(self, batch: dict[str, Any]) -> Tensor:
        """The image adapter's gradient in Stage 2, as one vector in double precision."""
        self.norms(self.stage2(), batch)
        gradients = [parameter.grad for parameter in self.model.image_adapter.parameters()]
        return torch.cat([gradient.double().flatten() for gradient in gradients if gradient is not None])

    def measure(self, weight: float) -> Measurement:
        """The image adapter's gradient at `weight` and at 0, which is without cross-attention."""
        own = self.weight
        found = Measurement(weight, [], [], [], [])
        for batch in self.batches:
            gradients = []
            for value, norms in ((0.0, found.without), (weight, found.with_)):
                self.model.image_cross_attn.weight = value
                gradients.append(self.image_gradient(batch))
                norms.append(gradients[-1].norm().item())
            found.cosine.append(torch.cosine_similarity(*gradients, dim=0).item())
            found.contribution.append(contribution(self.model, self.prompts, batch, self.classes))
        self.model.image_cross_attn.weight = own
        return found


def build_model(test: GradientTest, checkpoint: Checkpoint | None) -> AdaptedCLIPWithCrossAttention:
    """A model with fresh modules, or with those that a base or cross-attention checkpoint holds.

    Raises `UserError` where the checkpoint, the weights and what is asked for do not fit together.
    """
    torch.manual_seed(derive_seed(test.seed))
    if checkpoint is None:
        clip = load_clip(test.model_name or "toy", test.clip_weights, test.img_size, test.activation)
        config = clip.model_config()
    else:
        clip = load_clip_for(checkpoint, test.clip_weights, **test.given("model_name", "img_size", "activation"))
        config = checkpoint_config(checkpoint, clip)
    asked = test.given("image_cross_attn_weight", "text_cross_attn_weight", "context_norm", "cross_attn_residual")
    cross = replace(own_setting(test, checkpoint), **asked)
    if "image_cross_attn_weight" in asked:
        # In a feedback run's loops before its cross-attention starts.
        cross = replace(cross, cross_attn_active=True)
    model = AdaptedCLIPWithCrossAttention(clip, config, cross=cross)
    for name, part in model.components.items():
        if checkpoint is not None and name in checkpoint.components:
            load_component(part, checkpoint.components[name], name, checkpoint.path)
    return model


def own_setting(test: GradientTest, checkpoint: Checkpoint | None) -> CrossAttentionConfig:
    """The cross-attention of the checkpoint or the preset, or the defaults."""
    trained = checkpoint and cross_attention_choices(checkpoint)
    if trained and test.preset:
        raise UserError(f"--preset {test.preset}: {test.checkpoint} has cross-attention of its own; leave one out")
    if trained:
        return trained
    return FeedbackConfig.of(preset=test.preset).cross_attention() if test.preset else CrossAttentionConfig()


def who_chose_more(model: AdaptedCLIPWithCrossAttention, test: GradientTest) -> str | None:
    """Who set a larger weight than the default: the checkpoint or the preset, None for the command line or nobody."""
    weight = model.i_ca_w if model.image_sees_text() else 0.0
    if weight <= DEFAULT_WEIGHT or test.image_cross_attn_weight is not None:
        return None
    return f"preset {test.preset}" if test.preset else str(test.checkpoint)


def who_matched(model: AdaptedCLIPWithCrossAttention, test: GradientTest) -> str | None:
    """Who matched the residual's length: the checkpoint or the preset, None for the command line or nobody."""
    if model.cross_config.cross_attn_residual != "matched" or test.cross_attn_residual is not None:
        return None
    return f"preset {test.preset}" if test.preset else str(test.checkpoint)


def describe(model: AdaptedCLIPWithCrossAttention, test: GradientTest, checkpoint: Checkpoint | None) -> str:
    """Which weights are measured, in which setting."""
    if checkpoint is None:
        name = test.model_name or "toy"
        what = f"the {name} model with fresh weights, nothing of which was trained (--checkpoint FILE measures a run)"
    elif "image_cross_attn" in checkpoint.components:
        what = f"{checkpoint.path}, with its own cross-attention"
    else:
        what = f"{checkpoint.path}, with a fresh cross-attention on top"
    image, text = model.i_ca_w, model.t_ca_w
    how = f"context {model.cross_config.context_norm}"
    if model.cross_config.cross_attn_residual == "matched":
        how += ", residual matched"
    off = "" if model.image_sees_text() else "; image cross-attention is off"
    return f"Model: {what}\nSetting: image weight {image:g}, text weight {text:g}, {how}{off}"


def take_batches(
    data: TaskData, model: AdaptedCLIPWithCrossAttention, test: GradientTest, device: str
) -> list[dict[str, Any]]:
    """The first batches that Stage 2 would train on."""
    loader, sampler = training_loader(make_dataset(data, model.clip, "full"), test.batch_size, 2, test.seed)
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
    """Mean over tokens of |w * out| / |x| of the image cross-attention, without dropout.

    Where the residual is matched, out has the length of x, so this is the weight.
    """
    if not model.image_sees_text():
        return 0.0
    model.eval()
    rows = class_rows(batch, {name: row for row, name in enumerate(classes)})
    side = model.text_side(prompts)
    x = run_block(model.clip.clip.visual.transformer.resblocks[0], model.clip.embed_image(batch["image"]))
    out = model.image_cross_attn(x, side.context[rows], side.mask[rows])
    if model.cross_config.cross_attn_residual == "matched":
        out = match_length(out, x)
    added = model.i_ca_w * out
    return (added.norm(dim=-1) / x.norm(dim=-1)).mean().item()


def spread(values: Sequence[float]) -> str:
    """A mean, with its standard deviation where there are several values."""
    mean = f"{statistics.mean(values):.6f}"
    return f"{mean} (sd {statistics.stdev(values):.6f} over {len(values)} batches)" if len(values) > 1 else mean


def verdict(found: Measurement, chosen_by: str | None = None, matched_by: str | None = None) -> str:
    """Whether the gradient stays what it was.

    A larger weight that somebody chose on purpose is not judged; nor is the change that matching the length makes.
    """
    if chosen_by is not None:
        return (
            f"[BY INTENT] {chosen_by} sets the weight to {found.weight:g}, above the default of {DEFAULT_WEIGHT}: "
            "it changes the image adapter's gradient by intent"
        )
    if found.is_healthy:
        return "[OK] Cross-attention doesn't harm gradient flow significantly"
    if matched_by is not None:
        return (
            f"[BY INTENT] {matched_by} matches the residual, which makes {found.weight:.0%} of the stream: it changes "
            "the image adapter's gradient by intent"
        )
    low, high = HEALTHY_RATIOS
    return (
        "[CAUTION] Cross-attention changes the image adapter's gradient: "
        f"healthy are a ratio of {low} to {high} and a cosine of at least {HEALTHY_COSINE}"
    )


def gradient_report(found: Measurement, chosen_by: str | None = None, matched_by: str | None = None) -> str:
    """What `test_stage2_gradients.py` prints of one weight."""
    return "\n".join(
        [
            "Image adapter gradient norm:",
            f"  Without cross-attention: {spread(found.without)}",
            f"  With cross-attention:    {spread(found.with_)}",
            f"  Ratio: {found.ratio:.4f}x",
            f"Cosine between the two gradients: {spread(found.cosine)}",
            f"Contribution to the stream, |w * out| / |x|: {spread(found.contribution)}",
            verdict(found, chosen_by, matched_by),
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
    """`gradient_sweep.csv` and `gradient_sweep.png`: ratio, cosine and contribution at each weight."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["weight", "without", "with", "ratio", "cosine", "contribution"])
    for found in measurements:
        without, with_ = statistics.mean(found.without), statistics.mean(found.with_)
        cosine, added = statistics.mean(found.cosine), statistics.mean(found.contribution)
        writer.writerow([found.weight, without, with_, found.ratio, cosine, added])
    write_text(folder / "gradient_sweep.csv", text.getvalue())
    weights = [found.weight for found in measurements]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    curves = (
        ("gradient with / without", [found.ratio for found in measurements], HEALTHY_RATIOS),
        ("cosine of the two", [statistics.mean(found.cosine) for found in measurements], (HEALTHY_COSINE,)),
        ("|w · out| / |x|", [statistics.mean(found.contribution) for found in measurements], ()),
    )
    for axis, (label, values, limits) in zip(figure.subplots(1, len(curves)), curves, strict=True):
        axis.plot(weights, values, marker="o")
        for limit in limits:
            axis.axhline(limit, color="grey", linestyle="--", linewidth=1)
        axis.set_ylabel(label)
        axis.set_xlabel("image_cross_attn_weight")
        axis.grid(alpha=0.3)
    save_png(figure, folder / "gradient_sweep.png")
