"""Export a checkpoint as one file for one class, ONNX or a torch program, that runs without this repository."""

from engine.cli.runner import Script
from engine.config.tools import ExportArguments

script = Script(__doc__, ExportArguments, "engine.export.export.export_checkpoint")

if __name__ == "__main__":
    script.run()
