"""Defects of earlier code of this method (docs/method.md, "Known defects").

Each test holds a check and a small re-creation of the old behaviour: the code must pass the check, and the old
behaviour, put in its place, must fail it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

import model.adapter
import model.clip_loading
import model.cross_attention
import model.frozen
import model.losses
from model import blocks, scoring
from model.adapter import AdaptedCLIP
from model.clip_loading import load_clip
from model.frozen import frozen_features
from tests.helpers import (
    TINY_NAME,
    adapted_clip,
    assert_agrees,
    config_for,
    random_batch,
    tiny_clip,
    tiny_open_clip,
    tiny_prompts,
)


def assert_detects(check: Callable[[], None]) -> None:
    """`check` fails; called while the old behaviour is in place."""
    with pytest.raises((AssertionError, RuntimeError)):
        check()


# Row 4: Stage 1 kept only the last level's loss.


def overwritten_stage1_losses(
    level_similarities: Sequence[Tensor], anchors: Tensor, mask: Tensor, norm_weight: float, levels: str = "all"
) -> tuple[dict[str, Tensor], Tensor]:
    """The old loop: `loss = ...` where `loss += ...` was meant."""
    for similarity in level_similarities:
        part = model.losses.segmentation_loss(similarity, mask)
        loss = part.total
    overlap = (anchors[..., 0] * anchors[..., 1]).sum(dim=-1).mean() ** 2
    return {"total": loss + norm_weight * overlap}, part.abnormal


def check_all_levels_count(levels: str = "all") -> None:
    generator = torch.Generator().manual_seed(0)
    similarities = [torch.randn(2, 9, 2, generator=generator, requires_grad=True) for _ in range(4)]
    anchors, mask = torch.randn(2, 5, 2, generator=generator), torch.zeros(2, 12, 12)
    mask[0, :5, :5] = 1
    losses, _ = model.losses.stage1_losses(similarities, anchors, mask, 0.1, levels)
    losses["total"].backward()
    for similarity in similarities:
        assert similarity.grad is not None and similarity.grad.abs().max() > 0
    each = [model.losses.segmentation_loss(similarity.detach(), mask).total for similarity in similarities]
    overlap = (anchors[..., 0] * anchors[..., 1]).sum(dim=-1).mean() ** 2
    assert_agrees(losses["total"], sum(each) / 4 + 0.1 * overlap, 1e-6)


def test_row4_all_levels_count(monkeypatch: pytest.MonkeyPatch) -> None:
    check_all_levels_count()
    assert_detects(lambda: check_all_levels_count("last"))
    monkeypatch.setattr(model.losses, "stage1_losses", overwritten_stage1_losses)
    assert_detects(check_all_levels_count)


# Row 5: CLIP's own weights kept requires_grad=True.


def check_clip_gets_no_gradient(adapted: AdaptedCLIP) -> None:
    """After the backward of both stages, under train mode as in training."""
    adapted.train()
    batch, prompts = random_batch(adapted.clip.img_size), tiny_prompts(adapted.clip)
    anchors = adapted.anchors(prompts)[batch.rows]
    similarities = scoring.similarities(adapted.frozen_features(batch.images).levels, anchors)
    model.losses.stage1_losses(similarities, anchors, batch.masks, 0.1)[0]["total"].backward()
    outputs = adapted(batch.images, adapted.text_side(prompts), batch.rows)
    model.losses.stage2_losses(outputs, batch.masks, batch.labels)[0]["total"].backward()
    with_gradient = {name for name, value in adapted.named_parameters() if value.grad is not None}
    assert with_gradient == {name for name, _ in adapted.named_parameters() if not name.startswith("clip.")}
    assert not any(value.requires_grad for value in adapted.clip.parameters())


def test_row5_clip_gets_no_gradient() -> None:
    adapted = adapted_clip(tiny_clip())
    check_clip_gets_no_gradient(adapted)
    adapted.zero_grad()
    adapted.clip.requires_grad_(True)
    assert_detects(lambda: check_clip_gets_no_gradient(adapted))


# Row 6: OpenAI's weights run with GELU instead of the QuickGELU that they were trained with.


def open_clips_own_choice(model_name: str, file: Path, state: dict[str, Tensor]) -> str:
    """open_clip follows the architecture's name, not the weights, and only warns."""
    return "gelu"


def check_openai_archive_runs_with_quick_gelu(archive: Path) -> None:
    loaded = load_clip(TINY_NAME, archive)
    assert loaded.activation == "quick_gelu"
    image = random_batch(40).images
    expected = tiny_open_clip(quick_gelu=True).eval().encode_image(image)
    assert_agrees(loaded.clip.encode_image(image), expected, 1e-5)


def test_row6_openai_weights_run_with_quick_gelu(openai_archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_openai_archive_runs_with_quick_gelu(openai_archive)
    monkeypatch.setattr(model.clip_loading, "_infer_activation", open_clips_own_choice)
    assert_detects(lambda: check_openai_archive_runs_with_quick_gelu(openai_archive))


# Row 7: V-V attention over the batch axis.


def batch_axis_attention(attn: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """V-V attention of tokens (B, T, C) with the missing transpose: images attend to one another, token by token."""
    _, _, v = blocks.project_heads(attn, x.transpose(0, 1))
    return blocks.merge_heads(attn, F.scaled_dot_product_attention(v, v, v)).transpose(0, 1)


def batch_axis_dual(block: ResidualAttentionBlock, x: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    return blocks.run_block(block, x), side + batch_axis_attention(block.attn, block.ln_1(x))


def batch_axis_values(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    return blocks.mlp_residual(block, x + batch_axis_attention(block.attn, block.ln_1(x)))


def features_of_a_batch(surgery: str) -> list[Tensor]:
    clip = tiny_clip()
    return frozen_features(clip, random_batch(40).images, config_for(clip, surgery=surgery)).levels


def check_features_do_not_depend_on_neighbours(surgery: str) -> None:
    clip = tiny_clip()
    config = config_for(clip, surgery=surgery)
    images = random_batch(40).images
    together = frozen_features(clip, images, config)
    alone = frozen_features(clip, images[:1], config)
    for first, second in zip(together.levels, alone.levels, strict=True):
        assert_agrees(first[:1], second, 1e-5)


@pytest.mark.parametrize("surgery", ["dual", "sequential"])
def test_row7_features_do_not_depend_on_neighbours(surgery: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_features_do_not_depend_on_neighbours(surgery)
    monkeypatch.setattr(model.frozen, "run_block_dual", batch_axis_dual)
    monkeypatch.setattr(model.frozen, "run_block_values", batch_axis_values)
    assert_detects(lambda: check_features_do_not_depend_on_neighbours(surgery))


def test_row7_surgery_batch_axis_is_the_old_behaviour(monkeypatch: pytest.MonkeyPatch) -> None:
    new = features_of_a_batch("batch_axis")
    assert_detects(lambda: check_features_do_not_depend_on_neighbours("batch_axis"))
    monkeypatch.setattr(model.frozen, "run_block_values", batch_axis_values)
    for level, old in zip(new, features_of_a_batch("sequential"), strict=True):
        assert_agrees(level, old, 1e-5)


# Row 8: `view` on non-contiguous tensors raised.


def viewing_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x.view(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def viewing_merge(attn: nn.MultiheadAttention, heads: Tensor) -> Tensor:
    batch, number, tokens, depth = heads.shape
    return attn.out_proj(heads.transpose(1, 2).view(batch, tokens, number * depth))


def viewing_dice(p: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    p, target = p.view(len(p), -1), target.view(len(target), -1)
    dice = (2 * (p * target).sum(dim=1) + smooth) / (p.sum(dim=1) + target.sum(dim=1) + smooth)
    return (1 - dice).mean()


def check_linear_takes_any_strides() -> None:
    x = torch.randn(5, 3, 4).transpose(0, 1)
    assert not x.is_contiguous()
    assert_agrees(blocks.linear_2d(x, torch.ones(2, 4)), x.sum(dim=-1, keepdim=True).expand(-1, -1, 2), 1e-5)


def check_heads_of_any_strides_merge() -> None:
    attn, heads = nn.MultiheadAttention(6, 2), torch.randn(4, 2, 5, 3)
    expected = attn.out_proj(torch.cat([heads[:, 0], heads[:, 1]], dim=-1))
    assert_agrees(blocks.merge_heads(attn, heads), expected, 1e-5)
    assert_agrees(blocks.merge_heads(attn, heads.transpose(0, 2).contiguous().transpose(0, 2)), expected, 1e-5)


def check_cross_attention_takes_any_strides() -> None:
    torch.manual_seed(0)
    branch = model.cross_attention.CrossAttention(4, 6, 8, 0.1, heads=2, dropout=0.0).eval()
    queries, context = torch.randn(5, 3, 4).transpose(0, 1), torch.randn(3, 6, 7).transpose(1, 2)
    assert not queries.is_contiguous()
    assert not context.is_contiguous()
    assert_agrees(branch(queries, context), branch(queries.contiguous(), context.contiguous()), 1e-5)


def check_losses_take_transposed_masks() -> None:
    mask = random_batch(40).masks.transpose(1, 2)
    assert not mask.is_contiguous()
    similarity = torch.randn(4, 25, 2)
    loss = model.losses.segmentation_loss(similarity, mask).total
    assert_agrees(loss, model.losses.segmentation_loss(similarity, mask.contiguous()).total, 1e-6)


@pytest.mark.parametrize(
    ("check", "where", "name", "old"),
    [
        (check_linear_takes_any_strides, blocks, "linear_2d", viewing_linear),
        (check_heads_of_any_strides_merge, blocks, "merge_heads", viewing_merge),
        (check_cross_attention_takes_any_strides, model.cross_attention, "linear_2d", viewing_linear),
        (check_losses_take_transposed_masks, model.losses, "dice_loss", viewing_dice),
    ],
)
def test_row8_any_strides(
    check: Callable[[], None], where: object, name: str, old: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    check()
    monkeypatch.setattr(where, name, old)
    assert_detects(check)
