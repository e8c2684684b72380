"""Options of reading and augmenting images; a module without slow imports, since parsers need it."""

from dataclasses import dataclass

from utils.fields import limited


@dataclass(frozen=True)
class AugmentationConfig:
    """How images are moved (docs/method.md, "Training"); masks always by the nearest pixel, uncovering normal ones."""

    augment_fill: str = limited("mean", choices=("mean", "black"))
    augment_resampling: str = limited("bilinear", choices=("bilinear", "nearest"))
    augment_moves: str = limited("joint", choices=("joint", "separate"))
    jitter_first: bool = False
    keep_label: bool = False


DEFAULT_AUGMENTATION = AugmentationConfig()
