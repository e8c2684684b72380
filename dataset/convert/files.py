"""Write the images of a source as a dataset in MVTec's layout."""

import io
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path

from PIL import Image

from dataset.conventions import is_image_name, is_normal_name
from dataset.convert.arguments import ConversionArguments
from dataset.convert.items import ANOMALOUS, Item, Outlines
from dataset.convert.sources import read_source
from dataset.folders import files_below
from dataset.images import read_image, read_mask
from utils.errors import UserError
from utils.files import check_folder, replacing
from utils.logging import progress_bar
from utils.paths import is_folder, safe_name
from utils.text import format_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """A file to make: `target` is the file `source`, or a PNG of the image that `draw` returns."""

    target: Path
    source: Path
    draw: Callable[[], Image.Image] | None = None

    def content(self) -> bytes | None:
        """The bytes of a drawn file."""
        if self.draw is None:
            return None
        content = io.BytesIO()
        self.draw().save(content, format="PNG")
        return content.getvalue()

    def is_done(self) -> bool:
        """Whether the file exists with this content; `UserError` if it cannot be drawn or another has its name."""
        content = self.content()
        if not os.path.lexists(self.target):
            return False
        if self.target.is_file() and self.target.read_bytes() == (content or self.source.read_bytes()):
            return True
        raise UserError(f"{self.target} exists already with another content and is not replaced: use another TARGET")


def convert(arguments: ConversionArguments) -> Counter[str]:
    """Write the files of a conversion that do not exist yet.

    Args:
        arguments: The arguments of `python -m dataset.convert`.

    Returns:
        How many files were linked, copied or written, and how many existed already.

    Raises:
        UserError: The source cannot be read, or the target holds other files; then nothing is written.
    """
    source_kind, items = read_source(arguments)
    target = arguments.target
    if not items:
        raise UserError(f"{arguments.source}: no images in it")
    check_folder(target, "TARGET")
    steps = list(plan(items, target))
    planned = {step.target for step in steps}
    classes = sorted({target / step.target.relative_to(target).parts[0] for step in steps})
    for file in (file for folder in classes if is_folder(folder) for file in files_below(folder)):
        if file not in planned:
            raise UserError(f"{file} is not of this conversion: use a new folder, or another --class_name")
    done = {step for step in steps if step.is_done()}
    counts: Counter[str] = Counter()
    link = not arguments.copy
    bar = progress_bar(len(steps), "converting")
    for step in steps:
        bar.update()
        way = "existing" if step in done else make(step, link)
        if link and way == "copied":
            link = False
            logger.info("Images cannot be linked to %s and are copied", target)
        counts[way] += 1
    bar.close()
    log_summary(source_kind, items)
    made = ", ".join(f"{count} {way}" for way, count in counts.items())
    logger.info("%d files: %s. Use them with --dataset %s", counts.total(), made, target)
    return counts


def plan(items: Sequence[Item], target: Path) -> Iterator[Step]:
    """The files of a dataset in MVTec's layout; images of the same name in one folder get different stems."""
    stems: set[str] = set()
    labels: dict[str, int] = {}
    for item in dict.fromkeys(items):
        if labels.setdefault(os.path.realpath(item.image), item.label) != item.label:
            raise UserError(f"{item.image} is both normal and anomalous in this source")
        class_folder, kind = _folder_name(item.class_name), _folder_name(item.kind) if item.label else "good"
        if class_folder.lower() == "test":
            raise UserError("a class cannot be called test, which is a folder of MVTec's layout: rename it")
        if item.label and is_normal_name(kind):
            kind = f"{kind}_{ANOMALOUS}"
        # In this layout anomalous images are for testing only.
        folder = f"{class_folder}/{'test' if item.label else item.split}/{kind}"
        stem = _free_stem(item.image, folder, stems)
        yield _step(target / folder / stem, item.image, read_image)
        mask = target / class_folder / "ground_truth" / kind / f"{stem}_mask"
        if item.label and isinstance(item.mask, Outlines):
            yield Step(mask.with_name(f"{mask.name}.png"), item.image, partial(item.mask.draw, item.image))
        elif item.label and isinstance(item.mask, Path):
            yield _step(mask, item.mask, read_mask)


def _step(target: Path, source: Path, read: Callable[[Path], Image.Image]) -> Step:
    """The file itself, under a name that keeps its extension; files without one are read and written as PNG."""
    if is_image_name(source):
        return Step(target.with_name(target.name + source.suffix), source)
    return Step(target.with_name(f"{target.name}.png"), source, partial(read, source))


def _folder_name(text: str) -> str:
    """A name of the source as the name of a visible folder."""
    return safe_name(text.strip()).lstrip(".") or "_"


def _free_stem(image: Path, folder: str, stems: set[str]) -> str:
    """The image's name without ending; if it is taken in `folder`, with its folder's name, then with a number."""
    longer = f"{image.parent.name}_{image.stem}"
    names = map(_folder_name, chain((image.stem, longer), (f"{longer}_{number}" for number in count(3))))
    stem = next(name for name in names if f"{folder}/{name}".casefold() not in stems)
    stems.add(f"{folder}/{stem}".casefold())
    return stem


def make(step: Step, link: bool) -> str:
    """Make a file; returns "linked", "copied" or "written"."""
    with replacing(step.target) as temporary:
        if (content := step.content()) is not None:
            temporary.write_bytes(content)
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


def log_summary(source_kind: str, items: Sequence[Item]) -> None:
    """Log the number of images of each class."""
    rows = []
    for class_name in dict.fromkeys(item.class_name for item in items):
        own = [item for item in items if item.class_name == class_name]
        normal = Counter(item.split for item in own if not item.label)
        masks = sum(item.mask is not None for item in own if item.label)
        numbers = (normal["train"], normal["test"], len(own) - normal.total(), masks)
        rows.append([_folder_name(class_name), *map(str, numbers)])
    table = format_table(["Class", "normal for training", "normal", "anomalous", "with mask"], rows)
    logger.info("%d images from %s\n\n%s\n", len(items), source_kind, table)
