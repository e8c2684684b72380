"""The V1 setting of the feedback script, by the name that older notes use: the V2 script with `--preset v1`."""

from __future__ import annotations

import sys

from train_cross_attention_feedback_v2 import main
from utils.cli import run_script

if __name__ == "__main__":
    run_script(lambda: main(["--preset", "v1", *sys.argv[1:]]))
