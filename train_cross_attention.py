"""Train cross-attention between the text and image branches, starting from a trained base."""

from engine.cli.runner import Script
from engine.config.training import CrossAttentionRunConfig

script = Script(__doc__, CrossAttentionRunConfig, "engine.training.cross_attention.train_cross_attention", shared=True)

if __name__ == "__main__":
    script.run()
