"""`train_cross_attention.py` and `test_stage2_gradients.py` as a user runs them."""

import subprocess
import sys
from pathlib import Path

import PIL
import pytest
import torch

from engine import load_model
from tests.helpers import equal
from tests.scripts import ROOT, base_arguments, common_arguments, environment, error_line, flags, run, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_world(tmp_path_factory.mktemp("world"), ("cork",))
    run("train.py", *common(folder), "--save_path", folder / "base")
    return folder


def common(world: Path) -> list[object]:
    return flags(**common_arguments(world, shot=8), text_epoch=2, image_epoch=3, image_lr=0.005)


def from_base(world: Path, save_path: Path, *more: object) -> list[object]:
    return ["train_cross_attention.py", *common(world), *flags(**base_arguments(world), save_path=save_path), *more]


@pytest.fixture(scope="module")
def finished(world: Path) -> Path:
    path = world / "cross"
    run(*from_base(world, path))
    return path


def test_verification_of_the_start(finished: Path) -> None:
    log = (finished / "train.log").read_text(encoding="utf-8")
    assert "WEIGHT INITIALIZATION VERIFICATION" in log
    assert "Base text adapter loaded successfully!" in log
    assert "image_cross_attn mean weight magnitude: " in log
    assert "image optimizer: moments of 9 tensors loaded from" in log
    checkpoint = torch.load(finished / "image_adapter.pth", weights_only=True)
    assert checkpoint["config"]["cross_attention"]["text_conditioning"] == "image"
    assert checkpoint["config"]["versions"]["pillow"] == PIL.__version__
    assert {"text_adapter", "text_cross_attn", "image_adapter", "image_cross_attn"} <= set(checkpoint)


def test_training_starts_from_the_base(world: Path, tmp_path: Path) -> None:
    """Before the first epoch, the state contains the base's adapters."""
    run(*from_base(world, tmp_path, "--text_epoch", 0, "--image_epoch", 0))
    state = torch.load(tmp_path / "training_state.pth", weights_only=True)
    base = torch.load(world / "base" / "image_adapter.pth", weights_only=True)
    for name in ("text_adapter", "image_adapter"):
        assert equal(state[name], base[name])
    moments = state["image_optimizer"]["state"]
    assert torch.equal(moments[0]["exp_avg"], base["image_optimizer"]["state"][0]["exp_avg"])


def test_v3_trains_image_cross_attention_only_and_starts_as_its_base(world: Path, tmp_path: Path) -> None:
    epochs = ("--preset", "v3", "--text_epoch", 0, "--image_epoch", 1)
    run(*from_base(world, tmp_path / "begun", *epochs, "--image_lr", 0))
    run(*from_base(world, tmp_path / "trained", *epochs))
    base, begun, trained = (
        load_model(folder, device="cpu") for folder in (world / "base", tmp_path / "begun", tmp_path / "trained")
    )
    picture = world / "test" / "cork" / "test" / "spot" / "000.png"
    assert (begun.predict(picture, "cork").anomaly_map == base.predict(picture, "cork").anomaly_map).all()
    found = trained.predict(picture, "cork", return_attention=True)
    assert found.attention.text is None and found.attention.image is not None
    trained.model.image_cross_attn.weight = 0.0
    assert abs(trained.predict(picture, "cork").anomaly_map - found.anomaly_map).max() > 1e-4


def test_evaluation_uses_cross_attention(world: Path, finished: Path, tmp_path: Path) -> None:
    """Row 3 of docs/method.md, "Known defects": results without it differ."""
    run("inference.py", "--checkpoint", finished, "--dataset", world / "test", "--num_workers", 0, "--device", "cpu")
    model = load_model(finished / "image_adapter.pth", device="cpu")
    picture = world / "test" / "cork" / "test" / "spot" / "000.png"
    trained = model.predict(picture, "cork", return_attention=True)
    attention = trained.attention
    torch.testing.assert_close(attention.text.sum(-1), torch.ones(attention.text.shape[:-1]))
    torch.testing.assert_close(attention.image.sum((-1, -2)), torch.ones(attention.image.shape[:-2]))
    assert (model.predict(picture, "cork").anomaly_map == trained.anomaly_map).all()
    model.model.image_cross_attn.weight = model.model.text_cross_attn.weight = 0.0
    assert abs(model.predict(picture, "cork").anomaly_map - trained.anomaly_map).max() > 1e-4


def test_mistakes_end_in_one_line(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "unused"
    asked = ["train_cross_attention.py", *common(world), "--save_path", path]
    text, image = world / "base" / "text_adapter.pth", world / "base" / "image_adapter.pth"
    both = ["--load_base_text_adapter", text, "--load_base_image_adapter"]
    untrained = tmp_path / "untrained.pth"
    torch.save({**torch.load(image, weights_only=True), "epoch": 0}, untrained)
    # Row 9 of docs/method.md, "Known defects": cross-attention on top of an untrained base went unnoticed.
    assert "was trained for 0 epochs" in error_line(*asked, *both, untrained)
    other = tmp_path / "other.pth"
    content = torch.load(image, weights_only=True)
    content["image_adapter"]["det_proj.fc.weight"] = torch.zeros(8, 8)
    torch.save(content, other)
    assert "det_proj.fc.weight" in error_line(*asked, *both, other)
    content = torch.load(image, weights_only=True)
    content["config"]["model"]["text_adapted"] = False
    torch.save(content, other)
    assert "text side was not trained" in error_line(*asked, *both, other)
    assert not path.exists()


def test_training_from_scratch_warns_of_unfair_comparisons(world: Path, tmp_path: Path) -> None:
    once = flags(text_epoch=1, image_epoch=1, save_path=tmp_path)
    assert "from scratch" in run("train_cross_attention.py", *common(world), *once)


def test_frozen_base(world: Path, tmp_path: Path) -> None:
    run(*from_base(world, tmp_path, "--freeze_base", "--cross_attn_residual", "add", "--cross_attn_init", "zero"))
    trained = torch.load(tmp_path / "image_adapter.pth", weights_only=True)
    base = torch.load(world / "base" / "image_adapter.pth", weights_only=True)
    assert equal(trained["image_adapter"], base["image_adapter"])
    assert trained["image_cross_attn"]["out_proj.weight"].abs().max() > 0


def test_collecting_the_root_does_not_run_the_gradient_test() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "test_stage2_gradients.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), text=True, encoding="utf-8", capture_output=True)
    assert "gradient norm" not in done.stdout
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
