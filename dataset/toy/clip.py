"""The toy CLIP (docs/toy_world.md): open_clip's own model, a faster way to encode drawings, and its export."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, SimpleTokenizer
from open_clip.model import CLIP
from open_clip.transformer import text_global_pool
from safetensors.torch import save_file
from torch import Tensor

from utils.files import replacing, write_json

IMAGE_SIZE = 96  # pixels
PATCH_SIZE = 8
CONTEXT_LENGTH = 77
CONFIG: dict[str, Any] = {
    "embed_dim": 96,
    "quick_gelu": True,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 8, "width": 96, "head_width": 48, "patch_size": PATCH_SIZE},
    "text_cfg": {"context_length": CONTEXT_LENGTH, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 4},
}


def tokenize(captions: list[str]) -> Tensor:
    """Tokens (B, T) of captions, without the padding behind the longest."""
    return trim(SimpleTokenizer(context_length=CONTEXT_LENGTH)(captions))


def trim(tokens: Tensor) -> Tensor:
    """Drop the columns behind the last end-of-text token, the largest id of a row."""
    return tokens[:, : int(tokens.argmax(dim=-1).max()) + 1]


def encode_images(model: CLIP, images: NDArray[np.uint8], keep: Tensor | None = None) -> Tensor:
    """Unit features of the class token and of the patches, (B, 1 + K, D).

    Args:
        model: The toy CLIP.
        images: (B, S, S, 3).
        keep: (B, K), the patches to encode. Default: all; then the class token is open_clip's own image feature.
    """
    visual = model.visual
    device = visual.conv1.weight.device
    patches = _patches(images).to(device)
    positions = visual.positional_embedding[1:].expand(len(patches), -1, -1)
    if keep is not None:
        patches = patches.take_along_dim(keep[..., None], dim=1)
        positions = positions.take_along_dim(keep[..., None], dim=1)
    channel = [value for value in range(3) for _ in range(patches.shape[-1] // 3)]
    mean = torch.tensor(OPENAI_DATASET_MEAN, device=device)[channel]
    std = torch.tensor(OPENAI_DATASET_STD, device=device)[channel]
    x = ((patches.float() / 255 - mean) / std) @ visual.conv1.weight.flatten(1).T + positions
    cls = (visual.class_embedding + visual.positional_embedding[0]).expand(len(x), 1, -1)
    x = visual.ln_pre(torch.cat([cls, x], dim=1))
    return F.normalize(visual.ln_post(visual.transformer(x)) @ visual.proj, dim=-1)


def _patches(images: NDArray[np.uint8]) -> Tensor:
    """Images (B, S, S, 3) as (B, N, 3 * P * P), in the order of the patch embedding's weights."""
    grid = IMAGE_SIZE // PATCH_SIZE
    cells = torch.from_numpy(np.array(images)).view(-1, grid, PATCH_SIZE, grid, PATCH_SIZE, 3)
    return cells.permute(0, 1, 3, 5, 2, 4).reshape(len(images), grid * grid, 3 * PATCH_SIZE * PATCH_SIZE)


def encode_text(model: CLIP, tokens: Tensor) -> Tensor:
    """Unit text features (B, D) of tokens (B, T); attention is causal, so the padding need not be encoded."""
    length = tokens.shape[1]
    tokens = tokens.to(model.positional_embedding.device)
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    x = text_global_pool(x, tokens, model.text_pool_type, eos_token_id=getattr(model, "text_eos_id", None))
    return F.normalize(x @ model.text_projection, dim=-1)


def export_toy_clip(model: CLIP, folder: Path) -> None:
    """Write an open_clip `local-dir:` folder: configuration and float16 weights, each file replaced as a whole."""
    config = {
        "model_cfg": CONFIG,
        "preprocess_cfg": {
            "mean": list(OPENAI_DATASET_MEAN),
            "std": list(OPENAI_DATASET_STD),
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }
    write_json(folder / "open_clip_config.json", config)
    weights = {key: value.detach().cpu().half().contiguous() for key, value in model.state_dict().items()}
    with replacing(folder / "open_clip_model.safetensors") as temporary:
        save_file(weights, temporary)
        temporary.chmod(0o644)
