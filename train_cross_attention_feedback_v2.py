"""Train with feedback: loops of text and image training on one model, each using what the previous one learned."""

from engine.cli.runner import Script
from engine.config.training import FeedbackConfig

script = Script(__doc__, FeedbackConfig, "engine.training.feedback.train_feedback", shared=True)

if __name__ == "__main__":
    script.run()
