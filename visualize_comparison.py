"""Draw the heatmaps of a base, a cross-attention run and a feedback loop side by side."""

from engine.cli.runner import Script
from engine.config.evaluation import VisualizationArguments

script = Script(__doc__, VisualizationArguments, "engine.evaluation.side_by_side.visualize_comparison")

if __name__ == "__main__":
    script.run()
