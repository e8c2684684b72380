"""Arguments of `pretrain_toy_clip.py` (docs/toy_world.md)."""

from dataclasses import dataclass
from pathlib import Path

from utils.arguments import Arguments
from utils.errors import UserError
from utils.fields import setting


@dataclass(frozen=True)
class PretrainArguments(Arguments):
    """Arguments of the pre-training.

    After the careful epochs, captions mention damage at random: the model has learned to see damage, but its words for
    it mean little, as CLIP's do.
    """

    drawings: int = setting(60_000, "image-caption pairs to draw", "training", between=(1, 10_000_000))
    epochs: int = setting(6, "passes over the drawings", "training", between=(1, 10_000))
    patch_dropout: float = setting(
        0.75, "share of the patches left out in the first half of all steps", "training", between=(0, 0.99)
    )
    last_patch_dropout: float = setting(
        0.25, "value that this share falls to, linearly, in the second half", "training", between=(0, 0.99)
    )
    careful_epochs: int = setting(
        4, "first epochs, in which captions mention damage only if there is some", "training", between=(0, 10_000)
    )
    batch_size: int = setting(128, "pairs in a step of the contrastive loss", "training", between=(2, 100_000))
    region_weight: float = setting(1.0, "weight of the loss between patches and words", "training", between=(0, 1000))
    lr: float = setting(2e-3, "highest learning rate: warm-up, then cosine", "schedule", between=(0, 100))
    weight_decay: float = setting(0.1, "weight decay of AdamW", "schedule", between=(0, 10))
    warmup_share: float = setting(0.05, "share of all steps that warm up", "schedule", between=(0, 1))
    seed: int = setting(0, "seed of drawings, weights and order", "training", between=(0, 2**31 - 1))
    output: Path = setting(Path("ckpt/toy_clip"), "folder of the exported model", "output")
    device: str = setting("cpu", "auto, cpu, cuda, cuda:N or mps", "machine")
    threads: int | None = setting(None, "CPU threads of torch", "machine", between=(1, 1024), unset="all")

    def check(self) -> None:
        if self.drawings < self.batch_size:
            raise UserError(
                f"--drawings {self.drawings} is less than --batch_size {self.batch_size}: increase --drawings or "
                "lower --batch_size"
            )
