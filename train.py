"""Train the base method: text adapters (Stage 1), then image adapters (Stage 2), on a frozen CLIP."""

from engine.cli.runner import Script
from engine.config.training import BaseConfig

script = Script(__doc__, BaseConfig, "engine.training.base.train_base", shared=True)

if __name__ == "__main__":
    script.run()
