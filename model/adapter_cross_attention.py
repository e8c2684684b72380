"""AdaptedCLIP with bidirectional cross-attention: text tokens see patches, image tokens see words (docs/method.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.adapter import AdaptedCLIP
from model.adapter_modules import blend
from model.blocks import run_block, take_tokens, unit
from model.clip import FrozenCLIP
from model.config import CrossAttentionConfig, LoopForward, ModelConfig, check_cross_attention
from model.cross_attention import CrossAttention, prepare_context
from model.frozen import ImageFeatures, SharedStreams, frozen_features, projected_features
from model.scoring import Outputs, compare
from model.steps import ALONE, step_mean
from model.text import Prompts, begin_prompts, finish_classes, finish_prompts, pair_anchors
from utils.processes import Share


class TextSide(NamedTuple):
    """What a forward needs of the text side, the same for all images, and what a feedback loop decides of the forward.

    prompts: of C classes; stream: after the first text block, (C, P, T, D_t); context, mask: what image tokens attend
    to, (C, P * T, D_t) and (C, P * T); anchors: (C, D, 2) before they see an image, None where the prompts see it.
    """

    prompts: Prompts
    stream: Tensor
    context: Tensor
    mask: Tensor
    anchors: Tensor | None
    loop: LoopForward


class Attention(NamedTuple):
    """Attention weights, without dropout; each row over the last axes sums to 1.

    text: (B, heads, P, T, N), which patches each token of each prompt looks at, or with `text_cross_attn_at` "anchors"
    (B, heads, 2, N), which patches each anchor looks at; None where text sees no image.
    image: (B, heads, 1 + N, P, T), which words each image token looks at, class token first; None where it sees none.
    words: (B, P, T) bool, the padding mask: True where a token is real. At padding, text has weights that mean nothing,
    image has none.
    """

    text: Tensor | None
    image: Tensor | None
    words: Tensor


class AdaptedCLIPWithCrossAttention(AdaptedCLIP):
    """An `AdaptedCLIP` with `text_cross_attn` and `image_cross_attn`, scaled residuals after the first blocks.

    With `text_cross_attn_at` "anchors" the text side's stands behind the encoder instead, where the anchors are.
    cross: all choices at once, the two weights among them, in place of the two arguments.
    At weight 0 a branch, and the expansion of prompts to each image, is skipped: with both at 0 the outputs are the
    base's, bit for bit. Raises `UserError` for choices that do not exist or do not go together.
    """

    def __init__(
        self,
        clip: FrozenCLIP,
        config: ModelConfig,
        text_cross_attn_weight: float = 0.1,
        image_cross_attn_weight: float = 0.1,
        cross: CrossAttentionConfig | None = None,
    ) -> None:
        super().__init__(clip, config)
        self.cross_config = cross or CrossAttentionConfig(text_cross_attn_weight, image_cross_attn_weight)
        check_cross_attention(self.cross_config, clip.text_width, clip.embed_dim)
        d_t, d_v, d = clip.text_width, clip.vision_width, clip.embed_dim
        chosen = self.cross_config
        same = (
            chosen.cross_attn_heads,
            chosen.cross_attn_dropout,
            chosen.cross_attn_init,
            chosen.cross_attn_scale,
            chosen.context_norm,
        )
        words = d if self.anchors_attend else d_t
        self.text_cross_attn = CrossAttention(words, d, words, chosen.text_cross_attn_weight, *same)
        self.image_cross_attn = CrossAttention(d_v, d_t, d_t, chosen.image_cross_attn_weight, *same)

    @property
    def t_ca_w(self) -> float | Tensor:
        """Weight of the text side's residual."""
        return self.text_cross_attn.scale

    @property
    def i_ca_w(self) -> float | Tensor:
        """Weight of the image side's residual."""
        return self.image_cross_attn.scale

    @property
    def anchors_attend(self) -> bool:
        """Whether the anchors look at the image, where otherwise the words of the prompts do."""
        return self.cross_config.text_cross_attn_at == "anchors"

    @property
    def loop(self) -> LoopForward:
        """What a feedback loop decides of the forward, where no loop is given: as in `cross_config`."""
        return LoopForward(self.cross_config.text_context, self.cross_config.cross_attn_active)

    def text_sees_image(self, loop: LoopForward | None = None) -> bool:
        """Whether anchors depend on the image."""
        on = (loop or self.loop).cross_attn_active and self.text_cross_attn.is_on
        return on and self.cross_config.text_conditioning != "none" and self.config.text_adapted

    def image_sees_text(self, loop: LoopForward | None = None) -> bool:
        """Whether image features depend on the class's words."""
        return (loop or self.loop).cross_attn_active and self.image_cross_attn.is_on

    def trained_components(self, side: str, loop: LoopForward | None = None) -> tuple[str, ...]:
        on = self.text_sees_image(loop) if side == "text" else self.image_sees_text(loop)
        return (f"{side}_adapter", f"{side}_cross_attn") if on else (f"{side}_adapter",)

    @torch.no_grad()
    def text_side(self, prompts: Prompts, loop: LoopForward | None = None) -> TextSide:
        words = self._words(prompts, loop or self.loop)
        if self.text_sees_image(words.loop) and not self.anchors_attend:
            return words
        return words._replace(anchors=self.anchors(prompts))

    def _words(self, prompts: Prompts, loop: LoopForward) -> TextSide:
        """The text side as far as image tokens see it, without anchors."""
        classes, count, length = prompts.tokens.shape
        tokens = prompts.tokens.flatten(0, 1)
        stream = begin_prompts(self.clip, tokens)  # (C * P, T, D_t)
        words = stream
        if self.config.text_adapted and len(self.text_adapter) > 1:
            words = blend(words, self.text_adapter[0](words), self.config.text_adapt_weight)
        context = prepare_context(words, self.cross_config.context_norm).reshape(classes, count * length, -1)
        positions = torch.arange(length, device=tokens.device)
        mask = (positions <= tokens.argmax(dim=-1, keepdim=True)).reshape(classes, count * length)
        return TextSide(prompts, stream.unflatten(0, (classes, count)), context, mask, None, loop)

    @torch.no_grad()
    def stage1_features(
        self, images: Tensor, prompts: Prompts, rows: Tensor, loop: LoopForward | None = None
    ) -> ImageFeatures:
        """Frozen features, or from loop 2 of a feedback run on what Stage 2 has learned (docs/method.md, "Feedback").

        The trained branch sees the words as `text_adapter` makes them now, so that it is the branch of Stage 2.
        """
        loop = loop or self.loop
        if loop.text_context == "trained":
            return self.image_features(images, self._words(prompts, loop), rows)
        return self._features_on_frozen_tokens(images, loop, self.config.levels)

    def _features_on_frozen_tokens(
        self, images: Tensor, loop: LoopForward, levels: Sequence[int], shared: SharedStreams | None = None
    ) -> ImageFeatures:
        if loop.text_context == "projectors":
            return projected_features(self.clip, images, self.config, self.image_adapter["seg_proj"], levels, shared)
        return frozen_features(self.clip, images, self.config, levels, shared)

    def text_context(self, features: ImageFeatures) -> Tensor:
        """What text tokens attend to: the level-0 features with the class embedding in them, (B, N, D)."""
        return prepare_context(features.context, self.cross_config.context_norm)

    def attend_to_image(self, stream: Tensor, context: Tensor) -> Tensor:
        """Text tokens (B, P * T, D_t) after the first block see the patches of their own image, (B, N, D)."""
        cross_out = self.text_cross_attn(stream, context)
        if self.cross_config.cross_attn_residual == "matched":
            return blend(stream, cross_out, self.t_ca_w)
        cross_out_scaled = self.t_ca_w * cross_out
        return stream + cross_out_scaled

    def attend_to_text(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Image tokens (B, 1 + N, D_v) after the first block see the words of their own class, (B, P * T, D_t)."""
        cross_out = self.image_cross_attn(x, context, mask)
        if self.cross_config.cross_attn_residual == "matched":
            return blend(x, cross_out, self.i_ca_w)
        cross_out_scaled = self.i_ca_w * cross_out
        return x + cross_out_scaled

    def anchors_see_image(self, anchors: Tensor, context: Tensor) -> Tensor:
        """Anchors (B, D, 2) see the patches of their own image, (B, N, D), in the joint space; unit again."""
        queries = anchors.transpose(1, 2)
        return unit(blend(queries, self.text_cross_attn(queries, context), self.t_ca_w)).transpose(1, 2)

    def conditioned_anchors(self, prompts: Prompts, start: Tensor, rows: Tensor, context: Tensor) -> Tensor:
        """Anchors of B images, (B, D, 2); from one text pass for each image where its prompts see it.

        start: what sees images, the stream of C classes after the first block (C, P, T, D_t), or their anchors
        (C, D, 2); rows: (B,), each image's class; context: (B, N, D), each image's.
        """
        if self.anchors_attend:
            return self.anchors_see_image(start[rows], context)
        if not (self.text_cross_attn.training and self.text_cross_attn.dropout):
            stream = take_tokens(start.flatten(1, 2), prompts.tree.taken)  # (C, U, D_t)
            x = self.attend_to_image(stream[rows], context)
            features = finish_classes(self.clip, x, prompts.tree.of(rows), **self.text_modules)
            return pair_anchors(features, prompts.normal)
        # Dropout lets each prompt see the image in its own way, also where prompts begin alike.
        tokens = prompts.tokens[rows]  # (B, P, T)
        x = self.attend_to_image(start[rows].flatten(1, 2), context)  # (B, P * T, D_t)
        x = x.unflatten(1, tokens.shape[1:]).flatten(0, 1)  # (B * P, T, D_t)
        features = finish_prompts(self.clip, x, tokens.flatten(0, 1), **self.text_modules)
        return pair_anchors(features.unflatten(0, tokens.shape[:2]), prompts.normal)

    def batch_anchors(
        self,
        prompts: Prompts,
        rows: Tensor,
        features: ImageFeatures,
        loop: LoopForward | None = None,
        share: Share = ALONE,
    ) -> Tensor:
        """Anchors of each image of a batch, (B, D, 2), conditioned as `text_conditioning` says (Stage 1)."""
        if not self.text_sees_image(loop):
            return self.anchors(prompts)[rows]
        if self.anchors_attend:
            start = self.anchors(prompts)
        else:
            start = begin_prompts(self.clip, prompts.tokens.flatten(0, 1)).unflatten(0, prompts.tokens.shape[:2])
        context = self.text_context(features)
        if self.cross_config.text_conditioning == "image":
            return self.conditioned_anchors(prompts, start, rows, context)
        mean = step_mean(context.mean(dim=0, keepdim=True), share)
        mean = prepare_context(mean, self.cross_config.context_norm)
        classes = torch.arange(len(start), device=rows.device)
        return self.conditioned_anchors(prompts, start, classes, mean.expand(len(start), -1, -1))[rows]

    def image_features(self, images: Tensor, text_side: TextSide, rows: Tensor) -> ImageFeatures:
        """The adapted image branch, whose tokens see the words of their class; shapes as in `AdaptedCLIP`."""
        loop = text_side.loop
        with_context = self.text_sees_image(loop) and loop.text_context == "trained"
        if not self.image_sees_text(loop):
            return self.encode_image(images, with_context=with_context)
        context, mask = text_side.context[rows], text_side.mask[rows]
        return self.encode_image(images, lambda x: self.attend_to_text(x, context, mask), with_context)

    def context_features(
        self, images: Tensor, features: ImageFeatures, loop: LoopForward, shared: SharedStreams | None = None
    ) -> ImageFeatures:
        """`features`, those of the trained branch, with what text sees as its `context`: theirs, or frozen ones'."""
        if loop.text_context == "trained":
            return features
        levels = self.config.levels[:1]
        if self.config.surgery != "batch_axis":
            return features._replace(context=self._features_on_frozen_tokens(images, loop, levels, shared).context)
        # Alone: what anchors see in testing must not depend on the batch that an image is in.
        found = [self._features_on_frozen_tokens(batch, loop, levels) for batch in images.split(1)]
        return features._replace(context=torch.cat([one.context for one in found]))

    def forward(
        self, images: Tensor, text_side: TextSide, rows: Tensor, shared: SharedStreams | None = None
    ) -> Outputs:
        """As `AdaptedCLIP.forward`, against anchors that each image conditions; no gradient reaches the text side."""
        features = self.image_features(images, text_side, rows)
        if not self.text_sees_image(text_side.loop):
            return compare(features.levels, features.det, text_side.anchors[rows])
        with torch.no_grad():
            context = self.text_context(self.context_features(images, features, text_side.loop, shared))
            start = text_side.anchors if self.anchors_attend else text_side.stream
            anchors = self.conditioned_anchors(text_side.prompts, start, rows, context)
        return compare(features.levels, features.det, anchors)

    def joint_forward(self, images: Tensor, prompts: Prompts, rows: Tensor, loop: LoopForward | None = None) -> Outputs:
        """`forward` with gradient in both sides; rows: (B,), each image's class in `prompts`."""
        words = self._words(prompts, loop or self.loop)
        features = self.image_features(images, words, rows)
        seen = self.context_features(images, features, words.loop) if self.text_sees_image(words.loop) else features
        return compare(features.levels, features.det, self.batch_anchors(prompts, rows, seen, words.loop))

    @torch.no_grad()
    def attention(self, images: Tensor, text_side: TextSide, rows: Tensor) -> Attention:
        """The weights of both cross-attentions for B images, per head; see `Attention`. For a model in eval mode."""
        text = image = None
        prompt_shape = text_side.prompts.tokens.shape[1:]  # (P, T)
        if self.text_sees_image(text_side.loop):
            features = self.image_features(images, text_side, rows)
            context = self.text_context(self.context_features(images, features, text_side.loop))
            if self.anchors_attend:
                text = self.text_cross_attn.weights(text_side.anchors[rows].transpose(1, 2), context)
            else:
                weights = self.text_cross_attn.weights(text_side.stream[rows].flatten(1, 2), context)
                text = weights.unflatten(2, prompt_shape)
        if self.image_sees_text(text_side.loop):
            x = run_block(self.clip.clip.visual.transformer.resblocks[0], self.clip.embed_image(images))
            weights = self.image_cross_attn.weights(x, text_side.context[rows], text_side.mask[rows])
            image = weights.unflatten(3, prompt_shape)
        return Attention(text, image, text_side.mask[rows].unflatten(1, prompt_shape))
