"""One step of both stages of `train.py` with ViT-L-14-336 at 518 px: seconds, and memory at the peak.

CLIP's weights are random, in a file of open_clip's format, so that the real loading code runs; speed and memory do not
depend on their values. Needs about 2 GB of disk and 10 GiB of memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from utils.files import replacing

ROOT = Path(__file__).resolve().parent.parent
MODEL = "ViT-L-14-336"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_vit_l"), help="weights, images and the run")
    parser.add_argument("--text_batch_size", type=int, default=2, help="images per step of Stage 1")
    parser.add_argument("--image_batch_size", type=int, default=2, help="images per step of Stage 2")
    parser.add_argument("--steps", type=int, default=1, help="steps of each stage")
    parser.add_argument("--device", default="auto", help="handed to train.py")
    parser.add_argument("--precision", default="fp32", help="handed to train.py")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    weights = arguments.folder / "random_vit_l_14_336.safetensors"
    if not weights.is_file():
        write_random_weights(weights)
    count = max(arguments.text_batch_size, arguments.image_batch_size) * arguments.steps
    images = write_images(arguments.folder / f"images_{count}", count)
    run = arguments.folder / f"run_{arguments.device}_{arguments.precision}_{count}"
    command = [
        sys.executable, str(ROOT / "train.py"), "--model_name", MODEL, "--clip_weights", str(weights),
        "--activation", "quick_gelu", "--dataset", str(images), "--training_mode", "full_shot",
        "--text_epoch", "1", "--image_epoch", "1", "--text_batch_size", str(arguments.text_batch_size),
        "--image_batch_size", str(arguments.image_batch_size), "--device", arguments.device,
        "--precision", arguments.precision, "--num_workers", "0", "--tracker", "none", "--save_path", str(run),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    print(f"| stage | steps | images per step | seconds per step | memory, GiB |\n|---|{'---:|' * 4}")
    for line in (run / "history.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        per_step = row["images"] / row["steps"]
        seconds = row["seconds"] / row["steps"]
        print(f"| {row['stage']} | {row['steps']} | {per_step:.0f} | {seconds:.2f} | {row['memory_gib']:.2f} |")


def write_random_weights(path: Path) -> None:
    torch.manual_seed(0)
    clip = open_clip.CLIP(**open_clip.get_model_config(MODEL))
    with replacing(path) as temporary:
        save_file({name: value.contiguous() for name, value in clip.state_dict().items()}, temporary)


def write_images(folder: Path, count: int) -> Path:
    """`count` plain pictures, half of them with a white square as their anomaly, in MVTec's layout."""
    for index in range(count):
        anomalous = index < (count + 1) // 2
        picture = Image.new("RGB", (518, 518), (90, 110, 130))
        if anomalous:
            picture.paste((240, 240, 240), (200, 200, 260, 260))
            mask = Image.new("L", picture.size)
            mask.paste(255, (200, 200, 260, 260))
            place(mask, folder / "plate" / "ground_truth" / "spot" / f"{index:03d}_mask.png")
        place(picture, folder / "plate" / "test" / ("spot" if anomalous else "good") / f"{index:03d}.png")
    return folder


def place(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


if __name__ == "__main__":
    main()
