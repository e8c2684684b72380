"""Run a script with a pause before each optimizer step: `python -m tests.slowly train.py ...`.

A test that kills a run in the middle must come before its end, however fast the machine and however busy.
"""

import runpy
import sys
import time

from torch.optim.optimizer import register_optimizer_step_pre_hook

PAUSE = 0.1


def main(pause: float = PAUSE) -> None:
    """Run the script that `sys.argv` names."""
    if pause:
        register_optimizer_step_pre_hook(lambda *_: time.sleep(pause))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    del sys.argv[0]
    main()
