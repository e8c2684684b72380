"""The images of few-shot training (`--training_mode few_shot --shot K`)."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest

from dataset.records import Record, natural_key, random_rank
from utils.errors import UserError

logger = logging.getLogger(__name__)


def few_shot(records: Sequence[Record], shot: int, seed: int) -> list[Record]:
    """Choose images of each class, half anomalous (rounded up) and half normal.

    Anomalous images are spread over the defect types, which are the images' folders. If a class has too few of one
    label, the other fills up. The choice depends on the seed and the class's own images alone, and more shots contain
    fewer.

    Args:
        records: The images of all classes.
        shot: Images of each class, at least 1.
        seed: Decides which images are chosen.

    Returns:
        The images in natural order of class and path.

    Raises:
        UserError: `shot` is below 1, or a class has fewer images.
    """
    if shot < 1:
        raise UserError(f"--shot must be at least 1, not {shot}")
    by_class = defaultdict(list)
    for record in records:
        by_class[record.class_name].append(record)
    chosen = [record for name in by_class for record in _choose(name, by_class[name], shot, seed)]
    return sorted(chosen, key=lambda record: (natural_key(record.class_name), natural_key(record.image_path)))


def split_shot(shot: int) -> tuple[int, int]:
    """How many of `shot` images of a class are anomalous, and how many normal, if there are enough of both."""
    return (shot + 1) // 2, shot // 2


def _choose(class_name: str, records: Sequence[Record], shot: int, seed: int) -> list[Record]:
    anomalous = _spread_over_defect_types([r for r in records if r.label], seed)
    normal = _shuffled([r for r in records if not r.label], seed)
    if shot > len(records):
        raise UserError(
            f"--shot {shot}: class {class_name!r} has {len(records)} images ({len(anomalous)} anomalous, "
            f"{len(normal)} normal); lower --shot or use --training_mode full_shot"
        )
    for kind, other, images, wanted in zip(
        ("anomalous", "normal"), ("normal", "anomalous"), (anomalous, normal), split_shot(shot), strict=True
    ):
        if len(images) < wanted:
            logger.info("%s: only %d of %d %s images; %s ones fill up", class_name, len(images), wanted, kind, other)
    return _alternate(anomalous, normal)[:shot]


def _spread_over_defect_types(records: Sequence[Record], seed: int) -> list[Record]:
    """Take one image of each defect type in turn."""
    by_type = defaultdict(list)
    for record in records:
        by_type[record.image_path.rpartition("/")[0]].append(record)
    types = sorted(by_type, key=lambda folder: random_rank(seed, folder))
    return _alternate(*(_shuffled(by_type[folder], seed) for folder in types))


def _shuffled(records: Sequence[Record], seed: int) -> list[Record]:
    return sorted(records, key=lambda record: random_rank(seed, record.image_path))


def _alternate(*sequences: Sequence[Record]) -> list[Record]:
    """The first of each sequence, then the second of each, until all have ended."""
    return [record for group in zip_longest(*sequences) for record in group if record is not None]
