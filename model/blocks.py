"""CLIP's frozen residual attention blocks, run on packed 2-D projections (docs/method.md).

open_clip's blocks provide the weights. The forward is here, because `nn.MultiheadAttention` cannot return V-V attention
(CLIP-Surgery, arXiv:2304.05653) and ordinary attention from one projection, and because linears on 2-D tokens avoid
batched matrix products in the backward pass on the CPU.
"""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn


def linear_2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` over the last axis of `x` with all leading axes flattened to one; any strides."""
    return F.linear(x.reshape(-1, x.shape[-1]), weight, bias).reshape(*x.shape[:-1], weight.shape[0])


def project_heads(attn: nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of `x` (B, T, C), each (B, heads, T, C / heads), from one packed projection."""
    q, k, v = _project(attn, x, 0, 3)
    return q, k, v


def _project(attn: nn.MultiheadAttention, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
    """Queries (0), keys (1) and values (2) from `first` up to, but not including, `last`."""
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
    """CLIP's own block: x (B, T, C) -> (B, T, C); mask: (B, 1, T, T) bool, True for tokens to attend to."""
    q, k, v = project_heads(block.attn, block.ln_1(x))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return mlp_residual(block, x + block.ls_1(merge_heads(block.attn, attended)))


def run_block_for_class(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    """The class token after a block, (B, 1, C), if the others are not needed: x (B, T, C), class token first."""
    q, k, v = _project_for_class(block, x)
    cls = x[:, :1] + block.ls_1(merge_heads(block.attn, F.scaled_dot_product_attention(q, k, v)))
    return mlp_residual(block, cls)


def _project_for_class(block: ResidualAttentionBlock, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    normed = block.ln_1(x)
    (q,), (k, v) = _project(block.attn, normed[:, :1], 0, 1), _project(block.attn, normed, 1, 3)
    return q, k, v


def run_block_values(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    """A block whose attention is V-V attention over the tokens of each image: `--surgery sequential`."""
    (v,) = _project(block.attn, block.ln_1(x), 2, 3)
    x = x + block.ls_1(merge_heads(block.attn, F.scaled_dot_product_attention(v, v, v)))
    return mlp_residual(block, x)


def run_block_batch_axis(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    """V-V attention over the images of a batch at each position, x (B, T, C): `--surgery batch_axis`.

    The published code does so because a transpose is missing.
    """
    return run_block_values(block, x.transpose(0, 1)).transpose(0, 1)


def run_block_dual(block: ResidualAttentionBlock, x: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    """A block that also adds its V-V attention to a side path without MLP: `--surgery dual`; x and side (B, T, C)."""
    q, k, v = project_heads(block.attn, block.ln_1(x))
    side = side + block.ls_1(merge_heads(block.attn, F.scaled_dot_product_attention(v, v, v)))
    x = x + block.ls_1(merge_heads(block.attn, F.scaled_dot_product_attention(q, k, v)))
    return mlp_residual(block, x), side


def run_block_dual_for_class(block: ResidualAttentionBlock, x: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    """`run_block_dual` with only the class token of the original stream, (B, 1, C)."""
    q, k, v = _project_for_class(block, x)
    side = side + block.ls_1(merge_heads(block.attn, F.scaled_dot_product_attention(v, v, v)))
    cls = x[:, :1] + block.ls_1(merge_heads(block.attn, F.scaled_dot_product_attention(q, k, v)))
    return mlp_residual(block, cls), side


class BlockRunner:
    """Runs blocks with activation checkpointing or `torch.compile`, which changes results by rounding only.

    Args:
        checkpointed: recompute the activations of blocks with gradient in the backward pass, except the attention
            output (activation checkpointing, Chen et al. 2016, arXiv:1604.06174).
        compiled: batch sizes of images whose blocks are compiled. Other sizes, such as an epoch's last batch, would
            need a compilation each and run eagerly. Text is compiled for any size.
    """

    def __init__(self, checkpointed: bool = False, compiled: Collection[int] = ()) -> None:
        self.checkpointed = checkpointed
        self.compiled = frozenset(compiled)

    def __call__(self, function: Callable[..., Any], block: nn.Module, *streams: Tensor, **text_options: Any) -> Any:
        """`function(block, *streams, **text_options)` for a function of this module; only text has options."""
        compiles = bool(self.compiled) and (bool(text_options) or len(streams[0]) in self.compiled)
        if compiles:
            function = compiled(function, dynamic=bool(text_options))
        if not (self.checkpointed and torch.is_grad_enabled() and streams[0].requires_grad):
            return function(block, *streams, **text_options)
        # A compiled block is one operation, so its attention cannot be saved separately.
        context = noop_context_fn if compiles else save_attention
        options = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": context, **text_options}
        return checkpoint(function, block, *streams, **options)


@cache
def compiled(function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
    """A compiled function of this module; it is compiled again for each new shape unless `dynamic`."""
    return torch.compile(function, fullgraph=True, dynamic=dynamic)


def save_attention() -> tuple[AbstractContextManager, AbstractContextManager]:
    """For `checkpoint`: save the attention output, which is expensive to recompute."""
    names = (name for name in dir(torch.ops.aten) if name.startswith("_scaled_dot_product"))
    attention = [getattr(torch.ops.aten, name).default for name in names if not name.endswith("backward")]
    return create_selective_checkpoint_contexts(attention)


def unit(x: Tensor) -> Tensor:
    """L2-normalise along the last axis, in float32 or better; a zero vector stays zero."""
    return F.normalize(full_precision(x), dim=-1)


def full_precision(x: Tensor) -> Tensor:
    """`x` as float32 if autocast left it in half precision; float64 stays."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def full_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in float32 or better, also under autocast or TF32; broadcast as `@` does."""
    with torch.autocast(b.device.type, enabled=False):
        a, b = full_precision(a), full_precision(b)
        if torch.get_float32_matmul_precision() == "highest" or a.dtype == torch.float64:
            return a @ b
        return (a.double() @ b.double()).float()


def take_tokens(x: Tensor, positions: Tensor) -> Tensor:
    """x (B, T, C) at one position per row, (B,) -> (B, C), or at P, (B, P) -> (B, P, C)."""
    rows = torch.arange(x.shape[0], device=x.device)
    return x[rows.reshape(-1, *[1] * (positions.dim() - 1)), positions]
