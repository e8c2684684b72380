"""Where a checkpoint and its calibration are: a path, or a repository on the Hugging Face hub, `hf://ORG/NAME`."""

import logging
import re
from pathlib import Path

from engine.detector.calibration import CALIBRATION_FILE
from engine.runtime.run_folder import find_checkpoints
from model.config import SHARED_CONFIG, SHARED_WEIGHTS
from utils.errors import UserError
from utils.text import first_line

logger = logging.getLogger(__name__)

# The value of `--checkpoint` for unadapted CLIP.
NO_CHECKPOINT = "none"
HUB = "hf://"
CARD_FILE = "README.md"
# Folder of results, next to a checkpoint or in the working directory.
RESULTS = "results"
SHARED_FILES = (SHARED_WEIGHTS, SHARED_CONFIG, CARD_FILE, CALIBRATION_FILE)
_NAME = r"[A-Za-z0-9][\w.-]*"
_REPOSITORY = re.compile(rf"{_NAME}/{_NAME}", re.ASCII)


def is_address(text: str | Path) -> bool:
    """Whether a checkpoint is a repository on the hub."""
    return isinstance(text, str) and text.startswith(HUB)


def read_address(text: str | Path) -> tuple[str, str | None]:
    """The repository ORG/NAME of `hf://ORG/NAME@REVISION`, and its branch, tag or commit (None: the main branch).

    Raises `UserError` for another form.
    """
    repository, at, revision = str(text).removeprefix(HUB).partition("@")
    if not _REPOSITORY.fullmatch(repository) or (at and not revision):
        raise UserError(f"{text}: write {HUB}ORG/NAME or {HUB}ORG/NAME@REVISION for a model on the hub")
    return repository, revision or None


def check_repository(text: str) -> str:
    """ORG/NAME unchanged; `UserError` for another form."""
    if not _REPOSITORY.fullmatch(text):
        raise UserError(f"--push {text}: write ORG/NAME for a repository on the hub")
    return text


def check_checkpoint(checkpoint: str | Path) -> None:
    """Raise `UserError` for a checkpoint that does not exist; the hub is not contacted."""
    if is_address(checkpoint):
        read_address(checkpoint)
    else:
        find_checkpoints(Path(checkpoint))


def local_path(checkpoint: str | Path) -> Path:
    """The path of a checkpoint; one on the hub is downloaded, or taken from the cache if the hub cannot be reached."""
    return fetch(str(checkpoint)) if is_address(checkpoint) else Path(checkpoint)


def folder_of(checkpoint: str | Path) -> Path | None:
    """The folder of a checkpoint; None if it has none: unadapted CLIP, or a model on the hub."""
    if checkpoint == NO_CHECKPOINT or is_address(checkpoint):
        return None
    path = Path(checkpoint)
    return path if path.is_dir() else path.parent


def calibration_files(checkpoint: str | Path, file: Path | None = None) -> list[Path]:
    """Where thresholds of a checkpoint may be: where `--calibrate` writes them, then next to its local `file`."""
    written = folder_of(checkpoint) or Path(RESULTS)
    return list(dict.fromkeys(folder / CALIBRATION_FILE for folder in (written, file and file.parent) if folder))


def fetch(address: str) -> Path:
    """The folder in the hub's cache with the files of a model; `UserError` if they cannot be downloaded."""
    import huggingface_hub  # slow to import, and most checkpoints are files

    from model.clip_loading import reach_hub

    repository, revision = read_address(address)
    offline = False
    try:
        try:
            reach_hub()
        except Exception as error:  # the hub's client raises its own kinds for network, disk and proxy failures
            offline = True
            logger.warning("%s: using an earlier download, if there is one (%s)", address, first_line(error))
        files = list(SHARED_FILES)
        folder = Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=files, local_files_only=offline
            )
        )
    except Exception as error:
        raise UserError(f"{address} cannot be downloaded ({first_line(error)})") from error
    if not (folder / SHARED_WEIGHTS).is_file():
        raise UserError(f"{address}: holds no {SHARED_WEIGHTS}, so it is not a model of this project")
    return folder


def push(folder: Path, repository: str, name: str) -> str:
    """Upload the files of a model, as one commit, to a repository, created as private if it does not exist.

    Returns the repository's page. Raises `UserError` if the upload fails.
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
            f"--push {repository}: the upload failed ({first_line(error)}); the model is in {folder}; log in with "
            "huggingface-cli login or $HF_TOKEN"
        ) from error
    return f"{huggingface_hub.constants.ENDPOINT}/{repository}"
