"""File names from data, and checks of any path."""

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.paths import expanded, figure_path, is_file, is_folder, safe_name


@pytest.mark.parametrize(
    "name", ["bottle", "metal_nut", "Schräube 2", "a.b", ".hidden", "console", "com10", "-x", "100%"]
)
def test_valid_names_are_unchanged(name: str) -> None:
    assert safe_name(name) == name


BAD_NAMES = ["../../evil", "C:\\x", "..", "", "a\0b", "two\nlines", "a?", "end.", "end ", "\udce9", "x" * 300]
DEVICES = ["CON", "con.png", "Aux.tar.gz", "COM1", "lpt9.txt", "CONIN$"]


@pytest.mark.parametrize("name", [*BAD_NAMES, *DEVICES])
def test_invalid_names_are_replaced(name: str) -> None:
    assert safe_name(name) != name
    assert_is_one_name(safe_name(name))


def assert_is_one_name(name: str) -> None:
    assert PurePosixPath(name).parts == PureWindowsPath(name).parts == (name,)
    assert name not in (".", "..")
    assert not any(mark in '<>:"/\\|?*' or ord(mark) < 32 for mark in name) and name[-1] not in " ."
    assert 0 < len(name.encode("utf-8")) <= 150


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=200)


@given(ANY_TEXT, ANY_TEXT)
def test_different_texts_have_different_file_names(one: str, other: str) -> None:
    for text in (one, other):
        assert_is_one_name(safe_name(text))
    assert (safe_name(one) == safe_name(other)) == (one == other)


def test_figures_stay_in_their_folder_with_different_names(tmp_path: Path) -> None:
    taken: set[str] = set()
    images = ["a/000.png", "a/000.jpg", "A/000.JPG", "/data/a/001.png", "../../b.png", "a/../../../b.png", ".."]
    figures = [figure_path(tmp_path, image, ".png", taken) for image in images]
    assert [figure.relative_to(tmp_path).as_posix() for figure in figures[:3]] == [
        "a/000.png",
        "a/000.jpg.png",
        "A/000.JPG_2.png",
    ]
    assert len({figure.as_posix().casefold() for figure in figures}) == len(images)
    for figure in figures:
        assert tmp_path in Path(os.path.normpath(figure)).parents
        figure.parent.mkdir(parents=True, exist_ok=True)
        figure.touch()


def test_checking_any_path(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "loop", Path("x" * 5000), Path("a\0b"), tmp_path / "nothing"):
        assert not is_file(path) and not is_folder(path)
    assert expanded("~nosuchuser/data") == Path("~nosuchuser/data")
    assert expanded("~/data") == Path.home() / "data"
