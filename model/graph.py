"""A model as one graph for a class: from 8-bit images of any size to maps and scores, with nothing left outside."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.adapter import AdaptedCLIP
from model.adapter_cross_attention import TextSide
from model.frozen import UnadaptedCLIP, frozen_patches
from model.references import joined_calibrated_maps, reference_maps
from model.scoring import Outputs, calibrated_maps, calibrated_scores, decisions

# Of Keys' cubic convolution, and the unit of its weights, as Pillow has them.
CUBIC = -0.5
FIXED_POINT = 2**22
# What only prompts pass on their way to the first block, and what they need behind it.
_WORDS_FIRST = ("token_embedding", "positional_embedding")
_WORDS = (*_WORDS_FIRST, "transformer", "ln_final", "text_projection")


class Thresholds(NamedTuple):
    """What an image's score, and a pixel of its map, must exceed to be called anomalous ."""

    image: float
    pixel: float


class Memory(NamedTuple):
    """Patch features of normal references, unit, (M, D) of each level and branch, and how their distances count.

    As `engine.detector.references.References`, which says which images they are.
    """

    levels: tuple[Tensor, ...]
    weight: float
    features: str


class ScoringGraph(nn.Module):
    """uint8 RGB images (B, H, W, 3) -> maps and scores of one class, as `Detector.predict` makes them of each image.

    text_side: of one class, as the model gives it. domain, det_score: as for `predict`. thresholds: without them there
    are no decisions. memory: the references that images are compared with, None for none. half: weights in float16, and
    what `torch.autocast` computes in it. Parts of CLIP that the graph never passes are left out of it; the model itself
    is not changed.
    """

    def __init__(
        self,
        model: AdaptedCLIP | UnadaptedCLIP,
        text_side: Any,
        domain: str,
        det_score: str,
        thresholds: Thresholds | None = None,
        memory: Memory | None = None,
        half: bool = False,
    ) -> None:
        super().__init__()
        sees_image = hasattr(model, "text_sees_image") and model.text_sees_image(text_side.loop)
        self.model = _without(model, _WORDS_FIRST if sees_image else _WORDS)
        self.text_side = text_side
        self.half_precision = half
        if half:
            self.model = copy.deepcopy(self.model).half()
            if isinstance(text_side, TextSide):
                # Words that pass blocks meet their weights in one precision, which runtimes insist on.
                self.text_side = text_side._replace(stream=text_side.stream.half())
        self.domain = domain
        self.det_score = det_score
        self.thresholds = thresholds
        self.memory = memory
        self.size = model.clip.img_size
        self.register_buffer("mean", torch.tensor(model.clip.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(model.clip.std).view(3, 1, 1))

    @property
    def one_by_one(self) -> bool:
        """Whether it takes one image at a time: where those of a batch would see one another (`batch_axis`)."""
        loop = getattr(self.text_side, "loop", None)
        frozen = loop is not None and self.model.text_sees_image(loop) and loop.text_context != "trained"
        return frozen and self.model.config.surgery == "batch_axis"

    @property
    def names(self) -> tuple[str, ...]:
        """What the outputs are called, in their order: the names of anomalib's exports."""
        return ("anomaly_map", "pred_score") + (("pred_label", "pred_mask") if self.thresholds else ())

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """anomaly_map (B, 1, S, S) and pred_score (B,), float32 in [0, 1]; pred_label (B,), pred_mask (B, 1, S, S)."""
        pixels = (resize(images, self.size) / 255 - self.mean) / self.std
        rows = torch.zeros_like(images[:, 0, 0, 0], dtype=torch.long)  # of the one class
        with torch.autocast(pixels.device.type, torch.float16, enabled=self.half_precision):
            outputs = self.model(pixels, self.text_side, rows)
            features = self._compared(outputs, pixels)
        if self.memory is None:
            levels = calibrated_maps(outputs, self.size)
        else:
            distances = reference_maps(features, self.memory.levels, self.size, most=None)
            distances = distances.unflatten(0, (-1, len(outputs.levels))).mean(dim=0)  # of two branches
            levels = joined_calibrated_maps(outputs, distances, self.memory.weight)
        maps = levels.mean(dim=0)
        scores = calibrated_scores(maps, outputs, self.domain, self.det_score)
        if self.thresholds is None:
            return maps[:, None], scores
        labels, masks = decisions(scores, maps, *self.thresholds)
        return maps[:, None], scores, labels, masks[:, None]

    def _compared(self, outputs: Outputs, pixels: Tensor) -> list[Tensor]:
        """The patch features that references are compared with, as `Detector.patch_features` has them."""
        which = self.memory.features if self.memory else "trained"
        if which == "trained" or isinstance(self.model, UnadaptedCLIP):
            return list(outputs.features)
        frozen = frozen_patches(self.model.clip, pixels, self.model.config)
        return frozen if which == "frozen" else [*outputs.features, *frozen]


def resize(images: Tensor, size: int) -> Tensor:
    """Pillow's bicubic resize to a square: uint8 (B, H, W, 3) -> float32 (B, 3, size, size) of whole numbers.

    Along the width first, then along the height, with 8-bit values between, as Pillow does it (of late in the other
    order where it is less work). Sums of whole numbers, which float64 holds exactly: every runtime rounds alike.
    """
    x = images.permute(0, 3, 1, 2).double()  # (B, 3, H, W)
    x = _eight_bits(x @ cubic_weights(images.shape[2], size, images.device).T)
    return _eight_bits(cubic_weights(images.shape[1], size, images.device) @ x).float()


def _eight_bits(sums: Tensor) -> Tensor:
    return (sums / FIXED_POINT + 0.5).floor().clamp(0, 255)


def cubic_weights(length: int, size: int, device: torch.device) -> Tensor:
    """What each of `length` pixels adds to each of `size` ones, (size, length): float64, in units of `FIXED_POINT`.

    A pixel's distance from the new pixel's centre, in units of the wider of both, is a fraction of whole numbers.
    """
    old = 2 * torch.arange(length, device=device) + 1
    new = 2 * torch.arange(size, device=device) + 1
    distance = ((old * size)[None] - (new * length)[:, None]).abs().double() / (2 * torch.sym_max(length, size))
    near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
    far = CUBIC * (((distance - 5) * distance + 8) * distance - 4)
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    return (weights / weights.sum(dim=1, keepdim=True) * FIXED_POINT).round()


def _without(model: Any, names: tuple[str, ...]) -> Any:
    """A model without these parts of CLIP, on the same weights; `model` itself keeps them."""
    kept = copy.copy(model)
    kept._modules = dict(model._modules)
    clip = kept.clip = copy.copy(model.clip)
    clip._modules = dict(clip._modules)
    clip.clip = copy.copy(clip.clip)
    for table in ("_modules", "_parameters", "_buffers"):
        setattr(clip.clip, table, {k: v for k, v in getattr(clip.clip, table).items() if k not in names})
    return kept
