"""The cache of a comparison: read back as written, and ignored with one warning where it is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.evaluation.evaluate import METRICS
from engine.report.comparison_cache import read_cache, write_cache

SOUND_CLASS = {"class": "cork", **dict.fromkeys(METRICS, 50.0), "image_ap": None, "scores": [["a.png", True, 0.5]]}


def cache_of(**changes: object) -> bytes:
    return json.dumps({"schema": 2, "results": {"key": [{**SOUND_CLASS, **changes}]}}).encode("utf-8")


def test_a_sound_cache_is_read(tmp_path: Path) -> None:
    file = tmp_path / "cache.json"
    assert read_cache(file) == {}
    file.write_bytes(cache_of())
    results = read_cache(file)
    assert results["key"][0].values["image_ap"] is None
    write_cache(file, results)
    assert read_cache(file) == results


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"schema": 1, "results": {}}', "schema must be 2, not 1"),
        (b'{"schema": 2, "results": {"key": []}}', "results must hold lists of classes"),
        (b'{"schema": 2, "results": {"key": [3]}}', "key: class must be a text"),
        (cache_of(aupro="50"), "key: aupro must be a number from 0 to 100, not '50'"),
        (cache_of(aupro=float("nan")), "not nan"),
        (cache_of(aupro=1e300), "not 1e+300"),
        (cache_of(aupro=True), "not True"),
        (cache_of(scores=[["a.png", True]]), "key: scores must be lists"),
        (cache_of(scores=[["a.png", 1, 0.5]]), "key: scores must be lists"),
        (cache_of(scores=[["a.png", True, -3]]), "key: scores must be a number from 0 to 1, not -3"),
        (cache_of(scores=[["a.png", True, 10**400]]), "key: scores must be a number"),
    ],
)
def test_a_cache_that_cannot_be_used_is_a_warning_with_file_and_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes, expected: str
) -> None:
    file = tmp_path / "cache.json"
    file.write_bytes(content)
    assert read_cache(file) == {}
    (message,) = caplog.messages
    assert message.startswith(f"{file} cannot be used (") and expected in message


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_damaged_cache_is_read_or_ignored(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers())
    key = data.draw(st.sampled_from(sorted(SOUND_CLASS)))
    content = cache_of(**{key: data.draw(values)})
    start = data.draw(st.integers(0, len(content)))
    content = content[:start] + data.draw(st.binary(max_size=5)) + content[start + data.draw(st.integers(0, 20)) :]
    file = tmp_path_factory.getbasetemp() / "damaged_cache.json"
    file.write_bytes(content)
    for classes in read_cache(file).values():
        for result in classes:
            assert all(value is None or -1 < value < 101 for value in result.values.values())
            assert all(isinstance(image.anomalous, bool) for image in result.scores)
