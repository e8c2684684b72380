"""The text side: prompts -> unit prompt features -> the pair of anchors of a class (docs/method.md, "Text")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.adapter_modules import blend
from model.blocks import full_precision, run_block, take_tokens, unit
from model.clip import FrozenCLIP
from utils.errors import UserError
from utils.reading import shown


@dataclass(frozen=True)
class Prompts:
    """The prompts of C classes as token ids, P per class, of which the first `normal` describe a normal object.

    tokens: (C, P, T), cut to the longest prompt of all classes.
    """

    tokens: Tensor
    normal: int

    @classmethod
    def from_texts(cls, clip: FrozenCLIP, texts: Sequence[tuple[Sequence[str], Sequence[str]]]) -> Prompts:
        """From (normal, abnormal) prompt lists of each class; every class has as many of each as the others.

        Raises UserError for a prompt that CLIP would cut: its end says whether the object is damaged.
        """
        normal, abnormal = len(texts[0][0]), len(texts[0][1])
        if any((len(first), len(second)) != (normal, abnormal) for first, second in texts):
            raise ValueError("every class needs the same number of normal and of abnormal prompts")
        prompts = [prompt for first, second in texts for prompt in (*first, *second)]
        tokens = clip.tokenize(prompts)
        longest = clip.tokenizer.context_length
        if tokens.shape[1] == longest:
            (row, *_) = tokens[:, -1].nonzero()[:, 0].tolist()
            raise UserError(
                f"the prompt {shown(prompts[row])} fills CLIP's {longest} tokens: give a shorter class name"
            )
        return cls(tokens.reshape(len(texts), normal + abnormal, -1), normal)

    def to(self, device: torch.device | str) -> Prompts:
        return Prompts(self.tokens.to(device), self.normal)


def begin_prompts(clip: FrozenCLIP, tokens: Tensor) -> Tensor:
    """Token ids (P, T) -> the text stream after the first block, (P, T, D_t): what prompts are before any adapter."""
    return clip.run(run_block, clip.clip.transformer.resblocks[0], clip.embed_text(tokens), causal=True)


def finish_prompts(
    clip: FrozenCLIP,
    x: Tensor,
    tokens: Tensor,
    adapters: Sequence[nn.Module] = (),
    projector: nn.Module | None = None,
    weight: float = 0.0,
) -> Tensor:
    """The stream after the first block (P, T, D_t) -> unit prompt features (P, D); `tokens` tell where each ends.

    adapters: stand after the first blocks, one each, blended in with `weight`.
    projector: takes the place of CLIP's text projection; None keeps CLIP's own.
    """
    for index, block in enumerate(clip.clip.transformer.resblocks):
        if index > 0:
            x = clip.run(run_block, block, x, causal=True)
        if index < len(adapters):
            x = blend(x, adapters[index](x), weight)
    # ln_final acts on each token by itself, so it is enough to normalise the end-of-text token.
    pooled = clip.clip.ln_final(take_tokens(x, tokens.argmax(dim=-1)))
    return unit(clip.project_text(pooled) if projector is None else projector(pooled))


def encode_prompts(
    clip: FrozenCLIP,
    tokens: Tensor,
    adapters: Sequence[nn.Module] = (),
    projector: nn.Module | None = None,
    weight: float = 0.0,
) -> Tensor:
    """Token ids (P, T) -> unit prompt features (P, D), one text pass; the rest as `finish_prompts`."""
    return finish_prompts(clip, begin_prompts(clip, tokens), tokens, adapters, projector, weight)


def pair_anchors(features: Tensor, normal: int) -> Tensor:
    """Unit prompt features (..., P, D) -> anchors (..., D, 2), column 0 normal, column 1 abnormal.

    Each group is averaged and made unit again.
    """
    features = full_precision(features)
    groups = (features[..., :normal, :], features[..., normal:, :])
    return torch.stack([unit(group.mean(dim=-2)) for group in groups], dim=-1)
