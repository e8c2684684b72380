"""Bring images into MVTec's layout: a list in JSON lines, COCO annotations, VisA's folders, or two folders.

Nothing is overwritten, and nothing is written before all of SOURCE has been understood.
"""

from __future__ import annotations

import filecmp
import io
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

from PIL import Image

from dataset.folders import IMAGE_ENDINGS
from dataset.images import read_image, read_mask
from dataset.layouts import NORMAL
from dataset.sources import ANOMALOUS, Asked, Item, Outlines, read_source
from utils.arguments import Arguments, make_parser
from utils.cli import Parser
from utils.errors import UserError
from utils.fields import setting
from utils.files import check_folder, replacing
from utils.logging import progress_bar, set_up_logging
from utils.paths import safe_name
from utils.script import run_script
from utils.tables import format_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ConversionArguments(Arguments):
    """Arguments of `python -m dataset.convert`."""

    source: Path = setting(
        MISSING,
        "list in JSON lines, meta.json, COCO file, VisA's folder, or folder of folders",
        "what to do",
        word=True,
    )
    target: Path = setting(MISSING, "folder of the dataset in MVTec's layout, new or not", "what to do", word=True)
    images: Path | None = setting(
        None, "folder that the paths in a list or COCO file are relative to", "data", unset="the file's own"
    )
    class_name: str | None = setting(
        None, "class of the images where SOURCE names none", "data", unset="the folder's name, or object"
    )
    normal: Path | None = setting(
        None, "folder in SOURCE with normal images", "data", unset="the one called good, ok or normal"
    )
    anomalous: Path | None = setting(
        None, "folder in SOURCE with anomalous images", "data", unset="all others, each a kind of defect"
    )
    copy: bool = setting(False, "copy images; without it they are linked, so that no space is taken", "output")


@dataclass(frozen=True)
class Step:
    """A file to make: `target` from the image `source`, as it is, or as PNG from `outlines` or from its pixels."""

    target: Path
    source: Path
    is_mask: bool = False
    outlines: Outlines | None = None

    @property
    def is_drawn(self) -> bool:
        """Whether it is written anew: this layout's files are known by their endings, and not every format has one."""
        return self.outlines is not None or self.source.suffix.lower() not in IMAGE_ENDINGS

    def content(self) -> bytes:
        """What is written where it is not a file as it is."""
        if self.outlines is not None:
            picture: Image.Image = self.outlines.draw(self.source)
        else:
            picture = read_mask(self.source) if self.is_mask else read_image(self.source)
        content = io.BytesIO()
        picture.save(content, format="PNG")
        return content.getvalue()

    def is_done(self) -> bool:
        """Whether the file is there with just this content."""
        if not self.target.is_file():
            return False
        if self.is_drawn:
            return self.target.read_bytes() == self.content()
        return self.target.samefile(self.source) or filecmp.cmp(self.target, self.source, shallow=False)


def convert(arguments: ConversionArguments) -> Counter[str]:
    """Make the files of a conversion that are not there yet; returns how many were made in which way.

    Raises `UserError` for a source that is not understood, and where another file is in the place of one to be made;
    then nothing is written.
    """
    source, target = arguments.source, arguments.target
    asked = Asked(arguments.images, arguments.class_name, arguments.normal, arguments.anomalous, target)
    what, items = read_source(source, asked)
    if not items:
        raise UserError(f"{source}: no images in it")
    check_folder(target, "TARGET")
    steps = list(plan(items, target))
    done = {step for step in steps if os.path.lexists(step.target) and is_free(step)}
    for step in steps:
        if step.is_drawn and step not in done:
            step.content()  # refuses what cannot be read, before anything is written
    counts: Counter[str] = Counter()
    linking = not arguments.copy
    bar = progress_bar(len(steps), "converting")
    for step in steps:
        bar.update()
        way = "there already" if step in done else make(step, linking)
        if linking and way == "copied":
            linking = False
            logger.info("Images cannot be linked to %s from where they are: they are copied", target)
        counts[way] += 1
    bar.close()
    summarise(what, items, counts, target)
    return counts


def plan(items: Sequence[Item], target: Path) -> Iterator[Step]:
    """The files of a dataset in MVTec's layout; each image and its mask have a stem of their own in their folder."""
    taken: set[str] = set()
    labels: dict[str, int] = {}
    for item in items:
        place = os.path.realpath(item.image)
        if labels.setdefault(place, item.label) != item.label:
            raise UserError(f"{item.image} is both normal and anomalous in this source")
    for item in dict.fromkeys(items):
        class_folder, kind = folder_name(item.class_name), kind_name(item)
        if class_folder.lower() == "test":
            raise UserError("a class cannot be called test, which is a folder of MVTec's layout: rename it")
        # Anomalous images are for testing alone in this layout.
        folder = f"{class_folder}/{'test' if item.label else item.split}/{kind}"
        stem = free_stem(item.image, folder, taken)
        yield Step(target / folder / f"{stem}{ending(item.image)}", item.image)
        mask = f"{class_folder}/ground_truth/{kind}/{stem}_mask"
        if isinstance(item.mask, Outlines):
            yield Step(target / f"{mask}.png", item.image, True, item.mask)
        elif item.mask is not None:
            yield Step(target / f"{mask}{ending(item.mask)}", item.mask, True)


def folder_name(text: str) -> str:
    """A name of the source as a folder's, which is not a hidden one."""
    return safe_name(text.strip()).lstrip(".") or "_"


def kind_name(item: Item) -> str:
    """The folder of an image's kind; a defect whose name means that there is none gets another."""
    if not item.label:
        return NORMAL[0]
    kind = folder_name(item.kind)
    return f"{kind}_{ANOMALOUS}" if kind.lower() in NORMAL else kind


def free_stem(image: Path, folder: str, taken: set[str]) -> str:
    """The image's name without ending, with its folder's name or a number where another one in `folder` has it."""
    stem, number = folder_name(image.stem), 1
    while f"{folder}/{stem}".casefold() in taken:
        number += 1
        stem = folder_name(f"{image.parent.name}_{image.stem}" + (f"_{number}" if number > 2 else ""))
    taken.add(f"{folder}/{stem}".casefold())
    return stem


def ending(file: Path) -> str:
    return file.suffix if file.suffix.lower() in IMAGE_ENDINGS else ".png"


def is_free(step: Step) -> bool:
    """True where a step is done; `UserError` where something else has its place."""
    if not step.is_done():
        raise UserError(f"{step.target} is there already, with another content, and is kept: give another TARGET")
    return True


def make(step: Step, linking: bool) -> str:
    """Make a file; returns how it was made: linked, copied, or written."""
    if step.is_drawn:
        with replacing(step.target) as temporary:
            temporary.write_bytes(step.content())
        return "written"
    with replacing(step.target) as temporary:
        if linking:
            try:
                # The file itself, not a link to it, which may lead nowhere later.
                temporary.hardlink_to(step.source.resolve())
                return "linked"
            except (OSError, NotImplementedError):  # another device, or a file system without links
                temporary.unlink(missing_ok=True)
        shutil.copyfile(step.source, temporary)
    return "copied"


def summarise(what: str, items: Sequence[Item], counts: Counter[str], target: Path) -> None:
    """Say what was found, class by class, what was made, and how to go on."""
    rows = []
    for class_name in dict.fromkeys(item.class_name for item in items):
        own = [item for item in items if item.class_name == class_name]
        training = sum(not item.label and item.split == "train" for item in own)
        anomalous = sum(item.label for item in own)
        masks = sum(item.mask is not None for item in own if item.label)
        found = (training, len(own) - anomalous - training, anomalous, masks)
        rows.append([folder_name(class_name), *map(str, found)])
    table = format_table(["Class", "normal for training", "normal", "anomalous", "with mask"], rows)
    made = ", ".join(f"{count} {way}" for way, count in counts.items())
    logger.info("%d images from %s\n\n%s\n", len(items), what, table)
    logger.info("%d files: %s. To go on: --dataset %s", counts.total(), made, target)
    for kept in sorted(target.glob("metadata_test*.jsonl")):
        logger.warning("%s lists the images of before: delete it", kept)


def build_parser() -> Parser:
    return make_parser(ConversionArguments, __doc__)


def main() -> None:
    arguments = ConversionArguments.of(**vars(build_parser().parse_args()))
    set_up_logging()
    convert(arguments)


if __name__ == "__main__":
    run_script(main)
