"""What the scripts do before and around their work: early checks, the demo, sharing a model."""

from utils.script import explain_missing_packages

explain_missing_packages()
