"""Options of reading and augmenting images; a module without slow imports, since parsers need it."""

from __future__ import annotations

from dataclasses import dataclass

from utils.cli import number, path
from utils.fields import setting

# Values of `--class_names` that are not a file: the catalog's names, or those of AA-CLIP's published code.
CATALOG_NAMES, PUBLISHED_NAMES = "catalog", "published"
NAMES = (CATALOG_NAMES, PUBLISHED_NAMES)
# Pixels of a mask are anomalous from this share of its largest value on, or if they are not zero.
HALF, NONZERO = 0.5, "nonzero"


@dataclass(frozen=True)
class AugmentationConfig:
    """How images are moved and recoloured (docs/method.md, "Training"); masks are moved to the nearest pixel."""

    augment_fill: str = setting(
        "mean",
        "colour of uncovered pixels: the mean of CLIP's normalisation, or black",
        "training",
        choices=("mean", "black"),
    )
    augment_resampling: str = setting(
        "bilinear",
        "interpolation of moved images",
        "training",
        choices=("bilinear", "nearest"),
        under={"published": "nearest"},
    )
    augment_moves: str = setting(
        "joint",
        "rotate and shift in one resampling, or rotate the normalised image, then shift it by whole pixels",
        "training",
        choices=("joint", "separate"),
        under={"published": "separate"},
    )
    jitter_first: bool = setting(
        False, "change colours before the image is resized, not after", "training", under={"published": True}
    )
    keep_label: bool = setting(
        False, "an image stays anomalous if its anomaly was moved out of it", "training", under={"published": True}
    )


DEFAULT_AUGMENTATION = AugmentationConfig()


def names_or_file(text: str) -> str:
    """A value of `--class_names`: one of `NAMES`, or a file, which gets a prefix if its name is one of `NAMES`."""
    if text in NAMES:
        return text
    file = path(text).as_posix()
    return f"./{file}" if file in NAMES else file


def share_or_nonzero(text: str) -> str | float:
    """A value of `--mask_threshold`: a share of a mask's largest value, or `NONZERO`."""
    return text if text == NONZERO else number(float, (0.001, 1))(text)
