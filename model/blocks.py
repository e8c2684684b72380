"""CLIP's frozen residual attention blocks, run on packed 2-D projections (docs/method.md).

open_clip's blocks hold the weights; the forward is written here because three things are needed that
`nn.MultiheadAttention` does not give: V-V attention beside ordinary attention from one projection (CLIP-Surgery,
arXiv:2304.05653), a stop between attention and adapter, and linears on 2-D tokens, which on the CPU avoid the batched
matrix products that 3-D activations fall into in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts


def linear_2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` over the last axis of `x` with all leading axes flattened to one; any strides."""
    return F.linear(x.reshape(-1, x.shape[-1]), weight, bias).reshape(*x.shape[:-1], weight.shape[0])


def project_heads(attn: nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of `x` (B, T, C), each (B, heads, T, C / heads), from one packed projection."""
    return _project(attn, x, 0, 3)


def _project(attn: nn.MultiheadAttention, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
    """Of queries (0), keys (1) and values (2) those from `first` to before `last`."""
    batch, tokens, width = x.shape
    rows = slice(first * width, last * width)
    packed = linear_2d(x, attn.in_proj_weight[rows], attn.in_proj_bias[rows])
    packed = packed.reshape(batch, tokens, last - first, attn.num_heads, width // attn.num_heads)
    return packed.permute(2, 0, 3, 1, 4).unbind()


def merge_heads(attn: nn.MultiheadAttention, heads: Tensor) -> Tensor:
    """Join (B, heads, T, C / heads) to (B, T, C) and apply the output projection."""
    joined = heads.transpose(1, 2).flatten(2)
    return linear_2d(joined, attn.out_proj.weight, attn.out_proj.bias)


def mlp_residual(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    """The second half of a block: x + MLP(ln_2(x)), x (B, T, C)."""
    hidden = block.mlp(block.ln_2(x).reshape(-1, x.shape[-1])).reshape(x.shape)
    return x + block.ls_2(hidden)


def run_block(block: ResidualAttentionBlock, x: Tensor, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """A block as CLIP was trained with it: x (B, T, C) -> (B, T, C); mask (B, 1, T, T): what tokens attend to."""
    q, k, v = project_heads(block.attn, block.ln_1(x))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return mlp_residual(block, x + block.ls_1(merge_heads(block.attn, attended)))


def run_block_for_class(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    """The class token after a block, (B, 1, C), where nothing reads the others: x (B, T, C), class token first."""
    q, k, v = _project_for_class(block, x)
    cls = x[:, :1] + block.ls_1(merge_heads(block.attn, F.scaled_dot_product_attention(q, k, v)))
    return mlp_residual(block, cls)


def _project_for_class(block: ResidualAttentionBlock, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    normed = block.ln_1(x)
    return *_project(block.attn, normed[:, :1], 0, 1), *_project(block.attn, normed, 1, 3)


def run_block_values(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    """A block whose attention is V-V attention over the tokens of each image: `--surgery sequential`."""
    (v,) = _project(block.attn, block.ln_1(x), 2, 3)
    x = x + block.ls_1(merge_heads(block.attn, F.scaled_dot_product_attention(v, v, v)))
    return mlp_residual(block, x)


def run_block_batch_axis(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    """V-V attention over the batch: at each position the images attend to one another, `--surgery batch_axis`.

    What the published code does for want of a transpose; x (B, T, C). MLP and layer norms see each token by itself.
    """
    return run_block_values(block, x.transpose(0, 1)).transpose(0, 1)


def run_block_dual(block: ResidualAttentionBlock, x: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    """A block that also adds its V-V attention to a side path without MLP: `--surgery dual`.

    x and side (B, T, C) -> the original stream after the block, and the side path after it.
    """
    q, k, v = project_heads(block.attn, block.ln_1(x))
    side = side + block.ls_1(merge_heads(block.attn, F.scaled_dot_product_attention(v, v, v)))
    x = x + block.ls_1(merge_heads(block.attn, F.scaled_dot_product_attention(q, k, v)))
    return mlp_residual(block, x), side


def run_block_dual_for_class(block: ResidualAttentionBlock, x: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    """`run_block_dual` where of the original stream the class token alone is read: (B, 1, C), and the side path."""
    q, k, v = _project_for_class(block, x)
    side = side + block.ls_1(merge_heads(block.attn, F.scaled_dot_product_attention(v, v, v)))
    cls = x[:, :1] + block.ls_1(merge_heads(block.attn, F.scaled_dot_product_attention(q, k, v)))
    return mlp_residual(block, cls), side


class BlockRunner:
    """How blocks are run on this machine, which changes no result but for rounding.

    checkpointed: activations of a block that a gradient crosses are computed again in the backward pass, but for
    attention's output (activation checkpointing, Chen et al. 2016, arXiv:1604.06174). compiled: the sizes of batches of
    images whose blocks `torch.compile` compiles, one graph for all blocks of an encoder; text is compiled for any size.
    Other batches, such as the last of an epoch, are run as they are: each size would be compiled anew.
    """

    def __init__(self, checkpointed: bool = False, compiled: Collection[int] = ()) -> None:
        self.checkpointed = checkpointed
        self.compiled = frozenset(compiled)

    def __call__(self, function: Callable[..., Any], block: nn.Module, *streams: Tensor, **of_text: Any) -> Any:
        """`function(block, *streams)`, one of the functions of this module; of_text: what is said of text alone."""
        compiles = bool(self.compiled) and (bool(of_text) or len(streams[0]) in self.compiled)
        if compiles:
            function = compiled(function, dynamic=bool(of_text))
        if not (self.checkpointed and torch.is_grad_enabled() and streams[0].requires_grad):
            return function(block, *streams, **of_text)
        return checkpoint(
            function,
            block,
            *streams,
            use_reentrant=False,
            preserve_rng_state=False,
            # A compiled block is one operation, of which no part can be kept.
            **({} if compiles else {"context_fn": keeping_attention}),
            **of_text,
        )


@cache
def compiled(function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
    """A function of this module, compiled when it is first called, and again for each new shape unless dynamic."""
    return torch.compile(function, fullgraph=True, dynamic=dynamic)


def keeping_attention() -> tuple[AbstractContextManager, AbstractContextManager]:
    """For `checkpoint`: keep what attention gives, which costs more to compute than to keep."""
    names = (name for name in dir(torch.ops.aten) if name.startswith("_scaled_dot_product"))
    attention = [getattr(torch.ops.aten, name).default for name in names if not name.endswith("backward")]
    return create_selective_checkpoint_contexts(attention)


def unit(x: Tensor) -> Tensor:
    """L2-normalise along the last axis, in float32 or better; a zero vector stays zero."""
    return F.normalize(full_precision(x), dim=-1)


def full_precision(x: Tensor) -> Tensor:
    """`x` as float32 where autocast left it in half precision; float64 stays."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def full_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in float32 or better, also where autocast or TF32 would have it shorter; broadcast as `@` does."""
    with torch.autocast(b.device.type, enabled=False):
        a, b = full_precision(a), full_precision(b)
        if torch.get_float32_matmul_precision() == "highest" or a.dtype == torch.float64:
            return a @ b
        return (a.double() @ b.double()).float()


def take_tokens(x: Tensor, positions: Tensor) -> Tensor:
    """x (B, T, C) at one position per row, (B,) -> (B, C), or at P, (B, P) -> (B, P, C)."""
    rows = torch.arange(x.shape[0], device=x.device)
    return x[rows.reshape(-1, *[1] * (positions.dim() - 1)), positions]
