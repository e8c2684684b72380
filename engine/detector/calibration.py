"""Thresholds from normal images alone, at a rate of false alarms: split conformal calibration, and its file.

What it promises, and how sure it is: docs/method.md, "Calibration". Nothing here needs a model, or torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError
from utils.files import write_json
from utils.locks import locked
from utils.paths import is_file, is_no_file
from utils.schema import check

CALIBRATION_FILE = "calibration.json"
SCHEMA = 1
FALSE_ALARMS = 0.01
CONFIDENCE = 0.95
# Seconds that one who adds to a file waits for another, who needs a moment for it.
PATIENCE = 20.0
# What `predict` and tables call an image above its threshold, and one that is not.
ANOMALOUS, NORMAL = "anomalous", "normal"


class Subject(NamedTuple):
    """What thresholds hold for; scores of anything else have another distribution.

    checkpoint: digest of the model (`Detector.digest`); class_name: as it stands in prompts; references: digest of the
    normal images that maps are compared with, None without any.
    """

    checkpoint: str
    class_name: str
    domain: str
    det_score: str
    references: str | None = None


@dataclass(frozen=True)
class Entry:
    """Thresholds of one subject at a rate of false alarms, from `images` normal images.

    model: what the checkpoint was called. interval: where the true rate of false alarms lies, at a confidence of 95 %;
    it is the same for images and for pixels. scores, peaks: of the normal images, each in ascending order: image scores
    and the maps' maxima.
    """

    checkpoint: str
    class_name: str
    domain: str
    det_score: str
    references: str | None
    model: str
    images: int = field(metadata={"between": (1, 2**31)})
    false_alarms: float = field(metadata={"between": (0, 1)})
    image_threshold: float
    pixel_threshold: float
    interval: tuple[float, float]
    scores: list[float]
    peaks: list[float]

    @property
    def subject(self) -> Subject:
        return Subject(self.checkpoint, self.class_name, self.domain, self.det_score, self.references)


@dataclass(frozen=True)
class _File:
    schema: int = field(metadata={"between": (SCHEMA, SCHEMA)})
    entries: list[Entry]


def images_needed(false_alarms: float) -> int:
    """The fewest normal images with which a rate of false alarms can be kept: 19 for 5 %, 99 for 1 %."""
    return math.ceil(1 / _exact(false_alarms)) - 1


def check_enough(count: int, false_alarms: float, source: object) -> None:
    """Raise `UserError`, which begins with `source`, for too few normal images, with the number that is needed."""
    needed = images_needed(false_alarms)
    if count < needed:
        lowest = math.ceil(10_000 / (count + 1)) / 10_000
        raise UserError(
            f"{source}: {count} normal images are too few for {100 * false_alarms:g} % false alarms, which takes "
            f"{needed}: add {needed - count}" + (f", or ask for --false_alarms {lowest:g}" if lowest <= 0.5 else "")
        )


def order_of_threshold(count: int, false_alarms: float) -> int:
    """k: of `count` normal values in ascending order, the k-th is the threshold, counted from 1.

    (count + 1) (1 - false_alarms), rounded up (Vovk et al., Algorithmic Learning in a Random World, 2005; Angelopoulos
    and Bates, arXiv:2107.07511). Raises `UserError` where there are too few values.
    """
    check_enough(count, false_alarms, "calibration")
    return math.ceil((count + 1) * (1 - _exact(false_alarms)))


def false_alarm_interval(count: int, false_alarms: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Where the rate of false alarms of a calibration on `count` images lies at this confidence.

    The share of normal images above the k-th of n values is distributed as Beta(n + 1 - k, k), whatever the values'
    own distribution is, as long as it has no ties.
    """
    from scipy.stats import beta  # takes a second to import, and most that import this module never ask

    k = order_of_threshold(count, false_alarms)
    low, high = beta.ppf(((1 - confidence) / 2, (1 + confidence) / 2), count + 1 - k, k)
    return float(low), float(high)


def make_entry(
    subject: Subject, model: str, scores: Sequence[float], peaks: Sequence[float], false_alarms: float
) -> Entry:
    """The thresholds that follow from the image scores and the maps' maxima of normal images, one of each per image.

    Raises `UserError` where there are too few images for the rate.
    """
    scores, peaks = sorted(scores), sorted(peaks)
    k = order_of_threshold(len(scores), false_alarms)
    interval = false_alarm_interval(len(scores), false_alarms)
    return Entry(*subject, model, len(scores), false_alarms, scores[k - 1], peaks[k - 1], interval, scores, peaks)


def read_calibration(path: Path) -> list[Entry]:
    """The entries of a calibration file; `UserError` for one that is missing or damaged."""
    if is_no_file(path):
        raise UserError(f"{path}: is no file of thresholds")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; inference.py --calibrate FOLDER makes one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}); calibrate again") from error
    check(content, _File, path)
    entries = [Entry(**{**values, "interval": tuple(values["interval"])}) for values in content["entries"]]
    for entry in entries:
        _check_consistent(entry, path)
    return entries


def _check_consistent(entry: Entry, path: Path) -> None:
    """Refuse thresholds that are not those of the entry's own images: the promised rate would not be theirs."""
    counted = entry.images == len(entry.scores) == len(entry.peaks) >= images_needed(entry.false_alarms or 1e-9)
    ordered = counted and entry.scores == sorted(entry.scores) and entry.peaks == sorted(entry.peaks)
    k = order_of_threshold(entry.images, entry.false_alarms) if ordered else 0
    if not ordered or (entry.image_threshold, entry.pixel_threshold) != (entry.scores[k - 1], entry.peaks[k - 1]):
        raise UserError(f"{path}: the thresholds of '{entry.class_name}' are not those of its images; calibrate again")


def add_entry(path: Path, entry: Entry) -> None:
    """Write an entry to a calibration file, in place of the one of the same subject where there is one.

    Several processes may do so at the same time: each waits for its turn, and none loses another's entry.
    """
    with locked(path.with_name(f".{path.name}.lock"), PATIENCE):
        others = read_calibration(path) if is_file(path) else []
        kept = [other for other in others if other.subject != entry.subject]
        write_json(path, {"schema": SCHEMA, "entries": [asdict(found) for found in (*kept, entry)]})


def find_entry(entries: Sequence[Entry], subject: Subject) -> Entry | None:
    """The entry of a subject; None where there is none, and never that of another one."""
    return next((entry for entry in entries if entry.subject == subject), None)


def why_none(entries: Sequence[Entry], subject: Subject) -> str:
    """What the entries hold in place of a subject's, in words."""
    left = list(entries)
    for name, words in (
        ("checkpoint", "another model, or of this one asked to compute something else"),
        ("class_name", "{found}, not of '{asked}'"),
        ("domain", "the domain {found}, not {asked}"),
        ("det_score", "the det score {found}, not {asked}"),
        ("references", "other references, or of none"),
    ):
        same = [entry for entry in left if getattr(entry, name) == getattr(subject, name)]
        if not same:
            found = ", ".join(f"'{value}'" if name == "class_name" else str(value) for value in _values(left, name))
            return f"its thresholds are of {words.format(found=found, asked=getattr(subject, name))}"
        left = same
    return "it holds no thresholds"


def _values(entries: Sequence[Entry], name: str, most: int = 5) -> list[object]:
    return list(dict.fromkeys(getattr(entry, name) for entry in entries))[:most]


def in_words(entry: Entry) -> str:
    """A calibration in a sentence, with how sure it is."""
    low, high = (100 * value for value in entry.interval)
    return (
        f"above {entry.image_threshold:.4f} (pixels: {entry.pixel_threshold:.4f}), from {entry.images} normal images "
        f"for {100 * entry.false_alarms:g} % false alarms; the true rate lies between {low:.2g} and {high:.2g} % "
        f"({100 * CONFIDENCE:g} % sure)"
    )


def _exact(false_alarms: float) -> Fraction:
    """The rate as it is written: 0.05 times 20 images is 1, which it is not in floating point."""
    if not 0 < false_alarms < 1:
        raise UserError(f"--false_alarms {false_alarms:g}: takes a rate between 0 and 1, such as 0.01")
    return Fraction(repr(float(false_alarms)))
