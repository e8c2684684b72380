"""Compare the loops of a feedback run on a dataset, zero-shot, with each other and with other runs."""

from engine.cli.runner import Script
from engine.config.evaluation import ComparisonArguments

script = Script(__doc__, ComparisonArguments, "engine.report.compare.compare_feedback_loops", shared=True)

if __name__ == "__main__":
    script.run()
