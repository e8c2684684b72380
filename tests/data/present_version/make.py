"""How `runs.zip` beside this file was made: small runs, stopped half-way, of the version of commit ca1fae5.

Run once, in a checkout of that commit: `PYTHONPATH=. python THIS_FILE FOLDER`, where FOLDER is new. The archive holds a
base run, a cross-attention run and a feedback run, and in `predictions.json` what that version predicted with their
checkpoints. The CLIP and the images are not kept: `write_world` makes the same bits on any machine.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

# Narrow, so that the files are small.
ARCHITECTURE = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 24, "layers": 4, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 4},
}
SIZE, CLASSES, EACH = 24, ("bolt", "felt"), 4
PICTURE = "images/felt/test/spot/001.png"

COMMON = (
    "--model_name local-dir:clip --dataset images --shot 4 --text_batch_size 4 --num_workers 0 --device cpu "
    "--tracker none --text_lr 1e-3 --image_lr 1e-3"
)
FROM_BASE = "--load_base_text_adapter base/text_adapter.pth --load_base_image_adapter base/image_adapter_1.pth"
# The command of each run, which also goes on with it.
RUNS = {
    "base": f"train.py {COMMON} --text_epoch 1 --image_epoch 3 --save_path base",
    "cross": f"train_cross_attention.py {COMMON} {FROM_BASE} --text_epoch 1 --image_epoch 3 --save_path cross",
    "feedback": (
        f"train_cross_attention_feedback_v2.py {COMMON} {FROM_BASE} --num_feedback_loops 2 --text_epochs_per_loop 1 "
        "--image_epochs_per_loop 3 --save_path feedback"
    ),
}
STOPPED_AFTER = {"base": 2, "cross": 2, "feedback": 6}  # epochs; feedback's are those of loop 1, and half of loop 2


def noise(name: str, count: int) -> np.ndarray:
    """`count` integers from 0 to 255 that follow from a name alone, whatever the machine and the libraries."""
    return np.frombuffer(hashlib.shake_256(name.encode("utf-8")).digest(count), np.uint8).astype(np.int64)


def write_world(folder: Path) -> None:
    """In `folder`: a CLIP, `clip`, and a dataset in MVTec's layout, `images`; the same bits on any machine."""
    (folder / "clip").mkdir(parents=True)
    config = {"model_cfg": {**ARCHITECTURE, "quick_gelu": True}, "preprocess_cfg": {}}
    (folder / "clip" / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    state = {}
    for key, value in open_clip.CLIP(**ARCHITECTURE, quick_gelu=True).state_dict().items():
        drawn = torch.from_numpy((noise(key, value.numel()) - 127.5) / 512).float().reshape(value.shape)
        state[key] = drawn + 1 if ".ln_" in key and key.endswith("weight") else drawn
    save_file(state, folder / "clip" / "open_clip_model.safetensors")
    for name in CLASSES:
        for index in range(EACH):
            for kind in ("good", "spot"):
                pixels = 60 + noise(f"{name} {kind} {index}", SIZE * SIZE * 3).reshape(SIZE, SIZE, 3) // 4
                file = folder / "images" / name / "test" / kind / f"{index:03d}.png"
                if kind == "spot":
                    mask = np.zeros((SIZE, SIZE), np.uint8)
                    mask[3 * index : 3 * index + 9, 5 : 5 + 9] = 255
                    pixels[mask > 0] += 120
                    _write(mask, folder / "images" / name / "ground_truth" / kind / f"{index:03d}_mask.png")
                _write(pixels.astype(np.uint8), file)


def _write(pixels: np.ndarray, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


class Enough(Exception):
    """Stands for a kill."""


def run_script(command: str) -> None:
    """Run a script of the version that is imported, in this process."""
    script, *arguments = command.split()
    with mock.patch.object(sys, "argv", [script, *arguments]):
        importlib.import_module(script.removesuffix(".py")).main()


def train_and_stop(command: str, epochs: int) -> None:
    """Train in the current folder, and stop in the midst of an epoch, when this many have been finished."""
    training = importlib.import_module("engine.run")
    train_epoch, begun = training.train_epoch, []

    def count(*parts: object) -> object:
        begun.append(parts)
        if len(begun) > epochs:
            raise Enough
        return train_epoch(*parts)

    with mock.patch.object(training, "train_epoch", count):
        try:
            run_script(command)
        except Enough:
            return
    raise AssertionError(f"not stopped: {command}")


def predict(file: Path) -> dict[str, object]:
    """What the version that is imported predicts with a checkpoint for one image."""
    model = importlib.import_module("engine").load_model(file, device="cpu")
    anomaly_map, score, _ = model.predict(PICTURE, "felt")
    return {"score": score, "map": [round(float(value), 7) for value in anomaly_map[::4, ::4].ravel()]}


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    write_world(folder)
    os.chdir(folder)
    for name, command in RUNS.items():
        train_and_stop(command, STOPPED_AFTER[name])
    files = [
        file for name in RUNS for file in sorted(Path(name).iterdir()) if file.suffix in (".pth", ".json", ".jsonl")
    ]
    predictions = {file.as_posix(): predict(file) for file in files if "image" in file.name or "final" in file.name}
    Path("predictions.json").write_text(json.dumps(predictions), encoding="utf-8")
    with zipfile.ZipFile("runs.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in [*files, Path("predictions.json")]:
            archive.write(file)


if __name__ == "__main__":
    main()
