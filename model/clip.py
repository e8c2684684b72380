"""The frozen CLIP: built and loaded by open_clip, with the activation that its weights were trained with (DESIGN 3)."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import resize_pos_embed
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from model.config import ACTIVATIONS, depth_defaults
from utils.errors import UserError

logger = logging.getLogger(__name__)

TOY_CLIP = Path(__file__).resolve().parent.parent / "ckpt" / "toy_clip"
DEFAULT_TAG = "openai"
# Image sizes that differ from the model's own: the published method reads ViT-L-14-336 at 37 x 37 patches.
DEFAULT_IMG_SIZES = {"ViT-L-14-336": 518}
# Entries that OpenAI's own archives carry beside the weights; no other distribution has them.
OPENAI_ENTRIES = ("input_resolution", "context_length", "vocab_size")


class FrozenCLIP(nn.Module):
    """An open_clip CLIP whose parameters never change: no gradients, always in eval mode.

    Attributes: `clip` (the open_clip model), `model_name`, `activation` ("gelu" or "quick_gelu"), `img_size` in pixels,
    `mean` and `std` of the image normalisation, `weights_digest` (of all weights but the resized positions).
    """

    def __init__(
        self,
        clip: open_clip.CLIP,
        model_name: str,
        activation: str,
        mean: tuple[float, ...] = open_clip.OPENAI_DATASET_MEAN,
        std: tuple[float, ...] = open_clip.OPENAI_DATASET_STD,
    ) -> None:
        super().__init__()
        check_architecture(clip, model_name)
        self.clip = clip.requires_grad_(False).eval()
        self.model_name = model_name
        self.activation = activation
        self.mean, self.std = tuple(mean), tuple(std)
        self.img_size: int = clip.visual.image_size[0]
        self.weights_digest = digest_weights(clip)
        self.tokenizer = SimpleTokenizer(context_length=clip.context_length)
        self.eval()

    def train(self, mode: bool = True) -> FrozenCLIP:
        """Stay in eval mode whatever is asked for: frozen means frozen."""
        return super().train(False)

    @property
    def vision_width(self) -> int:
        return self.clip.visual.transformer.width

    @property
    def text_width(self) -> int:
        return self.clip.transformer.width

    @property
    def embed_dim(self) -> int:
        return self.clip.visual.output_dim

    @property
    def vision_layers(self) -> int:
        return len(self.clip.visual.transformer.resblocks)

    @property
    def text_layers(self) -> int:
        return len(self.clip.transformer.resblocks)

    @property
    def grid(self) -> int:
        """Patches along one side of the square image."""
        return self.clip.visual.grid_size[0]

    @property
    def defaults(self) -> dict[str, Any]:
        """Levels and adapter depths that follow this model's depth (DESIGN 2)."""
        return depth_defaults(self.vision_layers, self.text_layers)

    def embed_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> token stream before the first block, (B, 1 + N, D_v), class token first."""
        visual = self.clip.visual
        patches = visual.conv1(images).flatten(2).transpose(1, 2)  # (B, N, D_v)
        cls = visual.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
        x = torch.cat([cls, patches], dim=1) + visual.positional_embedding.to(patches.dtype)
        return visual.ln_pre(x)

    def project_image(self, tokens: Tensor) -> Tensor:
        """`ln_post` and CLIP's own visual projection: (..., D_v) -> (..., D)."""
        return self.clip.visual.ln_post(tokens) @ self.clip.visual.proj

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Token ids (P, T) -> text stream before the first block, (P, T, D_t)."""
        return self.clip.token_embedding(tokens) + self.clip.positional_embedding[: tokens.shape[1]]

    def project_text(self, pooled: Tensor) -> Tensor:
        """CLIP's own text projection: (P, D_t) -> (P, D)."""
        projection = self.clip.text_projection
        return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Prompts -> token ids (P, T), cut to the longest one: attention is causal, so nothing behind it can matter."""
        return cut_to_length(self.tokenizer(prompts))


def cut_to_length(tokens: Tensor) -> Tensor:
    """Drop the columns behind the last end-of-text token, the largest id of a row: (P, 77) -> (P, T)."""
    return tokens[:, : int(tokens.argmax(dim=-1).max()) + 1]


def digest_weights(clip: nn.Module) -> str:
    """A hex digest of all weights but the visual position embedding, which depends on the image size."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(clip.state_dict().items()):
        if name != "visual.positional_embedding":
            digest.update(name.encode("utf-8"))
            digest.update(value.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def check_architecture(clip: nn.Module, model_name: str) -> None:
    """Refuse towers that are not CLIP's plain ViT and causal text transformer."""
    visual = getattr(clip, "visual", None)
    blocks = (
        [*clip.transformer.resblocks, *visual.transformer.resblocks] if isinstance(visual, VisionTransformer) else []
    )
    if (
        not isinstance(clip, open_clip.CLIP)
        or not blocks
        or any(type(block) is not ResidualAttentionBlock for block in blocks)
        or visual.pool_type != "tok"
        or visual.attn_pool is not None
        or visual.proj is None
        or visual.image_size[0] != visual.image_size[1]
        or clip.attn_mask is None
        or clip.text_pool_type != "argmax"
        or clip.text_projection is None
    ):
        raise UserError(f"{model_name}: only CLIP models with a plain ViT and a causal text transformer can be adapted")


@dataclass(frozen=True)
class _Source:
    """Weights and where they come from, with the activation that they are known to need (None: not told)."""

    model_cfg: dict[str, Any]
    weights: Path
    state: dict[str, Tensor] = field(repr=False)
    activation: str | None
    mean: tuple[float, ...] = open_clip.OPENAI_DATASET_MEAN
    std: tuple[float, ...] = open_clip.OPENAI_DATASET_STD


def load_clip(
    model_name: str = "ViT-L-14-336",
    clip_weights: str | Path | None = None,
    img_size: int | None = None,
    activation: str | None = None,
) -> FrozenCLIP:
    """Build a frozen CLIP in float32 (DESIGN 3).

    model_name: a name that open_clip knows, `toy` (the shipped toy CLIP), or `local-dir:FOLDER`.
    clip_weights: a weights file in any format that open_clip reads (OpenAI's archives too), or one of open_clip's tags
        for the model; None takes OpenAI's weights from the hub, or those in the local folder.
    img_size: pixels, a multiple of the patch size; None is 518 for ViT-L-14-336 and otherwise the model's own.
    activation: "gelu" or "quick_gelu"; None follows the weights.

    Raises `UserError` for an unknown model, weights that cannot be had or do not fit, an activation that nothing tells,
    and an image size that is not made of whole patches.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise UserError(f"--activation {activation}: choose one of {', '.join(ACTIVATIONS)}")
    source = (
        _local_source(model_name, clip_weights)
        if _local_folder(model_name)
        else _named_source(model_name, clip_weights)
    )
    if source.activation is None and activation is None:
        raise UserError(
            f"{source.weights}: nothing tells which activation these weights were trained with; "
            "give --activation quick_gelu (OpenAI and its conversions) or --activation gelu (most others)"
        )
    if activation is not None and source.activation not in (None, activation):
        logger.warning(
            "%s needs %s but runs with %s, as asked for with --activation",
            source.weights,
            source.activation,
            activation,
        )
    chosen = activation or source.activation
    size = check_image_size(model_name, source.model_cfg, img_size)
    model_cfg = {**source.model_cfg, "vision_cfg": {**source.model_cfg["vision_cfg"], "image_size": size}}
    model_cfg["quick_gelu"] = chosen == "quick_gelu"
    try:
        clip = open_clip.CLIP(**model_cfg)
    except TypeError as error:
        raise UserError(f"{model_name}: only plain CLIP models can be adapted ({error})") from error
    _load_weights(clip, source, model_name)
    logger.info("CLIP %s at %d px, %s, weights from %s", model_name, size, chosen, source.weights)
    return FrozenCLIP(clip, model_name, chosen, source.mean, source.std)


def check_image_size(model_name: str, model_cfg: dict[str, Any], img_size: int | None) -> int:
    """The image size to use; `UserError` unless it is made of at least two whole patches a side."""
    vision = model_cfg["vision_cfg"]
    size = (
        DEFAULT_IMG_SIZES.get(model_name.removesuffix("-quickgelu"), vision["image_size"])
        if img_size is None
        else img_size
    )
    patch = vision["patch_size"]
    if size % patch or size < 2 * patch:
        near = max(2, round(size / patch)) * patch
        raise UserError(
            f"--img_size {size}: {model_name} has patches of {patch} px, take a multiple of it such as {near}"
        )
    return size


def _local_folder(model_name: str) -> Path | None:
    if model_name == "toy":
        return TOY_CLIP
    return Path(model_name.removeprefix("local-dir:")) if model_name.startswith("local-dir:") else None


def _local_source(model_name: str, clip_weights: str | Path | None) -> _Source:
    folder = _local_folder(model_name)
    config_file = folder / "open_clip_config.json"
    if not config_file.is_file():
        raise UserError(f"--model_name {model_name}: {config_file} is not there; the folder must be an open_clip model")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        model_cfg, preprocess = config["model_cfg"], config.get("preprocess_cfg", {})
    except (json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{config_file}: not an open_clip configuration ({error})") from error
    weights = Path(clip_weights) if clip_weights else next(iter(_weight_files(folder)), None)
    if weights is None or not weights.is_file():
        raise UserError(f"{weights or folder}: no weights file (open_clip_model.safetensors) is there")
    return _Source(
        model_cfg,
        weights,
        _read_state_dict(weights),
        # In open_clip's own configuration files a missing entry means GELU.
        "quick_gelu" if model_cfg.get("quick_gelu", False) else "gelu",
        tuple(preprocess.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        tuple(preprocess.get("std", open_clip.OPENAI_DATASET_STD)),
    )


def _weight_files(folder: Path) -> list[Path]:
    """Weights in an open_clip folder, safetensors first."""
    return [file for ending in ("safetensors", "bin", "pth", "pt") for file in sorted(folder.glob(f"*.{ending}"))]


def _named_source(model_name: str, clip_weights: str | Path | None) -> _Source:
    model_cfg = None if ":" in model_name else open_clip.get_model_config(model_name)
    if model_cfg is None:
        raise UserError(
            f"--model_name {model_name}: not known; take toy, local-dir:FOLDER, or a name that open_clip.list_models() "
            "gives, such as ViT-L-14-336"
        )
    vision = model_cfg["vision_cfg"]
    plain_vit = isinstance(vision.get("patch_size"), int) and "timm_model_name" not in vision
    if "hf_tokenizer_name" in model_cfg["text_cfg"] or not plain_vit:
        raise UserError(
            f"--model_name {model_name}: only CLIP models with a plain ViT and CLIP's tokenizer can be adapted"
        )
    file = Path(clip_weights) if clip_weights else None
    if file is not None and file.is_file():
        state = _read_state_dict(file)
        return _Source(model_cfg, file, state, _told_activation(model_name, file, state))
    tag = str(clip_weights or DEFAULT_TAG)
    tags = list_pretrained_tags_by_model(model_name)
    if tag not in tags:
        what = f"--clip_weights {tag}: no such file, and" if clip_weights else "no --clip_weights given, and"
        raise UserError(
            f"{what} {model_name} has no weights of that tag (known: {', '.join(tags) or 'none'}); give a file"
        )
    return _hub_source(model_name, model_cfg, tag)


def _hub_source(model_name: str, model_cfg: dict[str, Any], tag: str) -> _Source:
    known = get_pretrained_cfg(model_name, tag)
    hub, url = known.get("hf_hub", "").rstrip("/"), known.get("url", "")
    try:
        weights = download_pretrained(known)
    except Exception as error:  # the hub's client raises its own kinds for network, disk and proxy failures
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = " or ".join(part for part in (f"https://huggingface.co/{hub}" if hub else "", url) if part)
        raise UserError(
            f"the {tag} weights of {model_name} cannot be had here ({reason[:160]}): download them from {where} "
            "and give the file with --clip_weights FILE"
        ) from error
    return _Source(
        model_cfg,
        Path(weights),
        _read_state_dict(Path(weights)),
        "quick_gelu" if known.get("quick_gelu", False) or tag == "openai" else "gelu",
        tuple(known.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        tuple(known.get("std") or open_clip.OPENAI_DATASET_STD),
    )


def _told_activation(model_name: str, file: Path, state: dict[str, Tensor]) -> str | None:
    """The activation that a weights file needs, where the file, its folder or the model's name tells; or None."""
    if _is_torchscript(file) or any(entry in state for entry in OPENAI_ENTRIES):
        return "quick_gelu"
    beside = file.parent / "open_clip_config.json"
    if beside.is_file():
        stated = json.loads(beside.read_text(encoding="utf-8")).get("model_cfg", {}).get("quick_gelu")
        if stated is not None:
            return "quick_gelu" if stated else "gelu"
    return "quick_gelu" if model_name.endswith("-quickgelu") else None


def _is_torchscript(file: Path) -> bool:
    """OpenAI distributes TorchScript archives: zip files with a `code` folder."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any("/code/" in name for name in archive.namelist())


def _read_state_dict(file: Path) -> dict[str, Tensor]:
    """A state dict in any form that open_clip reads; OpenAI's archives as TorchScript, which runs no pickle."""
    try:
        if _is_torchscript(file):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated, OpenAI's archives stay
                return torch.jit.load(file, map_location="cpu").state_dict()
        return open_clip.factory.load_state_dict(str(file), device="cpu", weights_only=True)
    except Exception as error:  # each format fails in its own way on a file that is damaged or is none of them
        raise UserError(
            f"{file}: not a CLIP weights file that open_clip reads ({type(error).__name__}); "
            "it takes safetensors, a state dict saved by torch, or OpenAI's archive"
        ) from error


def _load_weights(clip: open_clip.CLIP, source: _Source, model_name: str) -> None:
    # Float16 files (OpenAI's archives) are widened first: positions cannot be interpolated in half precision on a CPU.
    state = {
        key: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in source.state.items()
        if key not in OPENAI_ENTRIES and key != "attn_mask"
    }
    if "logit_scale" in state:  # a scalar in some files, a vector of one in others
        state["logit_scale"] = state["logit_scale"].reshape(clip.logit_scale.shape)
    resize_pos_embed(state, clip)
    expected = clip.state_dict()
    for key, value in expected.items():
        if key not in state:
            raise UserError(
                f"{source.weights}: no '{key}', so these are not weights of {model_name}; check --model_name"
            )
        if state[key].shape != value.shape:
            raise UserError(
                f"{source.weights}: '{key}' is {tuple(state[key].shape)} where {model_name} has {tuple(value.shape)}; "
                "check --model_name"
            )
    unknown = sorted(set(state) - set(expected))
    if unknown:
        raise UserError(f"{source.weights}: '{unknown[0]}' has no place in {model_name}; check --model_name")
    clip.load_state_dict(state)
