"""Score images with a file that export.py wrote; needs only onnxruntime, numpy and Pillow.

Prints a line for each image: path, score and, if the file is calibrated, the decision and the boxes of anomalous
regions (left,top,right,bottom in pixels, the worst first). With --output_dir it also writes heatmaps and masks. This
file does not need the repository and can be copied.
"""

import argparse
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps

# The turbo colour map, from 0 to 1.
COLOURS = np.frombuffer(
    bytes.fromhex(
        "30123b4040a2466be34294ff28bceb18ddc232f2986dfe62a4fc3ccdec34eecf3afdac34fb7e21eb500ed02f05a916017a0403"
    ),
    np.uint8,
).reshape(-1, 3)


def read(path: Path) -> np.ndarray:
    """An image as uint8 RGB (1, H, W, 3), rotated according to its EXIF tag, without transparency.

    Values above 255 are taken as 16-bit, floats up to 1 as the range 0 to 1.
    """
    # An open file, not its name, and loaded before it is rotated: otherwise Pillow also rotates a TIFF.
    with path.open("rb") as file, Image.open(file) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 65535):  # also for NaN
            raise ValueError(f"has values from {values.min():g} to {values.max():g}: convert it to 8 or 16 bits")
        scale = 1 / 257 if values.max() > 255 else 255 if image.mode == "F" and values.max() <= 1 else 1
        image = Image.fromarray(np.rint(values * scale).astype(np.uint8))
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))[None]


def images_in(paths: list[Path], excluded: Path | None) -> list[Path]:
    """The files among `paths`, and the images in its folders and below, without those in the folder `excluded`."""
    endings = Image.registered_extensions()
    files: list[Path] = []
    for path in paths:
        below = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in endings and file.is_file()]
        files += [file for file in below if excluded is None or not file.resolve().is_relative_to(excluded.resolve())]
        if not below:
            files.append(path)
    return files


def free_stem(path: Path, taken: set[str]) -> str:
    """The image's name without ending; with its folder's name or a number if another image has the same name."""
    stem, number = path.stem, 1
    while stem.casefold() in taken:
        number += 1
        stem = f"{path.resolve().parent.name}_{path.stem}" + (f"_{number}" if number > 2 else "")
    taken.add(stem.casefold())
    return stem


def boxes(mask: np.ndarray, anomaly_map: np.ndarray, size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Boxes of a mask's 8-connected regions, in pixels of an image of `size` (width, height); the worst first."""
    remaining = set(map(tuple, np.argwhere(mask).tolist()))
    scored = []
    while remaining:
        region = [remaining.pop()]
        for row, column in region:  # grows in the loop
            near = {(row + down, column + across) for down in (-1, 0, 1) for across in (-1, 0, 1)} & remaining
            remaining -= near
            region += near
        rows, columns = np.array(region).T
        across, down = size[0] / mask.shape[1], size[1] / mask.shape[0]
        first = (math.floor(columns.min() * across), math.floor(rows.min() * down))
        last = (math.ceil((columns.max() + 1) * across), math.ceil((rows.max() + 1) * down))
        scored.append((anomaly_map[rows, columns].max(), (*first, *last)))
    return [box for _, box in sorted(scored, key=lambda item: -item[0])]


def coloured(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as colours (..., 3), from blue to red."""
    positions = np.linspace(0, 1, len(COLOURS))
    return np.stack([np.interp(values, positions, channel) for channel in COLOURS.T], axis=-1)


def overlay(image: np.ndarray, anomaly_map: np.ndarray) -> Image.Image:
    """The image (H, W, 3) under its map (S, S), with a colour bar at its right."""
    height, width, _ = image.shape
    enlarged = np.asarray(Image.fromarray(anomaly_map).resize((width, height), Image.Resampling.BILINEAR))
    heat = Image.fromarray((0.5 * image + 0.5 * coloured(enlarged)).astype(np.uint8))
    size = max(10, height // 24)
    picture = Image.new("RGB", (width + 3 * size, height), "white")
    picture.paste(heat)
    scale = np.repeat(np.linspace(1, 0, height)[:, None], size, axis=1)
    picture.paste(Image.fromarray(coloured(scale).astype(np.uint8)), (width + size // 2, 0))
    for label, top in (("1", 0), ("0", height - round(1.3 * size))):
        ImageDraw.Draw(picture).text((width + round(1.8 * size), top), label, fill="black", font_size=size)
    return picture


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="file that export.py wrote")
    parser.add_argument("images", type=Path, nargs="+", help="images of its class, or folders of such, of any size")
    parser.add_argument("--output_dir", type=Path, help="folder for heatmaps and masks")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        session = onnxruntime.InferenceSession(options.model, providers=onnxruntime.get_available_providers())
    except Exception as error:  # onnxruntime raises many types of errors
        print(f"error: {options.model}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    metadata = session.get_modelmeta().custom_metadata_map
    names = [output.name for output in session.get_outputs()]
    if not {"anomaly_map", "pred_score"} <= set(names):
        print(f"error: {options.model}: not a file that export.py wrote", file=sys.stderr)
        return 2
    if options.output_dir is not None:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    print(f"{options.model.name}: {metadata.get('model')} for '{metadata.get('class_name')}'", file=sys.stderr)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    failed = 0
    taken: set[str] = set()
    for path in images_in(options.images, options.output_dir):
        try:
            image = read(path)
        except Exception as error:  # Pillow raises many types of errors for damaged files
            print(f"error: {path}: {' '.join(str(error).split())}", file=sys.stderr)
            failed += 1
            continue
        outputs = dict(zip(names, session.run(names, {"images": image}), strict=True))
        columns = [str(path), f"{outputs['pred_score'][0]:.4f}"]
        if "pred_label" in outputs:
            columns.append("anomalous" if outputs["pred_label"][0] else "normal")
            size = (image.shape[2], image.shape[1])
            regions = boxes(outputs["pred_mask"][0, 0], outputs["anomaly_map"][0, 0], size)
            columns.append(" ".join(",".join(map(str, box)) for box in regions))
        print("\t".join(columns))
        if options.output_dir is not None:
            stem = free_stem(path, taken)
            overlay(image[0], outputs["anomaly_map"][0, 0]).save(options.output_dir / f"{stem}_map.png")
            if "pred_mask" in outputs:
                mask = Image.fromarray(outputs["pred_mask"][0, 0].astype(np.uint8) * 255)
                mask.resize(size, Image.Resampling.NEAREST).save(options.output_dir / f"{stem}_mask.png")
    return 2 if failed else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for paths that the terminal cannot display
    sys.exit(main())
