"""Errors and help that need no torch, whose import takes seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config.training import BaseConfig
from engine.runtime.run_folder import ARGUMENTS_FILE, STATE_FILE
from tests.bad_cases import SCRIPTS
from tests.scripts import ROOT

# Runs scripts one after another in a Python that has no torch.
WITHOUT_TORCH = """
import json, runpy, sys
for name in ("torch", "open_clip", "accelerate"):
    sys.modules[name] = None
for script, arguments in json.load(sys.stdin):
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print("STATUS", end.code, flush=True)
    except BaseException as error:
        print("STATUS", repr(error), flush=True)
"""


def statuses(commands: list[tuple[str, list[str]]], folder: Path) -> tuple[list[str], str]:
    """The exit status of each command, and its standard error."""
    given = json.dumps([(str(ROOT / script), arguments) for script, arguments in commands])
    words = [sys.executable, "-c", WITHOUT_TORCH]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        words, input=given, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", check=True
    )
    return [line.partition(" ")[2] for line in done.stdout.splitlines() if line.startswith("STATUS ")], done.stderr


def test_help_needs_no_torch(tmp_path: Path) -> None:
    scripts = [*SCRIPTS, "run_study.py", "app.py"]
    assert statuses([(script, ["--help"]) for script in scripts], tmp_path)[0] == ["0"] * len(scripts)


@pytest.mark.parametrize("kind", ["arguments", "files"])
def test_wrong_options_are_refused_without_torch(kind: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / STATE_FILE).write_bytes(b"of another run")
    others = BaseConfig.of(recipe="toy", dataset="toy_train", image_lr=0.25).to_dict()
    (run / ARGUMENTS_FILE).write_text(json.dumps(others), encoding="utf-8")
    (run / "image_adapter.pth").write_bytes(b"")
    toy = ["--recipe", "toy", "--dataset", "toy_train"]
    cases = {
        "arguments": {
            "invalid choice": ("train.py", ["--adapter", "none"]),
            "unknown dataset": ("train.py", ["--dataset", "nosuch"]),
            "the data root": ("train_cross_attention.py", ["--dataset", "MVTec", "--data_root", "nowhere"]),
            "image_lr was 0.25": ("train.py", [*toy, "--save_path", "run"]),
            "99999 is not between": ("app.py", ["--port", "99999"]),
            "is a file": ("train_cross_attention_feedback.py", [*toy, "--save_path", "run/args.json"]),
        },
        "files": {
            "base.pth: no such file": (
                "train_cross_attention_feedback_v2.py",
                [*toy, "--load_base_text_adapter", "base.pth", "--load_base_image_adapter", "base.pth"],
            ),
            "list.jsonl": ("train.py", [*toy, "--metadata", "list.jsonl"]),
            "names.json": ("train.py", [*toy, "--class_names", "names.json"]),
            "gone.pth": ("inference.py", ["--checkpoint", "gone.pth"]),
            "nowhere": ("inference.py", ["--checkpoint", "run/image_adapter.pth", "--image", "nowhere"]),
            "no loop_": ("compare_feedback_loops.py", ["--save_path", "run", "--dataset", "toy_test"]),
            "elsewhere": ("visualize_comparison.py", ["--class_name", "nut", "--base_path", "elsewhere"]),
            "here.pth": ("test_stage2_gradients.py", ["--checkpoint", "here.pth"]),
            "there.pth": ("app.py", ["--checkpoint", "none", "there.pth"]),
        },
    }[kind]
    found, said = statuses(list(cases.values()), tmp_path)
    assert found == ["2"] * len(cases), said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    for words, line in zip(cases, lines, strict=True):
        assert words in line
    assert not (tmp_path / "data").exists()
