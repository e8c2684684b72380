"""Groups of options that several scripts share, and readers of their values."""

from dataclasses import dataclass
from functools import partial
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

_model, _data = partial(setting, group="model"), partial(setting, group="data")
_model_config = partial(changed, ModelConfig, group="model")
_machine = partial(setting, group="machine", free=True)


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

    model_name: str | None = _model(
        "ViT-L-14-336", "open_clip model name, local-dir:FOLDER, or toy (the toy CLIP in this repository)"
    )
    clip_weights: str | None = _model(
        None, "weights file for open_clip, its folder, or an open_clip tag", free=True, unset="OpenAI's from the hub"
    )
    img_size: int | None = _model_config(
        "img_size", None, help="side of the square input in pixels", unset="518 for ViT-L-14-336, else the model's"
    )
    activation: str | None = _model_config(
        "activation", None, help="activation function in CLIP's MLPs", unset="the one these weights were trained with"
    )
    surgery: str | None = _model_config(
        "surgery",
        help="V-V attention of the frozen image features: dual (parallel to the blocks, as CLIP-Surgery), sequential "
        "(inside the blocks, as AA-CLIP), or batch_axis (as sequential, but over the images of a batch, a bug of "
        "AA-CLIP's code)",
    )
    surgery_until_layer: int | None = _model_config(
        "surgery_until_layer", None, help="N: the last N - 1 vision blocks use V-V attention", unset="5/6 of the depth"
    )


@dataclass(frozen=True)
class ImageArguments(Arguments):
    """Where images are and how they are read."""

    data_root: Path | None = _data(None, "folder of the datasets", free=True, unset="$ANOMALY_DATA_ROOT, else data")
    metadata: Path | None = _data(None, "image list in JSON lines, instead of the one made from the folders", free=True)
    class_names: str | None = _data(
        None,
        'class names in prompts: catalog, published (of AA-CLIP\'s code), or a JSON file {"class": "readable name"}',
        free=True,
        unset="catalog",
        type=names_or_file,
    )
    mask_threshold: str | float | None = _data(
        HALF, "share of a mask's largest value from which its pixels are anomalous, or nonzero", type=share_or_nonzero
    )
    max_megapixels: int = _data(179, "largest image that is read, in megapixels", free=True, between=(1, 100_000))
    skip_bad_images: bool = _data(False, "skip images that cannot be read, and list them", free=True)

    def image_choices(self) -> tuple[Path | None, Path | None, str | None, bool, str | float | None]:
        """Where images are and how they are read, for `load_task`."""
        return self.data_root, self.metadata, self.class_names, self.skip_bad_images, self.mask_threshold


@dataclass(frozen=True)
class DataArguments(ImageArguments):
    """The images of a dataset."""

    dataset: str | None = _data("VisA", "dataset: a catalog name, or a folder in MVTec's layout")


@dataclass(frozen=True)
class MachineArguments(Arguments):
    """How the machine is used; only precision and tf32 affect the results."""

    device: str = _machine("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: str = _machine(
        "auto", "type of matrix products; auto: bf16 if the GPU supports it, else fp32", choices=PRECISIONS, free=False
    )
    tf32: str = _machine("on", "allow TF32 for fp32 products in the encoders", choices=("on", "off"), free=False)
    compile: bool = _machine(False, "compile the encoders' blocks with torch.compile")
    num_workers: int = _machine(2, "worker processes that load images", between=(0, 512))
