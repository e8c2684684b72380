"""Groups of options that several scripts share, and readers of their values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dataset.prompts import NAMES
from dataset.records import HALF, NONZERO
from engine.config.presets import PRESETS
from model.config import ModelConfig
from utils.arguments import Arguments, number, path
from utils.fields import changed, setting

# auto: bf16 on a GPU that supports it, else fp32.
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def names_or_file(text: str) -> str:
    """A value of `--class_names`: one of `NAMES`, or a file; a file with such a name becomes `./published`."""
    if text in NAMES:
        return text
    file = path(text).as_posix()
    return f"./{file}" if file in NAMES else file


def share_or_nonzero(text: str) -> str | float:
    """A value of `--mask_threshold`: a share of a mask's largest value, or `NONZERO`."""
    return text if text == NONZERO else number(float, (0.001, 1))(text)


@dataclass(frozen=True)
class ModelArguments(Arguments):
    """The CLIP model, and its frozen features."""

    presets: ClassVar = PRESETS

    model_name: str | None = setting(
        "ViT-L-14-336", "open_clip model name, local-dir:FOLDER, or toy (the toy CLIP in this repository)", "model"
    )
    clip_weights: str | None = setting(
        None,
        "weights file in a format that open_clip reads, or an open_clip tag",
        "model",
        free=True,
        unset="OpenAI's from the hub",
    )
    img_size: int | None = changed(
        ModelConfig,
        "img_size",
        None,
        help="side length of the square input image in pixels",
        group="model",
        unset="518 for ViT-L-14-336, else the model's own",
    )
    activation: str | None = changed(
        ModelConfig,
        "activation",
        None,
        help="activation function in CLIP's MLPs",
        group="model",
        unset="the one these weights were trained with",
    )
    surgery: str | None = changed(
        ModelConfig,
        "surgery",
        help="V-V attention of the frozen image features: dual (parallel to the blocks, as CLIP-Surgery), sequential "
        "(inside the blocks, as AA-CLIP), or batch_axis (as sequential, but over the images of a batch, a bug of "
        "AA-CLIP's code)",
        group="model",
    )
    surgery_until_layer: int | None = changed(
        ModelConfig,
        "surgery_until_layer",
        None,
        help="N: the last N - 1 vision blocks use V-V attention",
        group="model",
        unset="5/6 of the depth",
    )


@dataclass(frozen=True)
class DataArguments(Arguments):
    """The images of a dataset."""

    dataset: str | None = setting("VisA", "dataset: a catalog name, or a folder in MVTec's layout", "data")
    data_root: Path | None = setting(
        None, "folder that contains the datasets", "data", free=True, unset="$ANOMALY_DATA_ROOT, else data"
    )
    metadata: Path | None = setting(
        None, "image list in JSON lines, instead of the list made from the folders", "data", free=True, unset="none"
    )
    class_names: str | None = setting(
        None,
        'class names in prompts: catalog, published (of AA-CLIP\'s code), or a JSON file {"class": "readable name"}',
        "data",
        free=True,
        unset="catalog",
        type=names_or_file,
    )
    mask_threshold: str | float = setting(
        HALF,
        "a mask's pixels count as anomalous from this share of its largest value, or if they are nonzero",
        "data",
        type=share_or_nonzero,
    )
    skip_bad_images: bool = setting(False, "skip images that cannot be read, and list them", "data", free=True)


@dataclass(frozen=True)
class MachineArguments(Arguments):
    """How the machine is used; only precision and tf32 affect the results."""

    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", "machine", free=True)
    precision: str = setting(
        "auto",
        "precision of matrix products; auto: bf16 on a GPU that supports it, else fp32",
        "machine",
        choices=PRECISIONS,
    )
    tf32: str = setting("on", "allow TF32 for fp32 products in the encoders", "machine", choices=("on", "off"))
    compile: bool = setting(False, "compile the encoders' blocks with torch.compile", "machine", free=True)
    num_workers: int = setting(2, "worker processes that load images", "machine", between=(0, 512), free=True)
