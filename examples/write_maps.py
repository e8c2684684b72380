"""Write anomaly maps of another library, which `python -m engine.evaluation.rescore` reads.

`anomalib MODEL.pt` is a model that anomalib exported (it must be trusted: loading it runs its code). `open_clip NAME
TAG` compares windows of the image with two prompts, as WinCLIP does. This file does not need the repository:

    python examples/write_maps.py data/toy_test maps/winclip open_clip ViT-B-16 openai
    python -m engine.evaluation.rescore maps/winclip --dataset toy_test
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
SIDE, WINDOW = 240, 80


def anomalib_maps(paths: list[Path], model: str) -> Iterator[tuple[np.ndarray, float]]:
    """The map (H, W) and the score of each image."""
    from anomalib.deploy import TorchInferencer

    inferencer = TorchInferencer(path=model)
    for result in (inferencer.predict(image=path) for path in paths):
        yield np.asarray(result.anomaly_map), float(result.pred_score)


def open_clip_maps(paths: list[Path], name: str, pretrained: str) -> Iterator[tuple[np.ndarray, float]]:
    """As `anomalib_maps`, from the image and 25 windows of a third of its side."""
    import open_clip
    import torch

    clip, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained)
    clip.eval()
    prompts = open_clip.get_tokenizer(name)(["a photo of a flawless object", "a photo of a damaged object"])
    with torch.inference_mode():
        anchors = clip.encode_text(prompts, normalize=True)
    windows = [(x, y, x + WINDOW, y + WINDOW) for y in range(0, 161, 40) for x in range(0, 161, 40)]
    for path in paths:
        image = Image.open(path).convert("RGB").resize((SIDE, SIDE))
        crops = torch.stack([preprocess(crop) for crop in (image, *map(image.crop, windows))])
        with torch.inference_mode():
            features = clip.encode_image(crops, normalize=True)
            whole, *parts = (100 * features @ anchors.T).softmax(dim=1)[:, 1].tolist()
        total, count = np.zeros((SIDE, SIDE)), np.zeros((SIDE, SIDE))
        for (left, top, right, bottom), score in zip(windows, parts, strict=True):
            total[top:bottom, left:right] += score
            count[top:bottom, left:right] += 1
        yield total / count, (whole + max(parts)) / 2


LIBRARIES = {"anomalib": anomalib_maps, "open_clip": open_clip_maps}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of a dataset")
    parser.add_argument("maps", type=Path, help="folder for the maps and scores.csv")
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("model", nargs="+", help="MODEL.pt for anomalib, NAME TAG for open_clip")
    options = parser.parse_args(arguments)
    files = [path for path in sorted(options.images.rglob("*")) if path.suffix.lower() in ENDINGS]
    paths = [path for path in files if not {"train", "ground_truth"} & set(path.relative_to(options.images).parts)]
    rows: list[tuple[object, ...]] = [("path", "score")]
    for path, (anomaly_map, score) in zip(paths, LIBRARIES[options.library](paths, *options.model), strict=True):
        name = path.relative_to(options.images)
        (options.maps / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(options.maps / f"{name}.npy", anomaly_map.astype(np.float32))
        rows.append((name.as_posix(), score))
    with (options.maps / "scores.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main()
