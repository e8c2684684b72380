"""AdaptedCLIP with bidirectional cross-attention: text tokens see patches, image tokens see words (docs/method.md)."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from model.adapter import AdaptedCLIP
from model.adapter_modules import blend
from model.blocks import run_block, take_tokens
from model.clip import FrozenCLIP
from model.config import SIDES, CrossAttentionConfig, LoopForward, ModelConfig, check_cross_attention
from model.cross_attention import CrossAttention, prepare_context
from model.frozen import ImageFeatures, SharedStreams, frozen_features
from model.scoring import Outputs, compare
from model.text import Prompts, begin_prompts, finish_classes, finish_prompts, pair_anchors


class TextSide(NamedTuple):
    """The text side of a forward, shared by all images.

    prompts: of C classes; stream: after the first text block, (C, P, T, D_t); context, mask: the context of the image
    tokens, (C, P * T, D_t) and (C, P * T); anchors: (C, D, 2), None if they are conditioned on each image; loop: the
    choices of the feedback loop.
    """

    prompts: Prompts
    stream: Tensor
    context: Tensor
    mask: Tensor
    anchors: Tensor | None
    loop: LoopForward


class Attention(NamedTuple):
    """Attention weights without dropout; each row over the context axes sums to 1.

    text: (B, heads, P, T, N), from each prompt token to the patches; None if text is not conditioned on images.
    image: (B, heads, 1 + N, P, T), from each image token to the words, class token first; None if that side is off.
    words: (B, P, T) bool, True for real tokens. The text weights of padding have no meaning, its image weights are 0.
    """

    text: Tensor | None
    image: Tensor | None
    words: Tensor


class AdaptedCLIPWithCrossAttention(AdaptedCLIP):
    """An `AdaptedCLIP` with `text_cross_attn` and `image_cross_attn` after the first blocks (docs/method.md).

    A branch of weight 0 is skipped. With both at 0 the outputs equal those of `AdaptedCLIP`, bit for bit.

    Args:
        clip: the frozen CLIP.
        config: choices of the adapted model.
        text_cross_attn_weight: weight of the text side's residual.
        image_cross_attn_weight: weight of the image side's residual.
        cross: all choices of cross-attention, including both weights; replaces the two arguments above.

    Raises:
        UserError: for invalid or conflicting choices.
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
        check_cross_attention(self.cross_config, clip.text_width)
        d_t, d_v, d = clip.text_width, clip.vision_width, clip.embed_dim
        chosen = self.cross_config
        shared = (chosen.cross_attn_heads, chosen.cross_attn_dropout, chosen.cross_attn_init, chosen.context_norm)
        self.text_cross_attn = CrossAttention(d_t, d, d_t, chosen.text_cross_attn_weight, *shared)
        self.image_cross_attn = CrossAttention(d_v, d_t, d_t, chosen.image_cross_attn_weight, *shared)

    @property
    def components(self) -> dict[str, nn.Module]:
        """As in `AdaptedCLIP`, without branches of weight 0."""
        off = {f"{side}_cross_attn" for side in SIDES} - {f"{side}_cross_attn" for side in self.cross_config.sides}
        return {name: part for name, part in super().components.items() if name not in off}

    @property
    def t_ca_w(self) -> float:
        """Weight of the text side's residual."""
        return self.text_cross_attn.weight

    @property
    def i_ca_w(self) -> float:
        """Weight of the image side's residual."""
        return self.image_cross_attn.weight

    @property
    def loop(self) -> LoopForward:
        """The loop's choices of `cross_config`, used if no loop is passed."""
        return LoopForward(self.cross_config.text_context, self.cross_config.cross_attn_active)

    def text_sees_image(self, loop: LoopForward | None = None) -> bool:
        """Whether anchors depend on the image."""
        on = (loop or self.loop).cross_attn_active and self.t_ca_w != 0
        return on and self.cross_config.text_conditioning != "none" and self.config.text_adapted

    def image_sees_text(self, loop: LoopForward | None = None) -> bool:
        """Whether image features depend on the class's words."""
        return (loop or self.loop).cross_attn_active and self.i_ca_w != 0

    def trained_components(self, side: str, loop: LoopForward | None = None) -> tuple[str, ...]:
        on = self.text_sees_image(loop) if side == "text" else self.image_sees_text(loop)
        return (f"{side}_adapter", f"{side}_cross_attn") if on else (f"{side}_adapter",)

    @torch.no_grad()
    def text_side(self, prompts: Prompts, loop: LoopForward | None = None) -> TextSide:
        words = self._words(prompts, loop or self.loop)
        return words if self.text_sees_image(words.loop) else words._replace(anchors=self.anchors(prompts))

    def _words(self, prompts: Prompts, loop: LoopForward) -> TextSide:
        """The text side without anchors."""
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
        """Frozen features, or those that Stage 2 has trained if the loop says so (docs/method.md, "Feedback").

        The trained branch sees the words of the current `text_adapter`, as in Stage 2.
        """
        loop = loop or self.loop
        if loop.text_context == "trained":
            return self.image_features(images, self._words(prompts, loop), rows)
        return self._features_on_frozen_tokens(images, loop, self.config.levels)

    def _features_on_frozen_tokens(
        self, images: Tensor, loop: LoopForward, levels: Sequence[int], shared: SharedStreams | None = None
    ) -> ImageFeatures:
        projectors = self.seg_proj if loop.text_context == "projectors" else None
        return frozen_features(self.clip, images, self.config, levels, shared, projectors)

    def text_context(self, features: ImageFeatures) -> Tensor:
        """The context of text tokens: first-level features plus the class embedding, (B, N, D)."""
        assert features.context is not None
        return prepare_context(features.context, self.cross_config.context_norm)

    def attend_to_image(self, stream: Tensor, context: Tensor) -> Tensor:
        """Text tokens (B, P * T, D_t) after the first block attend to their image's patches, (B, N, D)."""
        cross_out = self.text_cross_attn(stream, context)
        if self.cross_config.cross_attn_residual == "matched":
            return blend(stream, cross_out, self.t_ca_w)
        cross_out_scaled = self.t_ca_w * cross_out
        return stream + cross_out_scaled

    def attend_to_text(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Image tokens (B, 1 + N, D_v) after the first block attend to their class's words, (B, P * T, D_t)."""
        cross_out = self.image_cross_attn(x, context, mask)
        if self.cross_config.cross_attn_residual == "matched":
            return blend(x, cross_out, self.i_ca_w)
        cross_out_scaled = self.i_ca_w * cross_out
        return x + cross_out_scaled

    def conditioned_anchors(self, prompts: Prompts, stream: Tensor, rows: Tensor, context: Tensor) -> Tensor:
        """Anchors of B images, (B, D, 2), from one text pass for each image.

        stream: of C classes after the first block, (C, P, T, D_t); rows: (B,), each image's class; context: (B, N, D).
        """
        if not (self.text_cross_attn.training and self.text_cross_attn.dropout):
            stream = take_tokens(stream.flatten(1, 2), prompts.tree.taken)  # (C, U, D_t)
            x = self.attend_to_image(stream[rows], context)
            features = finish_classes(self.clip, x, prompts.tree.of(rows), self.text_modules)
            return pair_anchors(features, prompts.normal)
        # Dropout differs between prompts, so their shared prefixes differ too.
        tokens = prompts.tokens[rows]  # (B, P, T)
        x = self.attend_to_image(stream[rows].flatten(1, 2), context)  # (B, P * T, D_t)
        x = x.unflatten(1, tokens.shape[1:]).flatten(0, 1)  # (B * P, T, D_t)
        features = finish_prompts(self.clip, x, tokens.flatten(0, 1), self.text_modules)
        return pair_anchors(features.unflatten(0, tokens.shape[:2]), prompts.normal)

    def batch_anchors(
        self, prompts: Prompts, rows: Tensor, features: ImageFeatures, loop: LoopForward | None = None
    ) -> Tensor:
        """Anchors of each image of a batch, (B, D, 2), conditioned on its `features` (Stage 1)."""
        if not self.text_sees_image(loop):
            return self.anchors(prompts)[rows]
        stream = begin_prompts(self.clip, prompts.tokens.flatten(0, 1)).unflatten(0, prompts.tokens.shape[:2])
        return self.conditioned_anchors(prompts, stream, rows, self.text_context(features))

    def image_features(self, images: Tensor, text_side: TextSide, rows: Tensor) -> ImageFeatures:
        """`encode_image` with image tokens that attend to the words of their class; rows: (B,), each image's class."""
        loop = text_side.loop
        with_context = self.text_sees_image(loop) and loop.text_context == "trained"
        if not self.image_sees_text(loop):
            return self.encode_image(images, with_context=with_context)
        context, mask = text_side.context[rows], text_side.mask[rows]
        return self.encode_image(images, lambda x: self.attend_to_text(x, context, mask), with_context)

    def context_features(
        self, images: Tensor, features: ImageFeatures, loop: LoopForward, shared: SharedStreams | None = None
    ) -> ImageFeatures:
        """`features` of the trained branch with the `context` that the loop asks for, trained or frozen."""
        if loop.text_context == "trained":
            return features
        levels = self.config.levels[:1]
        if self.config.surgery != "batch_axis":
            return features._replace(context=self._features_on_frozen_tokens(images, loop, levels, shared).context)
        # One by one: scores must not depend on the batch that an image is in.
        alone = [self._features_on_frozen_tokens(image, loop, levels) for image in images.split(1)]
        return features._replace(context=torch.cat([cast(Tensor, one.context) for one in alone]))

    def forward(
        self, images: Tensor, text_side: TextSide, rows: Tensor, shared: SharedStreams | None = None
    ) -> Outputs:
        """As `AdaptedCLIP.forward`, with anchors conditioned on each image; the text side receives no gradient."""
        features = self.image_features(images, text_side, rows)
        if text_side.anchors is not None:
            return self.scored(images, features, text_side.anchors[rows])
        with torch.no_grad():
            context = self.text_context(self.context_features(images, features, text_side.loop, shared))
            anchors = self.conditioned_anchors(text_side.prompts, text_side.stream, rows, context)
        return self.scored(images, features, anchors)

    def joint_forward(self, images: Tensor, prompts: Prompts, rows: Tensor, loop: LoopForward | None = None) -> Outputs:
        """`forward` with gradients on both sides; rows: (B,), each image's class in `prompts`."""
        words = self._words(prompts, loop or self.loop)
        features = self.image_features(images, words, rows)
        seen = self.context_features(images, features, words.loop) if self.text_sees_image(words.loop) else features
        return compare(features.levels, features.det, self.batch_anchors(prompts, rows, seen, words.loop))

    @torch.no_grad()
    def attention(self, images: Tensor, text_side: TextSide, rows: Tensor) -> Attention:
        """Weights of both cross-attentions for B images, per head (see `Attention`). For a model in eval mode."""
        text = image = None
        prompt_shape = text_side.prompts.tokens.shape[1:]  # (P, T)
        if self.text_sees_image(text_side.loop):
            features = self.image_features(images, text_side, rows)
            context = self.text_context(self.context_features(images, features, text_side.loop))
            weights = self.text_cross_attn.attention_weights(text_side.stream[rows].flatten(1, 2), context)
            text = weights.unflatten(2, prompt_shape)
        if self.image_sees_text(text_side.loop):
            x = run_block(self.clip.clip.visual.transformer.resblocks[0], self.clip.embed_image(images))
            weights = self.image_cross_attn.attention_weights(x, text_side.context[rows], text_side.mask[rows])
            image = weights.unflatten(3, prompt_shape)
        return Attention(text, image, text_side.mask[rows].unflatten(1, prompt_shape))
