"""Convert images of other layouts to MVTec's layout: `python -m dataset.convert`."""

from dataset.convert.arguments import ConversionArguments, build_parser
from dataset.convert.files import convert

__all__ = ["ConversionArguments", "build_parser", "convert"]
