"""Multi-head cross-attention, the branch that AdaptedCLIPWithCrossAttention adds to both streams (docs/method.md)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.adapter_modules import xavier
from model.blocks import full_precision, linear_2d, unit


class CrossAttention(nn.Module):
    """Queries of one modality attend to tokens of the other; the output has the queries' width.

    The projections have biases. `init="zero"` starts the output projection at zero, so that the branch starts silent.
    `scale="learned"` makes the weight of the residual a trainable number, from `weight`. `norm="layer"`: queries are
    layer-normalised; the context comes as `prepare_context` makes it.
    """

    def __init__(
        self,
        query_width: int,
        context_width: int,
        inner_width: int,
        weight: float,
        heads: int = 8,
        dropout: float = 0.1,
        init: str = "xavier",
        scale: str = "fixed",
        norm: str = "unit",
    ) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm = norm
        self.q_proj = nn.Linear(query_width, inner_width)
        self.k_proj = nn.Linear(context_width, inner_width)
        self.v_proj = nn.Linear(context_width, inner_width)
        self.out_proj = nn.Linear(inner_width, query_width)
        xavier(self)
        if init == "zero":
            nn.init.zeros_(self.out_proj.weight)
        if scale == "learned":
            self.scale = nn.Parameter(torch.tensor(float(weight)))
        else:
            self.scale = float(weight)

    @property
    def is_on(self) -> bool:
        """A branch of fixed weight 0 contributes nothing and is skipped."""
        return isinstance(self.scale, nn.Parameter) or self.scale != 0

    def _heads(self, projection: nn.Linear, tokens: Tensor) -> Tensor:
        projected = linear_2d(tokens, projection.weight, projection.bias)
        return projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, C / heads)

    def _queries(self, queries: Tensor) -> Tensor:
        return self._heads(self.q_proj, layer_normalised(queries) if self.norm == "layer" else queries)

    def forward(self, queries: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries (B, T, C_q) and context (B, M, C_c) -> (B, T, C_q); mask (B, M) is True where a token is real."""
        q, k, v = (self._queries(queries), self._heads(self.k_proj, context), self._heads(self.v_proj, context))
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if mask is None else mask[:, None, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return linear_2d(attended.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)

    def weights(self, queries: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """The attention weights, without dropout, (B, heads, T, M); each row sums to 1."""
        q, k = self._queries(queries), self._heads(self.k_proj, context)
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        return scores.softmax(dim=-1)


def prepare_context(tokens: Tensor, norm: str) -> Tensor:
    """Context as attention sees it: never with gradient; tokens unit, layer-normalised, or raw (the old behaviour)."""
    tokens = tokens.detach()
    if norm == "unit":
        return unit(tokens)
    return layer_normalised(tokens) if norm == "layer" else tokens


def layer_normalised(tokens: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the channel, without learned parameters, in float32 or better; shapes (..., C)."""
    return F.layer_norm(full_precision(tokens), tokens.shape[-1:])
