"""Pre-training of the toy CLIP (docs/toy_world.md): CLIP's contrastive loss on drawn pairs, with open_clip's own model,
and a loss that ties patches to the words of what they show.

At first a step sees a random quarter of each picture's patches (FLIP, arXiv:2212.00794), later more: on a CPU that is
several times the pictures in the same time. The drawings are made once and kept beside the training state; every epoch
ends with a state that can be resumed from and an exported `local-dir:` folder, so a run stopped early leaves a usable
model.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, SimpleTokenizer
from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from open_clip.transformer import text_global_pool
from safetensors.torch import save_file
from torch import Tensor, nn

from dataset.toy.captions import UNTOLD, Drawings, Words, draw_pairs
from dataset.toy.objects import OBJECTS, TEXTURES
from engine.config.pretraining import PretrainConfig
from model.checkpoint import FloatTensor, SavedOptimizer, load, load_component, save
from model.clip import cut_to_length
from utils.errors import NotFiniteError, UserError
from utils.files import check_folder, replacing, write_json
from utils.logging import set_up_logging
from utils.schema import check

logger = logging.getLogger(__name__)

IMAGE_SIZE = 96
TOY_CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 96,
    "quick_gelu": True,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 8, "width": 96, "head_width": 48, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 4},
}
HELD_OUT = 1000
_TRAIN_STREAM, _HELD_OUT_STREAM = 0, 1
_CHUNK = 250


def drawn_pairs(count: int, seed: int, stream: int, folder: Path) -> Drawings:
    """`count` image-caption pairs of a stream, drawn on all cores the first time and read from `folder` afterwards."""
    stem = f"pairs_seed{seed}_stream{stream}_{count}"
    images_file, patches_file, words_file = (folder / f"{stem}{end}" for end in (".npy", "_patches.npy", ".json"))
    patch = TOY_CLIP_CONFIG["vision_cfg"]["patch_size"]
    if not words_file.is_file():
        logger.info("drawing %d pictures into %s", count, images_file)
        words: list[Words] = []
        patches: list[NDArray[np.uint8]] = []
        starts = range(0, count, _CHUNK)
        stops = [min(start + _CHUNK, count) for start in starts]
        context = multiprocessing.get_context("spawn")
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, IMAGE_SIZE, IMAGE_SIZE, 3)}
        with replacing(images_file) as unfinished, ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
            ranges = zip(starts, stops, strict=True)
            drawn = [pool.submit(draw_pairs, (seed, stream), start, stop, IMAGE_SIZE, patch) for start, stop in ranges]
            # Written piece by piece: of a mapped file, a full disk would end the process without a word.
            try:
                with unfinished.open("wb") as file:
                    np.lib.format.write_array_header_1_0(file, header)
                    for part in drawn:
                        chunk = part.result()
                        file.write(chunk.images.tobytes())
                        patches.append(chunk.patches)
                        words += chunk.words
            except BaseException:
                # Leaving the pool would wait for all drawings.
                for child in multiprocessing.active_children():
                    child.terminate()
                raise
        with replacing(patches_file) as unfinished, unfinished.open("wb") as file:
            np.save(file, np.concatenate(patches))
        write_json(words_file, words)
    words = [Words(*entry) for entry in json.loads(words_file.read_text(encoding="utf-8"))]
    return Drawings(np.load(images_file, mmap_mode="r"), np.load(patches_file), words)


def _patches(images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Pictures (B, S, S, 3) as patches of bytes, (B, N, 3 * P * P), in the order of the patch embedding's weights."""
    size = TOY_CLIP_CONFIG["vision_cfg"]["patch_size"]
    grid = IMAGE_SIZE // size
    cut = torch.from_numpy(np.array(images)).view(-1, grid, size, grid, size, 3)
    return cut.permute(0, 1, 3, 5, 2, 4).reshape(len(images), grid * grid, 3 * size * size).to(device)


def encode_image(model: CLIP, images: NDArray[np.uint8], keep: Tensor | None = None) -> Tensor:
    """Unit image features (B, D) of pictures (B, S, S, 3); the same as open_clip's where all patches are kept.

    keep: (B, K), the patches that are looked at.
    """
    return encode_tokens(model, images, keep)[:, 0]


def encode_tokens(model: CLIP, images: NDArray[np.uint8], keep: Tensor | None = None) -> Tensor:
    """Unit features of the class token and of the patches that are looked at, (B, 1 + K, D); see `encode_image`."""
    visual = model.visual
    device = visual.conv1.weight.device
    patches = _patches(images, device)
    positions = visual.positional_embedding[1:].expand(len(patches), -1, -1)
    if keep is not None:
        patches = patches.take_along_dim(keep[..., None], dim=1)
        positions = positions.take_along_dim(keep[..., None], dim=1)
    channel = [value for value in range(3) for _ in range(patches.shape[-1] // 3)]
    mean = torch.tensor(OPENAI_DATASET_MEAN, device=device)[channel]
    std = torch.tensor(OPENAI_DATASET_STD, device=device)[channel]
    x = ((patches.float() / 255 - mean) / std) @ visual.conv1.weight.flatten(1).T + positions
    cls = (visual.class_embedding + visual.positional_embedding[0]).expand(len(x), 1, -1)
    x = visual.ln_pre(torch.cat([cls, x], dim=1))
    return F.normalize(visual.ln_post(visual.transformer(x)) @ visual.proj, dim=-1)


def region_loss(patches: Tensor, regions: Tensor, phrases: Tensor, logit_scale: Tensor) -> Tensor:
    """Cross-entropy of patches with the words of what they show, among all words of the batch.

    patches (B, K, D) and phrases (R, D), unit; regions (B, K), the row of each patch's words, -1 where nothing is told.
    Each region of each picture counts alike, however many patches it has, so that a small mark is not lost.
    """
    told = regions >= 0
    picture = torch.arange(len(regions), device=regions.device)[:, None].expand_as(regions)
    _, region_of, sizes = (picture * len(phrases) + regions)[told].unique(return_inverse=True, return_counts=True)
    losses = F.cross_entropy(logit_scale * patches[told] @ phrases.T, regions[told], reduction="none")
    return (losses / sizes[region_of]).sum() / max(1, len(sizes))


def _encode_text(model: CLIP, tokens: Tensor) -> Tensor:
    """Text features, unit, of tokens cut to their longest caption (attention is causal: what follows cannot matter)."""
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    x = text_global_pool(x, tokens, model.text_pool_type, eos_token_id=getattr(model, "text_eos_id", None))
    return F.normalize(x @ model.text_projection, dim=-1)


def _tokens(captions: list[str]) -> Tensor:
    tokens = SimpleTokenizer(context_length=TOY_CLIP_CONFIG["text_cfg"]["context_length"])(captions)
    return cut_to_length(tokens)


def new_toy_clip() -> CLIP:
    """A toy CLIP with random weights."""
    return CLIP(**TOY_CLIP_CONFIG)


@torch.no_grad()
def held_out_accuracy(model: CLIP, pairs: Drawings, device: torch.device) -> dict[str, float]:
    """Zero-shot accuracy on held-out drawings.

    `class`: a picture of one thing among all kinds, by "a photo of a KIND."; `retrieval`: a picture's own caption among
    the captions of 100 pictures (equal captions count as equal), mean over the hundreds.
    """
    model.eval()
    features = torch.cat([encode_image(model, pairs.images[i : i + 100]) for i in range(0, len(pairs.words), 100)])
    kinds = [*OBJECTS, *TEXTURES]
    names = _encode_text(model, _tokens([f"a photo of a {kind}." for kind in kinds]).to(device))
    chosen = (features @ names.T).argmax(dim=1).tolist()
    single = [kinds[c] == said.kind for c, said in zip(chosen, pairs.words, strict=True) if said.kind is not None]
    hits = 0
    for start in range(0, len(pairs.words), 100):
        captions = [said.caption for said in pairs.words[start : start + 100]]
        texts = _encode_text(model, _tokens(captions).to(device))
        best = (features[start : start + 100] @ texts.T).argmax(dim=1).tolist()
        hits += sum(captions[b] == caption for b, caption in zip(best, captions, strict=True))
    return {"class": sum(single) / len(single), "retrieval": hits / len(pairs.words)}


def _learning_rate(config: PretrainConfig, step: int, steps: int) -> float:
    warmup = max(1, round(config.warmup_share * steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _parameter_groups(model: CLIP, weight_decay: float) -> list[dict[str, Any]]:
    """CLIP's own rule: gains, biases and the temperature are not decayed."""
    plain = [p for p in model.parameters() if p.ndim < 2]
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def export_toy_clip(model: CLIP, folder: Path) -> None:
    """Write an open_clip `local-dir:` folder: configuration and float16 weights, each file replaced in one go."""
    config = {
        "model_cfg": TOY_CLIP_CONFIG,
        "preprocess_cfg": {
            "mean": list(OPENAI_DATASET_MEAN),
            "std": list(OPENAI_DATASET_STD),
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }
    write_json(folder / "open_clip_config.json", config)
    weights = {key: value.detach().cpu().half().contiguous() for key, value in model.state_dict().items()}
    with replacing(folder / "open_clip_model.safetensors") as temporary:
        save_file(weights, temporary)
        temporary.chmod(0o644)


class _Regions:
    """Which words belong to which patch: every different name of a region has a row of tokens."""

    def __init__(self, pairs: Drawings) -> None:
        names = sorted({name for said in pairs.words for name in said.regions})
        row_of = {name: row for row, name in enumerate(names)}
        rows = [[row_of[name] for name in said.regions] for said in pairs.words]
        # What is not told stands last, at -1.
        table = np.full((len(rows), max(map(len, rows)) + 1), -1, np.int32)
        for number, row in enumerate(rows):
            table[number, : len(row)] = row
        self._table = table
        self._patches = pairs.patches.reshape(len(rows), -1)
        self.tokens = _tokens(names)

    def of(self, drawings: NDArray[np.intp]) -> Tensor:
        """Rows of `tokens` of all patches of some drawings (B, N); -1 where nothing is told."""
        patches = self._patches[drawings].astype(np.intp)
        patches[patches == UNTOLD] = -1
        return torch.from_numpy(np.take_along_axis(self._table[drawings], patches, axis=1)).long()


def _batches(count: int, config: PretrainConfig, epoch: int) -> Iterator[NDArray[np.intp]]:
    """Which drawings a step sees."""
    order = np.random.default_rng((config.seed, epoch)).permutation(count)
    for start in range(0, count - config.batch_size + 1, config.batch_size):
        yield np.sort(order[start : start + config.batch_size])


@dataclass(frozen=True)
class _State:
    """What `pretrain_state.pth` holds."""

    config: PretrainConfig
    model: dict[str, FloatTensor]
    optimizer: SavedOptimizer
    epoch: int


class _Run:
    """A pre-training run in progress: model, optimizer and how far it is."""

    def __init__(self, config: PretrainConfig, work: Path, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.config, self.device = config, device
        self.state_file = work / "pretrain_state.pth"
        self.model = new_toy_clip().to(device)
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(self.model, config.weight_decay), lr=config.lr, betas=(0.9, 0.98), eps=1e-6
        )
        self.epoch = 0
        if self.state_file.is_file():
            self._resume()

    def _resume(self) -> None:
        state = load(self.state_file)
        check(state, _State, self.state_file)
        if state["config"] != asdict(self.config):
            raise UserError(f"{self.state_file} belongs to a run with other settings; choose another --work folder")
        load_component(self.model, state["model"], "model", self.state_file)
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch = state["epoch"]
        logger.info("resumed after epoch %d", self.epoch)

    def save(self) -> None:
        state = {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
        }
        save(state, self.state_file)

    def train_epoch(self, pairs: Drawings, tokens: Tensor, regions: _Regions) -> float:
        """One pass over the drawings; returns the mean loss."""
        config, model = self.config, self.model
        random = torch.Generator().manual_seed(config.seed * 1000 + self.epoch)
        model.train()
        total, started = 0.0, time.monotonic()
        per_epoch = len(tokens) // config.batch_size
        steps = config.epochs * per_epoch
        for number, drawings in enumerate(_batches(len(tokens), config, self.epoch)):
            step = self.epoch * per_epoch + number
            rate = _learning_rate(config, step, steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            keep = self._kept_patches(len(drawings), step / steps, random)
            told = regions.of(drawings).to(self.device).take_along_dim(keep, dim=1)
            loss = self._loss(pairs.images[drawings], cut_to_length(tokens[drawings]), keep, told, regions.tokens)
            if not torch.isfinite(loss):
                raise NotFiniteError(f"the loss is {loss.item()} in epoch {self.epoch + 1}, step {number + 1}")
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            self.optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            total += loss.item()
            if (number + 1) % 50 == 0:
                speed = (number + 1) * config.batch_size / (time.monotonic() - started)
                logger.info(
                    "epoch %d step %d/%d loss %.3f, %.0f drawings/s",
                    self.epoch + 1,
                    number + 1,
                    per_epoch,
                    total / (number + 1),
                    speed,
                )
        self.epoch += 1
        return total / per_epoch

    def _loss(self, images: NDArray[np.uint8], captions: Tensor, keep: Tensor, told: Tensor, phrases: Tensor) -> Tensor:
        model, weight = self.model, self.config.region_weight
        scale = model.logit_scale.exp()
        tokens = encode_tokens(model, images, keep)
        loss = ClipLoss()(tokens[:, 0], _encode_text(model, captions.to(self.device)), scale)
        if not weight:
            return loss
        present, rows = told.unique(return_inverse=True)
        untold = int(present[0] == -1)
        words = _encode_text(model, cut_to_length(phrases[present[untold:].cpu()]).to(self.device))
        return loss + weight * region_loss(tokens[:, 1:], rows - untold, words, scale)

    def _kept_patches(self, batch: int, progress: float, random: torch.Generator) -> Tensor:
        """Which patches of each picture are looked at, (B, K); `progress` runs from 0 to 1 over the whole run."""
        first, last = self.config.patch_dropout, self.config.last_patch_dropout
        dropped = first + (last - first) * max(0.0, 2 * progress - 1)
        patches = self.model.visual.positional_embedding.shape[0] - 1
        kept = round(patches * (1 - dropped))
        return torch.rand(batch, patches, generator=random).argsort(dim=1)[:, :kept].to(self.device)


def pretrain_toy_clip(config: PretrainConfig, output: Path, work: Path, device: str = "cpu") -> dict[str, float]:
    """Pre-train the toy CLIP and export it to `output` after every epoch; returns the held-out accuracies.

    `work` keeps the drawings and the state: the same command goes on where it was. Raises UserError where `work` holds
    a run with other settings.
    """
    check_folder(work, "--work")
    check_folder(output, "--output")
    run = _Run(config, work, torch.device(device))
    set_up_logging(output / "pretrain.log")
    held_out = drawn_pairs(HELD_OUT, config.seed, _HELD_OUT_STREAM, work)
    pairs = drawn_pairs(config.drawings, config.seed, _TRAIN_STREAM, work)
    regions = _Regions(pairs)
    careful = _tokens([said.caption for said in pairs.words])
    careless = _tokens([said.careless_caption for said in pairs.words])
    logger.info("%s; captions of up to %d tokens", config, careful.shape[1])
    while run.epoch < config.epochs:
        loss = run.train_epoch(pairs, careful if run.epoch < config.careful_epochs else careless, regions)
        run.save()
        export_toy_clip(run.model, output)
        accuracy = held_out_accuracy(run.model, held_out, run.device)
        logger.info(
            "epoch %d/%d loss %.3f; held out: class %.1f %%, caption among 100 %.1f %%",
            run.epoch,
            config.epochs,
            loss,
            100 * accuracy["class"],
            100 * accuracy["retrieval"],
        )
    return held_out_accuracy(run.model, held_out, run.device)
