"""What was evaluated before, by a digest of all that the figures depend on: `comparison_cache.json`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from engine.evaluation.evaluate import METRICS, ClassResult, ImageScore
from utils.errors import UserError
from utils.files import write_json
from utils.reading import read_json, short_repr

logger = logging.getLogger(__name__)

# Another number makes earlier caches void: raise it when scoring or metrics change.
CACHE_SCHEMA = 2
# Bytes: scores of millions of images.
LARGEST_CACHE = 2**30
Results = dict[str, list[ClassResult]]


def read_cache(path: Path) -> Results:
    """Metrics per class of what was evaluated before, by key; a file that cannot be used is ignored with a warning."""
    if not path.exists():
        return {}
    try:
        content = read_json(path, max_bytes=LARGEST_CACHE)
        results = _results_of(content)
        return {key: [_class_result(item, key) for item in classes] for key, classes in results.items()}
    except UserError as error:
        logger.warning("%s cannot be used (%s): everything is evaluated again", path, error)
        return {}


def _results_of(content: Any) -> dict[str, list[Any]]:
    """The results of a cache, each a list of classes; raises `UserError` for anything else."""
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != CACHE_SCHEMA:
        raise UserError(f"schema must be {CACHE_SCHEMA}, not {short_repr(schema)}")
    results = content.get("results")
    if not isinstance(results, dict) or not all(isinstance(item, list) and item for item in results.values()):
        raise UserError(f"results must hold lists of classes, not {short_repr(results)}")
    return results


def _class_result(item: Any, where: str) -> ClassResult:
    """A class's metrics and scores; `UserError` with the key for what is missing, of another type or out of range."""
    if not isinstance(item, dict) or not isinstance(item.get("class"), str):
        raise UserError(f"{where}: class must be a text in each of its classes")
    values = {}
    for metric in METRICS:
        if metric not in item:
            raise UserError(f"{where}: {metric} is missing")
        values[metric] = None if item[metric] is None else _number(item[metric], 100, f"{where}: {metric}")
    rows = item.get("scores")
    if not isinstance(rows, list) or not all(
        isinstance(row, list) and len(row) == 3 and isinstance(row[0], str) and isinstance(row[1], bool) for row in rows
    ):
        raise UserError(f"{where}: scores must be lists of image, whether it is anomalous, and score")
    scores = tuple(ImageScore(image, bad, _number(score, 1, f"{where}: scores")) for image, bad, score in rows)
    return ClassResult(item["class"], values, scores)


def _number(value: Any, most: float, what: str) -> float:
    # One ten-thousandth for rounding.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e-4 <= value <= most + 1e-4:
        raise UserError(f"{what} must be a number from 0 to {most}, not {short_repr(value)}")
    return float(value)


def write_cache(path: Path, results: Results) -> None:
    """Keep metrics per class and scores per image by key, in full precision."""
    rows = {
        key: [
            {"class": r.class_name, **r.values, "scores": [[s.path, s.anomalous, s.score] for s in r.scores]}
            for r in classes
        ]
        for key, classes in results.items()
    }
    write_json(path, {"schema": CACHE_SCHEMA, "results": rows})
