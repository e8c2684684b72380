"""Arguments of `python -m dataset.convert`."""

from dataclasses import MISSING, dataclass
from pathlib import Path

from utils.arguments import Arguments, Parser, make_parser
from utils.fields import POSITIONAL, setting

DESCRIPTION = """Convert images to MVTec's layout.

SOURCE is a list (JSON lines, JSON, meta.json, Real-IAD's, CSV), a file of COCO annotations, or a folder: VisA's, one of
normal and anomalous images, of images and masks, or with files of labelme or YOLO (docs/datasets.md). Nothing is
overwritten, and nothing is written before all of SOURCE has been read.
"""


@dataclass(frozen=True, kw_only=True)
class ConversionArguments(Arguments):
    """Arguments of `python -m dataset.convert`."""

    source: Path = setting(MISSING, "list, COCO file, or folder of images", POSITIONAL)
    target: Path = setting(MISSING, "folder for the dataset in MVTec's layout, new or without the class", POSITIONAL)
    images: Path | None = setting(None, "folder that the paths in a list are relative to", "data", unset="its own")
    class_name: str | None = setting(None, "class, if SOURCE names none", "data", unset="the folder's name, or object")
    normal: str | None = setting(
        None, "folder of normal images, or their label in a list", "data", unset="good, ok, normal and similar"
    )
    anomalous: str | None = setting(None, "folder of anomalous images", "data", unset="all others, each a defect type")
    masks: str | None = setting(None, "folder of masks", "data", unset="by its name, or if its images look like masks")
    copy: bool = setting(False, "copy images; hard links, the default, take no disk space", "output")


def build_parser() -> Parser:
    parser = make_parser(ConversionArguments, DESCRIPTION)
    parser.prog = "python -m dataset.convert"
    return parser
