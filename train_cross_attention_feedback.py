"""Train with feedback, version 1: as train_cross_attention_feedback_v2.py with --preset v1, whose weights are 0.1.

The first version without changes, with both weights at 1, is --preset v1_original.
"""

from engine.cli.runner import Script
from engine.config.training import FeedbackConfig

script = Script(
    __doc__, FeedbackConfig, "engine.training.feedback.train_feedback", True, preset="v1", image_cross_attn_weight=0.1
)

if __name__ == "__main__":
    script.run()
