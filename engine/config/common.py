"""The groups of arguments that several scripts share; `utils/arguments.py` makes parsers of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dataset.options import HALF, names_or_file, share_or_nonzero
from model.config import ModelConfig
from utils.arguments import Arguments, decided_by, make_parser, plain
from utils.fields import changed, setting

__all__ = ["Arguments", "DataArguments", "MachineArguments", "ModelArguments", "decided_by", "make_parser", "plain"]

# The first is bf16 where a GPU has it, else fp32.
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class ModelArguments(Arguments):
    """Which CLIP, and how its frozen features are taken."""

    model_name: str = changed(ModelConfig, "model_name", "ViT-L-14-336")
    clip_weights: str | None = setting(
        None,
        "weights file in any format open_clip reads, or one of its tags",
        "model",
        free=True,
        unset="OpenAI's from the hub",
    )
    img_size: int | None = changed(ModelConfig, "img_size", None, unset="518 for ViT-L-14-336, else the model's own")
    activation: str | None = changed(ModelConfig, "activation", None, unset="the one that the weights need")
    surgery: str = changed(ModelConfig, "surgery")
    surgery_until_layer: int | None = changed(ModelConfig, "surgery_until_layer", None, unset="5/6 of the depth")


@dataclass(frozen=True)
class DataArguments(Arguments):
    """Where images come from."""

    dataset: str = setting("VisA", "dataset: a catalog name, or a folder in MVTec's layout", "data")
    data_root: Path | None = setting(
        None, "folder of the datasets", "data", free=True, unset="$ANOMALY_DATA_ROOT, else data"
    )
    metadata: Path | None = setting(
        None, "list of images in JSON lines, in place of the one made from the folders", "data", free=True, unset="none"
    )
    class_names: str | None = setting(
        None,
        'names in prompts: catalog, published (those of AA-CLIP\'s code), or a JSON file {"class": "readable name"}',
        "data",
        kind=names_or_file,
        free=True,
        unset="the catalog's",
        under={"published": "published"},
    )
    mask_threshold: str | float = setting(
        HALF,
        "share of a mask's largest value from which on a pixel is anomalous, or nonzero: every one but 0",
        "data",
        kind=share_or_nonzero,
        under={"published": "nonzero"},
    )
    skip_bad_images: bool = setting(False, "leave out images that cannot be read, and say which", "data", free=True)


@dataclass(frozen=True)
class MachineArguments(Arguments):
    """How the machine is used; none of these changes what is computed, but for precision and rounding."""

    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", "machine", free=True)
    precision: str = setting(
        "auto",
        "precision of the matrix products; auto is bf16 on a GPU that has it, else fp32",
        "machine",
        choices=PRECISIONS,
        before="fp32",
        kept=True,
    )
    tf32: str = setting(
        "on",
        "whether a GPU may take TF32 for fp32's products in the encoders",
        "machine",
        choices=("on", "off"),
        before="off",
        kept=True,
    )
    compile: bool = setting(
        False, "compile the encoders' blocks with torch.compile for batches of the size asked for", "machine", free=True
    )
    num_workers: int = setting(2, "processes that load images", "machine", between=(0, 512), free=True)
