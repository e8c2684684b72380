"""Time and memory of a training step of both stages, and of evaluation, with ViT-L-14-336, in several variants.

CLIP's weights are random; time and memory do not depend on them. First the losses of `plain`, the step of the published
code (benchmarks/plain_step.py), are compared with those of the same forward pass in this project, on the same weights.
Then all variants take steps in turn, `--repeats` times, after a warm-up step in which the operations are counted.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain_step import PlainModel, parameters_of
from dataset.prompts import build_prompts
from dataset.toy.clip import CONFIG as TOY
from engine.config.training import BaseConfig
from engine.evaluation.evaluate import autocast
from engine.runtime.device import check_compiler, check_device, device_name
from engine.training.stage1 import TextStage
from engine.training.stage2 import ImageStage
from model.adapter import AdaptedCLIP
from model.blocks import BlockRunner
from model.clip import FrozenCLIP
from model.scoring import anomaly_map
from model.text import Prompts
from utils.text import format_table

MODEL, SIZE = "ViT-L-14-336", 518
STAGES = ("text", "image", "evaluation")
# plain: the step of the published code; same: its forward pass in this project; the others: the default forward pass.
VARIANTS = ("plain", "same", "fp32", "checkpointed", "compiled", "bf16", "bf16_compiled")
CLASSES = ("candle", "capsules", "cashew", "chewing gum", "fryum", "macaroni", "circuit board", "pipe fryum")
# The published smoothing, so that both losses treat confident errors equally.
CONFIG = BaseConfig(focal_smoothing=1e-5)
PEAK_MEMORY, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Row:
    """A variant of a step and its measurements.

    Attributes:
        batch: Images per step.
        seconds: Elapsed time of each step.
        processor: Processor time of all threads, which is less affected by other work on the machine.
        gib: Peak memory.
        flops: Operations of a step as torch counts them; 0 if they cannot be counted.
    """

    stage: str
    variant: str
    batch: int
    step: Callable[[], object]
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    gib: float = 0.0
    flops: int = 0


class Bench:
    """An adapted model and its steps."""

    def __init__(self, device: str, tiny: bool) -> None:
        torch.manual_seed(0)
        config = TOY if tiny else open_clip.get_model_config(MODEL)
        vision = config["vision_cfg"] if tiny else {**config["vision_cfg"], "image_size": SIZE}
        module = open_clip.CLIP(**{**config, "vision_cfg": vision, "quick_gelu": True})
        clip = FrozenCLIP(module, MODEL, "quick_gelu")
        self.device, self.clip = device, clip.to(device)
        self.model = AdaptedCLIP(clip, clip.model_config()).to(device)
        texts = [build_prompts(name) for name in CLASSES]
        self.prompts = Prompts.from_texts(clip, texts).to(device)

    def batch(self, size: int) -> dict[str, Any]:
        """Noise images; every second one has a square mask."""
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

    def step(self, stage: str, variant: str, size: int) -> Callable[[], Any]:
        """A function that takes a step without changing weights, and returns the loss, or the maps in evaluation."""
        batch, model = self.batch(size), self.model
        precision = "bf16" if variant.startswith("bf16") else "fp32"
        runner = BlockRunner(variant == "checkpointed", (size,) if variant.endswith("compiled") else ())
        surgery = "sequential" if variant in ("plain", "same") else "dual"
        if variant == "plain":
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
        model = self.model
        plain, masks, rows = PlainModel(model), batch["mask"][:, 0], self.rows_of(batch)
        tokens = F.pad(self.prompts.tokens, (0, self.clip.clip.context_length - self.prompts.tokens.shape[-1]))
        anchors = model.text_side(self.prompts)[rows]

        if stage == "evaluation":
            return torch.no_grad()(lambda: plain.image_features(batch["image"])[0])
        optimizer = torch.optim.Adam(parameters_of(model, [f"{stage}_adapter"]), lr=0.0)

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

        return train

    def check_losses(self) -> None:
        """Raise `SystemExit` if the losses of `plain` and `same` differ."""
        for stage in ("text", "image"):
            plain, same = (self.step(stage, variant, 1)() for variant in ("plain", "same"))
            print(f"{stage} loss: plain {plain:.6f}, same {same:.6f}")
            if abs(plain - same) > 1e-4 * abs(plain):
                raise SystemExit("the losses differ")


def measure(row: Row, device: str) -> None:
    """Take a step, and record its time and peak memory."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    elif RESET_PEAK.exists():
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)  # return the memory that earlier steps have freed
        RESET_PEAK.write_text("5", encoding="ascii")
    start, processor = time.perf_counter(), time.process_time()
    row.step()
    if device == "cuda":
        torch.cuda.synchronize()
    row.seconds.append(time.perf_counter() - start)
    row.processor.append(time.process_time() - processor)
    row.gib = max(row.gib, peak_memory(device))


def peak_memory(device: str) -> float:
    """Peak memory in GiB since the last reset, of the GPU or the process; 0 if the system does not report it."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if not PEAK_MEMORY.exists():
        return 0.0
    lines = PEAK_MEMORY.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def make_rows(bench: Bench, arguments: argparse.Namespace) -> Iterator[Row]:
    for stage, variant in product(arguments.stages, arguments.variants):
        # Only Stage 1 has frozen features, and evaluation has no gradient.
        if stage in {"same": STAGES[1:], "checkpointed": STAGES[2:]}.get(variant, ()):
            continue
        for size in getattr(arguments, f"{stage}_batch_sizes"):
            yield Row(stage, variant, size, bench.step(stage, variant, size))


def run(arguments: argparse.Namespace) -> list[Row]:
    """Measure and print all rows."""
    device = check_device(arguments.device, "fp32").partition(":")[0]
    if any(variant.endswith("compiled") for variant in arguments.variants):
        check_compiler(device)
    bench = Bench(device, arguments.tiny)
    bench.check_losses()
    rows = list(make_rows(bench, arguments))
    for row in rows:
        with nullcontext() if row.variant.endswith("compiled") else FlopCounterMode(display=False) as counter:
            row.step()
        row.flops = counter.get_total_flops() if counter else 0
    for _ in range(arguments.repeats):
        for row in rows:
            measure(row, device)
    print(f"{device_name(device)}, torch {torch.__version__}, median of {arguments.repeats}\n")
    print(table(rows, device))
    return rows


def table(rows: Sequence[Row], device: str) -> str:
    """The medians of all rows; "times plain" is the speed relative to `plain`, on a CPU in processor time."""
    cost = {id(row): statistics.median(row.processor if device == "cpu" else row.seconds) for row in rows}
    plain = {(row.stage, row.batch): cost[id(row)] for row in rows if row.variant == "plain"}
    lines = []
    for row in rows:
        seconds, processor = statistics.median(row.seconds), statistics.median(row.processor)
        base = plain.get((row.stage, row.batch))
        numbers = [f"{value:.3f}" for value in (seconds, processor, row.batch / seconds)]
        flops = f"{row.flops / 1e12:.3f}" if row.flops else "-"
        speed = f"{base / cost[id(row)]:.2f}" if base else "-"
        lines.append([row.stage, row.variant, str(row.batch), *numbers, f"{row.gib:.2f}", flops, speed])
    measured = ["seconds", "processor s", "images/s", "GiB", "TFLOP", "times plain"]
    return format_table(["stage", "variant", "images", *measured], lines)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS[:4])
    parser.add_argument("--text_batch_sizes", nargs="+", type=int, default=[4], help="images per step of Stage 1")
    parser.add_argument("--image_batch_sizes", nargs="+", type=int, default=[2], help="images per step of Stage 2")
    parser.add_argument("--evaluation_batch_sizes", nargs="+", type=int, default=[1], help="images per evaluation step")
    parser.add_argument("--repeats", type=int, default=3, help="measured steps of each variant")
    parser.add_argument("--tiny", action="store_true", help="the toy CLIP, to test the benchmark")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run(parse_arguments())
