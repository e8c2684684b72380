"""The version of this project, as `pyproject.toml` states it."""

import re
from pathlib import Path

# The key of this project among the versions of libraries.
PROJECT = "adapted-clip-anomaly-detection"
PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def project_version() -> str:
    """The version; the project need not be installed."""
    # Python 3.10 has no reader for TOML.
    match = re.search(r'^version = "(.+)"$', PYPROJECT.read_text(encoding="utf-8"), re.MULTILINE)
    return match.group(1) if match else "unknown"
