"""The small trainable modules: adapters inside the encoders, projectors after them (docs/method.md; AA-CLIP, 2025)."""

from torch import Tensor, nn

from model.blocks import linear_2d


class SimpleAdapter(nn.Module):
    """Bottleneck adapter: Linear(c -> c/2), LeakyReLU, Linear(c/2 -> c), no bias; (..., c) -> (..., c)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width // 2, bias=False)
        self.act = nn.LeakyReLU()
        self.fc2 = nn.Linear(width // 2, width, bias=False)
        xavier(self)

    def forward(self, x: Tensor) -> Tensor:
        return linear_2d(self.act(linear_2d(x, self.fc1.weight)), self.fc2.weight)


class LinearAdapter(nn.Module):
    """The published AA-CLIP adapter: Linear(c -> c) without bias, LeakyReLU; (..., c) -> (..., c)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(width, width, bias=False), nn.LeakyReLU())
        xavier(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc[1](linear_2d(x, self.fc[0].get_parameter("weight")))


class SimpleProj(nn.Module):
    """Projector Linear(c_in -> c_out) without bias, then LeakyReLU with `relu`; its key is `fc`, with `relu` `fc.0`."""

    def __init__(self, width_in: int, width_out: int, relu: bool) -> None:
        super().__init__()
        linear = nn.Linear(width_in, width_out, bias=False)
        self.fc = nn.Sequential(linear, nn.LeakyReLU()) if relu else linear
        xavier(self)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.fc, nn.Linear):
            return linear_2d(x, self.fc.weight)
        return self.fc[1](linear_2d(x, self.fc[0].get_parameter("weight")))


def xavier(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every Linear in `module`."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def make_adapter(kind: str, width: int) -> nn.Module:
    """The adapter of `--adapter`: "bottleneck" (SimpleAdapter) or "linear" (LinearAdapter)."""
    return {"bottleneck": SimpleAdapter, "linear": LinearAdapter}[kind](width)


def blend(x: Tensor, adapted: Tensor, weight: float) -> Tensor:
    """Blend an adapter's output into the stream, token by token (docs/method.md).

    Args:
        x: the stream, (..., c).
        adapted: the adapter's output, (..., c). Tokens of zeros contribute zero.
        weight: w in w a |x| / |a| + (1 - w) x.

    Returns:
        The blended stream, (..., c).
    """
    return weight * match_length(adapted, x) + (1 - weight) * x


def match_length(adapted: Tensor, x: Tensor) -> Tensor:
    """`adapted` with the length of `x`, token by token; shapes (..., c). Zeros stay zeros."""
    return adapted * (x.norm(dim=-1, keepdim=True) / adapted.norm(dim=-1, keepdim=True).clamp_min(1e-12))
