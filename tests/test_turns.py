"""Both sides trained in the same epochs: which steps, whose gradient, and restarts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import engine.training.run
from engine.config.feedback import FeedbackConfig, loop_forward, plan_loops
from engine.training.feedback import train_feedback
from engine.training.turns import TEXT_BATCH, BothStage, Turns
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.checkpoint import read_checkpoint
from model.config import CrossAttentionConfig, LoopForward
from model.steps import ALONE
from tests.helpers import config_for, random_batch, tiny_clip, tiny_prompts
from tests.scripts import write_world
from utils.errors import UserError

ORDERS = ("turns", "joint", "joint_stages")
CLASSES = ("nut", "zipper", "rope")


class Batches(list):
    """As many batches as a loader would give, of one process."""

    @property
    def batch_sampler(self) -> SimpleNamespace:
        return SimpleNamespace(shares=lambda: [ALONE] * len(self))


class Sampler:
    """One that notes the loop and epoch it was set to."""

    position: tuple[int, int] | None = None

    def set_position(self, loop: int, epoch: int) -> None:
        self.position = (loop, epoch)


def turns(text: int, image: int, text_epochs: int, epochs: int) -> Turns:
    batches = [Batches({"number": number} for number in range(count)) for count in (text, image)]
    return Turns(*batches, (Sampler(), Sampler()), text_epochs, epochs)


@pytest.mark.parametrize(("text", "image", "text_epochs", "epochs"), [(3, 7, 2, 5), (4, 4, 3, 3), (1, 9, 1, 4)])
def test_every_image_batch_comes_and_the_text_batches_are_spread_evenly(
    text: int, image: int, text_epochs: int, epochs: int
) -> None:
    schedule, counts = turns(text, image, text_epochs, epochs), []
    for epoch in range(1, epochs + 1):
        schedule.set_position(2, epoch)
        assert [sampler.position for sampler in schedule.samplers] == [(2, epoch)] * 2, "each epoch has its own order"
        batches = list(schedule)
        assert [batch["number"] for batch in batches] == list(range(image))
        texts = [batch[TEXT_BATCH]["number"] for batch in batches if batch[TEXT_BATCH]]
        assert texts == list(range(len(texts)))
        assert schedule.steps() == {"text_steps": len(texts), "image_steps": image}
        counts.append(len(texts))
    assert sum(counts) == text * text_epochs
    assert max(counts) - min(counts) <= 1


def stage_of(order: str, **choices: Any) -> tuple[BothStage, dict[str, Any]]:
    clip = tiny_clip()
    torch.manual_seed(0)
    cross = CrossAttentionConfig(cross_attn_dropout=0.0, **choices)
    model = AdaptedCLIPWithCrossAttention(clip, config_for(clip), cross=cross)
    forward = LoopForward("trained", True)
    stage = BothStage(model, tiny_prompts(clip), CLASSES, FeedbackConfig(), forward, order == "joint")
    stage.begin()
    batch = random_batch(40)
    names = [CLASSES[row] for row in batch.rows]
    return stage, {"image": batch.images, "mask": batch.masks[:, None], "label": batch.labels, "class_name": names}


def gradients(stage: BothStage) -> set[str]:
    return {
        name
        for name, part in stage.model.components.items()
        if any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in part.parameters())
    }


@pytest.mark.parametrize(("order", "text"), [("turns", set()), ("joint", {"text_adapter", "text_cross_attn"})])
def test_stage_2_trains_the_text_side_in_joint_alone(order: str, text: set[str]) -> None:
    stage, batch = stage_of(order)
    stage({**batch, TEXT_BATCH: None}).losses["total"].backward()
    assert gradients(stage) == {"image_adapter", "image_cross_attn"} | text


def test_in_turns_each_loss_is_that_of_its_own_stage() -> None:
    stage, batch = stage_of("turns")
    with torch.no_grad():
        image = stage({**batch, TEXT_BATCH: None}).losses["total"]
        both = stage({**batch, TEXT_BATCH: batch}).losses["total"]
        stage.text_stage.train()
        text = stage.text_stage(batch).losses["total"]
    torch.testing.assert_close(both, image + text)
    stage({**batch, TEXT_BATCH: batch}).losses["total"].backward()
    assert gradients(stage) == {"text_adapter", "text_cross_attn", "image_adapter", "image_cross_attn"}


@pytest.mark.parametrize(("order", "image"), [("turns", (False, True)), ("joint", (True, True))])
def test_dropout_is_on_in_what_a_loss_trains_alone(order: str, image: tuple[bool, bool]) -> None:
    stage, batch = stage_of(order)
    model, seen = stage.model, {}

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            seen[name] = (model.text_cross_attn.training, model.image_cross_attn.training)
            return function(*arguments)

        return noted

    model.forward, model.joint_forward = noting("image", model.forward), noting("image", model.joint_forward)
    stage.text_stage.forward = noting("text", stage.text_stage.forward)
    for on in (True, False):
        stage.train(on)
        stage({**batch, TEXT_BATCH: batch})
        assert seen == ({"image": image, "text": (True, False)} if on else dict.fromkeys(seen, (False, False)))


@pytest.mark.parametrize("choices", [{}, {"text_cross_attn_weight": 0.0, "image_cross_attn_weight": 0.0}])
def test_the_joint_forward_is_the_models_own(choices: dict[str, Any]) -> None:
    stage, batch = stage_of("joint", **choices)
    model, rows = stage.model.eval(), torch.tensor([CLASSES.index(name) for name in batch["class_name"]])
    ours = model.joint_forward(batch["image"], stage.prompts, rows, stage.loop)
    usual = model(batch["image"], model.text_side(stage.prompts, stage.loop), rows)
    torch.testing.assert_close(torch.stack(ours.levels), torch.stack(usual.levels))
    torch.testing.assert_close(ours.det, usual.det)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"), ("cork",), count=3)


def asked(world: Path, save_path: Path, **changes: Any) -> FeedbackConfig:
    values = {
        "model_name": f"local-dir:{world / 'clip'}",
        "dataset": str(world / "train"),
        "shot": 4,
        "text_batch_size": 4,
        "num_workers": 0,
        "device": "cpu",
        "tracker": "none",
        "num_feedback_loops": 2,
        "text_epochs_per_loop": (1, 2),
        "image_epochs_per_loop": (2, 2),
        "save_path": save_path,
        "order": "turns",
    }
    return FeedbackConfig.of(**{**values, **changes})


class Halt(BaseException):
    """Ends a run as a kill does."""


@pytest.mark.parametrize("order", ORDERS)
def test_a_killed_run_ends_the_same_and_its_checkpoint_counts_both_sides(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    whole, killed = (asked(world, tmp_path / name, order=order) for name in ("whole", "killed"))
    train_feedback(whole)
    epoch, done = engine.training.run.train_epoch, []

    def halting(*arguments: Any) -> Any:
        done.append(1)
        if len(done) in (2, 5):
            raise Halt
        return epoch(*arguments)

    monkeypatch.setattr(engine.training.run, "train_epoch", halting)
    for _ in range(2):
        with pytest.raises(Halt):
            train_feedback(killed)
    train_feedback(killed)
    one, two = (read_checkpoint(run.save_path / "final_model.pth") for run in (whole, killed))
    for name, part in one.components.items():
        for key, value in part.items():
            assert torch.equal(value, two.components[name][key]), (name, key)
    # Where Stage 2 trains the text side too, each of its steps is one of both.
    text = {"turns": 3 * 2, "joint": 4 * 4, "joint_stages": 3 * 2 + 4 * 4}
    assert one.steps == two.steps == {"text": text[order], "image": 4 * 4}
    assert (whole.save_path / "training_curves.png").is_file()


def test_text_sees_the_trained_branch_from_the_first_loop(world: Path, tmp_path: Path) -> None:
    assert loop_forward(asked(world, tmp_path), 1) == LoopForward("trained", True)
    for order in ("stages", "joint_stages"):
        assert loop_forward(asked(world, tmp_path, order=order), 1) == LoopForward("frozen", True)


@pytest.mark.parametrize(
    ("changes", "said"), [({"accumulate": 2}, "--accumulate"), ({"text_epochs_per_loop": (3, 1)}, "3 text epochs")]
)
def test_what_cannot_be_spread_is_refused(world: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan_loops(asked(world, tmp_path, **changes))
