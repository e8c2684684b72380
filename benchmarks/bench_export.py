"""Time per image on the CPU of a model, its ONNX file and its exported program: medians, measured in turn."""

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
from engine.config.tools import ONNX, TORCH
from engine.export.export import ExportTarget, export, load_run, pictures
from utils.arguments import number
from utils.text import markdown_table

CLASS, SIDE = "object", 512
PREDICT = "torch, `model.predict`"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="runs/toy", help="file or folder (default: %(default)s)")
    parser.add_argument("--rounds", type=number(int, (1, 10_000)), default=30, help="of each (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    model = load_model(options.checkpoint, device="cpu")
    image = np.asarray(Image.fromarray(pictures(model.clip.img_size)[0]).resize((SIDE, SIDE)))
    with tempfile.TemporaryDirectory() as folder:
        variants: dict[str, Callable[[], object]] = {PREDICT: lambda: model.predict(image, CLASS)}
        for kind, what in ((ONNX, "onnxruntime"), (TORCH, "torch, exported program")):
            file = Path(folder) / kind
            export(model, ExportTarget(CLASS), file, kind)
            run = load_run(file, kind)
            variants[what] = lambda run=run: run(image[None])
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(3):  # warm
        for variant in variants.values():
            variant()
    for _ in range(options.rounds):
        for name, variant in variants.items():
            start = time.perf_counter()
            with torch.inference_mode():
                variant()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [[name, f"{1000 * value:.1f}", f"{value / medians[PREDICT]:.2f}"] for name, value in medians.items()]
    print(f"{options.checkpoint}, an image of {SIDE} x {SIDE}, {torch.get_num_threads()} threads")
    print(markdown_table(["variant", "ms", f"share of {PREDICT}"], rows))


if __name__ == "__main__":
    main()
