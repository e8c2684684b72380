"""Serve a page in the browser: drop images on it to see their anomalies."""

from engine.cli.runner import Script
from engine.config.tools import AppArguments

script = Script(__doc__, AppArguments, "engine.app.serve.serve")

if __name__ == "__main__":
    script.run()
