"""Images per second that one process reads and resizes: decoded each time, and kept as squares (`--cache_images`).

Pictures are smooth noise with some grain, whose files have about the size of photographs. Four figures for each kind of
file, in one run, interleaved image by image, medians: reading and resizing alone, which the cache is for, and whole
samples without augmentation, with the normalisation that both sides share. Of reading and resizing processor time is
given beside the clock's, since other work on the machine disturbs it less; files lie in the system's memory.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from scipy import ndimage

from dataset.image_cache import ImageCache, open_cache, square_pair
from dataset.records import Record
from dataset.samples import AnomalyDataset
from engine.runtime.device import device_name

SIZES = ((1500, 1000), (900, 900))
ENDINGS = {"jpg": {"quality": 92}, "png": {}}
CLOCKS = {"clock": time.perf_counter, "processor": time.process_time}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="different images of each kind, half of them with a mask")
    parser.add_argument("--repeats", type=int, default=5, help="times that each image is read in each way")
    parser.add_argument("--img_size", type=int, default=518, help="side of the squares in pixels")
    parser.add_argument("--folder", type=Path, help="where to write the images; a temporary folder without it")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    print(f"{device_name('cpu')}, squares of {arguments.img_size}, Pillow's and torch's work on one thread\n")
    print("| file | MB | what | time | decoded, images/s | kept, images/s | ratio |")
    print(f"|---|---:|---|---|{'---:|' * 3}")
    with writable_folder(arguments.folder) as folder:
        for size in SIZES:
            for ending in ENDINGS:
                place = folder / f"{size[0]}x{size[1]}_{ending}"
                records = write_images(place, size, ending, arguments.images)
                megabytes = statistics.mean((place / record.image_path).stat().st_size for record in records) / 1e6
                kept = open_cache(place, records, arguments.img_size, 1e6)
                if kept is None:
                    raise SystemExit(f"{place}: there is no room for the squares")
                for what, ways in (
                    ("reading, resizing", reading(place, records, arguments.img_size, kept)),
                    ("sample", samples(place, records, arguments.img_size, kept)),
                ):
                    seconds = timed(ways, len(records), arguments.repeats)
                    for clock in CLOCKS:
                        decoded, squares = (statistics.median(way[clock]) for way in seconds)
                        row = [f"{size[0]} x {size[1]} {ending.upper()}", f"{megabytes:.2f}", what, clock]
                        row += [f"{1 / decoded:.0f}", f"{1 / squares:.0f}", f"{decoded / squares:.1f}"]
                        print(f"| {' | '.join(row)} |", flush=True)


Ways = tuple[Callable[[int], object], Callable[[int], object]]


def reading(root: Path, records: list[Record], img_size: int, kept: ImageCache) -> Ways:
    """An image and its mask as squares, by index: decoded, and kept."""
    return (
        lambda index: square_pair(root, records[index], img_size),
        lambda index: square_pair(root, records[index], img_size, kept=kept),
    )


def samples(root: Path, records: list[Record], img_size: int, kept: ImageCache) -> Ways:
    """Whole samples without augmentation, by index: decoded, and kept."""
    how = (root, records, img_size, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    return AnomalyDataset(*how).__getitem__, AnomalyDataset(*how, kept=kept).__getitem__


def timed(ways: Ways, count: int, repeats: int) -> list[dict[str, list[float]]]:
    """Seconds of each call of each way by clock, once every image has been read in both."""
    seconds = [{clock: [] for clock in CLOCKS} for _ in ways]
    for repeat in range(repeats + 1):
        for index in range(count):
            for way, found in zip(ways, seconds, strict=True):
                start = {name: clock() for name, clock in CLOCKS.items()}
                way(index)
                for name, clock in CLOCKS.items():
                    if repeat:
                        found[name].append(clock() - start[name])
    return seconds


@contextmanager
def writable_folder(folder: Path | None) -> Iterator[Path]:
    """The folder given, or one that is removed at the end."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def write_images(folder: Path, size: tuple[int, int], ending: str, count: int) -> list[Record]:
    """`count` pictures of a size (width, height), every second one with the mask of a defect."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    shapes, grain = (noise(rng, size, sigma) for sigma in (12, 1))
    records = []
    for index in range(count):
        # One drawing, shifted: what takes time in decoding is its content, not its place.
        values = 128 + 40 * np.roll(shapes, 97 * index, axis=1) + 8 * np.roll(grain, 31 * index, axis=0)
        Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.{ending}", **ENDINGS[ending])
        if index % 2:
            mask = Image.new("L", size)
            mask.paste(255, (100, 100, 300, 260))
            mask.save(folder / f"{index}_mask.png")
        records.append(Record(f"{index}.{ending}", index % 2, "part", f"{index}_mask.png" if index % 2 else None))
    return records


def noise(rng: np.random.Generator, size: tuple[int, int], sigma: float) -> np.ndarray:
    """Smooth noise of variance 1, (height, width, 3)."""
    values = ndimage.gaussian_filter(rng.normal(size=(size[1], size[0], 3)), (sigma, sigma, 0))
    return values / values.std()


if __name__ == "__main__":
    main()
