"""A step of both stages and evaluation with ViT-L-14-336 at 518 px, in every way to run it, interleaved in one run.

CLIP's weights are random; speed and memory do not depend on their values. First the losses of `plain`, the published
code's step in plain words (benchmarks/plain_step.py), are compared with those of the same forward here, on the same
weights. Then every row takes a step in turn, `--repeats` times, after one that is not counted.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain_step import PlainModel, full_length, parameters_of
from dataset.prompts import build_prompts
from engine.config.training import BaseConfig
from engine.evaluation.evaluate import autocast
from engine.runtime.device import check_compiler, check_device, device_name
from engine.training.stage1 import TextStage
from engine.training.stage2 import ImageStage
from model.adapter import AdaptedCLIP
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.blocks import BlockRunner
from model.clip import FrozenCLIP
from model.config import CrossAttentionConfig
from model.scoring import anomaly_map
from model.text import Prompts
from utils.text import format_table

MODEL, SIZE = "ViT-L-14-336", 518
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 4},
}
STAGES = ("text", "image", "evaluation")
# plain: the published code's step; same: its forward as this project computes it; the others: the default forward.
WAYS = ("plain", "same", "fp32", "checkpointed", "compiled", "bf16", "bf16_compiled")
CLASSES = ("candle", "capsules", "cashew", "chewing gum", "fryum", "macaroni", "circuit board", "pipe fryum")
# As published, and so that no confident error is cut off in one of the two alone.
CONFIG = BaseConfig(focal_smoothing=1e-5)
PEAK_MEMORY, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# The side of the square matrices whose product tells what the device can do.
PRODUCT = {"cpu": 2048, "cuda": 8192}


@dataclass
class Row:
    """One way to take a step, and what was measured of it.

    seconds: on the clock; processor: of all threads, which other work on the machine disturbs less; gib: the peak of
    memory; flops: operations of a step as torch counts them, 0 where they were not counted.
    """

    stage: str
    way: str
    cross: bool
    batch: int
    step: Callable[[], object]
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    gib: float = 0.0
    flops: int = 0

    @property
    def precision(self) -> str:
        return "bf16" if self.way.startswith("bf16") else "fp32"


class Bench:
    """The two models, with and without cross-attention, on one CLIP, and the steps that they take."""

    def __init__(self, device: str, tiny: bool, img_size: int = SIZE) -> None:
        torch.manual_seed(0)
        config = TINY if tiny else open_clip.get_model_config(MODEL)
        vision = config["vision_cfg"] if tiny else {**config["vision_cfg"], "image_size": img_size}
        clip = FrozenCLIP(open_clip.CLIP(**{**config, "vision_cfg": vision}, quick_gelu=True), MODEL, "quick_gelu")
        self.device, self.clip = device, clip.to(device)
        chosen = clip.model_config()
        self.models = {
            False: AdaptedCLIP(clip, chosen).to(device),
            True: AdaptedCLIPWithCrossAttention(clip, chosen, cross=CrossAttentionConfig()).to(device),
        }
        texts = [build_prompts(name) for name in CLASSES]
        self.prompts = Prompts.from_texts(clip, texts).to(device)

    def batch(self, size: int) -> dict[str, Any]:
        """Noise, half of it with a square as its anomaly; classes in turn."""
        side, generator = self.clip.img_size, torch.Generator().manual_seed(size)
        masks = torch.zeros(size, 1, side, side)
        masks[::2, :, side // 4 : side // 2, side // 4 : side // 2] = 1
        return {
            "image": torch.randn(size, 3, side, side, generator=generator).to(self.device),
            "mask": masks.to(self.device),
            "label": masks.flatten(1).amax(dim=1).long().to(self.device),
            "class_name": [CLASSES[index % len(CLASSES)] for index in range(size)],
        }

    def rows_of(self, batch: dict[str, Any]) -> Tensor:
        return torch.tensor([CLASSES.index(name) for name in batch["class_name"]], device=self.device)

    def step(self, stage: str, way: str, cross: bool, size: int) -> Callable[[], Any]:
        """A function that takes a step, without changing weights, and returns its loss (evaluation: the maps)."""
        batch, model = self.batch(size), self.models[cross]
        precision = "bf16" if way.startswith("bf16") else "fp32"
        runner = BlockRunner(way == "checkpointed", (size,) if way.endswith("compiled") else ())
        surgery = "sequential" if way in ("plain", "same") else "dual"
        if way == "plain":
            return self._plain_step(stage, batch)
        if stage == "evaluation":
            side, rows = model.text_side(self.prompts), self.rows_of(batch)

            @torch.inference_mode()
            def evaluate() -> Tensor:
                self.clip.run = runner
                with autocast(self.device, precision):
                    outputs = model.eval()(batch["image"], side, rows)
                return anomaly_map(outputs, self.clip.img_size, "industrial")

            return evaluate
        made = (TextStage if stage == "text" else ImageStage)(model, self.prompts, CLASSES, CONFIG)
        names = model.trained_components(stage)
        optimizer = torch.optim.Adam(parameters_of(model, names), lr=0.0)

        def train() -> float:
            self.clip.run = runner
            model.config = replace(model.config, surgery=surgery)
            made.begin()
            with autocast(self.device, precision):
                loss = made(batch).losses["total"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return train

    def _plain_step(self, stage: str, batch: dict[str, Any]) -> Callable[[], Any]:
        model = self.models[False]
        plain, masks, rows = PlainModel(model), batch["mask"][:, 0], self.rows_of(batch)
        tokens = full_length(self.prompts.tokens, self.clip.clip.context_length)
        optimizer = (
            torch.optim.Adam(parameters_of(model, [f"{stage}_adapter"]), lr=0.0) if stage != "evaluation" else None
        )
        anchors = model.text_side(self.prompts)[rows]

        def evaluate() -> list[Tensor]:
            with torch.no_grad():
                return plain.image_features(batch["image"])[0]

        def train() -> float:
            model.requires_grad_(True)
            if stage == "text":
                present, places = rows.unique(return_inverse=True)
                loss = plain.stage1_loss(batch["image"], masks, tokens[present], places, self.prompts.normal)
            else:
                loss = plain.stage2_loss(batch["image"], masks, batch["label"], anchors)
            loss.backward()
            optimizer.step()
            model.zero_grad()
            model.requires_grad_(False)
            return loss.item()

        return evaluate if stage == "evaluation" else train

    def check_losses(self) -> None:
        """Raise `SystemExit` where the plain step has another loss than the same forward here."""
        for stage in ("text", "image"):
            plain, same = (self.step(stage, way, False, 1)() for way in ("plain", "same"))
            print(f"loss of {stage}: plain {plain:.6f}, here {same:.6f}")
            if abs(plain - same) > 1e-4 * abs(plain):
                raise SystemExit("the two do not compute the same")

    def analytic_flops(self, stage: str, way: str, cross: bool, size: int) -> float:
        """The multiplications and additions of a step of `size` images that blocks need (docs/benchmarks.md)."""
        n, d, depth = 1 + self.clip.grid**2, self.clip.vision_width, self.clip.vision_layers
        linear, attention = 24 * d * d * n, 4 * n * n * d
        forward = depth * (linear + attention)
        values = (self.models[cross].config.surgery_until_layer - 1) * (attention + 2 * d * d * n)
        last = 20 * d * d * n + attention
        if way == "plain":
            # The backward pass of a linear is twice its forward where its weights have gradients.
            whole = forward + depth * (2 * linear + 2 * attention)
            return size * {"text": 2 * forward, "image": whole, "evaluation": forward}[stage]
        frozen = forward + values - last if way != "same" else 2 * forward - last
        if stage == "text":
            return size * frozen
        # Attention's backward pass computes its scores again; no gradient crosses the first block.
        backward = (depth - 1) * (linear + 2.5 * attention)
        if way == "checkpointed":
            backward += (depth - 1) * linear * 8 / 12
        context = forward - last + 1 / (depth - 1) * values if cross else 0
        return size * (forward + context + (backward if stage == "image" else 0))


def measure(row: Row, device: str) -> None:
    """Take a step, and keep its time and the peak of memory."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    elif RESET_PEAK.exists():
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)  # what earlier steps have freed counts no more
        RESET_PEAK.write_text("5", encoding="ascii")
    start, processor = time.perf_counter(), time.process_time()
    row.step()
    if device == "cuda":
        torch.cuda.synchronize()
    row.seconds.append(time.perf_counter() - start)
    row.processor.append(time.process_time() - processor)
    row.gib = max(row.gib, peak_memory(device))


def peak_memory(device: str) -> float:
    """GiB since the last reset: of the GPU, or of the process where the system tells; else 0."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if not PEAK_MEMORY.exists():
        return 0.0
    lines = PEAK_MEMORY.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def product_speed(device: str, precision: str) -> float:
    """Operations a second of one large matrix product, which a step cannot exceed; on the CPU of processor time."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    side = PRODUCT[device]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(side, side, device=device, dtype=dtype)
    times = []
    for _ in range(4):
        start = clock()
        (a @ a)[0, 0].item()
        times.append(clock() - start)
    return 2 * side**3 / min(times)


def rows_asked_for(bench: Bench, arguments: argparse.Namespace) -> Iterator[Row]:
    sizes = {
        "text": arguments.text_batch_sizes,
        "image": arguments.image_batch_sizes,
        "evaluation": arguments.eval_batch_sizes,
    }
    for stage in arguments.stages:
        for cross in (False, True) if arguments.cross_attention else (False,):
            for way in arguments.ways:
                # The published code has no cross-attention, Stage 1 alone has frozen features, evaluation no gradient.
                if (way == "plain" and cross) or (way == "same" and stage != "text"):
                    continue
                if way == "checkpointed" and stage == "evaluation":
                    continue
                for size in sizes[stage]:
                    yield Row(stage, way, cross, size, bench.step(stage, way, cross, size))


def run(arguments: argparse.Namespace) -> list[Row]:
    """All rows asked for, measured."""
    device = check_device(arguments.device, "fp32", arguments.tf32).partition(":")[0]
    if any(way.endswith("compiled") for way in arguments.ways):
        check_compiler(device)
    bench = Bench(device, arguments.tiny, arguments.img_size)
    bench.check_losses()
    rows = list(rows_asked_for(bench, arguments))
    for row in rows if arguments.warm_up else ():
        with nullcontext() if row.way.endswith("compiled") else FlopCounterMode(display=False) as counter:
            row.step()
        row.flops = counter.get_total_flops() if counter else 0
    for _ in range(arguments.repeats):
        for row in rows:
            measure(row, device)
    print(f"{device_name(device)}, torch {torch.__version__}, median of {arguments.repeats}")
    speeds = {name: product_speed(device, name) for name in sorted({row.precision for row in rows})}
    said = ", ".join(f"{name} {speed / 1e12:.3f}" for name, speed in speeds.items())
    print(f"a large matrix product, TFLOP/s: {said}\n")
    print(table(bench, rows, speeds))
    return rows


def table(bench: Bench, rows: Sequence[Row], speeds: dict[str, float]) -> str:
    """A row of figures for each way; the ratio is to the plain step of the same stage and batch.

    On the CPU both shares are of processor time.
    """
    cpu = bench.device == "cpu"
    cost = {id(row): statistics.median(row.processor if cpu else row.seconds) for row in rows}
    plain = {(row.stage, row.batch): cost[id(row)] for row in rows if row.way == "plain"}
    lines = []
    for row in rows:
        seconds = statistics.median(row.seconds)
        analytic = bench.analytic_flops(row.stage, row.way, row.cross, row.batch)
        whole = plain.get((row.stage, row.batch))
        lines.append(
            [
                row.stage,
                "on" if row.cross else "off",
                row.way,
                str(row.batch),
                f"{seconds:.3f}",
                f"{statistics.median(row.processor):.3f}",
                f"{row.batch / seconds:.3f}",
                f"{row.gib:.2f}",
                f"{row.flops / 1e12:.3f}" if row.flops else "-",
                f"{analytic / 1e12:.3f}",
                f"{100 * analytic / cost[id(row)] / speeds[row.precision]:.0f} %",
                f"{whole / cost[id(row)]:.2f}" if whole else "-",
            ]
        )
    header = [
        "Stage",
        "Cross-attention",
        "Way",
        "Images",
        "Seconds",
        "Processor",
        "Images/s",
        "GiB",
        "Counted TFLOP",
        "Blocks' TFLOP",
        "Share of product",
        "Times plain",
    ]
    return format_table(header, lines)


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tf32", choices=("on", "off"), default="on", help="for fp32 on a GPU")
    parser.add_argument("--img_size", type=int, default=SIZE, help="side of the square images, pixels")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS[:4])
    parser.add_argument("--cross_attention", action="store_true", help="rows with cross-attention too")
    parser.add_argument("--text_batch_sizes", nargs="+", type=int, default=[4], help="images in a step of Stage 1")
    parser.add_argument("--image_batch_sizes", nargs="+", type=int, default=[2], help="images in a step of Stage 2")
    parser.add_argument(
        "--eval_batch_sizes", nargs="+", type=int, default=[1], help="images in a forward of evaluation"
    )
    parser.add_argument("--repeats", type=int, default=3, help="steps of each row that count")
    parser.add_argument(
        "--warm_up", action=argparse.BooleanOptionalAction, default=True, help="a step of each row before, not timed"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny CLIP, to try the benchmark itself")
    return parser.parse_args(given)


if __name__ == "__main__":
    run(parse_arguments())
