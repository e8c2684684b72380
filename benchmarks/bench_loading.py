"""Images per second that one process reads and resizes, each with its mask, for several kinds of files.

The pictures are smooth noise with some grain; their files have about the size of photographs. Processor time is
measured, since other work on the machine disturbs it less than elapsed time.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from dataset.images import read_pair, resize_image, resize_mask
from dataset.records import Record
from engine.runtime.device import device_name

SIZES = ((1500, 1000), (900, 900))
ENDINGS: dict[str, dict[str, int]] = {"jpg": {"quality": 92}, "png": {}}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="different images of each kind, half of them with a mask")
    parser.add_argument("--repeats", type=int, default=5, help="times that each image is read")
    parser.add_argument("--img_size", type=int, default=518, help="side of the resized images in pixels")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    print(f"{device_name('cpu')}, {arguments.img_size} px\n")
    print("| file | MB | images/s |\n|---|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            for ending in ENDINGS:
                subfolder = Path(folder) / f"{size[0]}x{size[1]}_{ending}"
                records = write_images(subfolder, size, ending, arguments.images)
                megabytes = statistics.mean((subfolder / record.image_path).stat().st_size for record in records) / 1e6
                seconds = statistics.median(timed(subfolder, records, arguments.img_size, arguments.repeats))
                print(f"| {size[0]} x {size[1]} {ending.upper()} | {megabytes:.2f} | {1 / seconds:.0f} |", flush=True)


def timed(root: Path, records: list[Record], img_size: int, repeats: int) -> list[float]:
    """Seconds of processor time for each record, after every image has been read once."""
    seconds = []
    for repeat in range(repeats + 1):
        for record in records:
            start = time.process_time()
            image, mask = read_pair(root, record)
            resize_image(image, (img_size, img_size))
            resize_mask(mask, (img_size, img_size))
            if repeat:
                seconds.append(time.process_time() - start)
    return seconds


def write_images(folder: Path, size: tuple[int, int], ending: str, count: int) -> list[Record]:
    """Write `count` images of a size (width, height), every second one with a mask."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    shapes, grain = (noise(rng, size, sigma) for sigma in (12, 1))
    records = []
    for index in range(count):
        # One image, shifted, because its content determines the decoding time.
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
