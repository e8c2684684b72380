"""Runs of the version of commit ca1fae5, kept as files: they load, predict the same, and go on to their end."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch

from engine import load_model
from engine.run_folder import STATE_FILE, find_latest
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
