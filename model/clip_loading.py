"""Load CLIP weights of any common form with the activation they need (docs/method.md, "Frozen CLIP")."""

import logging
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import huggingface_hub
import open_clip
import torch
from huggingface_hub.utils import get_session
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, resize_pos_embed
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
from torch import Tensor

from model.checkpoint_schema import FloatTensor, check_state, without_wrappers
from model.clip import FrozenCLIP
from model.config import ACTIVATIONS, TOY
from utils.errors import UserError
from utils.fields import limited
from utils.reading import read_json, wrong_content
from utils.schema import MayHoldMore, Plain, check
from utils.text import first_line

logger = logging.getLogger(__name__)

TOY_CLIP = Path(__file__).resolve().parent.parent / "ckpt" / "toy_clip"
DEFAULT_TAG = "openai"
HUB_TIMEOUT = 5.0  # seconds
# The published method uses ViT-L-14-336 at 37 x 37 patches.
DEFAULT_IMG_SIZES = {"ViT-L-14-336": 518}
TRANSFORMERS = (
    "these weights have transformers' format; take the same model's file for open_clip, such as "
    "open_clip_model.safetensors on its page of the hub, or a tag of open_clip (--clip_weights openai)"
)
# Additional entries of OpenAI's own archives; no other distribution has them.
OPENAI_ENTRIES = ("input_resolution", "context_length", "vocab_size")


@dataclass
class _Vision(CLIPVisionCfg):
    """open_clip's own fields, with the limits of a plain, square ViT; open_clip checks the other sizes."""

    layers: int = limited(12, between=(1, 1000))
    patch_size: int = limited(16, between=(1, 8192))
    image_size: int = limited(224, between=(1, 8192))


@dataclass
class _Text(CLIPTextCfg):
    """open_clip's own fields, with limits."""

    layers: int = limited(12, between=(1, 1000))


@dataclass
class _Clip(MayHoldMore):
    more = Plain
    embed_dim: int
    vision_cfg: _Vision
    text_cfg: _Text
    quick_gelu: bool = False


@dataclass
class _Preprocessing(MayHoldMore):
    more = Plain
    mean: tuple[float, float, float] = open_clip.OPENAI_DATASET_MEAN
    std: tuple[float, float, float] = limited(open_clip.OPENAI_DATASET_STD, between=(1e-6, 1e6))


@dataclass
class _ClipFile(MayHoldMore):
    """An `open_clip_config.json`."""

    model_cfg: _Clip
    preprocess_cfg: _Preprocessing | None = None


class _Source(NamedTuple):
    """Weights, their origin, the activation they need (None: unknown), and `mean` and `std` of the images."""

    model_cfg: dict[str, Any]
    weights: Path
    activation: str | None = None
    preprocessing: Mapping[str, Any] = MappingProxyType({})


def load_clip(
    model_name: str = "ViT-L-14-336",
    clip_weights: str | Path | None = None,
    img_size: int | None = None,
    activation: str | None = None,
) -> FrozenCLIP:
    """Build a frozen CLIP in float32 (docs/method.md, "Frozen CLIP").

    Args:
        model_name: a name of open_clip, `toy` (the included toy CLIP), or `local-dir:FOLDER`.
        clip_weights: a weights file in any format that open_clip reads (including OpenAI's archives), the folder of
            one, or one of open_clip's tags for the model; None uses OpenAI's weights from the hub, or those in the
            local folder.
        img_size: pixels, a multiple of the patch size; None is 518 for ViT-L-14-336 and otherwise the model's own.
        activation: "gelu" or "quick_gelu"; None follows the weights.

    Raises:
        UserError: the model is unknown, the weights are unavailable or do not fit, their activation is unknown, or the
            image size is not a multiple of the patch size.
    """
    folder = _local_folder(model_name)
    source = _local_source(model_name, folder, clip_weights) if folder else _named_source(model_name, clip_weights)
    state = _read_state_dict(source.weights)
    needed = source.activation or _infer_activation(model_name, source.weights, state)
    chosen = _choose_activation(source.weights, needed, activation)
    size = check_image_size(model_name, source.model_cfg, img_size)
    model_cfg = {**source.model_cfg, "vision_cfg": {**source.model_cfg["vision_cfg"], "image_size": size}}
    model_cfg["quick_gelu"] = chosen == "quick_gelu"
    try:
        with torch.device("meta"):  # needs no memory, whatever sizes the file has
            shapes = open_clip.CLIP(**model_cfg)
    except (TypeError, ValueError, AssertionError, ArithmeticError, RuntimeError) as error:  # sizes that do not fit
        raise UserError(f"{model_name}: only plain CLIP models can be adapted ({first_line(error)})") from error
    clip = filled(shapes, _fitting_weights(shapes, state, source.weights, model_name))
    logger.info("CLIP %s at %d px, %s, weights from %s", model_name, size, chosen, source.weights)
    mean = source.preprocessing.get("mean") or open_clip.OPENAI_DATASET_MEAN
    std = source.preprocessing.get("std") or open_clip.OPENAI_DATASET_STD
    return FrozenCLIP(clip, model_name, chosen, mean, std)


def filled(shapes: open_clip.CLIP, state: Mapping[str, Tensor]) -> open_clip.CLIP:
    """A CLIP on "meta" with weights, without the seconds that random initialisation takes for ViT-L."""
    clip = shapes.to_empty(device="cpu")
    clip.load_state_dict(state)
    if clip.attn_mask is not None:  # the only buffer that is in no file
        clip.attn_mask = torch.full(clip.attn_mask.shape, -torch.inf).triu(1)
    return clip


def is_tag(model_name: str, clip_weights: str) -> bool:
    """Whether `clip_weights` is one of open_clip's tags for a model."""
    return clip_weights in list_pretrained_tags_by_model(model_name)


def check_image_size(model_name: str, model_cfg: dict[str, Any], img_size: int | None) -> int:
    """The image size to use; `UserError` unless it is a multiple of the patch size, at least two patches."""
    vision = CLIPVisionCfg(**model_cfg["vision_cfg"])
    default = DEFAULT_IMG_SIZES.get(model_name.removesuffix("-quickgelu"), vision.image_size)
    size, patch = default if img_size is None else img_size, vision.patch_size
    if size % patch or size < 2 * patch:
        near = max(2, round(size / patch)) * patch
        raise UserError(f"--img_size {size}: {model_name} has patches of {patch} px; choose a multiple, such as {near}")
    return size


def _local_folder(model_name: str) -> Path | None:
    if model_name == TOY:
        return TOY_CLIP
    return Path(model_name.removeprefix("local-dir:")) if model_name.startswith("local-dir:") else None


def _choose_activation(weights: Path, needed: str | None, activation: str | None) -> str:
    if activation not in (None, *ACTIVATIONS):
        raise UserError(f"--activation {activation}: choose one of {', '.join(ACTIVATIONS)}")
    chosen = activation or needed
    if chosen is None:
        raise UserError(
            f"{weights}: the activation of these weights is unknown; "
            "give --activation quick_gelu (OpenAI and its conversions) or --activation gelu (most others)"
        )
    if needed not in (None, chosen):
        problem = "%s: runs with %s (--activation), although these weights were trained with %s"
        logger.warning(problem, weights, chosen, needed)
    return chosen


def _local_source(model_name: str, folder: Path, clip_weights: str | Path | None) -> _Source:
    config_file = folder / "open_clip_config.json"
    if not config_file.is_file():
        problem = TRANSFORMERS if (folder / "config.json").is_file() else "give the folder of an open_clip model"
        raise UserError(f"--model_name {model_name}: {config_file} does not exist; {problem}")
    config = read_json(config_file, _ClipFile)
    weights = _weights_in(Path(clip_weights or folder))
    # In open_clip's configuration files the default is GELU.
    activation = "quick_gelu" if config["model_cfg"].get("quick_gelu") else "gelu"
    return _Source(config["model_cfg"], weights, activation, config.get("preprocess_cfg") or {})


def _weights_in(path: Path) -> Path:
    """A weights file, or the one in a folder, preferably open_clip's; `UserError` if there is none."""
    endings = [".safetensors", ".bin", ".pth", ".pt"]
    files = [file for file in path.glob("*.*") if file.suffix in endings and file.is_file()]
    files.sort(key=lambda file: (not file.name.startswith("open_clip"), endings.index(file.suffix), file.name))
    weights = path if path.is_file() else next(iter(files), None)
    if weights is None:
        raise UserError(f"{path}: no weights file (open_clip_model.safetensors); give one with --clip_weights")
    return weights


def _named_source(model_name: str, clip_weights: str | Path | None) -> _Source:
    model_cfg = None if ":" in model_name else open_clip.get_model_config(model_name)
    if model_cfg is None:
        raise UserError(
            f"--model_name {model_name}: unknown; use toy, local-dir:FOLDER, or a name of open_clip.list_models(), "
            "such as ViT-L-14-336"
        )
    vision = model_cfg["vision_cfg"]
    plain_vit = isinstance(vision.get("patch_size"), int) and "timm_model_name" not in vision
    if "hf_tokenizer_name" in model_cfg["text_cfg"] or not plain_vit:
        raise UserError(f"--model_name {model_name}: only models with a plain ViT and CLIP's tokenizer can be adapted")
    if clip_weights and Path(clip_weights).exists():
        return _Source(model_cfg, _weights_in(Path(clip_weights)))
    tag = str(clip_weights or DEFAULT_TAG)
    tags = list_pretrained_tags_by_model(model_name)
    if tag not in tags:
        raise UserError(f"--clip_weights {tag}: no file and no tag of {model_name} (tags: {', '.join(tags) or 'none'})")
    return _hub_source(model_name, model_cfg, tag)


def _hub_source(model_name: str, model_cfg: dict[str, Any], tag: str) -> _Source:
    known = get_pretrained_cfg(model_name, tag)
    hub, url = known.get("hf_hub", "").rstrip("/"), known.get("url", "")
    try:
        weights = _cached_weights(hub)
        if weights is None:
            if hub:
                reach_hub()
            weights = download_pretrained(known)
    except Exception as error:  # the hub's client raises many kinds of network, disk and proxy errors
        addresses = " or ".join(part for part in (f"https://huggingface.co/{hub}" if hub else "", url) if part)
        raise UserError(
            f"the {tag} weights of {model_name} cannot be downloaded ({first_line(error)}): download them from "
            f"{addresses} and give the file with --clip_weights FILE"
        ) from error
    activation = "quick_gelu" if known.get("quick_gelu") or tag == "openai" else "gelu"
    return _Source(model_cfg, Path(weights), activation, known)


def _cached_weights(hub: str) -> str | None:
    """The file of an earlier download, which needs no network; hub: ORG/MODEL, or ORG/MODEL/FILE."""
    repository, names = hub, ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    if hub.count("/") == 2:
        repository, name = hub.rsplit("/", 1)
        names = (f"{Path(name).stem}.safetensors", name)
    cached = (huggingface_hub.try_to_load_from_cache(repository, file) for file in names) if repository else ()
    return next((path for path in cached if isinstance(path, str)), None)


def reach_hub() -> None:
    """Raise an error within seconds if the hub cannot be reached: its client retries each file for 20 seconds."""
    get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT)


def _infer_activation(model_name: str, file: Path, state: dict[str, Tensor]) -> str | None:
    """The activation of a weights file according to the file, its folder or the model's name; None if unknown."""
    if _is_torchscript(file) or any(entry in state for entry in OPENAI_ENTRIES):
        return "quick_gelu"
    config_file = file.parent / "open_clip_config.json"
    if config_file.is_file():
        quick_gelu = read_json(config_file, _ClipFile)["model_cfg"].get("quick_gelu")
        if quick_gelu is not None:
            return "quick_gelu" if quick_gelu else "gelu"
    return "quick_gelu" if model_name.endswith("-quickgelu") else None


def _is_torchscript(file: Path) -> bool:
    """OpenAI distributes TorchScript archives: zip files with a `code` folder."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any("/code/" in name for name in archive.namelist())


def _read_state_dict(file: Path) -> dict[str, Tensor]:
    """A state dict in any form that open_clip reads, without unpickling code."""
    try:
        if _is_torchscript(file):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated
                return torch.jit.load(file, map_location="cpu").state_dict()
        state = without_wrappers(open_clip.factory.load_state_dict(str(file), device="cpu", weights_only=True))
    except Exception as error:  # each format raises its own errors for damaged files
        problem = wrong_content(file, error) or (
            f"not a CLIP weights file that open_clip reads ({type(error).__name__}); "
            "use safetensors, a state dict saved by torch, or OpenAI's archive"
        )
        raise UserError(f"{file}: {problem}") from error
    if any(key.startswith(("text_model.", "vision_model.")) for key in state):
        raise UserError(f"{file}: {TRANSFORMERS}")
    return state


def _fitting_weights(
    clip: open_clip.CLIP, content: Mapping[str, Tensor], source: Path, model_name: str
) -> dict[str, Tensor]:
    """The weights for `clip`; `UserError` if a tensor is missing, invalid or of another shape."""
    state = {key: value for key, value in content.items() if key not in (*OPENAI_ENTRIES, "attn_mask")}
    check(state, dict[str, FloatTensor], source)
    # OpenAI's archives are float16, in which a CPU cannot interpolate the positions.
    state = {key: value.float() for key, value in state.items()}
    if "logit_scale" in state and state["logit_scale"].numel() == 1:  # a scalar in some files, a vector in others
        state["logit_scale"] = state["logit_scale"].reshape(clip.logit_scale.shape)
    try:
        resize_pos_embed(state, clip)
    except (IndexError, RuntimeError) as error:
        raise UserError(f"{source}: 'visual.positional_embedding' fits no square image; check --model_name") from error
    check_state(state, clip.state_dict(), f"{source} for {model_name}:", "--model_name")
    return state
