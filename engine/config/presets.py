"""All presets, as tables of option values. A script uses the values of the options that it has."""

from typing import Any

RECIPES = ("toy",)

# `--recipe toy`: the toy CLIP, with rates and depths for it. It is applied after a preset.
TOY: dict[str, Any] = {
    "model_name": "toy",
    "text_adapt_until": 2,
    "text_adapt_weight": 0.3,
    "training_mode": "full_shot",
    "image_batch_size": 8,
    "text_norm_weight": 3.0,
    "text_lr": 1e-3,
    "image_lr": 1e-3,
}

# The bases of this project (docs/method.md), which is the default, and of AA-CLIP's code, with all its defects.
BASE: dict[str, tuple[Any, ...]] = {
    # option: recommended, published
    "activation": (None, "gelu"),
    "surgery": ("dual", "batch_axis"),
    "adapter": ("bottleneck", "linear"),
    "training_mode": ("few_shot", "full_shot"),
    "class_names": (None, "published"),
    "mask_threshold": (0.5, "nonzero"),
    "augment_resampling": ("bilinear", "nearest"),
    "augment_moves": ("joint", "separate"),
    "jitter_first": (False, True),
    "keep_label": (False, True),
    "stage1_levels": ("all", "last"),
    "focal_smoothing": (0.0, 1e-5),
}

# v3 is the best variant on the toy dataset (docs/results.md): image cross-attention only, a joint Stage 2 and constant
# rates. v2, the default, is the second version with a matched residual and a layer-normalised context. v1 is the first
# version with the weights reduced to 0.1.
FEEDBACK: dict[str, tuple[Any, ...]] = {
    # option: v3, v2, v1, v1_original
    "num_feedback_loops": (3, 5, 3, 3),
    "text_epochs_per_loop": ((2,), (5,), (5, 3, 2), (5, 3, 2)),
    "image_epochs_per_loop": ((7,), (15,), (20, 10, 5), (20, 10, 5)),
    "epochs_decay_rate": (1.0, 0.8, 0.5, 0.5),
    "order": ("joint", "stages", "stages", "stages"),
    "text_lr": (1e-5, 2e-5, 1e-5, 1e-5),
    "image_lr": (5e-4, 5e-3, 5e-4, 5e-4),
    "lr_decay_per_loop": (1.0, 0.8, 0.5, 0.5),
    "lr_schedule": ("constant", "cosine", "multistep", "multistep"),
    "warmup_epochs": (0, 2, 0, 0),
    "optimizer": ("adam", "adamw", "adam", "adam"),
    "grad_clip": (0.0, 1.0, 0.0, 0.0),
    "reset_optimizers": (False, False, True, True),
    "text_cross_attn_weight": (0.0, 0.1, 0.1, 1.0),
    "image_cross_attn_weight": (1.0, 0.1, 0.1, 1.0),
    "context_norm": ("layer", "layer", "none", "none"),
    "cross_attn_residual": ("add", "matched", "add", "add"),
    "cross_attn_init": ("zero", "xavier", "xavier", "xavier"),
}


def _columns(names: tuple[str, ...], table: dict[str, tuple[Any, ...]]) -> dict[str, dict[str, Any]]:
    columns = zip(*table.values(), strict=True)
    return {name: dict(zip(table, column, strict=True)) for name, column in zip(names, columns, strict=True)}


BASE_PRESETS = _columns(("recommended", "published"), BASE)
FEEDBACK_PRESETS = _columns(("v3", "v2", "v1", "v1_original"), FEEDBACK)
PRESETS = {"toy": TOY, **BASE_PRESETS, **FEEDBACK_PRESETS}
