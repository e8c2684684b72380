"""Multi-head cross-attention, the branch that `AdaptedCLIPWithCrossAttention` adds to both streams (docs/method.md)."""

import torch.nn.functional as F
from torch import Tensor, nn

from model.adapter_modules import xavier
from model.blocks import full_precision, linear_2d, unit


class CrossAttention(nn.Module):
    """Multi-head attention from the tokens of one modality to those of the other (docs/method.md, "Cross-attention").

    All four projections have biases.

    Args:
        query_width: width of the queries and of the output.
        context_width: width of the context tokens.
        inner_width: width of all heads together.
        weight: weight of the output in the residual, kept as an attribute for the caller. At 0 the branch is skipped.
        heads: attention heads, which must divide `inner_width`.
        dropout: dropout of the attention weights in train mode.
        init: "xavier", or "zero" for an output projection that starts at zero.
        norm: "layer" layer-normalises the queries. The caller prepares the context with `prepare_context`.
    """

    def __init__(
        self,
        query_width: int,
        context_width: int,
        inner_width: int,
        weight: float,
        heads: int,
        dropout: float,
        init: str = "xavier",
        norm: str = "unit",
    ) -> None:
        super().__init__()
        self.weight = float(weight)
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

    def _heads(self, projection: nn.Linear, tokens: Tensor) -> Tensor:
        projected = linear_2d(tokens, projection.weight, projection.bias)
        return projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, C / heads)

    def _queries(self, queries: Tensor) -> Tensor:
        return self._heads(self.q_proj, layer_normalised(queries) if self.norm == "layer" else queries)

    def forward(self, queries: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from queries to context.

        Args:
            queries: (B, T, C_q).
            context: (B, M, C_c).
            mask: (B, M) bool, True for real tokens; None if all are real.

        Returns:
            The output projection, (B, T, C_q), not yet weighted.
        """
        q, k, v = (self._queries(queries), self._heads(self.k_proj, context), self._heads(self.v_proj, context))
        mask = None if mask is None else mask[:, None, None]
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return linear_2d(attended.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)

    def attention_weights(self, queries: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention weights without dropout, (B, heads, T, M); each row sums to 1. Arguments as for `forward`."""
        q, k = self._queries(queries), self._heads(self.k_proj, context)
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        return scores.softmax(dim=-1)


def prepare_context(tokens: Tensor, norm: str) -> Tensor:
    """Detach context tokens (..., C) and make them "unit" or "layer"-normalised; "none" leaves them as they are."""
    tokens = tokens.detach()
    if norm == "unit":
        return unit(tokens)
    return layer_normalised(tokens) if norm == "layer" else tokens


def layer_normalised(tokens: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the channel, without learned parameters, in float32 or better; shapes (..., C)."""
    return F.layer_norm(full_precision(tokens), tokens.shape[-1:])
