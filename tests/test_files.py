"""Files are written completely or not at all; errors are one line; files may be open in another program."""

import errno
import logging
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file

import utils.files
from model.checkpoint import save
from utils.errors import UserError, WriteError
from utils.figures import save_png
from utils.files import NOT_REPLACED, append_text, check_folder, remove_leftovers, replacing, write_text, writing
from utils.heatmaps import save_image


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_error_is_one_line(tmp_path: Path, code: int) -> None:
    with pytest.raises(WriteError) as caught, writing(tmp_path / "a"):
        raise OSError(code, os.strerror(code))
    assert str(caught.value) == f"{tmp_path / 'a'} cannot be written: {utils.files.REASONS[code]}"


def test_disk_errors_of_libraries_are_recognised(tmp_path: Path) -> None:
    class SafetensorError(Exception):
        pass

    def torch_fails() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598")

    def safetensors_fails() -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for fail in (torch_fails, safetensors_fails):
        with pytest.raises(WriteError, match="the disk is full"), writing(tmp_path / "x"):
            fail()
    with pytest.raises(RuntimeError, match="a mistake"), writing(tmp_path / "x"):
        raise RuntimeError("a mistake of the programmer's")


def bad_folders(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "file").write_text("", encoding="utf-8")
    found = {
        "file": tmp_path / "file",
        "under a file": tmp_path / "file" / "below" / "it",
        "too long": tmp_path / ("x" * 300),
        "below too long": tmp_path / ("x" * 300) / "below",
        "NUL": tmp_path / "a\0b",
        "device": Path(os.devnull),
    }
    if os.name == "posix":
        (tmp_path / "circle").symlink_to(tmp_path / "circle")
        (tmp_path / "nothing").symlink_to(tmp_path / "gone")
        found |= {
            "circle": tmp_path / "circle" / "below",
            "link to nothing": tmp_path / "nothing" / "below",
            "not UTF-8": tmp_path / os.fsdecode(b"\xff"),
            "no files there": Path("/proc/none"),
        }
    return found


def test_an_unwritable_folder_is_reported_before_work(tmp_path: Path) -> None:
    folders = bad_folders(tmp_path)
    before = names(tmp_path)
    for kind, folder in folders.items():
        with pytest.raises(UserError, match="--output_dir") as found:
            check_folder(folder, "--output_dir")
        assert "\n" not in str(found.value), kind
        str(found.value).encode("utf-8")
        if kind not in ("not UTF-8",):
            with pytest.raises(WriteError) as late:
                write_text(folder / "x.txt", "x")
            assert "\n" not in str(late.value), kind
    assert names(tmp_path) == before
    check_folder(tmp_path / "new" / "newer", "--output_dir")
    assert names(tmp_path) == before


def test_a_folder_or_a_device_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.csv").mkdir()
    for path in (tmp_path / "a.csv", Path(os.devnull)):
        with pytest.raises(WriteError, match="folder or a device"):
            write_text(path, "x")
    assert not Path(os.devnull).is_file()


def held_open(monkeypatch: pytest.MonkeyPatch, name: str, times: float) -> list[str]:
    """Replacing `name` raises what Windows raises for a file that another program holds open, this many times."""
    real, tried = Path.replace, []

    def replace(path: Path, target: Path) -> Path:
        if Path(target).name == name and len(tried) < times:
            tried.append(name)
            raise PermissionError(errno.EACCES, "Access is denied", str(path))
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(utils.files.time, "sleep", lambda _: None)
    monkeypatch.setattr(utils.files, "SHORT_PATIENCE", 0.01)
    monkeypatch.setattr(utils.files, "PATIENCE", 0.05)
    return tried


@pytest.mark.parametrize("times", [3, float("inf")])
def test_an_open_checkpoint_is_replaced_later_or_an_error(
    times: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pth"
    path.write_bytes(b"old")
    tried = held_open(monkeypatch, path.name, times)
    if times == 3:
        save({"a": 1}, path)
        assert len(tried) == 3
    else:
        with pytest.raises(WriteError, match="another program holds it open"):
            save({"a": 1}, path)
    assert (path.read_bytes() == b"old") == (times > 3)
    assert names(tmp_path) == {path.name}


def test_the_new_version_of_an_open_file_is_saved_next_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text("old", encoding="utf-8")
    with monkeypatch.context() as patch:
        held_open(patch, path.name, float("inf"))
        write_text(path, "new")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "held open" in record.getMessage() and NOT_REPLACED in record.getMessage()
    assert path.read_text(encoding="utf-8") == "old"
    assert (tmp_path / (path.name + NOT_REPLACED)).read_text(encoding="utf-8") == "new"
    # Closed again: the file has the newest content, and what was kept aside is gone.
    write_text(path, "newer")
    assert names(tmp_path) == {path.name}
    assert path.read_text(encoding="utf-8") == "newer"


def test_temporary_files_of_dead_processes_only_are_removed(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.pth") as temporary:
        temporary.touch()
    here, dead = socket.gethostname(), 2**22 - 7
    assert temporary.name == f".a.pth.{os.getpid()}@{here}.tmp"
    (tmp_path / "a.pth").unlink()
    left = {f".a.pth.{dead}@{here}.tmp", f".a.pth.{os.getpid()}@{here}.tmp"}
    others = {f".a.pth.{os.getppid()}@{here}.tmp", f".a.pth.{dead}@elsewhere.tmp", ".notes.tmp", "a.tmp"}
    for name in left | others:
        (tmp_path / name).write_text("", encoding="utf-8")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == others


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files, which Windows cannot")
def test_a_full_disk_is_an_error_that_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on file sizes replaces a full disk: torch, safetensors, Pillow and matplotlib all fail."""
    import resource

    noise = np.random.default_rng(0).integers(0, 255, (99, 99, 3), dtype=np.uint8)
    weights = {"weights": torch.zeros(100_000)}
    figure = Figure()
    figure.add_subplot().imshow(noise)

    def safetensors(path: Path) -> None:
        with replacing(path) as temporary:
            save_file(weights, temporary)

    (tmp_path / "file").write_bytes(b"old\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for attempt in (
        lambda path: save(weights, path),
        safetensors,
        lambda path: save_image(Image.fromarray(noise), path),
        lambda path: save_png(figure, path),
        lambda path: write_text(path, "x" * 9000),
        lambda path: append_text(path, "x" * 9000),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            with pytest.raises(WriteError, match="larger than the system allows"):
                attempt(tmp_path / "file")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert names(tmp_path) == {"file"}
        assert (tmp_path / "file").read_bytes() == b"old\n"
