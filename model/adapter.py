"""AdaptedCLIP: a frozen CLIP with trainable adapters in both encoders (AA-CLIP, CVPR 2025; docs/method.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model.adapter_modules import SimpleProj, blend, make_adapter
from model.blocks import run_block, run_block_for_class, unit
from model.clip import FrozenCLIP
from model.config import COMPONENTS, LoopForward, ModelConfig, check_depths
from model.frozen import ImageFeatures, SharedStreams, frozen_features
from model.scoring import Outputs, compare
from model.text import Prompts, encode_classes, pair_anchors


class AdaptedCLIP(nn.Module):
    """A frozen CLIP with `text_adapter` and `image_adapter`, the only trainable parts.

    text_adapter: ModuleList of the adapters after the first text blocks and, last, the projector that takes the place
        of CLIP's text projection.
    image_adapter: ModuleDict of `layer_adapters`, `seg_proj` (one per level) and `det_proj`.
    """

    def __init__(self, clip: FrozenCLIP, config: ModelConfig) -> None:
        super().__init__()
        check_depths(config, clip.vision_layers, clip.text_layers)
        self.clip = clip
        self.config = config
        d_t, d_v, d = clip.text_width, clip.vision_width, clip.embed_dim
        self.text_adapter = nn.ModuleList(
            [
                *(make_adapter(config.adapter, d_t) for _ in range(config.text_adapt_until)),
                SimpleProj(d_t, d, relu=True),
            ]
        )
        self.image_adapter = nn.ModuleDict(
            {
                "layer_adapters": nn.ModuleList(
                    make_adapter(config.adapter, d_v) for _ in range(config.image_adapt_until)
                ),
                "seg_proj": nn.ModuleList(SimpleProj(d_v, d, config.relu) for _ in config.levels),
                "det_proj": SimpleProj(d_v, d, config.relu),
            }
        )

    @property
    def components(self) -> dict[str, nn.Module]:
        """The trainable components by the names that checkpoints and logs use."""
        return {name: getattr(self, name) for name in COMPONENTS if hasattr(self, name)}

    def trained_components(self, side: str, loop: LoopForward | None = None) -> tuple[str, ...]:
        """The components that take part in the forward of a side, "text" or "image"."""
        return (f"{side}_adapter",)

    @property
    def text_modules(self) -> dict[str, Any]:
        """What the text pass takes beside CLIP: adapters, projector and blend weight; nothing where not adapted."""
        if not self.config.text_adapted:
            return {}
        *adapters, projector = self.text_adapter
        return {"adapters": adapters, "projector": projector, "weight": self.config.text_adapt_weight}

    def anchors(self, prompts: Prompts) -> Tensor:
        """Anchors of all classes from one text pass, (C, D, 2); CLIP's own where the text side is not adapted."""
        return pair_anchors(encode_classes(self.clip, prompts, **self.text_modules), prompts.normal)

    def frozen_features(self, images: Tensor) -> ImageFeatures:
        """What Stage 1 looks at: CLIP's own features by V-V attention, without gradient."""
        return frozen_features(self.clip, images, self.config)

    def stage1_features(
        self, images: Tensor, prompts: Prompts, rows: Tensor, loop: LoopForward | None = None
    ) -> ImageFeatures:
        """The image features of Stage 1's loss and conditioning, without gradient; rows as in `batch_anchors`."""
        return self.frozen_features(images)

    def image_features(self, images: Tensor) -> ImageFeatures:
        """The adapted image branch: images (B, 3, S, S) -> unit patch features (B, N, D) per level, and det (B, D)."""
        return self.encode_image(images)

    def encode_image(
        self, images: Tensor, after_first_block: Callable[[Tensor], Tensor] | None = None, with_context: bool = False
    ) -> ImageFeatures:
        """`image_features`, with a change of the stream (B, 1 + N, D_v) between the first block and its adapter.

        with_context: also what text attends to, whose class embedding takes the blocks behind the last level too.
        """
        visual = self.clip.clip.visual
        adapters = self.image_adapter["layer_adapters"]
        projectors = dict(zip(self.config.levels, self.image_adapter["seg_proj"], strict=True))
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
        """Anchors of each image of a batch, (B, D, 2), for Stage 1; rows (B,): each image's class in `prompts`.

        `features` are the image features of Stage 1, on which the anchors of this model do not depend.
        """
        return self.anchors(prompts)[rows]

    @torch.no_grad()
    def text_side(self, prompts: Prompts, loop: LoopForward | None = None) -> Tensor:
        """What `forward` needs of the text side, computed once for all images: anchors (C, D, 2), without gradient."""
        return self.anchors(prompts)

    def forward(self, images: Tensor, text_side: Tensor, rows: Tensor, shared: SharedStreams | None = None) -> Outputs:
        """Similarities of B images to the anchors of their classes: the one forward of Stage 2 and of evaluation.

        images: (B, 3, S, S), normalised; text_side: as `text_side` gives it; rows: (B,), each image's class in it.
        shared: what other models have computed of the same images.
        """
        features = self.image_features(images)
        return compare(features.levels, features.det, text_side[rows])
