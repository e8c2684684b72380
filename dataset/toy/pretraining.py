"""Pre-training of the toy CLIP (docs/toy_world.md) on drawings and captions.

The losses are CLIP's contrastive loss, and a loss between patches and the words for what they show. A step sees a
random part of each drawing's patches (FLIP, arXiv:2212.00794), a quarter at first and more later, which is faster.
"""

import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from torch import Tensor, nn

from dataset.toy.captions import UNLABELLED, Description, Drawings, draw_pairs
from dataset.toy.clip import CONFIG, IMAGE_SIZE, PATCH_SIZE, encode_images, encode_text, export_toy_clip, tokenize, trim
from dataset.toy.objects import OBJECTS
from dataset.toy.options import PretrainArguments
from dataset.toy.textures import TEXTURES
from utils.errors import NotFiniteError
from utils.files import check_folder
from utils.logging import set_up_logging

logger = logging.getLogger(__name__)

HELD_OUT = 1000
_TRAIN_STREAM, _HELD_OUT_STREAM = 0, 1
_CHUNK = 250


def draw_all(count: int, seed: int, stream: int) -> Drawings:
    """Draw `count` image-caption pairs of a stream on all cores."""
    starts = range(0, count, _CHUNK)
    stops = [min(start + _CHUNK, count) for start in starts]
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    patches: list[NDArray[np.uint8]] = []
    descriptions: list[Description] = []
    draw = partial(draw_pairs, (seed, stream), size=IMAGE_SIZE, patch=PATCH_SIZE)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for start, stop, chunk in zip(starts, stops, pool.map(draw, starts, stops), strict=True):
            images[start:stop] = chunk.images
            patches.append(chunk.patches)
            descriptions += chunk.descriptions
    return Drawings(images, np.concatenate(patches), descriptions)


def region_loss(patches: Tensor, regions: Tensor, phrases: Tensor, logit_scale: Tensor) -> Tensor:
    """Cross-entropy of patches with the words for what they show, among all words of the batch.

    Each region of each drawing has the same weight, however many patches it has, so that small marks count.

    Args:
        patches: (B, K, D), unit.
        regions: (B, K), the row of each patch's words in `phrases`; -1 for an unlabelled patch.
        phrases: (R, D), unit.
        logit_scale: CLIP's temperature, a factor.
    """
    labelled = regions >= 0
    drawing = torch.arange(len(regions), device=regions.device)[:, None].expand_as(regions)
    _, region_of, sizes = (drawing * len(phrases) + regions)[labelled].unique(return_inverse=True, return_counts=True)
    losses = F.cross_entropy(logit_scale * patches[labelled] @ phrases.T, regions[labelled], reduction="none")
    return (losses / sizes[region_of]).sum() / max(1, len(sizes))


class _Regions:
    """The words of each patch; every distinct phrase is a row of `tokens`."""

    def __init__(self, pairs: Drawings) -> None:
        phrases = sorted({phrase for described in pairs.descriptions for phrase in described.regions})
        row_of = {phrase: row for row, phrase in enumerate(phrases)}
        rows = [[row_of[phrase] for phrase in described.regions] for described in pairs.descriptions]
        # The last column, at -1, stands for unlabelled patches.
        table = np.full((len(rows), max(map(len, rows)) + 1), -1, np.int32)
        for number, row in enumerate(rows):
            table[number, : len(row)] = row
        self._table = table
        self._patches = pairs.patches.reshape(len(rows), -1)
        self.tokens = tokenize(phrases)

    def of(self, drawings: NDArray[np.intp]) -> Tensor:
        """Rows of `tokens` of all patches of some drawings (B, N); -1 for unlabelled patches."""
        patches = self._patches[drawings].astype(np.intp)
        patches[patches == UNLABELLED] = -1
        return torch.from_numpy(np.take_along_axis(self._table[drawings], patches, axis=1)).long()


@torch.no_grad()
def held_out_accuracy(model: CLIP, pairs: Drawings) -> tuple[float, float]:
    """Zero-shot accuracy on held-out drawings.

    Returns:
        The share of drawings of one thing that are recognised among all kinds by "a photo of a KIND.", and the share of
        drawings whose own caption is the best among those of 100 drawings (equal captions count as the same).
    """
    model.eval()
    count = len(pairs.descriptions)
    features = torch.cat([encode_images(model, pairs.images[i : i + 100])[:, 0] for i in range(0, count, 100)])
    kinds = [*OBJECTS, *TEXTURES]
    names = encode_text(model, tokenize([f"a photo of a {kind}." for kind in kinds]))
    chosen = [kinds[column] for column in (features @ names.T).argmax(dim=1).tolist()]
    single = [kind == item.kind for kind, item in zip(chosen, pairs.descriptions, strict=True) if item.kind is not None]
    hits = 0
    for start in range(0, count, 100):
        captions = [item.caption for item in pairs.descriptions[start : start + 100]]
        texts = encode_text(model, tokenize(captions))
        best = (features[start : start + 100] @ texts.T).argmax(dim=1).tolist()
        hits += sum(captions[b] == caption for b, caption in zip(best, captions, strict=True))
    return sum(single) / len(single), hits / count


def _learning_rate(arguments: PretrainArguments, step: int, steps: int) -> float:
    warmup = max(1, round(arguments.warmup_share * steps))
    if step < warmup:
        return arguments.lr * (step + 1) / warmup
    return arguments.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _batches(count: int, arguments: PretrainArguments, epoch: int) -> Iterator[NDArray[np.intp]]:
    """The drawings of each step of an epoch."""
    order = np.random.default_rng((arguments.seed, epoch)).permutation(count)
    for start in range(0, count - arguments.batch_size + 1, arguments.batch_size):
        yield np.sort(order[start : start + arguments.batch_size])


def _kept_patches(model: CLIP, arguments: PretrainArguments, progress: float, random: torch.Generator) -> Tensor:
    """The patches of each drawing that a step sees, (B, K); `progress` runs from 0 to 1 over the whole run."""
    first, last = arguments.patch_dropout, arguments.last_patch_dropout
    dropped = first + (last - first) * max(0.0, 2 * progress - 1)
    patches = model.visual.positional_embedding.shape[0] - 1
    count = round(patches * (1 - dropped))
    return torch.rand(arguments.batch_size, patches, generator=random).argsort(dim=1)[:, :count]


def _loss(model: CLIP, images: Tensor, captions: Tensor, regions: Tensor, phrases: Tensor, weight: float) -> Tensor:
    """CLIP's contrastive loss, and `weight` times the loss between patches and words.

    images: features (B, 1 + K, D); captions: tokens (B, T); regions (B, K): rows of the tokens `phrases`, or -1.
    """
    scale = model.logit_scale.exp()
    loss = ClipLoss()(images[:, 0], encode_text(model, captions), scale)
    if not weight:
        return loss
    present, rows = regions.unique(return_inverse=True)
    unlabelled = int(present[0] == -1)
    words = encode_text(model, trim(phrases[present[unlabelled:].cpu()]))
    return loss + weight * region_loss(images[:, 1:], rows - unlabelled, words, scale)


class _Run:
    """Model, optimizer and data of a pre-training run."""

    def __init__(self, arguments: PretrainArguments, pairs: Drawings, device: str) -> None:
        torch.manual_seed(arguments.seed)
        self.arguments, self.pairs, self.device = arguments, pairs, device
        self.regions = _Regions(pairs)
        self.captions = tokenize([item.caption for item in pairs.descriptions])
        self.careless_captions = tokenize([item.careless_caption for item in pairs.descriptions])
        self.model = CLIP(**CONFIG).to(device)
        # As in CLIP, gains, biases and the temperature are not decayed.
        groups = [
            {"params": [p for p in self.model.parameters() if p.ndim >= 2], "weight_decay": arguments.weight_decay},
            {"params": [p for p in self.model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=arguments.lr, betas=(0.9, 0.98), eps=1e-6)

    def train_epoch(self, epoch: int) -> float:
        """One pass over the drawings, `epoch` from 0; returns the mean loss."""
        arguments, model = self.arguments, self.model
        random = torch.Generator().manual_seed(arguments.seed * 1000 + epoch)
        tokens = self.captions if epoch < arguments.careful_epochs else self.careless_captions
        model.train()
        total, started = 0.0, time.monotonic()
        per_epoch = len(tokens) // arguments.batch_size
        steps = arguments.epochs * per_epoch
        for number, drawings in enumerate(_batches(len(tokens), arguments, epoch)):
            step = epoch * per_epoch + number
            for group in self.optimizer.param_groups:
                group["lr"] = _learning_rate(arguments, step, steps)
            keep = _kept_patches(model, arguments, step / steps, random).to(self.device)
            regions = self.regions.of(drawings).to(self.device).take_along_dim(keep, dim=1)
            images = encode_images(model, self.pairs.images[drawings], keep)
            captions = trim(tokens[drawings])
            loss = _loss(model, images, captions, regions, self.regions.tokens, arguments.region_weight)
            if not torch.isfinite(loss):
                raise NotFiniteError(f"the loss is {loss.item()} in epoch {epoch + 1}, step {number + 1}")
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            self.optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            total += loss.item()
            if (number + 1) % 50 == 0:
                speed = (number + 1) * arguments.batch_size / (time.monotonic() - started)
                progress = (epoch + 1, number + 1, per_epoch, total / (number + 1), speed)
                logger.info("epoch %d step %d/%d loss %.3f, %.0f drawings/s", *progress)
        return total / per_epoch


def pretrain_toy_clip(arguments: PretrainArguments, device: str = "cpu") -> tuple[float, float]:
    """Pre-train the toy CLIP, and export it to `--output` after every epoch.

    Args:
        arguments: The arguments of `pretrain_toy_clip.py`.
        device: Where to compute, such as "cuda".

    Returns:
        The held-out accuracies of the last epoch (`held_out_accuracy`).

    Raises:
        UserError: There are fewer drawings than a batch needs, or `--output` cannot be written.
        NotFiniteError: The loss is infinite or NaN.
    """
    arguments.check()
    check_folder(arguments.output, "--output")
    set_up_logging(arguments.output / "pretrain.log")
    logger.info("Drawing %d pairs", HELD_OUT + arguments.drawings)
    held_out = draw_all(HELD_OUT, arguments.seed, _HELD_OUT_STREAM)
    run = _Run(arguments, draw_all(arguments.drawings, arguments.seed, _TRAIN_STREAM), device)
    logger.info("%s; captions of up to %d tokens", arguments, run.captions.shape[1])
    accuracies = (0.0, 0.0)
    for epoch in range(arguments.epochs):
        loss = run.train_epoch(epoch)
        export_toy_clip(run.model, arguments.output)
        accuracies = held_out_accuracy(run.model, held_out)
        numbers = (epoch + 1, arguments.epochs, loss, *(100 * accuracy for accuracy in accuracies))
        logger.info("epoch %d/%d loss %.3f; held out: class %.1f %%, caption among 100 %.1f %%", *numbers)
    return accuracies
