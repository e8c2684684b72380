"""Make a folder to share of a checkpoint: trained components, their story and a card; and put it on the hub."""

from __future__ import annotations

import logging
from dataclasses import MISSING, dataclass
from pathlib import Path

from engine.config.common import Arguments, ModelArguments, make_parser
from engine.config.evaluation import NO_CHECKPOINT, TestingArguments
from engine.detector.hub import HUB, check_checkpoint, check_repository
from utils.cli import Parser
from utils.errors import UserError
from utils.fields import changed, setting
from utils.files import check_folder
from utils.logging import set_up_logging
from utils.script import run_script

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SharingArguments(Arguments):
    """Arguments of `python -m engine.cli.share`."""

    checkpoint: str = setting(MISSING, "file, or folder of a run, whose latest counts", "what to do")
    output: Path = setting(MISSING, "folder of the model to share, new or made by this", "output")
    licence: str | None = setting(
        None, "licence of the trained components, such as apache-2.0", "output", unset="the card says not stated"
    )
    push: str | None = setting(
        None, "also put it on the Hugging Face hub, as ORG/NAME: private where it is new there", "output", unset="no"
    )
    model_name: str | None = changed(TestingArguments, "model_name")
    clip_weights: str | None = changed(ModelArguments, "clip_weights", unset="those trained with, else from the hub")
    img_size: int | None = changed(TestingArguments, "img_size")
    activation: str | None = changed(TestingArguments, "activation")
    det_score: str | None = changed(TestingArguments, "det_score")


def build_parser() -> Parser:
    return make_parser(SharingArguments, __doc__)


def share(arguments: SharingArguments) -> Path:
    """Write the folder, and push it where that is asked for; returns the folder."""
    from engine.detector.detector import load_model
    from engine.detector.hub import push
    from engine.detector.sharing import check_target, save_pretrained

    check_target(arguments.output, "--output")
    chosen = {name: getattr(arguments, name) for name in ("model_name", "img_size", "activation", "det_score")}
    model = load_model(arguments.checkpoint, clip_weights=arguments.clip_weights, device="cpu", **chosen)
    address = arguments.push and f"{HUB}{arguments.push}"
    folder = save_pretrained(model, arguments.output, arguments.licence, address)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    logger.info("%s: %s, %.1f MB without CLIP's weights", folder, model.name, size / 1e6)
    if arguments.push:
        logger.info("On the hub: %s", push(folder, arguments.push, model.name))
    return folder


def main() -> None:
    arguments = SharingArguments.of(**vars(build_parser().parse_args()))
    set_up_logging()
    if arguments.checkpoint == NO_CHECKPOINT:
        raise UserError("--checkpoint none: unadapted CLIP has nothing trained that could be shared")
    check_checkpoint(arguments.checkpoint)
    check_folder(arguments.output, "--output")
    if arguments.push is not None:
        check_repository(arguments.push)
    # torch takes seconds: arguments come first
    import engine.detector.detector  # noqa: F401

    share(arguments)


if __name__ == "__main__":
    run_script(main)
