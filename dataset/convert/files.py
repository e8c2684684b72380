"""Write the images of a source as a dataset in MVTec's layout."""

from __future__ import annotations

import filecmp
import io
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.conventions import is_image_name, is_normal_name
from dataset.convert.arguments import ConversionArguments
from dataset.convert.items import ANOMALOUS, Item, Outlines
from dataset.convert.sources import read_source
from dataset.images import read_image, read_mask
from utils.errors import UserError
from utils.files import check_folder, replacing
from utils.logging import progress_bar
from utils.paths import safe_name
from utils.text import format_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """A file to make: `target` is the file `source`, or a PNG drawn from `outlines` or from the pixels of `source`."""

    target: Path
    source: Path
    is_mask: bool = False
    outlines: Outlines | None = None

    @property
    def is_drawn(self) -> bool:
        """Whether the file is a new PNG: images need an extension."""
        return self.outlines is not None or not is_image_name(self.source)

    def content(self) -> bytes:
        """The bytes of a drawn file."""
        if self.outlines is not None:
            image = self.outlines.draw(self.source)
        else:
            image = read_mask(self.source) if self.is_mask else read_image(self.source)
        content = io.BytesIO()
        image.save(content, format="PNG")
        return content.getvalue()

    def is_done(self) -> bool:
        """Whether the file exists with this content; `UserError` if another file has its name."""
        if not os.path.lexists(self.target):
            return False
        if self.target.is_file():
            if self.is_drawn and self.target.read_bytes() == self.content():
                return True
            if not self.is_drawn and filecmp.cmp(self.target, self.source, shallow=False):
                return True
        raise UserError(f"{self.target} exists already with another content and is not replaced: use another TARGET")


def convert(arguments: ConversionArguments) -> Counter[str]:
    """Write the files of a conversion that do not exist yet.

    Args:
        arguments: The arguments of `python -m dataset.convert`.

    Returns:
        How many files were linked, copied or written, and how many existed already.

    Raises:
        UserError: The source cannot be read, or another file has the name of one to write; then nothing is written.
    """
    kind, items = read_source(arguments)
    if not items:
        raise UserError(f"{arguments.source}: no images in it")
    check_folder(arguments.target, "TARGET")
    steps = list(plan(items, arguments.target))
    done = {step for step in steps if step.is_done()}
    for step in steps:
        if step.is_drawn and step not in done:
            step.content()  # raises for unreadable images before anything is written
    counts: Counter[str] = Counter()
    link = not arguments.copy
    bar = progress_bar(len(steps), "converting")
    for step in steps:
        bar.update()
        way = "existing" if step in done else make(step, link)
        if link and way == "copied":
            link = False
            logger.info("Images cannot be linked to %s and are copied", arguments.target)
        counts[way] += 1
    bar.close()
    log_summary(kind, items, counts, arguments.target)
    return counts


def plan(items: Sequence[Item], target: Path) -> Iterator[Step]:
    """The files of a dataset in MVTec's layout; images of the same name in one folder get different stems."""
    stems: set[str] = set()
    labels: dict[str, int] = {}
    for item in items:
        if labels.setdefault(os.path.realpath(item.image), item.label) != item.label:
            raise UserError(f"{item.image} is both normal and anomalous in this source")
    for item in dict.fromkeys(items):
        class_folder, kind = _folder_name(item.class_name), _kind_folder(item)
        if class_folder.lower() == "test":
            raise UserError("a class cannot be called test, which is a folder of MVTec's layout: rename it")
        # In this layout anomalous images are for testing only.
        folder = f"{class_folder}/{'test' if item.label else item.split}/{kind}"
        stem = _free_stem(item.image, folder, stems)
        yield Step(target / folder / f"{stem}{_ending(item.image)}", item.image)
        mask = f"{class_folder}/ground_truth/{kind}/{stem}_mask"
        if not item.label:
            continue
        if isinstance(item.mask, Outlines):
            yield Step(target / f"{mask}.png", item.image, True, item.mask)
        elif item.mask is not None:
            yield Step(target / f"{mask}{_ending(item.mask)}", item.mask, True)


def _folder_name(text: str) -> str:
    """A name of the source as the name of a visible folder."""
    return safe_name(text.strip()).lstrip(".") or "_"


def _kind_folder(item: Item) -> str:
    """The folder of an image's kind; a defect named like normal images gets another name."""
    if not item.label:
        return "good"
    kind = _folder_name(item.kind)
    return f"{kind}_{ANOMALOUS}" if is_normal_name(kind) else kind


def _free_stem(image: Path, folder: str, stems: set[str]) -> str:
    """The image's name without ending; if it is taken in `folder`, with its folder's name, then with a number."""
    stem, number = _folder_name(image.stem), 1
    while f"{folder}/{stem}".casefold() in stems:
        number += 1
        stem = _folder_name(f"{image.parent.name}_{image.stem}" + (f"_{number}" if number > 2 else ""))
    stems.add(f"{folder}/{stem}".casefold())
    return stem


def _ending(file: Path) -> str:
    return file.suffix if is_image_name(file) else ".png"


def make(step: Step, link: bool) -> str:
    """Make a file; returns "linked", "copied" or "written"."""
    with replacing(step.target) as temporary:
        if step.is_drawn:
            temporary.write_bytes(step.content())
            return "written"
        if link:
            try:
                # A link to the file itself: a symbolic link may break later.
                temporary.hardlink_to(step.source.resolve())
                return "linked"
            except (OSError, NotImplementedError):  # another device, or a file system without links
                temporary.unlink(missing_ok=True)
        shutil.copyfile(step.source, temporary)
    return "copied"


def log_summary(kind: str, items: Sequence[Item], counts: Counter[str], target: Path) -> None:
    """Log the images of each class, the files made, and how to use the dataset."""
    rows = []
    for class_name in dict.fromkeys(item.class_name for item in items):
        own = [item for item in items if item.class_name == class_name]
        training = sum(not item.label and item.split == "train" for item in own)
        anomalous = sum(item.label for item in own)
        masks = sum(item.mask is not None for item in own if item.label)
        numbers = (training, len(own) - anomalous - training, anomalous, masks)
        rows.append([_folder_name(class_name), *map(str, numbers)])
    table = format_table(["Class", "normal for training", "normal", "anomalous", "with mask"], rows)
    logger.info("%d images from %s\n\n%s\n", len(items), kind, table)
    made = ", ".join(f"{count} {way}" for way, count in counts.items())
    logger.info("%d files: %s. Use them with --dataset %s", counts.total(), made, target)
    for file in sorted(target.glob("metadata_test*.jsonl")):
        logger.warning("%s lists the images before this conversion: delete it", file)
