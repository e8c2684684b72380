"""Frozen image features by V-V attention: what Stage 1 sees, and unadapted CLIP as the baseline (docs/method.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.blocks import (
    run_block,
    run_block_batch_axis,
    run_block_dual,
    run_block_dual_for_class,
    run_block_for_class,
    run_block_values,
    unit,
)
from model.clip import FrozenCLIP
from model.config import LoopForward, ModelConfig
from model.scoring import Outputs, compare
from model.text import Prompts, encode_classes, pair_anchors


class ImageFeatures(NamedTuple):
    """`levels`: patch features, (B, N, D) for each level; `det`: the image's own feature, (B, D).

    `context`: what text attends to, before it is normalised: the level-0 patch features with the class embedding of the
    same branch in them, (B, N, D); None where it was not asked for.
    """

    levels: list[Tensor]
    det: Tensor
    context: Tensor | None = None


class SharedStreams:
    """The frozen streams of one batch of images, computed once for all models that look at it on the same CLIP."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int], tuple[dict[int, Tensor], Tensor]] = {}

    def get(
        self, clip: FrozenCLIP, images: Tensor, config: ModelConfig, levels: Sequence[int]
    ) -> tuple[list[Tensor], Tensor]:
        """As `surgery_stream`, whose streams at a level do not depend on which other levels are asked for."""
        key = (config.surgery, config.surgery_until_layer)
        if key not in self._kept or not self._kept[key][0].keys() >= set(levels):
            streams, cls = surgery_stream(clip, images, config, levels)
            self._kept[key] = (dict(zip(levels, streams, strict=True)), cls)
        of_levels, cls = self._kept[key]
        return [of_levels[level] for level in levels], cls


def surgery_stream(
    clip: FrozenCLIP, images: Tensor, config: ModelConfig, levels: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    """Token streams (B, 1 + N, D_v) at `levels`, and the class token (B, D_v) after the last block of the plain pass.

    `dual` (CLIP-Surgery, arXiv:2304.05653): one pass; V-V attention of the original stream sums up on a side path.
    `sequential` (AA-CLIP): V-V attention inside the blocks, so the class token takes a pass of its own. `batch_axis`
    is `sequential` as the published code computes it, over the images of the batch.
    """
    blocks = clip.clip.visual.transformer.resblocks
    first = len(blocks) - (config.surgery_until_layer - 1)
    x = clip.embed_image(images)
    run_values = run_block_batch_axis if config.surgery == "batch_axis" else run_block_values
    # Of the plain pass the class token alone is read in the end, unless its patches are a level.
    patches_read = first == len(blocks) and levels[-1] == len(blocks)
    side: Tensor | None = None
    values: Tensor | None = None
    streams = []
    for index, block in enumerate(blocks):
        last = index + 1 == len(blocks) and not patches_read
        run_plain = run_block_for_class if last else run_block
        if index < first or index >= levels[-1]:
            x = clip.run(run_plain, block, x)
        elif config.surgery == "dual":
            x, side = clip.run(
                run_block_dual_for_class if last else run_block_dual, block, x, x if side is None else side
            )
        else:
            values = clip.run(run_values, block, x if values is None else values)
            x = clip.run(run_plain, block, x)
        if index + 1 in levels:
            streams.append(next(stream for stream in (side, values, x) if stream is not None))
    return streams, x[:, 0]


@torch.no_grad()
def frozen_features(
    clip: FrozenCLIP,
    images: Tensor,
    config: ModelConfig,
    levels: Sequence[int] | None = None,
    shared: SharedStreams | None = None,
) -> ImageFeatures:
    """Unit patch features plus the unit class embedding, not normalised again, at each level; det: class embedding.

    images: (B, 3, S, S), normalised; levels: those of `config` unless fewer are enough; shared: of these images.
    Features of an image do not depend on the batch that it is in, but for `batch_axis`.
    """
    streams, cls = (shared or SharedStreams()).get(clip, images, config, levels or config.levels)
    embedding = unit(clip.project_image(cls))
    features = [unit(clip.project_image(x[:, 1:])) + embedding[:, None] for x in streams]
    return ImageFeatures(features, embedding, features[0])


@torch.no_grad()
def frozen_patches(clip: FrozenCLIP, images: Tensor, config: ModelConfig) -> list[Tensor]:
    """Unit patch features of `dual`, (B, N, D) at each level, without the class embedding: what references compare."""
    streams, _ = surgery_stream(clip, images, replace(config, surgery="dual"), config.levels)
    return [unit(clip.project_image(x[:, 1:])) for x in streams]


@torch.no_grad()
def projected_features(
    clip: FrozenCLIP,
    images: Tensor,
    config: ModelConfig,
    projectors: Sequence[nn.Module],
    levels: Sequence[int] | None = None,
    shared: SharedStreams | None = None,
) -> ImageFeatures:
    """The trained projectors on the frozen encoder's tokens: unit patch features at each level.

    What feedback carried over in the idea's first form: `seg_proj` without the adapters. Shapes as `frozen_features`.
    """
    streams, cls = (shared or SharedStreams()).get(clip, images, config, levels or config.levels)
    embedding = unit(clip.project_image(cls))
    ln_post = clip.clip.visual.ln_post
    pairs = zip(streams, projectors[: len(streams)], strict=True)  # the first levels may be enough
    features = [unit(projector(ln_post(x[:, 1:]))) for x, projector in pairs]
    return ImageFeatures(features, embedding, features[0] + embedding[:, None])


class UnadaptedCLIP(nn.Module):
    """The baseline: frozen `dual` features and CLIP's own text embeddings, scored like an adapted model."""

    def __init__(self, clip: FrozenCLIP, config: ModelConfig) -> None:
        super().__init__()
        self.clip = clip
        self.config = replace(config, surgery="dual")

    @torch.no_grad()
    def text_side(self, prompts: Prompts, loop: LoopForward | None = None) -> Tensor:
        """Anchors of all classes, (C, D, 2)."""
        return pair_anchors(encode_classes(self.clip, prompts), prompts.normal)

    def forward(self, images: Tensor, text_side: Tensor, rows: Tensor, shared: SharedStreams | None = None) -> Outputs:
        """As `AdaptedCLIP.forward`."""
        features = frozen_features(self.clip, images, self.config, shared=shared)
        # The embedding, which is the same for all patches of an image, is no feature of a patch.
        patches = [level - features.det[:, None] for level in features.levels]
        return compare(features.levels, features.det, text_side[rows])._replace(features=patches)
