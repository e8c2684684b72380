"""V1 as mended, by the name that older notes use: the V2 script with `--preset v1` and both weights at 0.1.

The unmended V1, at full scale, is `--preset v1_original`.
"""

from __future__ import annotations

from functools import partial

from engine.training.advice import LESS_MEMORY
from train_cross_attention_feedback_v2 import main
from utils.script import run_script

if __name__ == "__main__":
    main_v1 = partial(main, preset="v1", image_cross_attn_weight=0.1, text_cross_attn_weight=0.1)
    run_script(main_v1, LESS_MEMORY, shared=True)
