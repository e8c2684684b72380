"""The text side: prompts -> unit prompt features -> the pair of anchors of a class (docs/method.md, "Text")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.adapter_modules import blend
from model.blocks import full_precision, run_block, take_tokens, unit
from model.clip import FrozenCLIP
from utils.errors import UserError
from utils.reading import short_repr


class PromptTree(NamedTuple):
    """The tokens of C classes with shared prefixes only once and without padding.

    Attention is causal, so equal prefixes have equal streams. Classes with fewer tokens than others are padded with
    tokens that attend to themselves.

    tokens: (C, U), ids; positions: (C, U), positions in the prompt; taken: (C, U), indices among the P * T tokens of
    the class; sees: (C, 1, U, U) bool, the attention mask; ends: (C, P), index of each prompt's end-of-text token.
    """

    tokens: Tensor
    positions: Tensor
    taken: Tensor
    sees: Tensor
    ends: Tensor

    def of(self, rows: Tensor) -> PromptTree:
        """The trees of classes, rows (n,)."""
        return PromptTree(*(part.to(rows.device)[rows] for part in self))


def prompt_tree(tokens: Tensor) -> PromptTree:
    """The tree of prompts (C, P, T), whose end-of-text token has the largest id, on the CPU."""
    width = tokens.shape[-1]
    classes: list[dict[tuple[int, ...], tuple[int, int]]] = []  # for each class: prefix -> index in the tree and taken
    ends = []
    for prompts in tokens.tolist():
        nodes: dict[tuple[int, ...], tuple[int, int]] = {}
        words = [tuple(prompt[: prompt.index(max(prompt)) + 1]) for prompt in prompts]
        for row, prompt in enumerate(words):
            for length in range(1, len(prompt) + 1):
                nodes.setdefault(prompt[:length], (len(nodes), row * width + length - 1))
        classes.append(nodes)
        ends.append([nodes[prompt][0] for prompt in words])
    size = max(map(len, classes))
    ids, positions, taken = torch.zeros(3, len(classes), size, dtype=torch.long)
    sees = torch.eye(size, dtype=torch.bool).repeat(len(classes), 1, 1, 1)
    for row, nodes in enumerate(classes):
        for prefix, (node, source) in nodes.items():
            ids[row, node], positions[row, node], taken[row, node] = prefix[-1], len(prefix) - 1, source
            sees[row, 0, node, [nodes[prefix[: end + 1]][0] for end in range(len(prefix))]] = True
    return PromptTree(ids, positions, taken, sees, torch.tensor(ends))


class Prompts:
    """The prompts of C classes as token ids, P per class.

    Args:
        tokens: (C, P, T), cut to the longest prompt of all classes.
        normal: the first `normal` prompts of each class describe a normal object, the others an anomalous one.
        tree: the tree of `tokens`, if it is already computed.
    """

    def __init__(self, tokens: Tensor, normal: int, tree: PromptTree | None = None) -> None:
        self.tokens = tokens
        self.normal = normal
        self.tree = PromptTree(*(part.to(tokens.device) for part in tree or prompt_tree(tokens)))

    @classmethod
    def from_texts(cls, clip: FrozenCLIP, texts: Sequence[tuple[Sequence[str], Sequence[str]]]) -> Prompts:
        """From the (normal, abnormal) prompt lists of each class, of equal lengths for all classes.

        Raises:
            UserError: a prompt is longer than CLIP's context.
        """
        normal, abnormal = len(texts[0][0]), len(texts[0][1])
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
        return Prompts(self.tokens.to(device), self.normal, self.tree)

    def of_classes(self, rows: Tensor) -> Prompts:
        """The prompts of classes, rows (n,), on the device of `rows`."""
        return Prompts(self.tokens.to(rows.device)[rows], self.normal, self.tree.of(rows))


def begin_prompts(clip: FrozenCLIP, tokens: Tensor) -> Tensor:
    """Token ids (P, T) -> the text stream after the first block, before any adapter, (P, T, D_t)."""
    return clip.run(run_block, clip.clip.transformer.resblocks[0], clip.embed_text(tokens), causal=True)


class TextModules(NamedTuple):
    """The trainable modules of the text encoder; the default is CLIP's own encoder.

    adapters: after the first blocks, one each; projector: replaces CLIP's text projection; weight: of the adapters in
    the blend.
    """

    adapters: Sequence[nn.Module] = ()
    projector: nn.Module | None = None
    weight: float = 0.0


CLIP_TEXT = TextModules()


def finish_prompts(clip: FrozenCLIP, x: Tensor, tokens: Tensor, modules: TextModules = CLIP_TEXT) -> Tensor:
    """Encode prompts from the stream after the first block.

    Args:
        clip: the frozen CLIP.
        x: the stream after the first block, (P, T, D_t).
        tokens: token ids, (P, T).
        modules: adapters and projector.

    Returns:
        Unit prompt features, (P, D).
    """
    return _finish(clip, x, tokens.argmax(dim=-1), modules, causal=True)


def encode_classes(clip: FrozenCLIP, prompts: Prompts, modules: TextModules = CLIP_TEXT) -> Tensor:
    """Unit features of all prompts of C classes, (C, P, D), from one text pass; arguments as for `finish_prompts`."""
    tree = prompts.tree
    x = clip.clip.token_embedding(tree.tokens) + clip.clip.positional_embedding[tree.positions]  # (C, U, D_t)
    x = clip.run(run_block, clip.clip.transformer.resblocks[0], x, mask=tree.sees)
    return finish_classes(clip, x, tree, modules)


def finish_classes(clip: FrozenCLIP, x: Tensor, tree: PromptTree, modules: TextModules = CLIP_TEXT) -> Tensor:
    """`finish_prompts` for trees: the stream after the first block (C, U, D_t) -> unit prompt features (C, P, D)."""
    return _finish(clip, x, tree.ends, modules, mask=tree.sees)


def _finish(clip: FrozenCLIP, x: Tensor, ends: Tensor, modules: TextModules, **attention: Any) -> Tensor:
    """The text pass after the first block; ends: positions for `take_tokens`; attention: options of `run_block`."""
    for index, block in enumerate(clip.clip.transformer.resblocks):
        if index > 0:
            x = clip.run(run_block, block, x, **attention)
        if index < len(modules.adapters):
            x = blend(x, modules.adapters[index](x), modules.weight)
    # ln_final acts on each token separately, so only the end-of-text tokens need it.
    pooled = clip.clip.ln_final(take_tokens(x, ends))
    return unit(clip.project_text(pooled) if modules.projector is None else modules.projector(pooled))


def pair_anchors(features: Tensor, normal: int) -> Tensor:
    """Unit prompt features (..., P, D) -> anchors (..., D, 2): the unit mean of the normal and of the other prompts."""
    features = full_precision(features)
    groups = (features[..., :normal, :], features[..., normal:, :])
    return torch.stack([unit(group.mean(dim=-2)) for group in groups], dim=-1)
