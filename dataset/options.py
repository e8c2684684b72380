"""What a run may choose of how images become samples; apart, since parsers need it before anything that takes long."""

from __future__ import annotations

from dataclasses import dataclass

from utils.fields import setting


@dataclass(frozen=True)
class AugmentationConfig:
    """How images are moved (docs/method.md, "Training"); masks always by the nearest pixel, uncovering normal ones."""

    augment_fill: str = setting(
        "mean", "what moving an image uncovers: the mean colour of CLIP's normalisation, or black", "training",
        choices=("mean", "black"), before="black",
    )  # fmt: skip
    augment_resampling: str = setting(
        "bilinear", "how a moved image's pixels are found", "training", choices=("bilinear", "nearest")
    )


AS_USUAL = AugmentationConfig()
