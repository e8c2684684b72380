"""What a training run is asked for: a frozen value that its parser fills, that is saved, that a restart must equal."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from dataset.options import AugmentationConfig
from engine.config.common import DataArguments, MachineArguments, ModelArguments
from model.config import CrossAttentionConfig, ModelConfig
from utils.errors import UserError
from utils.fields import changed, setting

RECIPES = ("toy",)
BATCH_SIZES = ("text_batch_size", "image_batch_size")
MOST_EPOCHS, MOST_IMAGES = 100_000, 100_000
# Images in a forward where a loop is evaluated.
LOOP_BATCH = 8
# Far beyond sense, but an optimizer can take it; a loss that is not finite then stops the run.
LARGEST_RATE = 1e30

Config = TypeVar("Config", bound="BaseConfig")


@dataclass(frozen=True)
class RunConfig(MachineArguments, DataArguments, ModelArguments):
    """Arguments that all training scripts share, with the base's defaults (docs/method.md, "Training").

    A restart may differ in the free ones without being another run: weights and metadata are compared by digest,
    prompts by their words, and epochs where the run stands.
    """

    recipe: str | None = setting(
        None, "the model, rates and depths for the toy world", "training", choices=RECIPES, free=True, unset="none"
    )
    adapter: str = changed(ModelConfig, "adapter")
    relu: bool = changed(ModelConfig, "relu")
    levels: tuple[int, ...] | None = changed(ModelConfig, "levels", None, unset="each quarter of the depth")
    text_adapt_weight: float = changed(ModelConfig, "text_adapt_weight")
    image_adapt_weight: float = changed(ModelConfig, "image_adapt_weight")
    text_adapt_until: int | None = changed(ModelConfig, "text_adapt_until", None, unset="a quarter of them")
    image_adapt_until: int | None = changed(ModelConfig, "image_adapt_until", None, unset="a quarter of them")
    dataset: str = changed(
        DataArguments, "dataset", help="dataset to train on: a catalog name, or a folder in MVTec's layout"
    )
    training_mode: str = setting(
        "few_shot",
        "some images of each class, or all",
        "training",
        choices=("few_shot", "full_shot"),
        under={"toy": "full_shot", "published": "full_shot"},
    )
    shot: int = setting(
        32,
        "images of each class in few_shot, half of them anomalous, the odd one too",
        "training",
        between=(1, MOST_IMAGES),
    )
    text_batch_size: int = setting(
        16, "images in a step of Stage 1, over all processes", "training", between=(1, MOST_IMAGES)
    )
    image_batch_size: int = setting(
        2, "images in a step of Stage 2, over all processes", "training", between=(1, MOST_IMAGES), under={"toy": 8}
    )
    accumulate: int = setting(
        1, "batches whose gradients make one optimizer step", "training", between=(1, MOST_IMAGES)
    )
    checkpoint_blocks: bool = setting(
        False,
        "keep less of each block for the backward pass, and compute it again: less memory, more time",
        "machine",
        free=True,
    )
    text_norm_weight: float = setting(
        0.1, "weight of the anchors' overlap in Stage 1's loss", "training", between=(0, 1000), under={"toy": 3.0}
    )
    augment_fill: str = changed(AugmentationConfig, "augment_fill")
    augment_resampling: str = changed(AugmentationConfig, "augment_resampling")
    augment_moves: str = changed(AugmentationConfig, "augment_moves")
    jitter_first: bool = changed(AugmentationConfig, "jitter_first")
    keep_label: bool = changed(AugmentationConfig, "keep_label")
    stage1_levels: str = setting(
        "all",
        "levels that count in Stage 1's loss; last is what earlier code did by mistake",
        "training",
        choices=("all", "last"),
        under={"published": "last"},
    )
    focal_smoothing: float = setting(
        0.0,
        "smoothing of the focal loss, which caps it for confident errors; 0 is exact",
        "training",
        between=(0, 0.4),
        under={"published": 1e-5},
    )
    seed: int = setting(
        0, "seed of weights, few-shot choice, order and augmentation", "training", between=(-(2**63), 2**63 - 1)
    )
    text_lr: float = setting(
        1e-5, "learning rate of Stage 1", "schedule", between=(0, LARGEST_RATE), under={"toy": 1e-3}
    )
    image_lr: float = setting(
        5e-4, "learning rate of Stage 2", "schedule", between=(0, LARGEST_RATE), under={"toy": 1e-3}
    )
    save_path: Path = setting(Path("ckpt/base"), "folder of this run", "output", free=True)
    resume: str = setting(
        "auto",
        "auto goes on with the run that is there; never begins one, in a new folder only",
        "output",
        choices=("auto", "never"),
        free=True,
    )
    tracker: str = setting(
        "tensorboard", "where curves go", "output", choices=("tensorboard", "wandb", "none"), free=True
    )

    @property
    def frozen(self) -> tuple[str, ...]:
        """Components that are not trained."""
        return ()

    def augmentation(self) -> AugmentationConfig:
        """How images are moved."""
        return AugmentationConfig(**{item.name: getattr(self, item.name) for item in fields(AugmentationConfig)})

    def check_processes(self, processes: int) -> None:
        """Raise `UserError` where so many processes cannot share the images of a step, and compute what one does."""
        if processes == 1:
            return
        for name in BATCH_SIZES:
            if (images := getattr(self, name)) % processes:
                more = images + processes - images % processes
                raise UserError(
                    f"--{name} {images} is that of a step, which {processes} processes do not share evenly: give a "
                    f"multiple of {processes}, such as {more}, or start another number of processes"
                )
        if self.surgery == "batch_axis":
            raise UserError(
                "--surgery batch_axis lets the images of a step see each other, so processes cannot share them: start "
                "one process, or give another --surgery"
            )

    def signature(self) -> dict[str, Any]:
        """What makes this run this run: a restart with another value is another run."""
        values = self.to_dict()
        signature = {item.name: values[item.name] for item in fields(self) if not item.metadata.get("free")}
        if self.training_mode == "full_shot":
            del signature["shot"]
        return signature


@dataclass(frozen=True)
class BaseConfig(RunConfig):
    """Arguments of `train.py`."""

    preset: str = setting(
        "recommended",
        "defaults of the arguments that name it; published is AA-CLIP's code with all its defects",
        "training",
        choices=("recommended", "published"),
        free=True,
    )
    text_epoch: int = setting(
        5, "epochs of Stage 1; 0 keeps CLIP's own text embeddings", "schedule", between=(0, MOST_EPOCHS), free=True
    )
    image_epoch: int = setting(20, "epochs of Stage 2", "schedule", between=(0, MOST_EPOCHS), free=True)
    image_loss_only: bool = setting(
        False,
        "Stage 2's classification of whole images alone, without Stage 1: needs no masks, and leaves the maps "
        "untrained",
        "training",
    )

    @classmethod
    def of(cls: type[Config], **given: Any) -> Config:
        """As `Arguments.of`; without masks there is no Stage 1. Raises `UserError` where it is asked for."""
        without_stage1 = {"text_epoch": 0} if given.get("image_loss_only") else {}
        if without_stage1 and given.get("text_epoch"):
            raise UserError("--image_loss_only trains no Stage 1: leave --text_epoch out")
        return super().of(**{**given, **without_stage1})


@dataclass(frozen=True)
class CrossAttentionArguments(RunConfig):
    """Arguments that the scripts with cross-attention share: the branches, and the base that they start from."""

    text_cross_attn_weight: float = changed(CrossAttentionConfig, "text_cross_attn_weight")
    image_cross_attn_weight: float = changed(CrossAttentionConfig, "image_cross_attn_weight")
    cross_attn_heads: int = changed(CrossAttentionConfig, "cross_attn_heads")
    cross_attn_dropout: float = changed(CrossAttentionConfig, "cross_attn_dropout")
    context_norm: str = changed(CrossAttentionConfig, "context_norm")
    cross_attn_residual: str = changed(CrossAttentionConfig, "cross_attn_residual")
    cross_attn_init: str = changed(CrossAttentionConfig, "cross_attn_init")
    text_conditioning: str = changed(CrossAttentionConfig, "text_conditioning")
    load_base_text_adapter: Path | None = setting(
        None, "text_adapter.pth of a trained base", "base", free=True, unset="from scratch"
    )
    load_base_image_adapter: Path | None = setting(
        None, "image_adapter.pth of a trained base", "base", free=True, unset="from scratch"
    )
    reset_base_optimizer: bool = setting(False, "leave the base's optimizer moments behind", "base")
    allow_partial_base: bool = setting(False, "start from one trained side only", "base", free=True)
    freeze_base: bool = setting(False, "train the cross-attentions alone", "base")

    @classmethod
    def of(cls: type[Config], **given: Any) -> Config:
        """As `Arguments.of`; matched branches start at Xavier weights with weight 0.1 unless others are given."""
        asked = super().of(**given)
        sides = asked.cross_attention().sides
        if asked.cross_attn_init != "zero" or asked.cross_attn_residual != "matched" or not sides:
            return asked
        names = ("cross_attn_init", *(f"{side}_cross_attn_weight" for side in sides))
        return super().of(**{**{name: getattr(CrossAttentionConfig, name) for name in names}, **given})

    def cross_attention(self) -> CrossAttentionConfig:
        """The choices that the forward depends on; what a feedback loop decides keeps its default."""
        names = {item.name for item in fields(CrossAttentionConfig)} & {item.name for item in fields(self)}
        return CrossAttentionConfig(**{name: getattr(self, name) for name in names})

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("text_adapter", "image_adapter") if self.freeze_base else ()


@dataclass(frozen=True)
class CrossAttentionRunConfig(CrossAttentionArguments, BaseConfig):
    """Arguments of `train_cross_attention.py`: by default the image sees words, and begins as if it did not."""

    text_cross_attn_weight: float = changed(CrossAttentionConfig, "text_cross_attn_weight", 0.0, before=0.1)
    image_cross_attn_weight: float = changed(CrossAttentionConfig, "image_cross_attn_weight", 1.0, before=0.1)
    context_norm: str = changed(CrossAttentionConfig, "context_norm", "layer", before="unit")
    cross_attn_init: str = changed(CrossAttentionConfig, "cross_attn_init", "zero", before="xavier")
    save_path: Path = changed(RunConfig, "save_path", Path("ckpt/cross_attention"))
