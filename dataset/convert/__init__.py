"""Convert images of other layouts to MVTec's layout: `python -m dataset.convert`."""

from dataset.convert.arguments import build_parser

__all__ = ["build_parser"]
