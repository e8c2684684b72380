"""A plain, slow reference of the method's mathematics, written for the tests from docs/method.md alone.

Nothing here is fast and nothing here is shared with `model/`: images, heads and levels are looped over, attention is
softmax(q k^T / sqrt(d)) v, blur and enlargement are matrices filled in entry by entry. What it takes from elsewhere is
CLIP's own definition (open_clip's layer norms, projections and MLPs hold the weights) and the trainable tensors, by the
names that checkpoints carry. Everything is differentiable, so that gradients can be compared too.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import CrossAttentionConfig, ModelConfig

# log p_normal, log p_abnormal and the mask of one image -> its focal loss.
Focal = Callable[[Tensor, Tensor, Tensor], Tensor]

LEAKY_SLOPE = 0.01
NORM_EPSILON = 1e-5
CONTEXT_LENGTH = 77
BLUR = {"industrial": (7, 1.0), "medical": (9, 1.5)}


@dataclass(frozen=True)
class Reference:
    """An open_clip CLIP, the trainable tensors by their state-dict names, and the choices that change the forward."""

    clip: nn.Module
    weights: Mapping[str, Tensor]
    config: ModelConfig
    cross: CrossAttentionConfig | None = None


def unit(x: Tensor) -> Tensor:
    """x / |x| along the last axis."""
    return x / (x * x).sum(dim=-1, keepdim=True).sqrt()


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, LEAKY_SLOPE * x)


def attention(attn: nn.MultiheadAttention, x: Tensor, causal: bool = False, values_only: bool = False) -> Tensor:
    """Attention of one sequence, (T, C) -> (T, C); with `values_only` the values stand in for queries and keys."""
    tokens, width = x.shape
    depth = width // attn.num_heads
    q_all, k_all, v_all = (
        x @ attn.in_proj_weight[part * width : (part + 1) * width].T
        + attn.in_proj_bias[part * width : (part + 1) * width]
        for part in range(3)
    )
    heads = []
    for head in range(attn.num_heads):
        columns = slice(head * depth, (head + 1) * depth)
        q, k, v = q_all[:, columns], k_all[:, columns], v_all[:, columns]
        if values_only:
            q, k = v, v
        scores = q @ k.T / math.sqrt(depth)
        if causal:
            later = torch.arange(tokens)[None, :] > torch.arange(tokens)[:, None]
            scores = scores.masked_fill(later, -math.inf)
        heads.append(scores.softmax(dim=1) @ v)
    return torch.cat(heads, dim=1) @ attn.out_proj.weight.T + attn.out_proj.bias


def block(layer: nn.Module, x: Tensor, causal: bool = False, values_only: bool = False) -> Tensor:
    """CLIP's residual attention block on one sequence, (T, C) -> (T, C)."""
    x = x + attention(layer.attn, layer.ln_1(x), causal, values_only)
    return x + layer.mlp(layer.ln_2(x))


def vision_input(clip: nn.Module, image: Tensor) -> Tensor:
    """One image (3, S, S) -> the tokens that enter the first block, (1 + N, D_v): class token, then rows of patches."""
    visual = clip.visual
    kernel = visual.conv1.weight  # (D_v, 3, p, p)
    size = kernel.shape[-1]
    tokens = [visual.class_embedding]
    for top in range(0, image.shape[1], size):
        for left in range(0, image.shape[2], size):
            patch = image[:, top : top + size, left : left + size]
            tokens.append((kernel * patch).sum(dim=(1, 2, 3)))
    return visual.ln_pre(torch.stack(tokens) + visual.positional_embedding)


def project_image(clip: nn.Module, tokens: Tensor) -> Tensor:
    """Tokens (..., D_v) through `ln_post` and CLIP's own visual projection, unit."""
    return unit(clip.visual.ln_post(tokens) @ clip.visual.proj)


def adapter(ref: Reference, name: str, x: Tensor) -> Tensor:
    if ref.config.adapter == "linear":
        return leaky(x @ ref.weights[f"{name}.fc.0.weight"].T)
    return leaky(x @ ref.weights[f"{name}.fc1.weight"].T) @ ref.weights[f"{name}.fc2.weight"].T


def projector(ref: Reference, name: str, x: Tensor, relu: bool) -> Tensor:
    return leaky(x @ ref.weights[f"{name}.fc.0.weight"].T) if relu else x @ ref.weights[f"{name}.fc.weight"].T


def blend(x: Tensor, adapted: Tensor, weight: float) -> Tensor:
    """x = w a |x| / |a| + (1 - w) x, with the lengths of each token, (T, C)."""
    length = (x * x).sum(dim=1).sqrt()
    adapted_length = (adapted * adapted).sum(dim=1).sqrt()
    scaled = adapted * (length / adapted_length)[:, None]
    return weight * scaled + (1 - weight) * x


def cross_attention(ref: Reference, name: str, queries: Tensor, context: Tensor) -> Tensor:
    """Multi-head attention of queries (T, C_q) to context (M, C_c), all of it real tokens -> (T, C_q), no dropout."""
    if ref.cross.context_norm == "layer":
        queries = layer_normalised(queries)
    q_all, k_all, v_all = (
        tokens @ ref.weights[f"{name}.{part}_proj.weight"].T + ref.weights[f"{name}.{part}_proj.bias"]
        for part, tokens in (("q", queries), ("k", context), ("v", context))
    )
    depth = q_all.shape[1] // ref.cross.cross_attn_heads
    rows = []
    for q in q_all:
        heads = []
        for head in range(ref.cross.cross_attn_heads):
            columns = slice(head * depth, (head + 1) * depth)
            scores = k_all[:, columns] @ q[columns] / math.sqrt(depth)
            heads.append(scores.softmax(dim=0) @ v_all[:, columns])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ ref.weights[f"{name}.out_proj.weight"].T + ref.weights[f"{name}.out_proj.bias"]


def cross_residual(ref: Reference, side: str, x: Tensor, context: Tensor) -> Tensor:
    """x + w_ca * cross_attn(x, context), or both blended as an adapter is; `side` is "text" or "image"."""
    attended = cross_attention(ref, f"{side}_cross_attn", x, context)
    weight = getattr(ref.cross, f"{side}_cross_attn_weight")
    return blend(x, attended, weight) if ref.cross.cross_attn_residual == "matched" else x + weight * attended


def layer_normalised(x: Tensor) -> Tensor:
    """Each token (T, C) less its mean, over its standard deviation; without weight and bias."""
    centred = x - x.mean(dim=1, keepdim=True)
    return centred / ((centred * centred).mean(dim=1, keepdim=True) + NORM_EPSILON).sqrt()


def as_context(ref: Reference, tokens: Tensor) -> Tensor:
    """Tokens as they are attended to: unit, layer-normalised or raw, and never with gradient."""
    return {"unit": unit, "layer": layer_normalised, "none": lambda raw: raw}[ref.cross.context_norm](tokens).detach()


def words_of(ref: Reference, prompts: Sequence[Tensor]) -> Tensor:
    """Token ids of all prompts of a class -> what image tokens attend to: their real tokens in one sequence, (M, D_t).

    After text block 0 and the blend of the first text adapter, without text cross-attention.
    """
    words = []
    for tokens in prompts:
        real = tokens[: int(tokens.argmax()) + 1]
        x = ref.clip.token_embedding(real) + ref.clip.positional_embedding[: len(real)]
        x = block(ref.clip.transformer.resblocks[0], x, causal=True)
        if ref.config.text_adapted and ref.config.text_adapt_until > 0:
            x = blend(x, adapter(ref, "text_adapter.0", x), ref.config.text_adapt_weight)
        words.append(x)
    return as_context(ref, torch.cat(words))


def frozen_patches(ref: Reference, image: Tensor) -> Tensor:
    """One image (3, S, S) -> what text tokens attend to in frozen features: unit(f_0), (N, D)."""
    return as_context(ref, frozen_image(ref, image)[0][0])


def trained_patches(ref: Reference, image: Tensor, words: Tensor | None) -> Tensor:
    """As `frozen_patches`, from the trained branch: its level-0 feature plus its own unit class embedding, (N, D)."""
    streams = adapted_streams(ref, image, words)
    return as_context(ref, adapted_levels(ref, streams)[0] + project_image(ref.clip, streams[-1][0]))


def projected_patches(ref: Reference, image: Tensor) -> Tensor:
    """As `frozen_patches`, from the trained projectors on frozen tokens, (N, D)."""
    levels, class_embedding = projected_image(ref, image)
    return as_context(ref, levels[0] + class_embedding)


def prompt_feature(ref: Reference, tokens: Tensor, patches: Tensor | None = None) -> Tensor:
    """One prompt's token ids, of any length up to 77, -> its unit feature (D,), computed on the full 77 tokens.

    patches: (M, D), the context of text cross-attention; without it there is none.
    """
    clip = ref.clip
    ids = F.pad(tokens, (0, CONTEXT_LENGTH - len(tokens)))
    x = clip.token_embedding(ids) + clip.positional_embedding
    adapted = ref.config.text_adapted
    for index, layer in enumerate(clip.transformer.resblocks):
        x = block(layer, x, causal=True)
        if index == 0 and patches is not None:
            # Attention is causal: what is added to the padding after the end-of-text token reaches nothing.
            end = int(ids.argmax()) + 1
            x = torch.cat([cross_residual(ref, "text", x[:end], patches), x[end:]])
        if adapted and index < ref.config.text_adapt_until:
            x = blend(x, adapter(ref, f"text_adapter.{index}", x), ref.config.text_adapt_weight)
    end_of_text = clip.ln_final(x)[int(ids.argmax())]
    if adapted:
        return unit(projector(ref, f"text_adapter.{ref.config.text_adapt_until}", end_of_text, relu=True))
    return unit(end_of_text @ clip.text_projection)


def anchor_pair(
    ref: Reference, normal: Sequence[Tensor], abnormal: Sequence[Tensor], patches: Tensor | None = None
) -> Tensor:
    """Token ids of a class's normal and abnormal prompts -> its anchors (D, 2), conditioned on `patches` (M, D)."""
    columns = []
    for group in (normal, abnormal):
        features = [prompt_feature(ref, tokens, patches) for tokens in group]
        columns.append(unit(sum(features) / len(features)))
    return torch.stack(columns, dim=1)


def adapted_streams(ref: Reference, image: Tensor, words: Tensor | None = None) -> list[Tensor]:
    """One image (3, S, S) -> the adapted branch's stream after each block, (1 + N, D_v).

    words: (M, D_t), the context of image cross-attention; without it there is none.
    """
    config = ref.config
    x = vision_input(ref.clip, image)
    streams = []
    for index, layer in enumerate(ref.clip.visual.transformer.resblocks):
        x = block(layer, x)
        if index == 0 and words is not None:
            x = cross_residual(ref, "image", x, words)
        if index < config.image_adapt_until:
            x = blend(x, adapter(ref, f"image_adapter.layer_adapters.{index}", x), config.image_adapt_weight)
        streams.append(x)
    return streams


def adapted_levels(ref: Reference, streams: Sequence[Tensor]) -> list[Tensor]:
    """The levels' unit patch features, (N, D) each."""
    return [
        unit(projector(ref, f"image_adapter.seg_proj.{k}", level_tokens(ref, streams, level), ref.config.relu))
        for k, level in enumerate(ref.config.levels)
    ]


def level_tokens(ref: Reference, streams: Sequence[Tensor], level: int) -> Tensor:
    """Patch tokens of a level after `ln_post`, (N, D_v)."""
    return ref.clip.visual.ln_post(streams[level - 1][1:])


def adapted_image(ref: Reference, image: Tensor, words: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
    """One image (3, S, S) -> the levels' unit patch features, (N, D) each, and det (D,)."""
    streams = adapted_streams(ref, image, words)
    last = level_tokens(ref, streams, ref.config.levels[-1])
    det = unit(projector(ref, "image_adapter.det_proj", last, ref.config.relu)).mean(dim=0)
    return adapted_levels(ref, streams), det


def frozen_image(ref: Reference, image: Tensor) -> tuple[list[Tensor], Tensor]:
    """One image (3, S, S) -> the levels' features (N, D), unit patch plus unit class embedding, and the latter (D,)."""
    streams, class_embedding = frozen_streams(ref, image)
    return [
        project_image(ref.clip, streams[level][1:]) + class_embedding for level in ref.config.levels
    ], class_embedding


def projected_image(ref: Reference, image: Tensor) -> tuple[list[Tensor], Tensor]:
    """As `frozen_image`, by the trained projectors: the levels' unit patch features alone, and the class embedding."""
    streams, class_embedding = frozen_streams(ref, image)
    # `adapted_levels` counts streams from the first block's output, without the input.
    return adapted_levels(ref, streams[1:]), class_embedding


def frozen_streams(ref: Reference, image: Tensor) -> tuple[list[Tensor], Tensor]:
    """One image -> the input of the first block and each block's output, with V-V attention; the class embedding."""
    layers = list(ref.clip.visual.transformer.resblocks)
    first = len(layers) - (ref.config.surgery_until_layer - 1)
    original = [vision_input(ref.clip, image)]
    for layer in layers:
        original.append(block(layer, original[-1]))
    class_embedding = project_image(ref.clip, original[-1][0])

    streams = original[: first + 1]
    for index in range(first, len(layers)):
        layer = layers[index]
        if ref.config.surgery == "dual":
            values = attention(layer.attn, layer.ln_1(original[index]), values_only=True)
            streams.append(streams[-1] + values)
        else:
            streams.append(block(layer, streams[-1], values_only=True))
    return streams, class_embedding


def published_frozen_images(ref: Reference, images: Tensor) -> list[list[Tensor]]:
    """Images (B, 3, S, S) -> the levels' features (N, D) of each, as AA-CLIP's published code computes them.

    Its V-V attention takes a batch for a sequence: at one position, the tokens of the B images attend to one another.
    """
    layers = list(ref.clip.visual.transformer.resblocks)
    first = len(layers) - (ref.config.surgery_until_layer - 1)
    embeddings = [frozen_streams(ref, image)[1] for image in images]
    tokens = [vision_input(ref.clip, image) for image in images]
    levels: list[list[Tensor]] = [[] for _ in images]
    for index, layer in enumerate(layers):
        if index < first:
            tokens = [block(layer, of_image) for of_image in tokens]
        else:
            positions = range(len(tokens[0]))
            mixed = [block(layer, torch.stack([x[at] for x in tokens]), values_only=True) for at in positions]
            tokens = [torch.stack([across[number] for across in mixed]) for number in range(len(images))]
        if index + 1 in ref.config.levels:
            for of_image, x, embedding in zip(levels, tokens, embeddings, strict=True):
                of_image.append(project_image(ref.clip, x[1:]) + embedding)
    return levels


def enlarging_matrix(side: int, size: int, dtype: torch.dtype) -> Tensor:
    """(size, side): bilinear interpolation of one axis, the first and last samples on the first and last pixels."""
    matrix = torch.zeros(size, side, dtype=dtype)
    for pixel in range(size):
        position = pixel * (side - 1) / (size - 1)
        below = min(int(position), side - 2)
        matrix[pixel, below] = 1 - (position - below)
        matrix[pixel, below + 1] = position - below
    return matrix


def enlarge(grid: Tensor, size: int) -> Tensor:
    """(side, side) -> (size, size), bilinear with aligned corners."""
    matrix = enlarging_matrix(grid.shape[0], size, grid.dtype)
    return matrix @ grid @ matrix.T


def to_grid(values: Tensor) -> Tensor:
    """One value a patch, (N,) -> (side, side), row by row."""
    side = math.isqrt(len(values))
    return torch.stack([values[row * side : (row + 1) * side] for row in range(side)])


def similarity(features: Tensor, anchors: Tensor) -> Tensor:
    """(N, D) and (D, 2) -> (N, 2)."""
    return 100 * features @ anchors


def pixel_log_probabilities(scores: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """s on the patch grid (N, 2) -> log p_normal and log p_abnormal, (size, size) each."""
    normal, abnormal = (enlarge(to_grid(scores[:, column]), size) for column in range(2))
    total = torch.logaddexp(normal, abnormal)
    return normal - total, abnormal - total


def dice(p: Tensor, target: Tensor) -> Tensor:
    """Of one image, (S, S) each; smooth 1."""
    return 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)


def exact_focal(log_normal: Tensor, log_abnormal: Tensor, mask: Tensor) -> Tensor:
    """Of one image, (S, S) each; gamma 2."""
    log_true = torch.where(mask > 0.5, log_abnormal, log_normal)
    return (-((1 - log_true.exp()) ** 2) * log_true).mean()


def published_focal(log_normal: Tensor, log_abnormal: Tensor, mask: Tensor) -> Tensor:
    """As `exact_focal`, from targets that are never quite 0 or 1 and a probability that is never 0."""
    total = torch.full_like(mask, 1e-5)
    for target, log_p in ((1 - mask, log_normal), (mask, log_abnormal)):
        total = total + target.clamp(1e-5, 1 - 1e-5) * log_p.exp()
    return (-((1 - total) ** 2) * total.log()).mean()


def segmentation(scores: Sequence[Tensor], masks: Tensor, focal_of: Focal = exact_focal) -> Tensor:
    """One level's loss: s on the patch grid of each image, (N, 2), and masks (B, S, S)."""
    focal, dice_normal, dice_abnormal = [], [], []
    for score, mask in zip(scores, masks, strict=True):
        log_normal, log_abnormal = pixel_log_probabilities(score, mask.shape[-1])
        focal.append(focal_of(log_normal, log_abnormal, mask))
        dice_normal.append(dice(log_normal.exp(), 1 - mask))
        dice_abnormal.append(dice(log_abnormal.exp(), mask))
    return (sum(focal) + sum(dice_normal) + sum(dice_abnormal)) / len(scores)


def stage1_loss(
    features: Sequence[Sequence[Tensor]],
    anchors: Sequence[Tensor],
    masks: Tensor,
    norm_weight: float = 0.1,
    levels: str = "all",
    focal_of: Focal = exact_focal,
) -> Tensor:
    """Frozen features of each image, a list over levels of (N, D); anchors of each image, (D, 2); masks (B, S, S)."""
    counted = range(len(features[0])) if levels == "all" else [len(features[0]) - 1]
    losses = [
        segmentation(
            [similarity(image[k], pair) for image, pair in zip(features, anchors, strict=True)], masks, focal_of
        )
        for k in counted
    ]
    overlap = sum(pair[:, 0] @ pair[:, 1] for pair in anchors) / len(anchors)
    return sum(losses) / len(losses) + norm_weight * overlap**2


def stage2_loss(
    features: Sequence[tuple[Sequence[Tensor], Tensor]],
    anchors: Sequence[Tensor],
    masks: Tensor,
    labels: Tensor,
    focal_of: Focal = exact_focal,
) -> Tensor:
    """Adapted features and det of each image; anchors of each image, (D, 2); masks (B, S, S); labels (B,)."""
    entropies = []
    for (_, det), pair, label in zip(features, anchors, labels, strict=True):
        logits = det @ pair
        entropies.append(torch.logsumexp(logits, dim=0) - logits[int(label)])
    total = sum(entropies) / len(entropies)
    for k in range(len(features[0][0])):
        scores = [similarity(levels[k], pair) for (levels, _), pair in zip(features, anchors, strict=True)]
        total = total + segmentation(scores, masks, focal_of)
    return total


def published_stage1_loss(ref: Reference, images: Tensor, anchors: Sequence[Tensor], masks: Tensor) -> Tensor:
    """A step of the published code's Stage 1: of the levels' losses, each of which overwrites the last, one is left."""
    with torch.no_grad():
        features = published_frozen_images(ref, images)
    return stage1_loss([of_image[-1:] for of_image in features], anchors, masks, 0.1, focal_of=published_focal)


def published_stage2_loss(
    ref: Reference, images: Tensor, anchors: Sequence[Tensor], masks: Tensor, labels: Tensor
) -> Tensor:
    """A step of the published code's Stage 2."""
    features = [adapted_image(ref, image) for image in images]
    return stage2_loss(features, [pair.detach() for pair in anchors], masks, labels, published_focal)


def mirrored(index: int, length: int) -> int:
    """The index that a reflecting border shows: -1 is 1, `length` is `length - 2`."""
    while not 0 <= index < length:
        index = -index if index < 0 else 2 * (length - 1) - index
    return index


def blur(grid: Tensor, kernel: int, sigma: float) -> Tensor:
    """Gaussian blur with a reflecting border, (side, side) -> (side, side)."""
    side = grid.shape[0]
    reach = kernel // 2
    taps = [math.exp(-(offset**2) / (2 * sigma**2)) for offset in range(-reach, reach + 1)]
    blurred = torch.zeros_like(grid)
    for down, tap_down in enumerate(taps):
        rows = [mirrored(row + down - reach, side) for row in range(side)]
        for right, tap_right in enumerate(taps):
            columns = [mirrored(column + right - reach, side) for column in range(side)]
            blurred = blurred + tap_down * tap_right / sum(taps) ** 2 * grid[rows][:, columns]
    return blurred


def anomaly_map(levels: Sequence[Tensor], anchors: Tensor, size: int, domain: str) -> Tensor:
    """The published map of one image, (size, size), from its levels' features (N, D)."""
    total = torch.zeros(size, size, dtype=anchors.dtype)
    for features in levels:
        scores = similarity(features, anchors)
        grid = to_grid((scores[:, 1] + 1 - scores[:, 0]) / 2)
        total = total + enlarge(blur(grid, *BLUR[domain]), size)
    return total


def det_score(det: Tensor, anchors: Tensor, kind: str = "abnormal") -> Tensor:
    if kind == "difference":
        return (det @ (anchors[:, 1] - anchors[:, 0]) + 2) / 4
    return (det @ anchors[:, 1] + 1) / 2


def normalised(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    return torch.zeros_like(values) if low == high else (values - low) / (high - low)


def class_image_scores(maps: Tensor, det: Tensor, domain: str) -> Tensor:
    """Published image scores of all n images of a class: maps (n, S, S), det scores (n,)."""
    highest = torch.stack([image.max() for image in normalised(maps)])
    return 0.5 * highest + 0.5 * normalised(det) if domain == "industrial" else highest


def calibrated_map(levels: Sequence[Tensor], anchors: Tensor, size: int) -> Tensor:
    """Mean over levels of p_abnormal of one image, (size, size)."""
    maps = [pixel_log_probabilities(similarity(features, anchors), size)[1].exp() for features in levels]
    return sum(maps) / len(maps)


def calibrated_score(
    levels: Sequence[Tensor], det: Tensor, anchors: Tensor, size: int, domain: str, kind: str = "abnormal"
) -> Tensor:
    highest = calibrated_map(levels, anchors, size).max()
    return 0.5 * highest + 0.5 * det_score(det, anchors, kind) if domain == "industrial" else highest
