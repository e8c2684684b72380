"""Thresholds from normal images for a chosen false alarm rate: split conformal calibration, and its file.

Guarantees and their uncertainty: docs/method.md, "Calibration". Nothing here needs a model or torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from model.config import TILES
from utils.errors import UserError
from utils.files import write_json
from utils.paths import is_file, is_no_file
from utils.schema import check
from utils.text import list_names

CALIBRATION_FILE = "calibration.json"
SCHEMA = 1
FALSE_ALARMS = 0.01
CONFIDENCE = 0.95
# Seconds to wait while another process adds to a file.
LOCK_TIMEOUT = 20.0
# Decisions: above the threshold, or not.
ANOMALOUS, NORMAL = "anomalous", "normal"


class CalibrationKey(NamedTuple):
    """What thresholds are valid for; anything else has another distribution of scores.

    checkpoint: digest of the model (`Detector.digest`); class_name: the name in prompts; references: digest of the
    normal images that maps are compared with, None without any; tiles: the choice of `Detector.predict`.
    """

    checkpoint: str
    class_name: str
    domain: str
    det_score: str
    references: str | None = None
    tiles: str = TILES[0]


@dataclass(frozen=True)
class Entry:
    """Thresholds of one key for a false alarm rate, from `images` normal images.

    model: the checkpoint's name. interval: the 95 % interval of the true false alarm rate, which is the same for
    images and pixels. scores, peaks: image scores and map maxima of the normal images, each in ascending order. pillow:
    the version that resized them, because versions differ.
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
    pillow: str = ""
    tiles: str = TILES[0]

    @property
    def key(self) -> CalibrationKey:
        return CalibrationKey(*(getattr(self, name) for name in CalibrationKey._fields))

    def __str__(self) -> str:
        low, high = (100 * value for value in self.interval)
        return (
            f"above {self.image_threshold:.4f} (pixels: {self.pixel_threshold:.4f}), from {self.images} normal images "
            f"for {100 * self.false_alarms:g} % false alarms; 95 % interval of the true rate: {low:.2g} to {high:.2g} %"
        )


@dataclass(frozen=True)
class _File:
    schema: int = field(metadata={"between": (SCHEMA, SCHEMA)})
    entries: list[Entry]


def images_needed(false_alarms: float) -> int:
    """The smallest number of normal images for a false alarm rate: 19 for 5 %, 99 for 1 %."""
    return math.ceil(1 / _exact(false_alarms)) - 1


def check_enough(count: int, false_alarms: float, source: object) -> None:
    """Raise `UserError`, which begins with `source`, for too few normal images."""
    needed = images_needed(false_alarms)
    if count < needed:
        lowest = math.ceil(10_000 / (count + 1)) / 10_000
        raise UserError(
            f"{source}: {count} normal images are too few for {100 * false_alarms:g} % false alarms, which need "
            f"{needed}: add {needed - count}" + (f", or use --false_alarms {lowest:g}" if lowest <= 0.5 else "")
        )


def order_of_threshold(count: int, false_alarms: float) -> int:
    """k, such that the k-th smallest of `count` normal values is the threshold (k starts at 1).

    (count + 1) (1 - false_alarms), rounded up (Vovk et al., Algorithmic Learning in a Random World, 2005; Angelopoulos
    and Bates, arXiv:2107.07511). Raises `UserError` for too few values.
    """
    check_enough(count, false_alarms, "calibration")
    return math.ceil((count + 1) * (1 - _exact(false_alarms)))


def false_alarm_interval(count: int, false_alarms: float) -> tuple[float, float]:
    """The 95 % interval of the true false alarm rate after calibration on `count` images.

    The share of normal images above the k-th of n values follows Beta(n + 1 - k, k) for any distribution of the values
    without ties.
    """
    from scipy.stats import beta  # takes a second to import, and is rarely needed

    k = order_of_threshold(count, false_alarms)
    low, high = beta.ppf(((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2), count + 1 - k, k)
    return float(low), float(high)


def make_entry(
    key: CalibrationKey, model: str, scores: Sequence[float], peaks: Sequence[float], false_alarms: float
) -> Entry:
    """Thresholds from the image scores and map maxima of normal images, one of each per image.

    Raises `UserError` for too few images.
    """
    scores, peaks = sorted(scores), sorted(peaks)
    k = order_of_threshold(len(scores), false_alarms)
    interval = false_alarm_interval(len(scores), false_alarms)
    return Entry(
        **key._asdict(),
        model=model,
        images=len(scores),
        false_alarms=false_alarms,
        image_threshold=scores[k - 1],
        pixel_threshold=peaks[k - 1],
        interval=interval,
        scores=scores,
        peaks=peaks,
        pillow=version("pillow"),
    )


def read_calibration(path: Path) -> list[Entry]:
    """The entries of a calibration file; `UserError` for a file that is missing or damaged."""
    if is_no_file(path):
        raise UserError(f"{path}: is not a file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; create it with inference.py --calibrate FOLDER") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}); calibrate again") from error
    check(content, _File, path)
    return [Entry(**{**values, "interval": tuple(values["interval"])}) for values in content["entries"]]


def add_entry(path: Path, entry: Entry) -> None:
    """Write an entry to a calibration file, in place of one with the same key; safe for concurrent processes."""
    from utils.locks import locked  # needed only here

    with locked(path.with_name(f".{path.name}.lock"), LOCK_TIMEOUT):
        others = [other for other in read_calibration(path) if other.key != entry.key] if is_file(path) else []
        write_json(path, {"schema": SCHEMA, "entries": [asdict(each) for each in (*others, entry)]})


def mismatch_reason(entries: Sequence[Entry], key: CalibrationKey) -> str:
    """Why entries have no thresholds for a key: what they were calibrated for."""
    entries = [entry for entry in entries if entry.checkpoint == key.checkpoint]
    if not entries:
        return "its thresholds are of another model, or of this one with other options"
    classes = list_names(list(dict.fromkeys(f"'{entry.class_name}'" for entry in entries)))
    if all(entry.class_name != key.class_name for entry in entries):
        return f"its thresholds are of {classes}, not of '{key.class_name}'"
    tiles = list(dict.fromkeys(entry.tiles for entry in entries if entry.key == key._replace(tiles=entry.tiles)))
    if tiles:
        return f"its thresholds of '{key.class_name}' are for --tiles {' or '.join(tiles)}, not for --tiles {key.tiles}"
    return f"its thresholds of {classes} are for another domain, det score or set of references"


def _exact(false_alarms: float) -> Fraction:
    """The rate as written: in floating point, 0.05 times 20 is not exactly 1."""
    if not 0 < false_alarms < 1:
        raise UserError(f"--false_alarms {false_alarms:g}: must be between 0 and 1, such as 0.01")
    return Fraction(repr(float(false_alarms)))
