"""Whether cross-attention preserves the image adapter's gradient in Stage 2, in length and direction."""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.config.tools import GradientTest
from engine.config.training import CrossAttentionRunConfig, FeedbackConfig, RunConfig
from engine.data.loaders import make_dataset, training_loader
from engine.data.task import TaskData, check_masks, choose_training_images, load_task
from engine.detector.loading import checkpoint_config, cross_attention_choices, load_clip_for
from engine.runtime.device import check_device
from engine.runtime.run_folder import find_checkpoints
from engine.training.stage1 import TextStage
from engine.training.stage2 import ImageStage
from engine.training.stages import Stage, class_rows
from engine.training.trainer import gradient_norms
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.adapter_modules import match_length
from model.blocks import run_block
from model.checkpoint import Checkpoint, load_component, read_checkpoint
from model.clip_loading import load_clip
from model.config import CROSS_ATTENTION_OVERRIDES, TOY, CrossAttentionConfig
from model.text import Prompts
from utils.errors import UserError
from utils.seeding import derive_seed

MIN_RATIO, MAX_RATIO = 0.8, 1.25
MIN_COSINE = 0.95


class Measurement(NamedTuple):
    """The image adapter's gradient without and with cross-attention, one value per batch.

    without, with_: gradient norms; cosine: between both gradients; contribution: |w * out| / |x| of the branch.
    """

    without: list[float]
    with_: list[float]
    cosine: list[float]
    contribution: list[float]

    @property
    def ratio(self) -> float:
        return statistics.mean(self.with_) / statistics.mean(self.without)

    @property
    def is_healthy(self) -> bool:
        return MIN_RATIO <= self.ratio <= MAX_RATIO and statistics.mean(self.cosine) >= MIN_COSINE


@dataclass
class Probe:
    """A model and the data that its gradients are measured on."""

    model: AdaptedCLIPWithCrossAttention
    prompts: Prompts
    classes: Sequence[str]
    batches: list[dict[str, Any]]
    seed: int

    def stage(self, kind: type[TextStage] | type[ImageStage]) -> Stage:
        return kind(self.model, self.prompts, self.classes, RunConfig())

    def norms(self, stage: Stage, batch: dict[str, Any]) -> dict[str, float]:
        """The gradient norms of all trained components of a stage, on one batch."""
        stage.begin()
        self.model.zero_grad(set_to_none=True)
        torch.manual_seed(self.seed)  # the same dropout with and without cross-attention
        stage(batch).losses["total"].backward()
        return {name: norm.item() for name, norm in gradient_norms(stage.trained).items()}

    def image_gradient(self, batch: dict[str, Any], weight: float) -> Tensor:
        """The image adapter's gradient in Stage 2 as a double precision vector, at this weight of the image branch."""
        own, self.model.image_cross_attn.weight = self.model.image_cross_attn.weight, weight
        self.norms(self.stage(ImageStage), batch)
        self.model.image_cross_attn.weight = own
        gradients = [parameter.grad for parameter in self.model.image_adapter.parameters()]
        return torch.cat([gradient.double().flatten() for gradient in gradients if gradient is not None])

    def measure(self) -> Measurement:
        """Compare the model's own weight of the image branch with 0, which is no cross-attention."""
        measurement = Measurement([], [], [], [])
        for batch in self.batches:
            without, with_ = (self.image_gradient(batch, weight) for weight in (0.0, self.model.i_ca_w))
            measurement.without.append(without.norm().item())
            measurement.with_.append(with_.norm().item())
            measurement.cosine.append(torch.cosine_similarity(without, with_, dim=0).item())
            measurement.contribution.append(self.contribution(batch))
        return measurement

    @torch.no_grad()
    def contribution(self, batch: dict[str, Any]) -> float:
        """Mean over tokens of |w * out| / |x| of the image branch, without dropout."""
        if not self.model.image_sees_text():
            return 0.0
        self.model.eval()
        rows = class_rows(batch, {name: row for row, name in enumerate(self.classes)})
        side = self.model.text_side(self.prompts)
        blocks = self.model.clip.clip.visual.transformer.resblocks
        x = run_block(blocks[0], self.model.clip.embed_image(batch["image"]))
        out = self.model.image_cross_attn(x, side.context[rows], side.mask[rows])
        if self.model.cross_config.cross_attn_residual == "matched":
            out = match_length(out, x)
        return ((self.model.i_ca_w * out).norm(dim=-1) / x.norm(dim=-1)).mean().item()


def run_gradient_test(test: GradientTest) -> int:
    """Measure the gradients and print the report; the exit status is 1 for [CAUTION], unless `--allow` is given."""
    device = check_device(test.device, "fp32")
    data = load_task(test.dataset, test.data_root)
    check_masks(data, "the losses of both stages need them")
    data = choose_training_images(data, "full_shot", 0, test.seed)
    checkpoint = None if test.checkpoint is None else read_checkpoint(find_checkpoints(test.checkpoint)[-1])
    model = build_model(test, checkpoint).to(device)
    sys.stdout.write(f"{describe(model, checkpoint)}\n")
    probe = make_probe(model, data, test, device)
    if model.image_sees_text() and not model.image_cross_attn.out_proj.weight.any():
        sys.stdout.write("The image cross-attention is zero-initialised: measure it after training (--checkpoint)\n")
    measurement = probe.measure()
    sys.stdout.write(gradient_report(measurement) + "\n")
    if test.component:
        sys.stdout.write(component_report(probe) + "\n")
    return 0 if measurement.is_healthy or test.allow else 1


def build_model(test: GradientTest, checkpoint: Checkpoint | None) -> AdaptedCLIPWithCrossAttention:
    """A model with new modules, or with those of a base or cross-attention checkpoint.

    Raises `UserError` if the checkpoint, the weights and the options do not fit together.
    """
    torch.manual_seed(derive_seed(test.seed))
    overrides = test.overrides()
    if checkpoint is None:
        clip = load_clip(test.model_name or TOY, test.clip_weights, test.img_size, test.activation)
        config = clip.model_config()
    else:
        clip = load_clip_for(checkpoint, test.clip_weights, **overrides)
        config = checkpoint_config(checkpoint, clip)
    options = {name: value for name, value in overrides.items() if name in CROSS_ATTENTION_OVERRIDES}
    cross = replace(default_cross_attention(test, checkpoint), **options)
    if "image_cross_attn_weight" in options:
        # Also for a feedback loop before its cross-attention starts.
        cross = replace(cross, cross_attn_active=True)
    model = AdaptedCLIPWithCrossAttention(clip, config, cross=cross)
    for name, part in model.components.items():
        if checkpoint is not None and name in checkpoint.components:
            load_component(part, checkpoint.components[name], name, checkpoint.path)
    return model


def default_cross_attention(test: GradientTest, checkpoint: Checkpoint | None) -> CrossAttentionConfig:
    """The cross-attention of the checkpoint or the preset, or that of `train_cross_attention.py`."""
    trained = cross_attention_choices(checkpoint) if checkpoint else None
    if trained is None:
        run = FeedbackConfig.of(preset=test.preset) if test.preset else CrossAttentionRunConfig()
        return run.cross_attention()
    if test.preset:
        raise UserError(f"--preset {test.preset}: {test.checkpoint} has cross-attention of its own; leave one out")
    return trained


def describe(model: AdaptedCLIPWithCrossAttention, checkpoint: Checkpoint | None) -> str:
    """The measured weights and options."""
    weights = "new adapters, nothing of which was trained (--checkpoint FILE measures a run)"
    if checkpoint is not None:
        own = "its own" if "image_cross_attn" in checkpoint.components else "a new"
        weights = f"{checkpoint.path}, with {own} cross-attention"
    cross = model.cross_config
    options = f"context {cross.context_norm}, residual {cross.cross_attn_residual}"
    off = "" if model.image_sees_text() else "; image cross-attention is off"
    return f"Model: {weights}\nOptions: image weight {model.i_ca_w:g}, text weight {model.t_ca_w:g}, {options}{off}"


def make_probe(model: AdaptedCLIPWithCrossAttention, data: TaskData, test: GradientTest, device: str) -> Probe:
    """A probe with the first batches of Stage 2."""
    loader = training_loader(make_dataset(data, model.clip, "full"), test.batch_size, 2, test.seed)
    if test.batches > len(loader):
        raise UserError(
            f"--batches {test.batches}: {data.located.spec.name} has {len(loader)} of {test.batch_size} images"
        )
    batches = [to_device(batch, device) for batch in islice(loader, test.batches)]
    prompts = data.prompts(model.clip).to(device)
    return Probe(model, prompts, data.classes, batches, test.seed)


def to_device(batch: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


def mean_text(values: Sequence[float]) -> str:
    """A mean, with the standard deviation of several values."""
    mean = f"{statistics.mean(values):.6f}"
    return f"{mean} (sd {statistics.stdev(values):.6f} over {len(values)} batches)" if len(values) > 1 else mean


def verdict(measurement: Measurement) -> str:
    if measurement.is_healthy:
        return "[OK] Cross-attention doesn't harm gradient flow significantly"
    return (
        "[CAUTION] Cross-attention changes the image adapter's gradient: a healthy ratio is "
        f"{MIN_RATIO} to {MAX_RATIO}, a healthy cosine at least {MIN_COSINE}"
    )


def gradient_report(measurement: Measurement) -> str:
    return "\n".join(
        [
            "Image adapter gradient norm:",
            f"  Without cross-attention: {mean_text(measurement.without)}",
            f"  With cross-attention:    {mean_text(measurement.with_)}",
            f"  Ratio: {measurement.ratio:.4f}x",
            f"Cosine between the two gradients: {mean_text(measurement.cosine)}",
            f"Contribution to the stream, |w * out| / |x|: {mean_text(measurement.contribution)}",
            verdict(measurement),
        ]
    )


def component_report(probe: Probe) -> str:
    """The gradient norms of all trained components in both stages, means over the batches."""
    lines = []
    for title, kind in (("Stage 1 (text)", TextStage), ("Stage 2 (image)", ImageStage)):
        each = [probe.norms(probe.stage(kind), batch) for batch in probe.batches]
        lines.append(f"{title}:")
        lines += [f"  {name}: {mean_text([norms[name] for norms in each])}" for name in each[0]]
    return "\n".join(lines)
