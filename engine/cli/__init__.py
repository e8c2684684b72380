"""What the scripts do before and around their work: early checks, the demo, sharing a model."""
