"""The frozen CLIP: open_clip's model without gradients, always in eval mode (docs/method.md, "Frozen CLIP")."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from model.blocks import BlockRunner
from model.config import ModelConfig, depth_defaults, limits_of
from utils.errors import UserError


class FrozenCLIP(nn.Module):
    """An open_clip CLIP without gradients, always in eval mode.

    Args:
        clip: the open_clip model.
        model_name: its name in errors and checkpoints.
        activation: the activation of its MLPs, "gelu" or "quick_gelu".
        mean: per channel, of the image normalisation.
        std: per channel, of the image normalisation.

    Attributes:
        img_size: side of the square image, pixels; grid: the same in patches.
        vision_width, vision_layers, text_width, text_layers: of the two transformers; embed_dim: of the embeddings.
        weights_digest: digest of all weights except the positions, which are resized with the image.
        run: runs its blocks (`BlockRunner`).
        limits: which images it must not be used for, if that is known.

    Raises:
        UserError: `clip` is not a plain ViT with a causal text transformer.
    """

    def __init__(
        self,
        clip: open_clip.CLIP,
        model_name: str,
        activation: str,
        mean: tuple[float, ...] = open_clip.OPENAI_DATASET_MEAN,
        std: tuple[float, ...] = open_clip.OPENAI_DATASET_STD,
    ) -> None:
        super().__init__()
        check_architecture(clip, model_name)
        self.clip = clip.requires_grad_(False).eval()
        self.model_name = model_name
        self.limits = limits_of(model_name)
        self.activation = activation
        self.mean, self.std = tuple(mean), tuple(std)
        visual = clip.visual
        self.img_size: int = visual.image_size[0]
        self.grid: int = visual.grid_size[0]
        self.vision_width: int = visual.transformer.width
        self.vision_layers = len(visual.transformer.resblocks)
        self.text_width: int = clip.transformer.width
        self.text_layers = len(clip.transformer.resblocks)
        self.embed_dim: int = visual.output_dim
        self.weights_digest = digest_weights(clip)
        self.run = BlockRunner()
        self.eval()

    def train(self, mode: bool = True) -> FrozenCLIP:
        """Stay in eval mode."""
        return super().train(False)

    @property
    def tokenizer(self) -> SimpleTokenizer:
        return _tokenizer(self.clip.context_length)

    @property
    def defaults(self) -> dict[str, Any]:
        """Default levels and adapter depths for this model's depth (docs/method.md, "Depths")."""
        return depth_defaults(self.vision_layers, self.text_layers)

    def model_config(self, **chosen: Any) -> ModelConfig:
        """The config of an adapted model on this CLIP, with the default depths unless others are chosen."""
        fixed = {name: getattr(self, name) for name in ("model_name", "weights_digest", "activation", "img_size")}
        return ModelConfig(**{**self.defaults, **fixed, **chosen})

    def embed_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> token stream before the first block, (B, 1 + N, D_v), class token first."""
        visual = self.clip.visual
        patches = visual.conv1(images).flatten(2).transpose(1, 2)  # (B, N, D_v)
        cls = visual.class_embedding.to(patches.dtype).expand(images.shape[0], 1, -1)
        x = torch.cat([cls, patches], dim=1) + visual.positional_embedding.to(patches.dtype)
        return visual.ln_pre(x)

    def project_image(self, tokens: Tensor) -> Tensor:
        """`ln_post` and CLIP's own visual projection: (..., D_v) -> (..., D)."""
        return self.clip.visual.ln_post(tokens) @ self.clip.visual.proj

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Token ids (P, T) -> text stream before the first block, (P, T, D_t)."""
        return self.clip.token_embedding(tokens) + self.clip.positional_embedding[: tokens.shape[1]]

    def project_text(self, pooled: Tensor) -> Tensor:
        """CLIP's own text projection: (P, D_t) -> (P, D)."""
        projection = self.clip.text_projection
        return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Prompts -> token ids (P, T), cut to the longest prompt; attention is causal, so padding has no effect."""
        tokens = self.tokenizer(prompts)
        return tokens[:, : int(tokens.argmax(dim=-1).max()) + 1]  # the end-of-text token has the largest id


@functools.cache
def _tokenizer(context_length: int) -> SimpleTokenizer:
    """CLIP's tokenizer, cached because its vocabulary is slow to read."""
    return SimpleTokenizer(context_length=context_length)


def digest_weights(clip: nn.Module) -> str:
    """A hex digest of all weights except the visual position embedding, which depends on the image size."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(clip.state_dict().items()):
        if name != "visual.positional_embedding":
            digest.update(name.encode("utf-8"))
            digest.update(value.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def check_architecture(clip: open_clip.CLIP, model_name: str) -> None:
    """`UserError` unless the towers are CLIP's plain ViT and causal text transformer."""
    visual: Any = clip.visual
    plain = isinstance(visual, VisionTransformer) and (
        visual.pool_type == "tok"
        and visual.attn_pool is None
        and visual.proj is not None
        and visual.image_size[0] == visual.image_size[1]
        and clip.attn_mask is not None
        and clip.text_pool_type == "argmax"
        and clip.text_projection is not None
        and {type(block) for block in (*clip.transformer.resblocks, *visual.transformer.resblocks)}
        == {ResidualAttentionBlock}
    )
    if not plain:
        raise UserError(f"{model_name}: only CLIP models with a plain ViT and a causal text transformer can be adapted")
