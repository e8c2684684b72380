"""AdaptedCLIP with bidirectional cross-attention: text tokens see image patches, image tokens see words (DESIGN 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.adapter import AdaptedCLIP
from model.adapter_modules import blend
from model.blocks import run_block, unit
from model.clip import FrozenCLIP
from model.config import CrossAttentionConfig, ModelConfig, check_cross_attention
from model.cross_attention import CrossAttention, prepare_context
from model.frozen import ImageFeatures, frozen_features
from model.scoring import Outputs, compare
from model.text import Prompts, begin_prompts, finish_prompts, pair_anchors

COMPONENTS = ("text_adapter", "text_cross_attn", "image_adapter", "image_cross_attn")


class TextSide(NamedTuple):
    """What a forward needs of the text side, the same for all images.

    prompts: of C classes; stream: after the first text block, (C, P, T, D_t); context, mask: what image tokens attend
    to, (C, P * T, D_t) and (C, P * T); anchors: (C, D, 2) where they do not depend on the image, otherwise None.
    """

    prompts: Prompts
    stream: Tensor
    context: Tensor
    mask: Tensor
    anchors: Tensor | None


class Attention(NamedTuple):
    """Attention weights, without dropout; each row over the last axes sums to 1.

    text: (B, heads, P, T, N), which patches each token of each prompt looks at; None where text sees no image.
    image: (B, heads, 1 + N, P, T), which words each image token looks at, class token first; None where it sees none.
    """

    text: Tensor | None
    image: Tensor | None


class AdaptedCLIPWithCrossAttention(AdaptedCLIP):
    """An `AdaptedCLIP` with `text_cross_attn` and `image_cross_attn`, scaled residuals after the first blocks.

    At weight 0 a branch, and the expansion of prompts to each image, is skipped: with both at 0 the outputs are the
    base's, bit for bit. Raises `UserError` for choices that do not exist.
    """

    def __init__(
        self,
        clip: FrozenCLIP,
        config: ModelConfig,
        text_cross_attn_weight: float = 0.1,
        image_cross_attn_weight: float = 0.1,
        cross_attn_heads: int = 8,
        cross_attn_dropout: float = 0.1,
        context_norm: str = "unit",
        cross_attn_init: str = "xavier",
        cross_attn_scale: str = "fixed",
        text_conditioning: str = "image",
        text_context: str = "frozen",
    ) -> None:
        super().__init__(clip, config)
        self.cross_config = CrossAttentionConfig(
            text_cross_attn_weight,
            image_cross_attn_weight,
            cross_attn_heads,
            cross_attn_dropout,
            context_norm,
            cross_attn_init,
            cross_attn_scale,
            text_conditioning,
            text_context,
        )
        check_cross_attention(self.cross_config, clip.text_width)
        d_t, d_v, d = clip.text_width, clip.vision_width, clip.embed_dim
        same = (cross_attn_heads, cross_attn_dropout, cross_attn_init, cross_attn_scale)
        self.text_cross_attn = CrossAttention(d_t, d, d_t, text_cross_attn_weight, *same)
        self.image_cross_attn = CrossAttention(d_v, d_t, d_t, image_cross_attn_weight, *same)

    @property
    def components(self) -> dict[str, nn.Module]:
        return {name: getattr(self, name) for name in COMPONENTS}

    @property
    def t_ca_w(self) -> float | Tensor:
        """Weight of the text side's residual."""
        return self.text_cross_attn.scale

    @property
    def i_ca_w(self) -> float | Tensor:
        """Weight of the image side's residual."""
        return self.image_cross_attn.scale

    @property
    def text_sees_image(self) -> bool:
        """Whether anchors depend on the image."""
        on = self.text_cross_attn.is_on and self.cross_config.text_conditioning != "none"
        return on and self.config.text_adapted

    def trained_components(self, side: str) -> tuple[str, ...]:
        on = self.text_sees_image if side == "text" else self.image_cross_attn.is_on
        return (f"{side}_adapter", f"{side}_cross_attn") if on else (f"{side}_adapter",)

    @torch.no_grad()
    def text_side(self, prompts: Prompts) -> TextSide:
        classes, count, length = prompts.tokens.shape
        tokens = prompts.tokens.flatten(0, 1)
        stream = begin_prompts(self.clip, tokens)  # (C * P, T, D_t)
        words = stream
        if self.config.text_adapted and len(self.text_adapter) > 1:
            words = blend(words, self.text_adapter[0](words), self.config.text_adapt_weight)
        context = prepare_context(words, self.cross_config.context_norm).reshape(classes, count * length, -1)
        positions = torch.arange(length, device=tokens.device)
        mask = (positions <= tokens.argmax(dim=-1, keepdim=True)).reshape(classes, count * length)
        anchors = None if self.text_sees_image else self.anchors(prompts)
        return TextSide(prompts, stream.unflatten(0, (classes, count)), context, mask, anchors)

    def text_context(self, features: ImageFeatures) -> Tensor:
        """What text tokens attend to: the level-0 features with the class embedding in them, (B, N, D)."""
        first = features.levels[0]
        if self.cross_config.text_context == "trained":
            first = first + features.embedding[:, None]
        return prepare_context(first, self.cross_config.context_norm)

    def attend_to_image(self, stream: Tensor, context: Tensor) -> Tensor:
        """Text tokens (B, P * T, D_t) after the first block see the patches of their own image, (B, N, D)."""
        cross_out = self.text_cross_attn(stream, context)
        cross_out_scaled = self.t_ca_w * cross_out
        return stream + cross_out_scaled

    def attend_to_text(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Image tokens (B, 1 + N, D_v) after the first block see the words of their own class, (B, P * T, D_t)."""
        cross_out = self.image_cross_attn(x, context, mask)
        cross_out_scaled = self.i_ca_w * cross_out
        return x + cross_out_scaled

    def conditioned_anchors(self, prompts: Prompts, stream: Tensor, rows: Tensor, context: Tensor) -> Tensor:
        """Anchors of B images from one text pass, (B, D, 2).

        stream: (C, P, T, D_t) after the first block; rows: (B,), each image's class; context: (B, N, D), each image's.
        """
        tokens = prompts.tokens[rows]  # (B, P, T)
        x = self.attend_to_image(stream[rows].flatten(1, 2), context)  # (B, P * T, D_t)
        x = x.unflatten(1, tokens.shape[1:]).flatten(0, 1)  # (B * P, T, D_t)
        features = finish_prompts(self.clip, x, tokens.flatten(0, 1), **self.text_modules)
        return pair_anchors(features.unflatten(0, tokens.shape[:2]), prompts.normal)

    def batch_anchors(self, prompts: Prompts, rows: Tensor, features: ImageFeatures) -> Tensor:
        """Anchors of each image of a batch, (B, D, 2), conditioned as `text_conditioning` says (Stage 1)."""
        if not self.text_sees_image:
            return self.anchors(prompts)[rows]
        stream = begin_prompts(self.clip, prompts.tokens.flatten(0, 1)).unflatten(0, prompts.tokens.shape[:2])
        context = self.text_context(features)
        if self.cross_config.text_conditioning == "image":
            return self.conditioned_anchors(prompts, stream, rows, context)
        mean = context.mean(dim=0, keepdim=True)
        mean = unit(mean) if self.cross_config.context_norm == "unit" else mean
        classes = torch.arange(len(stream), device=rows.device)
        return self.conditioned_anchors(prompts, stream, classes, mean.expand(len(stream), -1, -1))[rows]

    def image_features(self, images: Tensor, text_side: TextSide, rows: Tensor) -> ImageFeatures:
        """The adapted image branch, whose tokens see the words of their class; shapes as in `AdaptedCLIP`."""
        with_embedding = self.text_sees_image and self.cross_config.text_context == "trained"
        if not self.image_cross_attn.is_on:
            return self.encode_image(images, with_embedding=with_embedding)
        context, mask = text_side.context[rows], text_side.mask[rows]
        return self.encode_image(images, lambda x: self.attend_to_text(x, context, mask), with_embedding)

    def context_features(self, images: Tensor, features: ImageFeatures) -> ImageFeatures:
        """The features that text sees: of the trained branch, or frozen ones, of which the first level is enough."""
        if self.cross_config.text_context == "trained":
            return features
        return frozen_features(self.clip, images, self.config, self.config.levels[:1])

    def forward(self, images: Tensor, text_side: TextSide, rows: Tensor) -> Outputs:
        """As `AdaptedCLIP.forward`, against anchors that each image conditions; no gradient reaches the text side."""
        features = self.image_features(images, text_side, rows)
        if text_side.anchors is not None:
            return compare(features.levels, features.det, text_side.anchors[rows])
        with torch.no_grad():
            context = self.text_context(self.context_features(images, features))
            anchors = self.conditioned_anchors(text_side.prompts, text_side.stream, rows, context)
        return compare(features.levels, features.det, anchors)

    @torch.no_grad()
    def attention(self, images: Tensor, text_side: TextSide, rows: Tensor) -> Attention:
        """The weights of both cross-attentions for B images, per head; see `Attention`. For a model in eval mode."""
        text = image = None
        prompt_shape = text_side.prompts.tokens.shape[1:]  # (P, T)
        if self.text_sees_image:
            features = self.image_features(images, text_side, rows)
            context = self.text_context(self.context_features(images, features))
            weights = self.text_cross_attn.weights(text_side.stream[rows].flatten(1, 2), context)
            text = weights.unflatten(2, prompt_shape)
        if self.image_cross_attn.is_on:
            x = run_block(self.clip.clip.visual.transformer.resblocks[0], self.clip.embed_image(images))
            weights = self.image_cross_attn.weights(x, text_side.context[rows], text_side.mask[rows])
            image = weights.unflatten(3, prompt_shape)
        return Attention(text, image)
