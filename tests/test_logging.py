"""The log files contain all lines of the screen."""

import json
import logging
import warnings
from pathlib import Path

import pytest

import utils.logging
from utils.errors import NotFiniteError, Stopped, UserError, WriteError
from utils.logging import log_to_files, set_up_logging

logger = logging.getLogger("test")


@pytest.fixture(autouse=True)
def no_earlier_messages() -> None:
    """What other tests have said is in nobody's log here."""
    logging.getLogger().handlers.clear()
    logging.captureWarnings(False)


def messages(file: Path) -> list[str]:
    """The lines without their times."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line.split(" ", 2)[2] for line in lines if line.startswith("20")]


def test_a_log_starts_with_earlier_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    logger.info("early")
    logger.warning("  early warning")
    with log_to_files(tmp_path / "a" / "train.log", tmp_path / "a" / "warnings.jsonl"):
        logger.info("later")
        warnings.warn("of Python's own kind", stacklevel=1)
    logger.info("between")
    with log_to_files(tmp_path / "b" / "train.log", tmp_path / "b" / "warnings.jsonl"):
        logger.info("second run")
    assert messages(tmp_path / "a" / "train.log")[:3] == ["INFO early", "WARNING   early warning", "INFO later"]
    assert "of Python's own kind" in (tmp_path / "a" / "train.log").read_text(encoding="utf-8")
    assert messages(tmp_path / "b" / "train.log") == ["INFO between", "INFO second run"]
    rows = [json.loads(line) for line in (tmp_path / "a" / "warnings.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[0]["message"] == "early warning"
    assert "of Python's own kind" in rows[1]["message"]
    assert set(rows[0]) == {"time", "level", "message"}
    assert not (tmp_path / "b" / "warnings.jsonl").exists()
    said = capsys.readouterr().err
    for line in ("early", "later", "between", "second run"):
        assert said.count(line) >= 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("no such file"), "ERROR no such file"),
        (NotFiniteError("loss nan"), "ERROR loss nan"),
        (Stopped("stopped in epoch 2", 15), "INFO stopped in epoch 2"),
    ],
)
def test_the_final_error_is_in_the_log(tmp_path: Path, error: Exception, line: str) -> None:
    with pytest.raises(type(error)), log_to_files(tmp_path / "train.log", tmp_path / "warnings.jsonl"):
        raise error
    assert messages(tmp_path / "train.log") == [line]
    with pytest.raises(ZeroDivisionError), log_to_files(tmp_path / "other.log", tmp_path / "warnings.jsonl"):
        1 / 0  # noqa: B018
    assert "Traceback" in (tmp_path / "other.log").read_text(encoding="utf-8")


def test_no_log_is_created_before_the_first_message(tmp_path: Path) -> None:
    set_up_logging(tmp_path / "new" / "train.log")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="is a file"):
        set_up_logging(tmp_path / "file" / "train.log")


def test_a_full_disk_ends_the_run_but_an_open_file_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "train.log"
    real, trouble = utils.logging.append_text, []

    def append(path: Path, text: str) -> None:
        if trouble:
            raise WriteError(f"{path} cannot be written: {trouble[0]}") from trouble[0]
        real(path, text)

    monkeypatch.setattr(utils.logging, "append_text", append)
    set_up_logging(file)
    logger.info("one")
    trouble.append(PermissionError(13, "held open"))
    logger.info("two")
    trouble.clear()
    logger.info("three")
    assert messages(file) == ["INFO one", "INFO two", "INFO three"]
    trouble.append(OSError(28, "No space left on device"))
    with pytest.raises(WriteError, match=r"train\.log"):
        logger.info("four")
