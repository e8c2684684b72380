"""Models on the Hugging Face hub: `hf://ORG/NAME@REVISION` as a local folder, and a folder as a repository there."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import NamedTuple

from engine.detector.calibration import CALIBRATION_FILE
from engine.runtime.run_folder import find_checkpoints
from model.config import SHARED_CONFIG, SHARED_WEIGHTS
from utils.errors import UserError

logger = logging.getLogger(__name__)

NO_CHECKPOINT = "none"
HUB = "hf://"
CARD_FILE = "README.md"
# The folder of results, beside a checkpoint or where the command is given.
RESULTS = "results"
SHARED_FILES = (SHARED_WEIGHTS, SHARED_CONFIG, CARD_FILE, CALIBRATION_FILE)
_NAME = r"[A-Za-z0-9][\w.-]*"
_REPOSITORY = re.compile(rf"{_NAME}/{_NAME}", re.ASCII)


class Address(NamedTuple):
    """A repository on the hub, ORG/NAME, and a branch, tag or commit (None: the main branch)."""

    repository: str
    revision: str | None


def is_address(text: str | Path) -> bool:
    """Whether a checkpoint is named by its place on the hub."""
    return isinstance(text, str) and text.startswith(HUB)


def read_address(text: str) -> Address:
    """The parts of `hf://ORG/NAME@REVISION`; `UserError` for text of another form."""
    repository, at, revision = text.removeprefix(HUB).partition("@")
    if not _REPOSITORY.fullmatch(repository) or (at and not revision):
        raise UserError(f"{text}: a model on the hub is named {HUB}ORG/NAME or {HUB}ORG/NAME@REVISION")
    return Address(repository, revision or None)


def check_repository(text: str) -> str:
    """ORG/NAME as it is; `UserError` for anything else."""
    if not _REPOSITORY.fullmatch(text):
        raise UserError(f"--push {text}: a repository on the hub is named ORG/NAME")
    return text


def check_checkpoint(checkpoint: str | Path) -> None:
    """Refuse a checkpoint that is not there, as far as that shows without asking the hub."""
    if is_address(checkpoint):
        read_address(str(checkpoint))
    else:
        find_checkpoints(Path(checkpoint))


def local_path(checkpoint: str | Path) -> Path:
    """The path of a checkpoint; one on the hub is fetched, or taken from an earlier time where nobody can be asked."""
    return fetch(read_address(checkpoint)) if is_address(checkpoint) else Path(checkpoint)


def folder_of(checkpoint: str | Path) -> Path | None:
    """The folder in which a checkpoint is; None where nothing can be kept beside it: on the hub, or unadapted CLIP."""
    if checkpoint == NO_CHECKPOINT or is_address(checkpoint):
        return None
    path = Path(checkpoint)
    return path if path.is_dir() else path.parent


def calibration_files(checkpoint: str | Path, file: Path | None = None) -> list[Path]:
    """Where the thresholds of a checkpoint are: where `--calibrate` keeps them, then those that came with it.

    Beside it, or in the folder of results where it has none. file: the checkpoint's own, once it is here.
    """
    kept = folder_of(checkpoint) or Path(RESULTS)
    return list(dict.fromkeys(folder / CALIBRATION_FILE for folder in (kept, file and file.parent) if folder))


def fetch(address: Address) -> Path:
    """The folder in the hub's cache with the files of a shared model; `UserError` where they cannot be had."""
    import huggingface_hub  # takes a while, and most checkpoints are files

    from model.clip_loading import reach_hub

    def snapshot(local_files_only: bool) -> Path:
        found = huggingface_hub.snapshot_download(
            address.repository,
            revision=address.revision,
            allow_patterns=list(SHARED_FILES),
            local_files_only=local_files_only,
        )
        return Path(found)

    shown = f"{HUB}{address.repository}{f'@{address.revision}' if address.revision else ''}"
    try:
        try:
            reach_hub()
        except Exception as error:  # the hub's client raises its own kinds for network, disk and proxy failures
            folder = snapshot(local_files_only=True)
            logger.warning("%s: taken from an earlier download (%s)", shown, _first_line(error))
        else:
            folder = snapshot(local_files_only=False)
    except Exception as error:
        raise UserError(f"{shown} cannot be had here ({_first_line(error)})") from error
    if not (folder / SHARED_WEIGHTS).is_file():
        raise UserError(f"{shown}: holds no {SHARED_WEIGHTS}, so it is no model of this project")
    return folder


def push(folder: Path, repository: str, name: str) -> str:
    """Upload the files of a shared model, as one commit, to a repository that is made, private, where it is not there.

    Returns its page. Raises `UserError` where the hub refuses, or cannot be reached.
    """
    import huggingface_hub

    from model.clip_loading import reach_hub

    try:
        reach_hub()
        api = huggingface_hub.HfApi()
        if not api.repo_exists(repository):
            api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=list(SHARED_FILES), commit_message=f"Model {name}"
        )
    except Exception as error:  # as above
        raise UserError(
            f"--push {repository}: the hub did not take it ({_first_line(error)}); the model is in {folder}, and "
            "huggingface-cli login, or $HF_TOKEN, says who you are"
        ) from error
    return f"{huggingface_hub.constants.ENDPOINT}/{repository}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:160]
