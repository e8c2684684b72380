"""What a run may choose of how images become samples; apart, since parsers need it before anything that takes long."""

from __future__ import annotations

from dataclasses import dataclass

from utils.cli import number, path
from utils.fields import setting

# What `--class_names` takes beside a file: the catalog's names, or those of AA-CLIP's published code.
CATALOG_NAMES, PUBLISHED_NAMES = "catalog", "published"
NAMES = (CATALOG_NAMES, PUBLISHED_NAMES)
# Which pixels of a mask are anomalous: those from this share of its largest value on, or all that are not zero.
HALF, NONZERO = 0.5, "nonzero"


@dataclass(frozen=True)
class AugmentationConfig:
    """How images are moved (docs/method.md, "Training"); masks always by the nearest pixel, uncovering normal ones."""

    augment_fill: str = setting(
        "mean",
        "what moving an image uncovers: the mean colour of CLIP's normalisation, or black",
        "training",
        choices=("mean", "black"),
        before="black",
    )
    augment_resampling: str = setting(
        "bilinear",
        "how a moved image's pixels are found",
        "training",
        choices=("bilinear", "nearest"),
        under={"published": "nearest"},
    )
    augment_moves: str = setting(
        "joint",
        "turn and shift in one resampling, or the normalised image turned, then shifted by whole pixels",
        "training",
        choices=("joint", "separate"),
        under={"published": "separate"},
    )
    jitter_first: bool = setting(
        False, "change colours before the image is resized, not after", "training", under={"published": True}
    )
    keep_label: bool = setting(
        False, "an image whose anomaly was moved out of it stays anomalous", "training", under={"published": True}
    )


DEFAULT_AUGMENTATION = AugmentationConfig()


def names_or_file(text: str) -> str:
    """What `--class_names` takes: one of `NAMES`, or a file, in a form that no name has, as in `./published`."""
    if text in NAMES:
        return text
    file = path(text).as_posix()
    return f"./{file}" if file in NAMES else file


def share_or_nonzero(text: str) -> str | float:
    """What `--mask_threshold` takes: a share of a mask's largest value, or `NONZERO`."""
    return text if text == NONZERO else number(float, (0.001, 1))(text)
