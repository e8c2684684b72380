"""Write anomaly maps of another library, which `python -m engine.evaluation.rescore` reads.

`anomalib MODEL.pt` is a model that anomalib exported (it must be trusted: loading it runs its code). `open_clip NAME
TAG` compares windows of the image with two prompts, as WinCLIP does. This file does not need the repository:

    python examples/write_maps.py data/toy_test maps/winclip open_clip ViT-B-16 openai
    python -m engine.evaluation.rescore maps/winclip --dataset toy_test
"""

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

# The map (H, W) and the score of an image.
Predictor = Callable[[Path], tuple[np.ndarray, float]]
ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}


def anomalib_predictor(model: str) -> Predictor:
    from anomalib.deploy import TorchInferencer

    inferencer = TorchInferencer(path=model)

    def predict(path: Path) -> tuple[np.ndarray, float]:
        result = inferencer.predict(image=path)
        return np.asarray(result.anomaly_map), float(result.pred_score)

    return predict


def open_clip_predictor(name: str, pretrained: str, windows: int = 5) -> Predictor:
    import open_clip
    import torch

    clip, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained)
    clip.eval()
    prompts = open_clip.get_tokenizer(name)(["a photo of a flawless object", "a photo of a damaged object"])
    with torch.inference_mode():
        anchors = clip.encode_text(prompts, normalize=True)

    def predict(path: Path) -> tuple[np.ndarray, float]:
        image = Image.open(path).convert("RGB").resize((240, 240))
        # Windows of a third of the side, and the whole image.
        corners = [(x, y) for y in np.linspace(0, 160, windows) for x in np.linspace(0, 160, windows)]
        crops = [image, *(image.crop((int(x), int(y), int(x) + 80, int(y) + 80)) for x, y in corners)]
        with torch.inference_mode():
            features = clip.encode_image(torch.stack([preprocess(crop) for crop in crops]), normalize=True)
            whole, *parts = (100 * features @ anchors.T).softmax(dim=1)[:, 1].tolist()
        total, count = np.zeros((240, 240)), np.zeros((240, 240))
        for (x, y), score in zip(corners, parts, strict=True):
            total[int(y) : int(y) + 80, int(x) : int(x) + 80] += score
            count[int(y) : int(y) + 80, int(x) : int(x) + 80] += 1
        return total / count, (whole + max(parts)) / 2

    return predict


PREDICTORS = {"anomalib": anomalib_predictor, "open_clip": open_clip_predictor}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of a dataset")
    parser.add_argument("maps", type=Path, help="folder for the maps and scores.csv")
    parser.add_argument("library", choices=PREDICTORS)
    parser.add_argument("model", nargs="+", help="MODEL.pt for anomalib, NAME TAG for open_clip")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    predict = PREDICTORS[options.library](*options.model)
    rows: list[tuple[object, ...]] = [("path", "score")]
    for path in sorted(options.images.rglob("*")):
        name = path.relative_to(options.images)
        if path.suffix.lower() in ENDINGS and not {"train", "ground_truth"} & set(name.parts):
            anomaly_map, score = predict(path)
            (options.maps / name).parent.mkdir(parents=True, exist_ok=True)
            np.save(options.maps / f"{name}.npy", anomaly_map.astype(np.float32))
            rows.append((name.as_posix(), score))
    with (options.maps / "scores.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main()
