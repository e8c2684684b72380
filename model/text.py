"""The text side: prompts -> unit prompt features -> the pair of anchors of a class (docs/method.md, "Text")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.adapter_modules import blend
from model.blocks import full_precision, run_block, take_tokens, unit
from model.clip import FrozenCLIP
from utils.errors import UserError
from utils.reading import short_repr


class PromptTree(NamedTuple):
    """The prompts of C classes with the beginnings that several share taken once, and nothing behind their ends.

    Attention is causal, so a token's stream depends on its prompt's tokens up to itself alone. tokens (C, U): the ids;
    positions (C, U): the place in the prompt; taken (C, U): the place among all P * T tokens of a class; sees (C, 1, U,
    U): bool, what each one attends to; ends (C, P): where each prompt's end-of-text token stands. Classes with fewer
    tokens than others are padded with tokens that see themselves.
    """

    tokens: Tensor
    positions: Tensor
    taken: Tensor
    sees: Tensor
    ends: Tensor

    def of(self, rows: Tensor) -> PromptTree:
        """Of some of the classes, rows (n,), or of one class for each of n images."""
        return PromptTree(*(part.to(rows.device)[rows] for part in self))


def prompt_tree(tokens: Tensor) -> PromptTree:
    """The tree of prompts (C, P, T), whose end-of-text token has the largest id."""
    width = tokens.shape[-1]
    found: list[dict[tuple[int, ...], tuple[int, int]]] = []  # of each class: beginning -> its place here and there
    ends = []
    for prompts in tokens.tolist():
        places: dict[tuple[int, ...], tuple[int, int]] = {}
        words = [tuple(prompt[: prompt.index(max(prompt)) + 1]) for prompt in prompts]
        for row, prompt in enumerate(words):
            for length in range(1, len(prompt) + 1):
                places.setdefault(prompt[:length], (len(places), row * width + length - 1))
        found.append(places)
        ends.append([places[prompt][0] for prompt in words])
    size = max(map(len, found))
    ids, positions, taken = torch.zeros(3, len(found), size, dtype=torch.long)
    sees = torch.eye(size, dtype=torch.bool).repeat(len(found), 1, 1, 1)
    for row, places in enumerate(found):
        for beginning, (place, taken_from) in places.items():
            ids[row, place], positions[row, place], taken[row, place] = beginning[-1], len(beginning) - 1, taken_from
            sees[row, 0, place, [places[beginning[: end + 1]][0] for end in range(len(beginning))]] = True
    return PromptTree(ids, positions, taken, sees, torch.tensor(ends))


@dataclass(frozen=True)
class Prompts:
    """The prompts of C classes as token ids, P per class, of which the first `normal` describe a normal object.

    tokens: (C, P, T), cut to the longest prompt of all classes; tree: the same, as it is encoded; made of the tokens
    unless it is given.
    """

    tokens: Tensor
    normal: int
    tree: PromptTree | None = None

    def __post_init__(self) -> None:
        if self.tree is None:
            tree = PromptTree(*(part.to(self.tokens.device) for part in prompt_tree(self.tokens)))
            object.__setattr__(self, "tree", tree)

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
                f"the prompt {short_repr(prompts[row])} fills CLIP's {longest} tokens: give a shorter class name"
            )
        return cls(tokens.reshape(len(texts), normal + abnormal, -1), normal)

    def to(self, device: torch.device | str) -> Prompts:
        return Prompts(self.tokens.to(device), self.normal, PromptTree(*(part.to(device) for part in self.tree)))

    def of_classes(self, rows: Tensor) -> Prompts:
        """The prompts of some of the classes, rows (n,), on the device of `rows`."""
        return Prompts(self.tokens.to(rows.device)[rows], self.normal, self.tree.of(rows))


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
    return _finish(clip, x, tokens.argmax(dim=-1), adapters, projector, weight, causal=True)


def encode_classes(
    clip: FrozenCLIP,
    prompts: Prompts,
    adapters: Sequence[nn.Module] = (),
    projector: nn.Module | None = None,
    weight: float = 0.0,
) -> Tensor:
    """The unit features of all prompts of C classes, (C, P, D), from one text pass; the rest as `finish_prompts`."""
    tree = prompts.tree
    x = clip.clip.token_embedding(tree.tokens) + clip.clip.positional_embedding[tree.positions]  # (C, U, D_t)
    x = clip.run(run_block, clip.clip.transformer.resblocks[0], x, mask=tree.sees)
    return finish_classes(clip, x, tree, adapters, projector, weight)


def finish_classes(
    clip: FrozenCLIP,
    x: Tensor,
    tree: PromptTree,
    adapters: Sequence[nn.Module] = (),
    projector: nn.Module | None = None,
    weight: float = 0.0,
) -> Tensor:
    """The stream of trees after the first block (C, U, D_t) -> unit prompt features (C, P, D); as `finish_prompts`."""
    return _finish(clip, x, tree.ends, adapters, projector, weight, mask=tree.sees)


def _finish(
    clip: FrozenCLIP,
    x: Tensor,
    ends: Tensor,
    adapters: Sequence[nn.Module],
    projector: nn.Module | None,
    weight: float,
    **attention: Any,
) -> Tensor:
    """The text pass behind the first block; ends: as for `take_tokens`; attention: what `run_block` takes of it."""
    for index, block in enumerate(clip.clip.transformer.resblocks):
        if index > 0:
            x = clip.run(run_block, block, x, **attention)
        if index < len(adapters):
            x = blend(x, adapters[index](x), weight)
    # ln_final acts on each token by itself, so it is enough to normalise the end-of-text token.
    pooled = clip.clip.ln_final(take_tokens(x, ends))
    return unit(clip.project_text(pooled) if projector is None else projector(pooled))


def pair_anchors(features: Tensor, normal: int) -> Tensor:
    """Unit prompt features (..., P, D) -> anchors (..., D, 2), column 0 normal, column 1 abnormal.

    Each group is averaged and made unit again.
    """
    features = full_precision(features)
    groups = (features[..., :normal, :], features[..., normal:, :])
    return torch.stack([unit(group.mean(dim=-2)) for group in groups], dim=-1)
