"""Seconds until scripts answer what needs no model, beside `import torch` alone: medians, interleaved in one run."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from run import COMMANDS as COMMANDS_OF_RUN
from utils.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
TORCH = "import torch"
COMMANDS = {
    TORCH: ["-c", TORCH],
    "train.py --help": ["train.py", "--help"],
    "inference.py --help": ["inference.py", "--help"],
    "train_cross_attention_feedback_v2.py --help": ["train_cross_attention_feedback_v2.py", "--help"],
    "a wrong argument": ["train.py", "--adapter", "none"],
    "an unknown dataset": ["train.py", "--dataset", "nosuch"],
    "a data root that is not there": ["train.py", "--dataset", "MVTec", "--data_root", "nosuch"],
    "a checkpoint that is not there": ["inference.py", "--checkpoint", "nosuch.pth"],
}
(TEST,) = COMMANDS_OF_RUN["test"]
# In an environment that `run.py` made: what it takes until it starts its command is the difference of these two.
IN_PLACE = {
    "run.py test --version": ["run.py", "test", "--version"],
    "the command that it starts": [*TEST, "--version"],
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each (default: %(default)s)")
    rounds = parser.parse_args(arguments).rounds
    commands = COMMANDS | (IN_PLACE if Path(sys.prefix) == ROOT / ".venv" else {})
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name, (first, *rest) in commands.items():
                words = [sys.executable, str(ROOT / first) if first.endswith(".py") else first, *rest]
                start = time.perf_counter()
                subprocess.run(words, cwd=folder, capture_output=True, check=False)
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [[name, f"{value:.2f}", f"{value / medians[TORCH]:.2f}"] for name, value in medians.items()]
    print(markdown_table(["what", "seconds", f"share of `{TORCH}`"], rows))


if __name__ == "__main__":
    main()
