"""The few images per class that few-shot training uses (`--training_mode few_shot --shot K`)."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest

from dataset.records import Record, natural_key
from utils.errors import UserError

logger = logging.getLogger(__name__)


def few_shot(records: Sequence[Record], shot: int, seed: int) -> list[Record]:
    """Choose `shot` images of each class: half anomalous (the extra one too where `shot` is odd), the rest normal.

    Anomalous images are spread over the defect types, which are the images' folders. Where a class has too few of one
    kind the other fills up. The choice depends on the seed and on the class's own images alone, and K shots contain
    the K' shots for every K' <= K. Returned in natural order of class and path.

    Raises UserError for `shot` below 1, and for a class that has fewer images, by name and count.
    """
    if shot < 1:
        raise UserError(f"--shot must be at least 1, not {shot}")
    by_class = defaultdict(list)
    for record in records:
        by_class[record.class_name].append(record)
    chosen = [record for name in by_class for record in _choose(name, by_class[name], shot, seed)]
    return sorted(chosen, key=lambda record: (natural_key(record.class_name), natural_key(record.image_path)))


def split_shot(shot: int) -> tuple[int, int]:
    """How many of `shot` images of a class are anomalous, and how many normal, where there are enough of both."""
    return (shot + 1) // 2, shot // 2


def _choose(class_name: str, records: Sequence[Record], shot: int, seed: int) -> list[Record]:
    anomalous = _spread_over_defect_types([r for r in records if r.label], seed)
    normal = _shuffled([r for r in records if not r.label], seed)
    if shot > len(records):
        raise UserError(
            f"--shot {shot} is more than there is: class {class_name!r} has {len(records)} images "
            f"({len(anomalous)} anomalous, {len(normal)} normal); lower --shot or use --training_mode full_shot"
        )
    kinds = (("anomalous", anomalous), ("normal", normal))
    for (kind, found), wanted in zip(kinds, split_shot(shot), strict=True):
        if len(found) < wanted:
            other = "normal" if kind == "anomalous" else "anomalous"
            logger.info("%s: only %d of %d %s images, %s ones fill up", class_name, len(found), wanted, kind, other)
    return _alternate(anomalous, normal)[:shot]


def _spread_over_defect_types(records: Sequence[Record], seed: int) -> list[Record]:
    """Take the defect types in turn, so that every prefix holds as many of each as it can."""
    by_type = defaultdict(list)
    for record in records:
        by_type[record.image_path.rpartition("/")[0]].append(record)
    types = sorted(by_type, key=lambda folder: _rank(seed, folder))
    return _alternate(*(_shuffled(by_type[folder], seed) for folder in types))


def _shuffled(records: Sequence[Record], seed: int) -> list[Record]:
    return sorted(records, key=lambda record: _rank(seed, record.image_path))


def _alternate(*sequences: Sequence[Record]) -> list[Record]:
    """The first of each sequence, then the second of each; one that has ended is passed over."""
    return [record for turn in zip_longest(*sequences) for record in turn if record is not None]


def _rank(seed: int, path: str) -> bytes:
    """A path's place in the seed's order. It depends on nothing else: no other images, no generator's state."""
    return hashlib.sha256(json.dumps([seed, path]).encode("ascii")).digest()
