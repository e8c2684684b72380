"""Score images with a file that export.py wrote: onnxruntime, numpy and Pillow are all that it takes.

Prints a line for each image, path, score and, where the file was calibrated, the decision and the boxes of anomalous
regions (left,top,right,bottom in pixels, the worst first); with --output_dir also writes each image under its map, and
its mask. Copy this file wherever it is needed: it imports nothing beside it.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def read(path: Path) -> np.ndarray:
    """An image as the file takes it, uint8 RGB (1, H, W, 3), turned as its EXIF tag says.

    Values beyond 255 mean the range 0 to 65535, floats up to 1 the range 0 to 1; transparency is dropped.
    """
    # An open file, not its name, and loaded before it is turned: Pillow turns a TIFF by itself.
    with path.open("rb") as file, Image.open(file) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        scale = 1 / 257 if values.max() > 255 else 255 if image.mode == "F" and values.max() <= 1 else 1
        image = Image.fromarray(np.rint(values * scale).clip(0, 255).astype(np.uint8))
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))[None]


def free_stem(path: Path, taken: set[str]) -> str:
    """The image's name without ending, with its folder's name or a number where another image has it already."""
    stem, number = path.stem, 1
    while stem.casefold() in taken:
        number += 1
        stem = f"{path.resolve().parent.name}_{path.stem}" + (f"_{number}" if number > 2 else "")
    taken.add(stem.casefold())
    return stem


def enlarged(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map (S, S) in the size (width, height) of its image."""
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BILINEAR))


def boxes(mask: np.ndarray, anomaly_map: np.ndarray, size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Boxes of a mask (S, S): of 8-connected regions, in pixels of an image of `size` (width, height); worst first."""
    left = set(map(tuple, np.argwhere(mask).tolist()))
    found = []
    while left:
        region = [left.pop()]
        for row, column in region:  # which grows meanwhile
            near = {(row + down, column + across) for down in (-1, 0, 1) for across in (-1, 0, 1)} & left
            left -= near
            region += near
        rows, columns = np.array(region).T
        across, down = size[0] / mask.shape[1], size[1] / mask.shape[0]
        first = (math.floor(columns.min() * across), math.floor(rows.min() * down))
        last = (math.ceil((columns.max() + 1) * across), math.ceil((rows.max() + 1) * down))
        found.append((anomaly_map[rows, columns].max(), (*first, *last)))
    return [box for _, box in sorted(found, key=lambda item: -item[0])]


def overlay(image: np.ndarray, anomaly_map: np.ndarray) -> Image.Image:
    """The image (H, W, 3), red where its map (S, S) is high."""
    height, width, _ = image.shape
    share = enlarged(anomaly_map, (width, height))[..., None] * 0.7
    return Image.fromarray(np.rint(image * (1 - share) + np.array([255, 0, 0]) * share).astype(np.uint8))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="file that export.py wrote")
    parser.add_argument("images", type=Path, nargs="+", help="images of its class, of any size")
    parser.add_argument("--output_dir", type=Path, help="folder for the images under their maps, and for masks")
    return parser


def main(words: list[str] | None = None) -> int:
    asked = build_parser().parse_args(words)
    try:
        session = onnxruntime.InferenceSession(asked.model, providers=onnxruntime.get_available_providers())
    except Exception as error:  # onnxruntime has a kind of its own for each thing that can be wrong with a file
        print(f"error: {asked.model}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    about = session.get_modelmeta().custom_metadata_map
    names = [output.name for output in session.get_outputs()]
    if not {"anomaly_map", "pred_score"} <= set(names):
        print(f"error: {asked.model}: is no file that export.py wrote", file=sys.stderr)
        return 2
    if asked.output_dir is not None:
        try:
            asked.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"error: --output_dir {asked.output_dir}: {error.strerror}", file=sys.stderr)
            return 2
    print(f"{asked.model.name}: {about.get('model')} for '{about.get('class_name')}'", file=sys.stderr)
    failed, taken = 0, set()
    for path in asked.images:
        try:
            image = read(path)
        except Exception as error:  # Pillow raises whatever a damaged file makes it stumble over
            print(f"error: {path}: {' '.join(str(error).split())}", file=sys.stderr)
            failed += 1
            continue
        found = dict(zip(names, session.run(names, {"images": image}), strict=True))
        words_of_it = [str(path), f"{found['pred_score'][0]:.4f}"]
        if "pred_label" in found:
            words_of_it.append("anomalous" if found["pred_label"][0] else "normal")
            size = (image.shape[2], image.shape[1])
            regions = boxes(found["pred_mask"][0, 0], found["anomaly_map"][0, 0], size)
            words_of_it.append(" ".join(",".join(map(str, box)) for box in regions))
        print("\t".join(words_of_it))
        if asked.output_dir is not None:
            stem = free_stem(path, taken)
            overlay(image[0], found["anomaly_map"][0, 0]).save(asked.output_dir / f"{stem}_map.png")
            if "pred_mask" in found:
                mask = Image.fromarray(found["pred_mask"][0, 0].astype(np.uint8) * 255)
                mask.resize(size, Image.Resampling.NEAREST).save(asked.output_dir / f"{stem}_mask.png")
    return 2 if failed else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for paths that a terminal has no letters for
    sys.exit(main())
