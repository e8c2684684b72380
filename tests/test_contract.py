"""Names, options, defaults, files and output lines that users of the earlier scripts rely on."""

import inspect
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.cli.runner import Script
from engine.config.training import FeedbackConfig
from engine.runtime import run_folder
from engine.training.plan import plan_loops
from engine.training.verdicts import LOW_GRADIENT, VANISHING_GRADIENT
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.checkpoint_schema import SavedFile
from model.config import COMPONENTS, depth_defaults
from tests.helpers import tiny_clip
from utils.arguments import Arguments

ROOT = Path(__file__).resolve().parent.parent
SHARED = {
    "dataset": "VisA",
    "training_mode": "few_shot",
    "shot": 32,
    "text_batch_size": 16,
    "image_batch_size": 2,
    "seed": 0,
    "load_base_text_adapter": None,
    "load_base_image_adapter": None,
}
BASE = {"text_epoch": 5, "image_epoch": 20, "text_lr": 1e-5, "image_lr": 5e-4}
V2 = {
    "preset": "v2",
    "num_feedback_loops": 5,
    "text_epochs_per_loop": (5,),
    "image_epochs_per_loop": (15,),
    "epochs_decay_rate": 0.8,
    "text_lr": 2e-5,
    "image_lr": 5e-3,
    "lr_decay_per_loop": 0.8,
    "warmup_epochs": 2,
    "grad_clip": 1.0,
    "cross_attn_start_loop": 1,
    "optimizer": "adamw",
    "weight_decay": 0.01,
    "lr_schedule": "cosine",
    "init_from": None,
    "reset_optimizers": False,
}
V1 = {
    "preset": "v1",
    "optimizer": "adam",
    "lr_schedule": "multistep",
    "grad_clip": 0.0,
    "image_lr": 5e-4,
    "text_lr": 1e-5,
    "text_epochs_per_loop": (5, 3, 2),
    "image_epochs_per_loop": (20, 10, 5),
    "image_cross_attn_weight": 0.1,
    "text_cross_attn_weight": 0.1,
}
WEIGHTS = {"text_cross_attn_weight": 0.1, "image_cross_attn_weight": 0.1}


def parsed(script: str, *words: str) -> Arguments:
    module = import_module(script)
    assert isinstance(module.script, Script)
    return module.script.parse(words)


@pytest.mark.parametrize(
    ("script", "defaults"),
    [
        ("train", {name: value for name, value in {**SHARED, **BASE}.items() if not name.startswith("load_base")}),
        ("train_cross_attention", {**SHARED, **BASE, **WEIGHTS}),
        ("train_cross_attention_feedback_v2", {**SHARED, **V2}),
        ("train_cross_attention_feedback", V1),
        ("visualize_comparison", {"image_idx": (0,), "dataset": None, "feedback_loop": None}),
        ("inference", {"dataset": None}),
    ],
)
def test_options_and_their_defaults(script: str, defaults: dict[str, Any]) -> None:
    required = {"visualize_comparison": ("--class_name", "felt"), "inference": ("--checkpoint", "x.pth")}
    arguments = parsed(script, *required.get(script, ()))
    assert {name: getattr(arguments, name) for name in defaults} == defaults


def test_options_without_a_default_that_matters() -> None:
    paths = ["--base_path", "b", "--cross_path", "c"]
    assert parsed("compare_feedback_loops", "--dataset", "x", "--save_path", "s", *paths).dataset == "x"
    drawn = ["--class_name", "felt", *paths, "--feedback_path", "f", "--feedback_loop", "2", "--image_idx", "3", "1"]
    assert parsed("visualize_comparison", *drawn).image_idx == (3, 1)
    feedback = ["--init_from", "x.pth", "--feedback_features", "projectors", "--reset_optimizers"]
    assert parsed("train_cross_attention_feedback_v2", *feedback).reset_optimizers
    parsed("test_stage2_gradients")


def test_epochs_decay_and_weights_of_presets() -> None:
    assert [loop.epochs["image"] for loop in plan_loops(FeedbackConfig())] == [15, 12, 9, 7, 6]
    for script in ("train_cross_attention", "train_cross_attention_feedback_v2", "train_cross_attention_feedback"):
        v3 = parsed(script, "--preset", "v3")
        assert (v3.text_cross_attn_weight, v3.image_cross_attn_weight, v3.cross_attn_init) == (0.0, 1.0, "zero")


def test_files_and_folders() -> None:
    for name in ("model", "dataset", "utils", "ckpt"):
        assert (ROOT / name).is_dir()
    assert run_folder.side_file("text") == "text_adapter.pth"
    assert run_folder.side_file("image") == "image_adapter.pth"
    assert run_folder.side_file("image", 20) == "image_adapter_20.pth"
    files = [run_folder.loop_file(2, kind) for kind in ("text", "image", "final")]
    assert files == ["loop_2_text_adapter.pth", "loop_2_image_adapter.pth", "loop_2_final.pth"]
    names = ("FINAL_FILE", "CURVES_FILE", "STATE_FILE", "LOG_FILE", "HISTORY_FILE", "ARGUMENTS_FILE")
    assert [getattr(run_folder, name) for name in names] == [
        "final_model.pth",
        "training_curves.png",
        "training_state.pth",
        "train.log",
        "history.jsonl",
        "args.json",
    ]
    assert COMPONENTS == ("text_adapter", "text_cross_attn", "image_adapter", "image_cross_attn")
    others = {"text_optimizer", "image_optimizer", "epoch", "loop", "steps", "config"}
    assert {item.name for item in fields(SavedFile)} == {*COMPONENTS, *others}


def test_the_model() -> None:
    parameters = inspect.signature(AdaptedCLIPWithCrossAttention).parameters
    assert list(parameters)[:4] == ["clip", "config", "text_cross_attn_weight", "image_cross_attn_weight"]
    assert parameters["image_cross_attn_weight"].default == parameters["text_cross_attn_weight"].default == 0.1
    clip = tiny_clip()
    model = AdaptedCLIPWithCrossAttention(clip, clip.model_config())
    assert (model.t_ca_w, model.i_ca_w) == (0.1, 0.1)
    assert isinstance(model.text_adapter, nn.ModuleList) and isinstance(model.image_adapter, nn.ModuleDict)
    assert set(model.image_adapter) == {"layer_adapters", "seg_proj", "det_proj"}
    names = {name for name, _ in model.named_parameters()}
    for prefix in ("text_cross_attn", "image_cross_attn"):
        assert {f"{prefix}.{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "out_proj")} <= names
    adapters = {"text_adapter.0.fc1.weight", "image_adapter.layer_adapters.0.fc2.weight"}
    projectors = {"image_adapter.seg_proj.0.fc.weight", f"text_adapter.{len(model.text_adapter) - 1}.fc.0.weight"}
    assert adapters | projectors <= names
    assert depth_defaults(24, 12)["levels"] == (6, 12, 18, 24)
    assert all(isinstance(value, torch.Tensor) for value in model.state_dict().values())


def test_warnings_of_small_gradients() -> None:
    assert (LOW_GRADIENT, VANISHING_GRADIENT) == (0.01, 0.001)


def test_source_of_the_model_and_of_version_1() -> None:
    source = (ROOT / "model" / "adapter_cross_attention.py").read_text(encoding="utf-8")
    assert "image_cross_attn_weight: float = 0.1" in source and ".view(" not in source
    assert "cross_out_scaled = self.i_ca_w * cross_out" in source
    assert "image_cross_attn_weight=0.1" in (ROOT / "train_cross_attention_feedback.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "line",
    [
        "Average Grad Norm: ",
        "WEIGHT INITIALIZATION VERIFICATION",
        " mean weight magnitude: ",
        " loaded successfully!",
        "Image adapter gradient norm:",
        "Without cross-attention: ",
        "With cross-attention: ",
        "Ratio: ",
        "[OK] Cross-attention doesn't harm gradient flow significantly",
        "Improvement from ",
        '"learning"',
        '"not learning"',
        '"exploding"',
    ],
)
def test_output_lines(line: str) -> None:
    """Lines with values are tested elsewhere; this test checks the words."""
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "engine").rglob("*.py"))
    assert any(line in source for source in sources)


@pytest.mark.parametrize(
    "name",
    [
        "QUICK_START_FAIR_COMPARISON",
        "TRAINING_CROSS_ATTENTION_FROM_BASE",
        "FEEDBACK_TRAINING_V2_GUIDE",
        "GRADIENT_DILUTION_BUG_FIXED",
        "TESTING_GUIDE",
        "untrained base",
        "view/reshape",
        "forward_utils_cross_attention.py",
    ],
)
def test_the_documentation_lists_names_of_earlier_guides(name: str) -> None:
    assert name in (ROOT / "docs" / "README.md").read_text(encoding="utf-8")


def test_the_documentation_says_how_to_train_faster() -> None:
    rows = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").splitlines()
    options = ("--num_feedback_loops 3", "--image_epochs_per_loop 10", "--image_batch_size 4")
    assert any(all(option in row for option in options) for row in rows if row.startswith("|"))
