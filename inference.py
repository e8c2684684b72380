"""Evaluate checkpoints on a dataset, zero-shot, score your own images, or calibrate a decision threshold."""

from engine.cli.runner import Script
from engine.config.evaluation import InferenceArguments

script = Script(__doc__, InferenceArguments, "engine.cli.tasks.run_inference", shared=True)

if __name__ == "__main__":
    script.run()
