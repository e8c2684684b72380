"""Both sides trained in the same epochs, for comparison with feedback's loops (docs/method.md, "Feedback")."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from dataset.samples import SeededSampler, SharedBatches
from engine.config.training import RunConfig
from engine.training.stage1 import TextStage
from engine.training.stages import Stage, StageOutput, present_classes, square_mask, watch_abnormal
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.config import SIDES, LoopForward
from model.losses import stage2_losses
from model.steps import ALONE
from model.text import Prompts

TEXT_BATCH = "text_batch"


@dataclass
class Turns:
    """The batches of an epoch of both stages: every image batch, some of them with a text batch in `TEXT_BATCH`.

    text, image: the stages' own loaders; text_epochs: passes over the first that all `epochs` hold together, spread
    evenly over the image batches; joint: as for `BothStage`. `set_position` chooses the epoch, as a sampler's does.
    """

    text: DataLoader
    image: DataLoader
    samplers: Sequence[SeededSampler]
    text_epochs: int
    epochs: int
    joint: bool = False
    epoch: int = 1

    def __len__(self) -> int:
        return len(self.image)

    def set_position(self, loop: int, epoch: int) -> None:
        self.epoch = epoch
        for sampler in self.samplers:
            sampler.set_position(loop, epoch)

    def due(self) -> list[bool]:
        """Whether a text batch goes with each image batch of this epoch."""
        text, image = self.text_epochs * len(self.text), self.epochs * len(self.image)
        first = (self.epoch - 1) * len(self.image)
        return [(step + 1) * text // image > step * text // image for step in range(first, first + len(self.image))]

    def steps(self) -> dict[str, int]:
        """The steps that each side takes in this epoch, as a row of the history names them."""
        return {"text_steps": len(self) if self.joint else sum(self.due()), "image_steps": len(self)}

    @property
    def batch_sampler(self) -> SharedBatches:
        """That of the image batches, whose shares are those of a step."""
        return self.image.batch_sampler

    def __iter__(self) -> Iterator[dict[str, Any]]:
        texts = zip(self.text, self.text.batch_sampler.shares(), strict=True)
        for due, batch in zip(self.due(), self.image, strict=True):
            text, share = next(texts) if due else (None, ALONE)
            yield {**batch, TEXT_BATCH: text if share.processes == 1 else {**text, "share": share}}


class BothStage(Stage):
    """Stage 1's loss and Stage 2's in one step.

    joint: whether Stage 2's gradient reaches the text side too. Otherwise each loss trains its own side, against the
    other as it stands.
    """

    name = "both"
    number = 3

    def __init__(
        self,
        model: AdaptedCLIPWithCrossAttention,
        prompts: Prompts,
        classes: Sequence[str],
        config: RunConfig,
        loop: LoopForward,
        joint: bool,
    ) -> None:
        super().__init__(model, classes, config, loop)
        self.prompts = prompts
        self.joint = joint
        self.text_stage = TextStage(model, prompts, classes, config, loop)

    @property
    def trained(self) -> dict[str, nn.Module]:
        return {name: part for side in SIDES for name, part in self.trained_on(side).items()}

    def train(self, mode: bool = True) -> BothStage:
        # Of a side that only stands by, no dropout: what trains meanwhile is switched on in `forward`.
        self.training = mode
        self.model.eval()
        return self

    def _train_only(self, *sides: str) -> None:
        self.model.eval()
        for side in sides:
            for part in self.trained_on(side).values():
                part.train(self.training)

    def forward(self, batch: Mapping[str, Any]) -> StageOutput:
        """A batch of `Turns` -> the sum of both losses, Stage 2's alone where there is no text batch; it is watched."""
        self._train_only(*(SIDES if self.joint else ("image",)))
        mask = square_mask(batch)
        present, rows = present_classes(batch, self.order)
        prompts = self.prompts.of_classes(present)
        if self.joint:
            outputs = self.model.joint_forward(batch["image"], prompts, rows, self.loop)
        else:
            outputs = self.model(batch["image"], self.model.text_side(prompts, self.loop), rows)
        losses, abnormal = stage2_losses(outputs, mask, batch["label"], self.config.focal_smoothing)
        weighed = [_weighed(losses, batch)]
        if (text_batch := batch.get(TEXT_BATCH)) is not None:
            self._train_only("text")
            weighed.append(_weighed(self.text_stage(text_batch).losses, text_batch))
        names = dict.fromkeys(name for found in weighed for name in found)
        sums = {name: sum(found[name] for found in weighed if name in found) for name in names}
        return StageOutput(sums, watch_abnormal(abnormal, mask), weighed=True)


def _weighed(losses: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Losses by what a batch's images count in their step: both batches of a step may be shared unevenly."""
    return {name: batch.get("share", ALONE).weight * value for name, value in losses.items()}
