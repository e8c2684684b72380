"""Time for an image by an exported file in onnxruntime, and by torch, on the CPU: medians, interleaved in one run."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine import load_model
from engine.config.export import ONNX, TORCH
from engine.export.export import Subject, export, pictures, run_of
from utils.cli import number
from utils.text import markdown_table

CLASS = "object"
PREDICT = "torch, `model.predict`"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="runs/toy", help="file or folder (default: %(default)s)")
    parser.add_argument("--rounds", type=number(int, (1, 10_000)), default=30, help="of each (default: %(default)s)")
    parser.add_argument("--side", type=number(int, (1, 10_000)), default=512, help="pixels (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    asked = build_parser().parse_args(arguments)
    model = load_model(asked.checkpoint, device="cpu")
    image = np.asarray(Image.fromarray(pictures(model.clip.img_size)[0]).resize((asked.side, asked.side)))
    with tempfile.TemporaryDirectory() as folder:
        ways: dict[str, Callable[[], object]] = {PREDICT: lambda: model.predict(image, CLASS)}
        for kind, what in ((ONNX, "onnxruntime"), (TORCH, "torch, exported program")):
            file = Path(folder) / kind
            export(model, Subject(CLASS), file, kind)
            run = run_of(file, kind)
            ways[what] = lambda run=run: run(image[None])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3):  # warm
        for way in ways.values():
            way()
    for _ in range(asked.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            with torch.inference_mode():
                way()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [[name, f"{1000 * value:.1f}", f"{value / medians[PREDICT]:.2f}"] for name, value in medians.items()]
    print(f"{asked.checkpoint}, an image of {asked.side} x {asked.side}, {torch.get_num_threads()} threads")
    print(markdown_table(["what", "ms", f"share of {PREDICT}"], rows))


if __name__ == "__main__":
    main()
