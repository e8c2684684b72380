"""The options of the training scripts; a run saves them, and must be resumed with the same values."""

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from dataset.catalog import known_dataset
from dataset.options import AugmentationConfig
from engine.config.common import DataArguments, MachineArguments, ModelArguments
from engine.config.presets import BASE_PRESETS, FEEDBACK_PRESETS, RECIPES
from model.config import CrossAttentionConfig, ModelConfig
from utils.errors import UserError
from utils.fields import changed, setting
from utils.processes import env_world_size

BATCH_SIZES = ("text_batch_size", "image_batch_size")
EPOCHS, IMAGES, MOST_LOOPS = 100_000, (1, 100_000), 10
# Images in a forward pass when a loop is evaluated.
LOOP_BATCH = 8
# An optimizer accepts it; the loss then becomes infinite, which stops the run.
LARGEST_RATE = 1e30
ORDERS = ("stages", "joint")
WEIGHT_DECAY = {"adamw": 0.01, "adam": 0.0}
# Options of the base that feedback training does not offer: it takes the model's from its base, and keeps the
# recommended values of the others.
FROM_BASE = ("surgery_until_layer", "text_adapt_weight", "image_adapt_weight", "text_adapt_until", "image_adapt_until")
BASE_ONLY = (*(item.name for item in fields(AugmentationConfig)), "stage1_levels", "focal_smoothing", "mask_threshold")

Config = TypeVar("Config", bound="BaseConfig")

_base, _feedback = partial(setting, group="base"), partial(setting, group="feedback")
_training, _schedule = partial(setting, group="training"), partial(setting, group="schedule")
_adapters = partial(changed, ModelConfig, group="adapters")
_augmentation = partial(changed, AugmentationConfig, group="training")
_cross = partial(changed, CrossAttentionConfig, group="cross-attention")


@dataclass(frozen=True)
class RunConfig(MachineArguments, DataArguments, ModelArguments):
    """Options of all training scripts, with the defaults of the base (docs/method.md, "Training").

    A run may be resumed with other values of the free ones: weights and metadata are compared by digest, prompts by
    their text, and epochs with the state of the run.
    """

    less_memory: ClassVar = (
        "--precision bf16, --checkpoint_blocks, smaller --image_batch_size and --text_batch_size with --accumulate, "
        "a smaller --img_size"
    )

    model_name: str = changed(ModelArguments, "model_name")
    surgery: str = changed(ModelArguments, "surgery")
    recipe: str | None = _training(None, "model, rates and depths for the toy datasets", choices=RECIPES, free=True)
    adapter: str = _adapters("adapter", help="two linear layers over half the width, or one (published form)")
    relu: bool = _adapters("relu", help="apply a LeakyReLU after the image projectors")
    levels: tuple[int, ...] | None = _adapters(
        "levels", None, help="blocks whose patch tokens are used, counted from 1", unset="each quarter of the depth"
    )
    text_adapt_weight: float = _adapters("text_adapt_weight", help="share of the adapter output in the text stream")
    image_adapt_weight: float = _adapters("image_adapt_weight", help="share of the adapter output in the image stream")
    text_adapt_until: int | None = _adapters(
        "text_adapt_until", None, help="number of first text blocks with an adapter", unset="a quarter of them"
    )
    image_adapt_until: int | None = _adapters(
        "image_adapt_until", None, help="number of first vision blocks with an adapter", unset="a quarter of them"
    )
    dataset: str = changed(DataArguments, "dataset", help="training data: catalog name, or folder in MVTec's layout")
    training_mode: str = _training("few_shot", "--shot images of each class, or all", choices=("few_shot", "full_shot"))
    shot: int = _training(32, "images of each class in few_shot, half of them anomalous, rounded up", between=IMAGES)
    text_batch_size: int = _training(16, "images in a step of Stage 1, over all processes", between=IMAGES)
    image_batch_size: int = _training(2, "images in a step of Stage 2, over all processes", between=IMAGES)
    accumulate: int = _training(1, "batches whose gradients are accumulated for one optimizer step", between=IMAGES)
    checkpoint_blocks: bool = setting(False, "activation checkpointing: less memory, more time", "machine", free=True)
    text_norm_weight: float = _training(0.1, "weight of the anchors' overlap in Stage 1's loss", between=(0, 1000))
    augment_fill: str = _augmentation("augment_fill", help="fill colour: mean (of CLIP's normalisation), or black")
    augment_resampling: str = _augmentation("augment_resampling", help="interpolation of augmentation")
    augment_moves: str = _augmentation(
        "augment_moves",
        help="rotate and shift in one interpolation, or rotate the normalised image, then shift it by whole pixels",
    )
    jitter_first: bool = _augmentation("jitter_first", help="jitter colours before resizing, not after")
    keep_label: bool = _augmentation("keep_label", help="keep the label anomalous if augmentation removes the anomaly")
    stage1_levels: str = _training("all", "levels in Stage 1's loss; last: a bug of AA-CLIP", choices=("all", "last"))
    focal_smoothing: float = _training(
        0.0, "smoothing of the focal loss, which bounds it for confident errors; 0: none", between=(0, 0.4)
    )
    seed: int = _training(0, "seed of weights, images, their order and augmentation", between=(-(2**63), 2**63 - 1))
    text_lr: float = _schedule(1e-5, "learning rate of Stage 1", between=(0, LARGEST_RATE))
    image_lr: float = _schedule(5e-4, "learning rate of Stage 2", between=(0, LARGEST_RATE))
    save_path: Path = setting(Path("ckpt/base"), "folder of this run", "output", free=True)
    tracker: str = setting(
        "tensorboard", "where to log curves", "output", choices=("tensorboard", "wandb", "none"), free=True
    )

    def unused(self) -> dict[str, str]:
        return {} if self.training_mode == "few_shot" else {"shot": "without --training_mode few_shot"}

    @property
    def frozen(self) -> tuple[str, ...]:
        """Components that are not trained."""
        return ()

    def augmentation(self) -> AugmentationConfig:
        return AugmentationConfig(**{item.name: getattr(self, item.name) for item in fields(AugmentationConfig)})

    def check(self) -> None:
        self.check_processes(env_world_size())

    def check_processes(self, processes: int) -> None:
        """Raise `UserError` if so many processes cannot share the images of a step with the same result."""
        if processes == 1:
            return
        for name in BATCH_SIZES:
            if (images := getattr(self, name)) % processes:
                more = images + processes - images % processes
                raise UserError(
                    f"--{name} {images} cannot be divided among {processes} processes: give a multiple of {processes}, "
                    f"such as {more}, or start another number of processes"
                )
        if self.surgery == "batch_axis":
            raise UserError(
                "--surgery batch_axis mixes the images of a step, so processes cannot share them: start one process, "
                "or give another --surgery"
            )

    def signature(self) -> dict[str, Any]:
        """The values that a resumed run must have in common with its start."""
        values = self.to_dict()
        signature = {item.name: values[item.name] for item in fields(self) if not item.metadata["free"]}
        if self.training_mode == "full_shot":
            del signature["shot"]
        if known_dataset(self.dataset) is None:  # a folder, which may have moved; its list is compared by its digest
            del signature["dataset"]
        return signature


@dataclass(frozen=True)
class BaseConfig(RunConfig):
    """Options of `train.py`."""

    preset: str = _training(
        "recommended", "option values; published: AA-CLIP's code with all its defects", choices=BASE_PRESETS, free=True
    )
    text_epoch: int = _schedule(5, "epochs of Stage 1; 0 keeps CLIP's text embeddings", between=(0, EPOCHS), free=True)
    image_epoch: int = _schedule(20, "epochs of Stage 2", between=(0, EPOCHS), free=True)
    text_side: str = _adapters("text_side", help="anchors from the text encoder, or two learned vectors, a control")
    image_loss_only: bool = _training(
        False, "train only the classification of whole images in Stage 2: needs no masks, but does not train the maps"
    )

    def unused(self) -> dict[str, str]:
        return super().unused() | ({} if self.text_epoch else {"text_side": "without epochs of Stage 1"})

    @classmethod
    def of(cls: type[Config], **explicit: Any) -> Config:
        """As `Arguments.of`; `image_loss_only` implies no epochs of Stage 1, which needs masks."""
        without_stage1 = {"text_epoch": 0} if explicit.get("image_loss_only") else {}
        if without_stage1 and explicit.get("text_epoch"):
            raise UserError("--image_loss_only trains no Stage 1: leave --text_epoch out")
        return super().of(**{**explicit, **without_stage1})


@dataclass(frozen=True)
class CrossAttentionArguments(RunConfig):
    """Options of the scripts with cross-attention: the branches, and the base to start from."""

    text_cross_attn_weight: float = _cross("text_cross_attn_weight", help="weight of text cross-attention; 0: off")
    image_cross_attn_weight: float = _cross("image_cross_attn_weight", help="weight of image cross-attention; 0: off")
    cross_attn_heads: int = _cross("cross_attn_heads", help="attention heads; must divide the text width")
    cross_attn_dropout: float = _cross("cross_attn_dropout", help="dropout of the attention weights during training")
    context_norm: str = _cross(
        "context_norm",
        "layer",
        help="normalisation: unit (context tokens to length 1), layer (layer norm of context and queries), or none",
    )
    cross_attn_residual: str = _cross(
        "cross_attn_residual",
        "matched",
        help="add: add the branch's weighted output; matched: scale it to the stream's length, and blend with the "
        "weight as its share",
    )
    cross_attn_init: str = _cross(
        "cross_attn_init",
        help="initial output projection; with zero, a run starts with exactly its base's outputs (needs residual add)",
    )
    text_conditioning: str = _cross("text_conditioning", help="context of the text cross-attention: the image, or none")
    load_base_text_adapter: Path | None = _base(None, "text_adapter.pth of a base", free=True, unset="from scratch")
    load_base_image_adapter: Path | None = _base(None, "image_adapter.pth of a base", free=True, unset="from scratch")
    allow_partial_base: bool = _base(False, "allow a base of which only one side was trained", free=True)

    def cross_attention(self) -> CrossAttentionConfig:
        """The choices of the forward; those that a feedback loop makes keep their defaults."""
        names = {item.name for item in fields(CrossAttentionConfig)} & {item.name for item in fields(self)}
        return CrossAttentionConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class CrossAttentionRunConfig(CrossAttentionArguments, BaseConfig):
    """Options of `train_cross_attention.py`."""

    not_options: ClassVar = ("text_side",)

    preset: str = changed(
        BaseConfig,
        "preset",
        choices=(*BASE_PRESETS, "v3"),
        help="values of other options; published: AA-CLIP's code with all its defects; v3: image cross-attention only",
    )
    freeze_base: bool = _base(False, "train only the cross-attention")
    save_path: Path = changed(RunConfig, "save_path", Path("ckpt/cross_attention"))

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("text_adapter", "image_adapter") if self.freeze_base else ()

    def check(self) -> None:
        if self.freeze_base and not (self.load_base_text_adapter or self.load_base_image_adapter):
            raise UserError("--freeze_base leaves adapters untrained: give --load_base_text_adapter and _image_adapter")
        super().check()


@dataclass(frozen=True)
class FeedbackConfig(CrossAttentionArguments):
    """Options of `train_cross_attention_feedback_v2.py`, with the defaults of preset v2."""

    not_options: ClassVar = (*FROM_BASE, *BASE_ONLY)

    preset: str = _feedback("v2", "values of other options", choices=FEEDBACK_PRESETS, free=True)
    num_feedback_loops: int = _feedback(5, "loops of Stage 1 and Stage 2", between=(1, MOST_LOOPS), free=True)
    text_epochs_per_loop: tuple[int, ...] = _feedback(
        (5,), "epochs of Stage 1: one number, which decays, or one for each loop", between=(1, EPOCHS), free=True
    )
    image_epochs_per_loop: tuple[int, ...] = _feedback(
        (15,), "epochs of Stage 2: one number, which decays, or one for each loop", between=(1, EPOCHS), free=True
    )
    epochs_decay_rate: float = _feedback(
        0.8, "factor r of the epochs: loop k has floor(first * r^(k - 1)), at least 1", between=(1e-6, 1), free=True
    )
    cross_attn_start_loop: int = _feedback(1, "first loop with cross-attention", between=(1, MOST_LOOPS))
    feedback_features: str = _feedback(
        "branch",
        "image features in Stage 1 from loop 2 on: the trained image branch, or its projectors on frozen tokens",
        choices=("branch", "projectors"),
    )
    order: str = _feedback(
        "stages",
        "stages: Stage 1 trains the text side, then Stage 2 the image side; joint: Stage 2 trains both sides",
        choices=ORDERS,
    )
    init_from: Path | None = _base(None, "checkpoint of all components to start from, instead of a base", free=True)
    eval_dataset: str | None = _feedback(None, "dataset to test on after each loop, to monitor training", free=True)
    val_fraction: float = _feedback(0.0, "share of the training images held out to select a loop", between=(0, 0.99))
    text_lr: float = changed(RunConfig, "text_lr", 2e-5, help="learning rate of Stage 1 in loop 1")
    image_lr: float = changed(RunConfig, "image_lr", 5e-3, help="learning rate of Stage 2 in loop 1")
    lr_decay_per_loop: float = _schedule(0.8, "factor of both learning rates from loop to loop", between=(1e-6, 1))
    lr_schedule: str = _schedule(
        "cosine",
        "schedule in each loop: warm-up then cosine to 0; image rate halved at 50 % and 80 %; or constant",
        choices=("cosine", "multistep", "constant"),
    )
    warmup_epochs: int = _schedule(2, "warm-up epochs of cosine, at most half the stage", between=(0, EPOCHS))
    grad_clip: float = _schedule(1.0, "largest gradient norm; 0: no clipping", between=(0, 1e6))
    optimizer: str = _schedule(
        "adamw", "adamw (betas 0.9 and 0.999, weight decay 0.01) or adam (0.5 and 0.999)", choices=("adam", "adamw")
    )
    reset_optimizers: bool = _schedule(False, "reset the optimizers' moments at the start of each loop")
    save_path: Path = changed(RunConfig, "save_path", Path("ckpt/feedback"))

    def unused(self) -> dict[str, str]:
        reasons = super().unused()
        if self.lr_schedule != "cosine":
            reasons["warmup_epochs"] = "without --lr_schedule cosine"
        if self.num_feedback_loops == 1:
            reasons["feedback_features"] = "in a single loop"
        return reasons

    @property
    def weight_decay(self) -> float:
        return WEIGHT_DECAY[self.optimizer]

    def check_processes(self, processes: int) -> None:
        super().check_processes(processes)
        if processes > 1 and self.order == "joint" and self.text_cross_attn_weight:
            raise UserError(
                "--order joint with text cross-attention trains in one process: leave accelerate launch out, or give "
                "--text_cross_attn_weight 0"
            )
