"""Damaged checkpoints and states are used if the damage is harmless, and otherwise refused in one line."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from engine.detector.loading import build_detector
from engine.runtime.run_folder import STATE_FILE
from engine.training.restart import check_save_path
from engine.training.state import read_state, restore
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.checkpoint import read_any
from model.clip import FrozenCLIP
from model.clip_loading import load_clip
from model.config import SIDES
from tests.damage import SOUND, Damaged, damage, damaged_files, sound, world
from utils.errors import UserError


@functools.cache
def clip() -> FrozenCLIP:
    """The CLIP of the runs, under its recorded name."""
    loaded = load_clip(f"local-dir:{world() / 'clip'}")
    loaded.model_name = "local-dir:clip"
    return loaded


def used_or_refused(use: Callable[[], object], file: Path) -> None:
    """The file is used, or refused in one line that names it."""
    try:
        use()
    except UserError as error:
        assert "\n" not in str(error)
        assert str(file.parent) in str(error)


@given(damaged=damaged_files())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_damage_is_harmless_or_refused(damaged: Damaged, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("damaged") / STATE_FILE
    torch.save(damaged.content, file)
    used_or_refused(lambda: build_detector(read_any(file), clip()), file)
    used_or_refused(lambda: check_save_path(file.parent, {}), file)
    used_or_refused(lambda: go_on(file), file)


def run_of() -> tuple[AdaptedCLIPWithCrossAttention, dict[str, torch.optim.Optimizer]]:
    """A new model with the optimizers of the feedback run."""
    model = AdaptedCLIPWithCrossAttention(clip(), read_any(world() / "feedback" / STATE_FILE).model_config())
    kinds = ("adapter", "cross_attn")
    groups = {
        side: [{"params": list(model.components[f"{side}_{kind}"].named_parameters())} for kind in kinds]
        for side in SIDES
    }
    return model, {side: torch.optim.AdamW(groups[side]) for side in SIDES}


def go_on(file: Path) -> None:
    """Load a state and do the first step."""
    model, optimizers = run_of()
    restore(read_state(file), model.components, optimizers, file)
    for parameter in (parameter for part in model.components.values() for parameter in part.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers.values():
        optimizer.step()


def test_undamaged_files_are_used() -> None:
    """The test above would not notice a check that refuses everything."""
    for name in SOUND:
        build_detector(read_any(world() / name), clip())
    go_on(world() / "feedback" / STATE_FILE)
    with pytest.raises(UserError, match="another run"):
        check_save_path(world() / "base", {"seed": -1})


@pytest.mark.parametrize(
    ("path", "change", "words"),
    [
        (("done",), None, "has no 'done'"),
        (("done", 0), lambda _: "1", "done[0] is '1', expected a whole number"),
        (("done", 0), lambda _: -1, "done[0] is -1"),
        (("planned", 0), None, "done and planned count different phases"),
        (("history",), lambda _: {}, "history is a dict, expected a list"),
        (("history", 0, "stage"), lambda _: "sound", "[0].stage is 'sound', expected one of text, image, both"),
        (("history", 0, "loss"), None, "history[0] has no 'loss'"),
        (("history", 0, "grad_norm/total"), None, "history[0] has no 'grad_norm/total'"),
        (("schedule_step",), None, "has no 'schedule_step'"),
        (("loops", 0, "loop"), lambda _: True, "loops[0].loop is True"),
        (("signature",), None, "has no 'signature'"),
        (("text_optimizer",), None, "text_optimizer"),
        (("image_cross_attn", "q_proj.bias"), None, "image_cross_attn has no 'q_proj.bias'"),
        (("image_optimizer", "state", 0, "exp_avg"), lambda value: value.T.flatten(), "image_optimizer is not of this"),
        (("image_optimizer", "param_groups", 0, "lr"), lambda _: "fast", "param_groups[0].lr is 'fast'"),
    ],
)
def test_a_damaged_state_is_refused_with_its_key(
    path: tuple[Any, ...], change: Callable[[Any], Any] | None, words: str, tmp_path: Path
) -> None:
    torch.save(damage(sound("feedback/training_state.pth"), path, change), tmp_path / STATE_FILE)
    with pytest.raises(UserError) as caught:
        go_on(tmp_path / STATE_FILE)
    assert str(tmp_path / STATE_FILE) in str(caught.value)
    assert words in str(caught.value)


def test_moments_are_assigned_to_their_parameters() -> None:
    """The file contains them for the CPU, and loading moves them; here another precision replaces a GPU."""
    file = world() / "feedback" / STATE_FILE
    model, optimizers = run_of()
    model.double()
    restore(read_state(file), model.components, optimizers, file)
    moments = optimizers["image"].state[next(model.image_adapter.parameters())]
    assert moments["exp_avg"].dtype == torch.float64
