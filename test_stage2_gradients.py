"""Test whether cross-attention preserves the image adapter's gradient in length and direction (not a pytest module).

Without --checkpoint, the toy model with new adapters is tested, with the cross-attention of train_cross_attention.py.
The exit status is 1 for [CAUTION], a ratio outside 0.8 to 1.25 or a cosine below 0.95, unless --allow is given.
"""

from engine.cli.runner import Script
from engine.config.tools import GradientTest

script = Script(__doc__, GradientTest, "engine.training.gradients.run_gradient_test")

if __name__ == "__main__":
    script.run()
