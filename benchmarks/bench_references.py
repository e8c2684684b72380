"""What references cost with ViT-L-14-336 at 518 px: a prediction with K normal images remembered, against one without.

Weights are random, and features and memory of real sizes: times do not depend on their values. Both are timed in turn
in one run, and the ratio of medians is given: on a CPU of processor time, which other work disturbs less, on one
thread. Needs about 4 GiB of memory.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import open_clip
import torch

from engine.detector.detector import Detector
from engine.runtime.device import device_name
from model.adapter import AdaptedCLIP
from model.clip import FrozenCLIP
from model.config import REFERENCE_FEATURES

MODEL, SIZE = "ViT-L-14-336", 518


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shots", type=int, nargs="+", default=[4], help="references")
    parser.add_argument("--features", nargs="+", default=[REFERENCE_FEATURES[0]], choices=REFERENCE_FEATURES)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    clock = time.process_time if arguments.device == "cpu" else time.perf_counter
    architecture = open_clip.get_model_config(MODEL)
    architecture["vision_cfg"]["image_size"] = SIZE
    clip = FrozenCLIP(open_clip.CLIP(**architecture, quick_gelu=True), MODEL, "quick_gelu")
    detector = Detector(AdaptedCLIP(clip, clip.model_config()), MODEL).to(arguments.device)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for _ in range(arguments.images)]
    print(f"{device_name(arguments.device)}\n")
    print("| features | references | memory, MiB | zero-shot, s | with references, s | ratio |")
    print(f"|---|{'---:|' * 5}")
    for features in arguments.features:
        # One image many times: what a memory costs is its size.
        detector.remember(images[:1], features=features)
        one = detector.references.pop("object")
        for shots in arguments.shots:
            memory = tuple(level.repeat(shots, 1) for level in one.memory)
            references = type(one)(memory, one.weight, features, one.images)
            seconds: dict[bool, list[float]] = {False: [], True: []}
            for repeat in range(arguments.repeats + 1):
                for image in images if repeat else images[:1]:
                    for compared, found in seconds.items():
                        start = clock()
                        detector.predict(image, references=references if compared else None)
                        if repeat:
                            found.append(clock() - start)
            plain, compared = (statistics.median(found) for found in seconds.values())
            megabytes = sum(level.numel() * level.element_size() for level in memory) / 2**20
            row = [f"{megabytes:.0f}", f"{plain:.3f}", f"{compared:.3f}", f"{compared / plain:.2f}"]
            print(f"| {features} | {shots} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
