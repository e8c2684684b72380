"""Measure everything that needs a GPU, in at most 11 minutes: `python -m benchmarks.gpu_suite`.

Writes `gpu_suite.json` and `gpu_suite.md` (the tables of docs/benchmarks.md) to `--output_dir` after each measurement,
so that an interrupted run keeps what it has. Each part has a time budget; parts that are skipped or end early are
named.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench_loading import write_images
from benchmarks.bench_metrics import draw_maps, draw_masks, streamed
from benchmarks.bench_vit_l import MODEL, STAGES, Bench, Row, measure
from engine.runtime.device import check_device, device_name
from utils.files import write_text
from utils.reading import read_json_lines, read_table
from utils.text import markdown_table

ROOT = Path(__file__).resolve().parents[1]
MODES = ("plain", "fp32", "tf32", "bf16", "checkpointed", "compiled", "bf16_compiled")
# Images per step: first those of the defaults, in all modes.
FIRST_SIZES = {"text": 4, "image": 2, "evaluation": 8}
MORE_SIZES = (1, 16, 64)
TESTS = ("tests/test_metrics.py", "tests/test_precision.py", "tests/test_waiting.py")
VISA_IMAGES, VISA_CLASSES = 2162, 12
Rows = Iterator[dict[str, Any]]


class Skipped(Exception):
    """A part cannot run here; the message says why."""


@dataclass
class Suite:
    """The options, and what has been measured.

    parts: rows of each part; notes: why a part was skipped or ended early; deadline: of the current part, by
    `time.monotonic`.
    """

    device: str
    tiny: bool
    output: Path
    parts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    deadline: float = 0.0

    def run(self, name: str, part: Callable[[Suite], Rows], seconds: float) -> None:
        """Run a part until it ends or its time is over, and save each row."""
        self.deadline = time.monotonic() + seconds
        rows = self.parts.setdefault(name, [])
        self.notes[name] = "interrupted"
        try:
            for row in part(self):
                rows.append(row)
                self.save()
                if time.monotonic() > self.deadline:
                    self.notes[name] = f"ended after its {seconds:.0f} s"
                    break
            else:
                self.notes[name] = ""
        except Skipped as reason:
            self.notes[name] = f"skipped: {reason}"
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            self.notes[name] = f"failed: {str(error).splitlines()[0]}"
        self.save()
        print(f"{name}: {len(rows)} rows{self.notes[name] and f', {self.notes[name]}'}", flush=True)

    def save(self) -> None:
        """Write both files."""
        facts = {"device": device_name(self.device), "driver": driver(), "torch": torch.__version__}
        content = {**facts, "parts": self.parts, "notes": self.notes}
        write_text(self.output / "gpu_suite.json", json.dumps(content, indent=1) + "\n")
        sections = [", ".join(f"{name} {value}" for name, value in facts.items())]
        for name, rows in self.parts.items():
            note = self.notes[name]
            columns = list(dict.fromkeys(column for row in rows for column in row))
            table = markdown_table(columns, [[cell(row.get(column)) for column in columns] for row in rows])
            sections += [f"## {name}", *filter(None, [note, table if rows else ""])]
        write_text(self.output / "gpu_suite.md", "\n\n".join(sections) + "\n")

    def call(self, *words: str, folder: Path = ROOT) -> str:
        """Run Python with these arguments in `folder` until the part's deadline, and return what it prints."""
        result = subprocess.run(
            [sys.executable, *words],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=max(1.0, self.deadline - time.monotonic()),
            check=False,
        )
        if result.returncode:
            raise RuntimeError((result.stderr or result.stdout).strip().splitlines()[-1])
        return result.stdout


def cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def driver() -> str:
    """The version of NVIDIA's driver."""
    program = shutil.which("nvidia-smi")
    command = [str(program), "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.check_output(command, text=True).splitlines()[0] if program else "none"


def gpu_tests(suite: Suite) -> Rows:
    """The tests that need a GPU, with those of the same files that do not."""
    options = ["-q", "-p", "no:cacheprovider", *(["--collect-only"] if suite.tiny else [])]
    yield {"tests": suite.call("-m", "pytest", *options, *TESTS).strip().splitlines()[-1]}


def steps(suite: Suite) -> Rows:
    """A step of both stages and of evaluation in all modes, from few images to many."""
    bench = Bench(suite.device, suite.tiny)
    peak = product_rate(suite.device, 256 if suite.tiny else 8192)
    flops: dict[tuple[str, int], int] = {}
    plain: dict[tuple[str, int], float] = {}
    sizes = [FIRST_SIZES, *(dict.fromkeys(STAGES, size) for size in (() if suite.tiny else MORE_SIZES))]
    compiles = not suite.tiny and suite.device == "cuda"
    for by_stage, stage, mode in product(sizes, STAGES, MODES):
        compiled = mode.endswith("compiled")
        if (compiled and (not compiles or by_stage is not FIRST_SIZES)) or (mode, stage) == ("checkpointed", STAGES[2]):
            continue
        size = by_stage[stage]
        torch.set_float32_matmul_precision("high" if mode == "tf32" else "highest")
        row = Row(stage, mode, size, bench.step(stage, "fp32" if mode == "tf32" else mode, size))
        result: dict[str, Any] = {"stage": stage, "mode": mode, "images": size}
        try:
            if mode == "fp32":
                with FlopCounterMode(display=False) as counter:
                    row.step()
                flops[stage, size] = counter.get_total_flops()
            for _ in range(4):  # the first one is a warm-up
                measure(row, suite.device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            yield {**result, "seconds": "out of memory"}
            continue
        seconds = statistics.median(row.seconds[1:])
        if mode == "plain":
            plain[stage, size] = seconds
        work, base = flops.get((stage, size), 0) / seconds, plain.get((stage, size))
        result |= {"seconds": seconds, "images/s": size / seconds, "times plain": base and base / seconds}
        result["GiB"] = row.gib
        yield {**result, "TFLOP/s": work / 1e12 or None, "share of bf16 product rate": work / peak or None}


def product_rate(device: str, side: int) -> float:
    """Operations per second of a large bf16 matrix product."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    row = Row("", "", 1, lambda: [left @ right for _ in range(10)])
    for _ in range(4):
        measure(row, device)
    return 10 * 2 * side**3 / min(row.seconds)


def largest_batches(suite: Suite) -> Rows:
    """The largest batch in 24 and 80 GB, predicted from two sizes and then tried."""
    if suite.device != "cuda":
        raise Skipped("needs a GPU")
    bench, total = Bench(suite.device, suite.tiny), torch.cuda.get_device_properties(0).total_memory
    for stage, mode in product(STAGES, ("bf16", "checkpointed")):
        if (stage, mode) == (STAGES[2], "checkpointed"):
            continue
        few, more = (_peak(bench, stage, mode, size) for size in (2, 6))
        for limit in (24e9, 80e9):
            images = int((limit - few) / max(1.0, (more - few) / 4)) + 2
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
            while images and _peak(bench, stage, mode, images) == float("inf"):
                images = int(0.95 * images)
            torch.cuda.set_per_process_memory_fraction(1.0)
            yield {"stage": stage, "mode": mode, "GB": limit / 1e9, "largest batch": images}


def _peak(bench: Bench, stage: str, mode: str, size: int) -> float:
    """Bytes that a step reserves; infinite if they do not fit."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        bench.step(stage, mode, size)()
    except torch.OutOfMemoryError:
        return float("inf")
    return float(torch.cuda.max_memory_reserved())


def epochs(suite: Suite) -> Rows:
    """One epoch of both stages on as many random images as VisA has, with several numbers of workers."""
    model = ["--model_name", "toy"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not suite.tiny:
            file = folder / "clip.pt"
            torch.save(open_clip.create_model(MODEL, pretrained=None).state_dict(), file)
            model = ["--model_name", MODEL, "--clip_weights", str(file)]
        write_dataset(folder / "images", 24 if suite.tiny else VISA_IMAGES, (400, 300) if suite.tiny else (1500, 1000))
        for workers in (0,) if suite.tiny else (2, 4, 8, 16):
            run = folder / f"run_{workers}"
            data = ["--dataset", str(folder / "images"), "--training_mode", "full_shot", "--save_path", str(run)]
            length = ["--text_epoch", "1", "--image_epoch", "1", "--num_workers", str(workers)]
            suite.call("train.py", *model, *data, *length, "--device", suite.device, folder=ROOT)
            rates = {row["stage"]: row["images_per_second"] for _, row in read_json_lines(run / "history.jsonl")}
            yield {"workers": workers, **{f"{stage}, images/s": rate for stage, rate in rates.items()}}


def write_dataset(folder: Path, count: int, size: tuple[int, int]) -> None:
    """A dataset in MVTec's layout whose images are links to 16 files."""
    source = folder.parent / "source"
    records = write_images(source, size, "jpg", 16)
    for index in range(count):
        record, part = records[index % len(records)], folder / f"part{index // 2 % VISA_CLASSES}"
        for file, target in (
            (record.image_path, f"test/{'bad' if record.mask_path else 'good'}/{index}.jpg"),
            (record.mask_path, f"ground_truth/bad/{index}_mask.png"),
        ):
            if file:
                (part / target).parent.mkdir(parents=True, exist_ok=True)
                os.link(source / file, part / target)


def pixel_counting(suite: Suite) -> Rows:
    """Seconds of all metrics of one VisA class, on the GPU and on the CPU."""
    count, side = (4, 64) if suite.tiny else (200, 518)
    generator = torch.Generator().manual_seed(0)
    masks = draw_masks(count, side, generator)
    maps = draw_maps(masks, generator)
    for device in dict.fromkeys((suite.device, "cpu")):
        row = Row("", "", count, partial(streamed, maps.to(device), masks, 8))
        for _ in range(2):
            measure(row, device)
        yield {"device": device, "images": count, "seconds": row.seconds[1]}


def onnx(suite: Suite) -> Rows:
    """Milliseconds per image of the exported toy model, with each provider of onnxruntime."""
    try:
        import onnxruntime
    except ImportError:
        raise Skipped("onnxruntime is not installed") from None
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise Skipped("onnxruntime has no CUDA provider")
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "model.onnx"
        suite.call("export.py", "--checkpoint", "none", "--model_name", "toy", "--output", str(file))
        image = torch.randint(0, 256, (1, 512, 512, 3), dtype=torch.uint8).numpy()
        for provider in ("CUDAExecutionProvider", "CPUExecutionProvider"):
            session = onnxruntime.InferenceSession(file, providers=[provider])
            row = Row("", "", 1, partial(session.run, None, {"images": image}))
            for _ in range(30):
                measure(row, "cpu")
            yield {"provider": provider, "ms": 1000 * statistics.median(row.seconds)}


def demo(suite: Suite) -> Rows:
    """The demo on this device, next to the figures in docs/results/demo.csv."""
    if suite.tiny:
        raise Skipped("takes minutes on a CPU")
    with tempfile.TemporaryDirectory() as name:
        suite.call("-m", "engine.cli.demo", folder=Path(name))
        (file,) = Path(name).rglob("comparison.csv")
        here = [row for _, row in read_table(file) if row["class"] == "average"]
        expected = [row for _, row in read_table(ROOT / "docs" / "results" / "demo.csv")]
        for row, known in zip(here, expected, strict=True):
            values = {name: float(row[name]) for name in ("pixel_ap", "image_auroc")}
            yield {"model": row["model"], **values, **{f"{name}, CPU": float(known[name]) for name in values}}


# The parts in order of importance, with their seconds.
PARTS: dict[str, tuple[Callable[[Suite], Rows], float]] = {
    "GPU tests": (gpu_tests, 100),
    "Steps": (steps, 200),
    "One epoch": (epochs, 130),
    "Largest batch": (largest_batches, 60),
    "Pixel metrics": (pixel_counting, 20),
    "Demo": (demo, 110),
    "ONNX": (onnx, 40),
}


def main(arguments: Sequence[str] | None = None) -> Suite:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gpu_suite"), help="folder of both files")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to run")
    parser.add_argument("--tiny", action="store_true", help="toy model and few images, to test the suite on a CPU")
    options = parser.parse_args(arguments)
    device = check_device(options.device).partition(":")[0]
    suite = Suite(device, options.tiny, options.output_dir)
    for name in options.parts:
        suite.run(name, *PARTS[name])
    print(f"Written: {options.output_dir / 'gpu_suite.md'}")
    return suite


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the parts that were measured are kept")
