"""Frozen image features by V-V attention for Stage 1, and unadapted CLIP as the baseline (docs/method.md)."""

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
    """Features of B images.

    levels: patch features of each level, (B, N, D); det: the image's own feature, (B, D); context: for text
    cross-attention, the first level's patch features plus the class embedding, not normalised, (B, N, D), or None.
    """

    levels: list[Tensor]
    det: Tensor
    context: Tensor | None = None


class SharedStreams:
    """The frozen streams of one batch of images, computed once for all models on the same CLIP."""

    def __init__(self) -> None:
        self._cache: dict[tuple[str, int], tuple[dict[int, Tensor], Tensor]] = {}

    def get(
        self, clip: FrozenCLIP, images: Tensor, config: ModelConfig, levels: Sequence[int]
    ) -> tuple[list[Tensor], Tensor]:
        """As `surgery_stream`, whose stream at a level does not depend on the other levels."""
        key = (config.surgery, config.surgery_until_layer)
        if key not in self._cache or not self._cache[key][0].keys() >= set(levels):
            streams, cls = surgery_stream(clip, images, config, levels)
            self._cache[key] = (dict(zip(levels, streams, strict=True)), cls)
        by_level, cls = self._cache[key]
        return [by_level[level] for level in levels], cls


def surgery_stream(
    clip: FrozenCLIP, images: Tensor, config: ModelConfig, levels: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    """Token streams (B, 1 + N, D_v) at `levels`, and the class token (B, D_v) after the last block of the plain pass.

    `dual` (CLIP-Surgery, arXiv:2304.05653): one pass; V-V attention of the original stream is added to a side path.
    `sequential` (AA-CLIP): V-V attention inside the blocks; the class token needs a pass of its own. `batch_axis`:
    `sequential` over the images of the batch, as in the published code.
    """
    blocks = clip.clip.visual.transformer.resblocks
    first = len(blocks) - (config.surgery_until_layer - 1)
    x = clip.embed_image(images)
    run_values = run_block_batch_axis if config.surgery == "batch_axis" else run_block_values
    # Only the class token of the plain pass is needed after the last block, unless its patches are a level.
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
    projectors: nn.ModuleList | None = None,
) -> ImageFeatures:
    """Image features on the frozen encoder's tokens, by V-V attention (docs/method.md).

    Args:
        clip: the frozen CLIP.
        images: (B, 3, S, S), normalised.
        config: the surgery and the levels.
        levels: fewer levels than those of `config`.
        shared: streams of these images, shared between models.
        projectors: trained projectors in place of CLIP's own projection (`--feedback_features projectors`).

    Returns:
        Levels: unit patch features plus the unit class embedding, not normalised again; with `projectors`, without the
        class embedding. det: the class embedding. They do not depend on the other images of the batch, except with
        `batch_axis`.
    """
    streams, cls = (shared or SharedStreams()).get(clip, images, config, levels or config.levels)
    embedding = unit(clip.project_image(cls))
    if projectors is None:
        features = [unit(clip.project_image(x[:, 1:])) + embedding[:, None] for x in streams]
        return ImageFeatures(features, embedding, features[0])
    pairs = zip(streams, projectors[: len(streams)], strict=True)
    features = [unit(projector(clip.clip.visual.ln_post(x[:, 1:]))) for x, projector in pairs]
    return ImageFeatures(features, embedding, features[0] + embedding[:, None])


@torch.no_grad()
def class_embedding(clip: FrozenCLIP, images: Tensor) -> Tensor:
    """CLIP's own embedding of images, (B, 3, S, S) -> (B, D), of length 1."""
    x = clip.embed_image(images)
    *blocks, last = clip.clip.visual.transformer.resblocks
    for block in blocks:
        x = clip.run(run_block, block, x)
    return unit(clip.project_image(clip.run(run_block_for_class, last, x)[:, 0]))


@torch.no_grad()
def frozen_patches(clip: FrozenCLIP, images: Tensor, config: ModelConfig) -> list[Tensor]:
    """Unit patch features of `dual` without the class embedding, (B, N, D) at each level, for normal references."""
    streams, _ = surgery_stream(clip, images, replace(config, surgery="dual"), config.levels)
    return [unit(clip.project_image(x[:, 1:])) for x in streams]


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
        # The class embedding is the same for all patches of an image.
        patches = [level - features.det[:, None] for level in features.levels]
        return compare(features.levels, features.det, text_side[rows])._replace(features=patches)
