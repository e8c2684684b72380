"""Runs of the version of commit ca1fae5, kept as files: they load, predict the same, and go on to their end."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch

from engine import load_model
from engine.report.commands import training_command
from engine.runtime.run_folder import STATE_FILE, find_latest
from tests.data.present_version import make
from tests.helpers import assert_agrees
from utils.errors import UserError


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kept runs, with their CLIP and images, in a folder that is the current one, as it was when they were made."""
    make.write_world(tmp_path)
    with zipfile.ZipFile(Path(make.__file__).with_name("runs.zip")) as archive:
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_checkpoints_predict_what_they_predicted(kept: Path) -> None:
    predictions = json.loads((kept / "predictions.json").read_text(encoding="utf-8"))
    assert {Path(file).parent.name for file in predictions} == set(make.RUNS)
    for file, expected in predictions.items():
        found = make.predict(Path(file))
        assert abs(found["score"] - expected["score"]) < 1e-4, file
        assert_agrees(torch.tensor(found["map"]), torch.tensor(expected["map"]), 1e-4, file)


def test_checkpoints_add_what_words_after_the_first_block_see(kept: Path) -> None:
    """They know neither `cross_attn_residual` nor `text_cross_attn_at`, and keep the context that they had."""
    for file in ("cross/image_adapter_cross_attn.pth", "feedback/loop_1_final.pth"):
        saved = torch.load(file, weights_only=True)["config"]["cross_attention"]
        assert not {"cross_attn_residual", "text_cross_attn_at"} & set(saved)
        found = load_model(file, device="cpu").model.cross_config
        assert (found.cross_attn_residual, found.text_cross_attn_at) == ("add", "first_block")
        assert found.context_norm == saved["context_norm"] == "unit"


def test_a_run_of_before_the_presets_changed_goes_on_as_it_was_begun(kept: Path) -> None:
    """And as nothing else: what is asked for is compared with what the run meant."""
    same = f"{make.RUNS['feedback']} --augment_fill black"
    for asked, was in (("--context_norm layer", "unit"), ("--cross_attn_residual matched", "add")):
        flag, value = asked.removeprefix("--").split()
        with pytest.raises(UserError, match=f"another run \\({flag} was {was}, now {value}\\)"):
            make.run_script(f"{same} {asked}")
    make.run_script(same)
    config = torch.load("feedback/loop_2_final.pth", weights_only=True)["config"]
    kept_values = {"context_norm": "unit", "cross_attn_residual": "add", "text_cross_attn_at": "first_block"}
    assert {name: config["cross_attention"][name] for name in kept_values} == kept_values
    command = training_command(torch.load("feedback/loop_1_final.pth", weights_only=True)["config"])
    assert "--context_norm unit" in command and "--cross_attn_residual add" in command


@pytest.mark.parametrize("name", make.RUNS)
def test_half_way_runs_go_on_to_their_end(name: str, kept: Path) -> None:
    before = torch.load(Path(name, STATE_FILE), weights_only=True)
    assert before["done"] != before["planned"]
    with pytest.raises(UserError, match="augment_fill was black, now mean"):
        make.run_script(make.RUNS[name])
    make.run_script(f"{make.RUNS[name]} --augment_fill black")
    after = torch.load(Path(name, STATE_FILE), weights_only=True)
    assert after["done"] == after["planned"] == before["planned"]
    assert after["history"][: len(before["history"])] == before["history"]
    latest = Path(name, "loop_2_final.pth") if name == "feedback" else find_latest(Path(name), "--base_path")
    model = load_model(latest, device="cpu")
    assert model.epoch == sum(row["stage"] == "image" for row in after["history"])
    assert 0 < model.predict(make.PICTURE, "felt").score < 1
