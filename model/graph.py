"""A model for one class as one graph, from 8-bit images of any size to maps and scores."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.adapter import AdaptedCLIP
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention, TextSide
from model.frozen import UnadaptedCLIP
from model.references import References, joined_calibrated_maps
from model.scoring import calibrated_maps, calibrated_scores, decisions, det_scores

# The parameter of Keys' cubic convolution and the unit of its weights, as in Pillow.
CUBIC = -0.5
FIXED_POINT = 2**22
# CLIP's modules for prompts up to the first block, and all of its text modules.
_PROMPT_INPUT = ("token_embedding", "positional_embedding")
_TEXT = (*_PROMPT_INPUT, "transformer", "ln_final", "text_projection")


class Thresholds(NamedTuple):
    """Scores of images and values of pixels above these are anomalous."""

    image: float
    pixel: float


class ScoringGraph(nn.Module):
    """`Detector.predict` for one class as a module: uint8 RGB images (B, H, W, 3) -> maps and scores.

    Args:
        model: the model, which is not changed; the graph leaves out the modules that it does not need.
        text_side: the model's text side of one class.
        domain: as for `predict`.
        det_score: as for `predict`.
        thresholds: None for no decisions.
        references: normal references; None for none.
        half: float16 weights and autocast.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: AdaptedCLIP | UnadaptedCLIP,
        text_side: Any,
        domain: str,
        det_score: str,
        thresholds: Thresholds | None = None,
        references: References | None = None,
        half: bool = False,
    ) -> None:
        super().__init__()
        conditioned = isinstance(model, AdaptedCLIPWithCrossAttention) and model.text_sees_image(text_side.loop)
        self.model = _without(model, _PROMPT_INPUT if conditioned else _TEXT)
        self.text_side = text_side
        self.half_precision = half
        if half:
            self.model = copy.deepcopy(self.model).half()
            if isinstance(text_side, TextSide):
                # Runtimes require inputs and weights of a block in the same precision.
                self.text_side = text_side._replace(stream=text_side.stream.half())
        self.domain = domain
        self.det_score = det_score
        self.thresholds = thresholds
        self.references = references
        self.size = model.clip.img_size
        self.register_buffer("mean", torch.tensor(model.clip.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(model.clip.std).view(3, 1, 1))

    @property
    def one_by_one(self) -> bool:
        """Whether images must be passed one at a time, because those of a batch interact (`batch_axis`)."""
        loop = getattr(self.text_side, "loop", None)
        frozen = loop is not None and self.model.text_sees_image(loop) and loop.text_context != "trained"
        return frozen and self.model.config.surgery == "batch_axis"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the outputs in their order, as in anomalib's exports."""
        return ("anomaly_map", "pred_score") + (("pred_label", "pred_mask") if self.thresholds else ())

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """anomaly_map (B, 1, S, S) and pred_score (B,), float32 in [0, 1]; pred_label (B,), pred_mask (B, 1, S, S)."""
        pixels = (resize(images, self.size) / 255 - self.mean) / self.std
        rows = torch.zeros_like(images[:, 0, 0, 0], dtype=torch.long)
        with torch.autocast(pixels.device.type, torch.float16, enabled=self.half_precision):
            outputs = self.model(pixels, self.text_side, rows)
            distances = self.references.maps(self.model, outputs, pixels, most=None) if self.references else None
        if self.references is None or distances is None:
            levels = calibrated_maps(outputs, self.size)
        else:
            levels = joined_calibrated_maps(outputs, distances, self.references.weight)
        maps = levels.mean(dim=0)
        scores = calibrated_scores(maps, det_scores(outputs, self.det_score), self.domain)
        if self.thresholds is None:
            return maps[:, None], scores
        labels, masks = decisions(scores, maps, *self.thresholds)
        return maps[:, None], scores, labels, masks[:, None]


def resize(images: Tensor, size: int) -> Tensor:
    """Pillow's bicubic resize to a square: uint8 (B, H, W, 3) -> float32 (B, 3, size, size) of whole numbers.

    First the width, then the height, with 8-bit values between, like Pillow (recent versions may use the other order).
    The sums are whole numbers, exact in float64, so every runtime rounds alike.
    """
    x = images.permute(0, 3, 1, 2).double()  # (B, 3, H, W)
    x = _eight_bits(x @ cubic_weights(images.shape[2], size, images.device).T)
    return _eight_bits(cubic_weights(images.shape[1], size, images.device) @ x).float()


def _eight_bits(sums: Tensor) -> Tensor:
    return (sums / FIXED_POINT + 0.5).floor().clamp(0, 255)


def cubic_weights(length: int, size: int, device: torch.device) -> Tensor:
    """Weights of `length` pixels in each of `size` pixels, (size, length), float64 in units of `FIXED_POINT`.

    Distances between pixel centres are in units of the larger of the two pixels.
    """
    old = 2 * torch.arange(length, device=device) + 1
    new = 2 * torch.arange(size, device=device) + 1
    larger: Any = torch.sym_max(length, size)
    distance = ((old * size)[None] - (new * length)[:, None]).abs().double() / (2 * larger)
    near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
    far = CUBIC * (((distance - 5) * distance + 8) * distance - 4)
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    return (weights / weights.sum(dim=1, keepdim=True) * FIXED_POINT).round()


def _without(model: Any, names: tuple[str, ...]) -> Any:
    """A copy of a model on the same weights, without these modules of CLIP."""
    reduced = copy.copy(model)
    reduced._modules = dict(model._modules)
    clip = reduced.clip = copy.copy(model.clip)
    clip._modules = dict(clip._modules)
    clip.clip = copy.copy(clip.clip)
    for table in ("_modules", "_parameters", "_buffers"):
        setattr(clip.clip, table, {k: v for k, v in getattr(clip.clip, table).items() if k not in names})
    return reduced
