"""Run or resume a study: arms over seeds and datasets, compared with statistics (docs/studies.md)."""

from engine.cli.runner import Script
from engine.config.tools import StudyArguments

script = Script(__doc__, StudyArguments, "engine.study.run.run_study")

if __name__ == "__main__":
    script.run()
