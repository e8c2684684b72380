"""Training: the stages, the one training loop, feedback, and going on after a kill."""
