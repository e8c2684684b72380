"""What pre-training of the toy CLIP is asked for (docs/toy_world.md)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from engine.config.common import Arguments, MachineArguments
from utils.fields import changed, setting


@dataclass(frozen=True)
class PretrainConfig(Arguments):
    """What determines a pre-training run.

    After the careful epochs captions mention damage anywhere: the model has learned to see damage, but its words for it
    say little, as CLIP's do.
    """

    drawings: int = setting(60_000, "image-caption pairs to draw", "training", between=(1, 10_000_000))
    epochs: int = setting(6, "passes over the drawings", "training", between=(1, 10_000))
    patch_dropout: float = setting(
        0.75, "share of the patches left out in the first half of all steps", "training", between=(0, 0.99)
    )
    last_patch_dropout: float = setting(
        0.25, "what that share falls to, linearly, in the second half", "training", between=(0, 0.99)
    )
    careful_epochs: int = setting(
        4, "first epochs whose captions mention damage only where there is some", "training", between=(0, 10_000)
    )
    batch_size: int = setting(128, "pairs contrasted with one another", "training", between=(2, 100_000))
    region_weight: float = setting(1.0, "weight of the loss that ties patches to words", "training", between=(0, 1000))
    lr: float = setting(2e-3, "highest learning rate: warm-up, then cosine", "schedule", between=(0, 100))
    weight_decay: float = setting(0.1, "weight decay of AdamW", "schedule", between=(0, 10))
    warmup_share: float = setting(0.05, "share of all steps that warm up", "schedule", between=(0, 1))
    seed: int = setting(0, "seed of drawings, weights and order", "training", between=(0, 2**31 - 1))


@dataclass(frozen=True)
class PretrainArguments(PretrainConfig):
    """Arguments of `pretrain_toy_clip.py`."""

    output: Path = setting(Path("ckpt/toy_clip"), "folder of the exported model", "output")
    work: Path = setting(Path("runs/toy_clip"), "folder of drawings and training state", "output")
    device: str = changed(MachineArguments, "device", "cpu")
    threads: int | None = setting(None, "CPU threads of torch", "machine", between=(1, 1024), unset="all")

    def pretraining(self) -> PretrainConfig:
        """What determines the run."""
        return PretrainConfig(**{item.name: getattr(self, item.name) for item in fields(PretrainConfig)})
