"""Write a checkpoint as a folder to share, with trained weights and a model card, and upload it to the hub."""

import logging
from pathlib import Path

from engine.cli.runner import Script
from engine.config.tools import SharingArguments

logger = logging.getLogger(__name__)


def share(arguments: SharingArguments) -> Path:
    """Write the folder, and upload it with `push`; returns the folder."""
    from engine.detector.hub import HUB, push
    from engine.detector.loading import load_model
    from engine.detector.sharing import check_target

    check_target(arguments.output, "--output")
    options = arguments.overrides()
    model = load_model(arguments.checkpoint, clip_weights=arguments.clip_weights, device="cpu", **options)
    address = arguments.push and f"{HUB}{arguments.push}"
    folder = model.save_pretrained(arguments.output, arguments.licence, address)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    logger.info("%s: %s, %.1f MB without CLIP's weights", folder, model.name, size / 1e6)
    if arguments.push:
        logger.info("On the hub: %s", push(folder, arguments.push, model.name))
    return folder


script = Script(__doc__, SharingArguments, "engine.cli.share.share")

if __name__ == "__main__":
    script.run()
