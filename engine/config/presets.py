"""All presets: a table of option values each. A script uses the values of the options that it has."""

from __future__ import annotations

from typing import Any

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

# The base of this project (docs/method.md).
RECOMMENDED: dict[str, Any] = {
    "activation": None,
    "surgery": "dual",
    "adapter": "bottleneck",
    "training_mode": "few_shot",
    "class_names": None,
    "mask_threshold": 0.5,
    "augment_resampling": "bilinear",
    "augment_moves": "joint",
    "jitter_first": False,
    "keep_label": False,
    "stage1_levels": "all",
    "focal_smoothing": 0.0,
}

# The base of AA-CLIP's published code, with all its defects.
PUBLISHED: dict[str, Any] = {
    "activation": "gelu",
    "surgery": "batch_axis",
    "adapter": "linear",
    "training_mode": "full_shot",
    "class_names": "published",
    "mask_threshold": "nonzero",
    "augment_resampling": "nearest",
    "augment_moves": "separate",
    "jitter_first": True,
    "keep_label": True,
    "stage1_levels": "last",
    "focal_smoothing": 1e-5,
}

# The second version of feedback training, with a matched residual and a layer-normalised context.
V2: dict[str, Any] = {
    "num_feedback_loops": 5,
    "text_epochs_per_loop": (5,),
    "image_epochs_per_loop": (15,),
    "epochs_decay_rate": 0.8,
    "order": "stages",
    "text_lr": 2e-5,
    "image_lr": 5e-3,
    "lr_decay_per_loop": 0.8,
    "lr_schedule": "cosine",
    "warmup_epochs": 2,
    "optimizer": "adamw",
    "grad_clip": 1.0,
    "reset_optimizers": False,
    "text_cross_attn_weight": 0.1,
    "image_cross_attn_weight": 0.1,
    "context_norm": "layer",
    "cross_attn_residual": "matched",
    "cross_attn_init": "xavier",
}

# The first version, with the weights reduced to 0.1.
V1: dict[str, Any] = {
    "num_feedback_loops": 3,
    "text_epochs_per_loop": (5, 3, 2),
    "image_epochs_per_loop": (20, 10, 5),
    "epochs_decay_rate": 0.5,
    "order": "stages",
    "text_lr": 1e-5,
    "image_lr": 5e-4,
    "lr_decay_per_loop": 0.5,
    "lr_schedule": "multistep",
    "warmup_epochs": 0,
    "optimizer": "adam",
    "grad_clip": 0.0,
    "reset_optimizers": True,
    "text_cross_attn_weight": 0.1,
    "image_cross_attn_weight": 0.1,
    "context_norm": "none",
    "cross_attn_residual": "add",
    "cross_attn_init": "xavier",
}

# The first version unchanged, with both weights at 1.
V1_ORIGINAL: dict[str, Any] = {**V1, "text_cross_attn_weight": 1.0, "image_cross_attn_weight": 1.0}

# The best variant on the toy world (docs/results.md): image cross-attention only, joint Stage 2, constant rates.
V3: dict[str, Any] = {
    "num_feedback_loops": 3,
    "text_epochs_per_loop": (2,),
    "image_epochs_per_loop": (7,),
    "epochs_decay_rate": 1.0,
    "order": "joint",
    "text_lr": 1e-5,
    "image_lr": 5e-4,
    "lr_decay_per_loop": 1.0,
    "lr_schedule": "constant",
    "warmup_epochs": 0,
    "optimizer": "adam",
    "grad_clip": 0.0,
    "reset_optimizers": False,
    "text_cross_attn_weight": 0.0,
    "image_cross_attn_weight": 1.0,
    "context_norm": "layer",
    "cross_attn_residual": "add",
    "cross_attn_init": "zero",
}

PRESETS = {
    "toy": TOY,
    "recommended": RECOMMENDED,
    "published": PUBLISHED,
    "v3": V3,
    "v2": V2,
    "v1": V1,
    "v1_original": V1_ORIGINAL,
}
RECIPES = ("toy",)
BASE_PRESETS = ("recommended", "published")
FEEDBACK_PRESETS = ("v3", "v2", "v1", "v1_original")
