"""AdaptedCLIP: a frozen CLIP with trainable adapters in both encoders (AA-CLIP, CVPR 2025; docs/method.md)."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from model.adapter_modules import SimpleProj, blend, make_adapter
from model.blocks import full_precision, run_block, run_block_for_class, unit
from model.clip import FrozenCLIP
from model.config import COMPONENTS, LoopForward, ModelConfig, check_depths
from model.frozen import ImageFeatures, SharedStreams, class_embedding, frozen_features
from model.scoring import Outputs, compare, compare_class_token
from model.text import CLIP_TEXT, Prompts, TextModules, encode_classes, pair_anchors


class AnchorVectors(nn.Module):
    """A normal and an abnormal vector, (2, D), which are the anchors of all classes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(unit(torch.randn(2, width)))

    def forward(self, classes: int) -> Tensor:
        """The same anchors for each class, (classes, D, 2)."""
        return unit(full_precision(self.vectors)).T.expand(classes, -1, -1)


class AdaptedCLIP(nn.Module):
    """A frozen CLIP with trainable adapters in both encoders.

    Args:
        clip: the frozen CLIP.
        config: choices of the adapted model.

    Attributes:
        text_adapter: ModuleList of the adapters after the first text blocks and, last, the projector that replaces
            CLIP's text projection; or of `AnchorVectors` alone.
        image_adapter: ModuleDict of `layer_adapters`, `seg_proj` (one projector per level) and `det_proj`.

    Raises:
        UserError: `config` has depths that this CLIP does not have.
    """

    def __init__(self, clip: FrozenCLIP, config: ModelConfig) -> None:
        super().__init__()
        check_depths(config, clip.vision_layers, clip.text_layers)
        self.clip = clip
        self.config = config
        d_t, d_v, d = clip.text_width, clip.vision_width, clip.embed_dim
        text_adapters = [make_adapter(config.adapter, d_t) for _ in range(config.text_adapt_until)]
        self.text_adapter = nn.ModuleList([*text_adapters, SimpleProj(d_t, d, relu=True)])
        if config.text_side == "vectors":
            self.text_adapter = nn.ModuleList([AnchorVectors(d)])
        image_adapters = [make_adapter(config.adapter, d_v) for _ in range(config.image_adapt_until)]
        self.image_adapter = nn.ModuleDict(
            {
                "layer_adapters": nn.ModuleList(image_adapters),
                "seg_proj": nn.ModuleList(SimpleProj(d_v, d, config.relu) for _ in config.levels),
                "det_proj": SimpleProj(d_v, d, config.relu),
            }
        )

    @property
    def components(self) -> dict[str, nn.Module]:
        """The trainable components by the names in checkpoints and logs."""
        return {name: getattr(self, name) for name in COMPONENTS if hasattr(self, name)}

    def trained_components(self, side: str, loop: LoopForward | None = None) -> tuple[str, ...]:
        """Names of the components in the forward of a side, "text" or "image"."""
        return (f"{side}_adapter",)

    @property
    def seg_proj(self) -> nn.ModuleList:
        """The projectors of the levels."""
        return cast(nn.ModuleList, self.image_adapter["seg_proj"])

    @property
    def text_modules(self) -> TextModules:
        """The modules of the text encoder; CLIP's own without text adaptation."""
        if not self.config.text_adapted:
            return CLIP_TEXT
        *adapters, projector = self.text_adapter
        return TextModules(adapters, projector, self.config.text_adapt_weight)

    def anchors(self, prompts: Prompts) -> Tensor:
        """Anchors of all C classes from one text pass, (C, D, 2); CLIP's own without text adaptation."""
        if self.config.text_side == "vectors" and self.config.text_adapted:
            (vectors,) = self.text_adapter
            return vectors(len(prompts.tokens))
        return pair_anchors(encode_classes(self.clip, prompts, self.text_modules), prompts.normal)

    def frozen_features(self, images: Tensor) -> ImageFeatures:
        """CLIP's own features by V-V attention, without gradient: the image features of Stage 1."""
        return frozen_features(self.clip, images, self.config)

    def stage1_features(
        self, images: Tensor, prompts: Prompts, rows: Tensor, loop: LoopForward | None = None
    ) -> ImageFeatures:
        """Image features of Stage 1, without gradient; arguments as for `batch_anchors`."""
        return self.frozen_features(images)

    def encode_image(
        self, images: Tensor, after_first_block: Callable[[Tensor], Tensor] | None = None, with_context: bool = False
    ) -> ImageFeatures:
        """The adapted image branch.

        Args:
            images: (B, 3, S, S), normalised.
            after_first_block: changes the stream (B, 1 + N, D_v) between the first block and its adapter.
            with_context: also compute the context for text, which takes the blocks after the last level.

        Returns:
            Unit patch features (B, N, D) of each level, `det` (B, D), and the context (B, N, D) or None.
        """
        visual = self.clip.clip.visual
        adapters = cast(nn.ModuleList, self.image_adapter["layer_adapters"])
        projectors = dict(zip(self.config.levels, self.seg_proj, strict=True))
        x = self.clip.embed_image(images)
        features, patches = [], x
        depth = self.clip.vision_layers if with_context else self.config.levels[-1]
        for index, block in enumerate(visual.transformer.resblocks[:depth]):
            last = index + 1 == self.clip.vision_layers and index + 1 not in projectors
            x = self.clip.run(run_block_for_class if last else run_block, block, x)
            if index == 0 and after_first_block is not None:
                x = after_first_block(x)
            if index < len(adapters):
                x = blend(x, adapters[index](x), self.config.image_adapt_weight)
            if index + 1 in projectors:
                patches = visual.ln_post(x[:, 1:])
                features.append(unit(projectors[index + 1](patches)))
        det = unit(self.image_adapter["det_proj"](patches)).mean(dim=1)
        context = features[0] + unit(self.clip.project_image(x[:, 0]))[:, None] if with_context else None
        return ImageFeatures(features, det, context)

    def batch_anchors(
        self, prompts: Prompts, rows: Tensor, features: ImageFeatures, loop: LoopForward | None = None
    ) -> Tensor:
        """Anchors of each image of a Stage 1 batch.

        Args:
            prompts: prompts of C classes.
            rows: (B,), each image's class in `prompts`.
            features: the image features of Stage 1, which only cross-attention uses.
            loop: choices of the feedback loop, which only cross-attention uses.

        Returns:
            Anchors with gradient, (B, D, 2).
        """
        return self.anchors(prompts)[rows]

    @torch.no_grad()
    def text_side(self, prompts: Prompts, loop: LoopForward | None = None) -> Any:
        """The text side of `forward`, computed once for all images: anchors (C, D, 2), without gradient."""
        return self.anchors(prompts)

    def forward(self, images: Tensor, text_side: Any, rows: Tensor, shared: SharedStreams | None = None) -> Outputs:
        """Similarities of images to the anchors of their classes: the forward of Stage 2 and of evaluation.

        Args:
            images: (B, 3, S, S), normalised.
            text_side: the result of `text_side`.
            rows: (B,), each image's class in `text_side`.
            shared: frozen streams of these images, shared between models.

        Returns:
            Similarities on the patch grid and of the whole images.
        """
        return self.scored(images, self.encode_image(images), text_side[rows])

    def scored(self, images: Tensor, features: ImageFeatures, anchors: Tensor) -> Outputs:
        """Similarities of `features` of `images` to anchors (B, D, 2); of whole images with `config.image_feature`."""
        outputs = compare(features.levels, features.det, anchors)
        if self.config.image_feature == "projector":
            return outputs
        return outputs._replace(det=compare_class_token(class_embedding(self.clip, images), anchors))
