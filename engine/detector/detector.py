"""A checkpoint as a ready model: loaded in one call, predicting on one image."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from dataset.catalog import readable_name
from dataset.class_names import published_name
from dataset.images import content_digest, read_image, to_rgb
from dataset.options import PUBLISHED_NAMES
from dataset.prompts import build_prompts
from dataset.samples import image_tensor
from engine.detector.calibration import ANOMALOUS, NORMAL, Entry, Subject, find_entry, read_calibration, why_none
from engine.detector.hub import calibration_files, local_path
from engine.detector.references import References
from engine.detector.sharing import save_pretrained
from engine.runtime.device import check_device
from engine.runtime.run_folder import find_checkpoints
from model.adapter import AdaptedCLIP
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention, Attention
from model.checkpoint import Checkpoint, infer_choices, load_component, read_checkpoint
from model.clip import FrozenCLIP
from model.clip_loading import is_tag, load_clip
from model.config import REFERENCE_FEATURES, REFERENCE_WEIGHT, CrossAttentionConfig, LoopForward, ModelConfig
from model.frozen import UnadaptedCLIP, frozen_patches
from model.references import joined_calibrated_maps
from model.scoring import DET_SCORES, DOMAINS, Outputs, calibrated_maps, calibrated_scores, decisions, ranks
from model.text import Prompts
from utils.errors import UserError
from utils.paths import is_file
from utils.regions import Region, regions_of

logger = logging.getLogger(__name__)

PUBLISHED_MODEL = "ViT-L-14-336"
# How the published code trained, whatever the weights of CLIP: files of its form are taken so unless asked otherwise.
PUBLISHED = {"activation": "gelu", "class_names": PUBLISHED_NAMES}
# What a model that was shared keeps of its forward where nothing else is asked for.
MODEL_OVERRIDES = ("model_name", "img_size", "activation", "surgery", "surgery_until_layer")
# What unadapted CLIP is called in tables and figures.
UNADAPTED = "unadapted"
# What may be asked of a checkpoint with cross-attention in place of what it was trained with.
CROSS_ATTENTION_OVERRIDES = (
    "text_cross_attn_weight",
    "image_cross_attn_weight",
    "context_norm",
    "cross_attn_residual",
    "text_conditioning",
    "text_context",
    "cross_attn_heads",
)


@dataclass(frozen=True)
class Prediction:
    """What `Detector.predict` says of one image; it unpacks into map, score and level maps.

    anomaly_map: float32 (S, S), p_abnormal averaged over levels, in [0, 1], of words and, where the class has any, of
    normal references; score: in [0, 1], higher is more
    anomalous; level_maps: float32 (levels, S, S). S is the model's image size.

    Where the model is calibrated for the class (docs/testing.md, "A decision"), else None: decision, "anomalous" or
    "normal", of the score; rank, the share of normal images that score lower, in [0, 1); mask, bool (S, S), the pixels
    above their own threshold; regions, those of the mask in pixels of the original image, the worst first.
    """

    anomaly_map: np.ndarray
    score: float
    level_maps: np.ndarray
    decision: str | None = None
    rank: float | None = None
    mask: np.ndarray | None = None
    regions: tuple[Region, ...] | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.anomaly_map, self.score, self.level_maps))


class Detector(nn.Module):
    """A model with its checkpoint's story: `model`, `name`, `epoch`, `loop`, `config` (None: written elsewhere).

    det_score: which det score takes part in image scores, one of `DET_SCORES`, the published one unless asked for.
    `arguments`: what its training was asked for, as far as that is known; `source`: the checkpoint without tensors.
    `calibration`: thresholds, by which `predict` decides; those of others among them are never used. `references`:
    normal images of classes to compare with.
    """

    def __init__(
        self,
        model: AdaptedCLIP | UnadaptedCLIP,
        name: str,
        checkpoint: Checkpoint | None = None,
        loop_forward: LoopForward | None = None,
        det_score: str | None = None,
    ) -> None:
        super().__init__()
        self.loop_forward = loop_forward
        self.det_score = check_det_score(det_score or DET_SCORES[0])
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.epoch = checkpoint.epoch if checkpoint else None
        self.loop = checkpoint.loop if checkpoint else None
        self.config = checkpoint.config if checkpoint else None
        self.arguments = arguments_of(checkpoint) if checkpoint else {}
        self.source = checkpoint and replace(
            checkpoint, components={n: {} for n in checkpoint.components}, optimizers={}
        )
        self.calibration: Sequence[Entry] = ()
        self._refuses_others: Path | None = None
        self.references: dict[str, References] = {}

    def text_side(self, prompts: Prompts) -> Any:
        """What the model's forward needs of the text side, the same for all images."""
        return self.model.text_side(prompts, self.loop_forward)

    @property
    def clip(self) -> FrozenCLIP:
        return self.model.clip

    @property
    def text_adapter(self) -> nn.ModuleList:
        return self.model.text_adapter

    @property
    def image_adapter(self) -> nn.ModuleDict:
        return self.model.image_adapter

    @property
    def device(self) -> torch.device:
        return self.clip.clip.visual.conv1.weight.device

    @property
    def text_cross_attn(self) -> nn.Module:
        return self.model.text_cross_attn

    @property
    def image_cross_attn(self) -> nn.Module:
        return self.model.image_cross_attn

    @cached_property
    def digest(self) -> str:
        """A hex digest of all that scores depend on beside image, class and scoring: weights, and choices of forward.

        A checkpoint has the same one wherever its file is; asked to compute something else, it has another.
        """
        config = {name: value for name, value in self.model.config.to_dict().items() if name != "model_name"}
        cross = getattr(self.model, "cross_config", None)
        loop = self.loop_forward
        choices = [type(self.model).__name__, config, cross and asdict(cross), loop and loop._asdict()]
        digest = hashlib.sha256(json.dumps([self.clip.weights_digest, choices], sort_keys=True).encode("utf-8"))
        for name, component in getattr(self.model, "components", {}).items():
            if name.startswith("text") and not self.model.config.text_adapted:
                continue  # fresh weights, which no score depends on
            for key, value in sorted(component.state_dict().items()):
                digest.update(f"{name}.{key}".encode())
                digest.update(value.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def name_in_prompts(self, class_name: str, class_names: str | None = None) -> str:
        """What a class is called in prompts; class_names: as for `predict`."""
        published = (class_names or self.arguments.get("class_names")) == PUBLISHED_NAMES
        return (published_name(class_name) if published else None) or readable_name(class_name)

    def subject(
        self, class_name: str, domain: str = "industrial", det_score: str | None = None, class_names: str | None = None
    ) -> Subject:
        """What a calibration must be of for this model and its references; arguments as for `predict`."""
        name, references = self.name_in_prompts(class_name, class_names), self.references.get(readable_name(class_name))
        digest = None if references is None else references.digest
        return Subject(self.digest, name, domain, det_score or self.det_score, digest)

    @torch.inference_mode()
    def remember(
        self,
        images: Sequence[Image.Image | np.ndarray | str | Path],
        class_name: str = "object",
        weight: float = REFERENCE_WEIGHT,
        features: str = REFERENCE_FEATURES[0],
        class_names: str | None = None,
        called: str | None = None,
    ) -> References:
        """Compare images of a class with these normal ones from now on (docs/method.md, "References").

        weight: of the distances, beside the words; 0 leaves the words alone. features: "trained", those that
        the model compares with words; "frozen", CLIP's own by V-V attention, at the cost of a second pass; or "both".
        class_name, class_names: as for `predict`. called: the name to find them by, where it is not the class's.
        Raises `UserError` for images that cannot be read, and for features that do not exist.
        """
        if features not in REFERENCE_FEATURES:
            raise UserError(f"--reference_features {features}: choose one of {', '.join(REFERENCE_FEATURES)}")
        if not images:
            raise UserError(f"no normal images of '{class_name}' to compare with")
        side, rows = self._words_of(class_name, class_names)
        found, digests = [], []
        for image in map(as_image, images):
            pixels = self._pixels(image)
            found.append(self.patch_features(self.model(pixels, side, rows), pixels, features))
            digests.append(content_digest(image))
        memory = tuple(torch.cat([patches[0] for patches in level]) for level in zip(*found, strict=True))
        references = References(memory, weight, features, tuple(digests))
        self.references[readable_name(called or class_name)] = references
        return references

    def patch_features(self, outputs: Outputs, pixels: torch.Tensor, features: str) -> list[torch.Tensor]:
        """Unit patch features (B, N, D) of images (B, 3, S, S): of each level, and each branch of `features`."""
        # Unadapted CLIP compares frozen features with words already.
        if features == "trained" or isinstance(self.model, UnadaptedCLIP):
            return list(outputs.features)
        frozen = frozen_patches(self.clip, pixels, self.model.config)
        return frozen if features == "frozen" else [*outputs.features, *frozen]

    def reference_maps(self, references: References, outputs: Outputs, pixels: torch.Tensor) -> torch.Tensor:
        """Distances of images (B, 3, S, S) to references, (levels, B, S, S); outputs: the model's for these images."""
        features = self.patch_features(outputs, pixels, references.features)
        return references.maps(features, pixels.shape[-1], len(outputs.levels))

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        """An RGB image as the model takes it, (1, 3, S, S)."""
        return image_tensor(image, self.clip.img_size, self.clip.mean, self.clip.std)[None].to(self.device)

    def _words_of(self, class_name: str, class_names: str | None) -> tuple[Any, torch.Tensor]:
        """The text side of one class, and the rows of a batch of one image of it."""
        prompts = Prompts.from_texts(self.clip, [build_prompts(self.name_in_prompts(class_name, class_names))])
        rows = torch.zeros(1, dtype=torch.long, device=self.device)
        return self.text_side(prompts.to(self.device)), rows

    def use_calibration(self, *files: Path, required: bool = True) -> None:
        """Decide by the thresholds of files from now on; where several have those of a subject, the first does.

        required: a file without thresholds of this model is refused, and so is, in `predict`, a class that has none;
        otherwise, and where no such file is there, there is no decision then. Raises `UserError` for a damaged file.
        """
        there = files if required else list(filter(is_file, files))
        if not there:
            return
        self.calibration = [entry for file in there for entry in read_calibration(file)]
        self._refuses_others = there[0] if required else None
        if required and all(entry.checkpoint != self.digest for entry in self.calibration):
            raise UserError(
                f"{there[0]} holds no thresholds of {self.name}: calibrate it first (inference.py --calibrate)"
            )

    def find_calibration(self, checkpoint: str | Path, calibration: Path | None = None) -> None:
        """Decide by the thresholds of the file `calibration`, as `use_calibration`; without it by those that are kept
        of what `checkpoint` names, this model, if there are any."""
        if calibration is not None:
            self.use_calibration(calibration)
        else:
            self.use_calibration(*calibration_files(checkpoint, self.source and self.source.path), required=False)

    def thresholds(self, subject: Subject) -> Entry | None:
        """The thresholds of a subject; None, or `UserError` where a file was required to hold them."""
        entry = find_entry(self.calibration, subject)
        if entry is None and self._refuses_others is not None:
            raise UserError(
                f"{self._refuses_others}: {why_none(self.calibration, subject)}; calibrate for it (inference.py "
                "--calibrate)"
            )
        return entry

    @torch.inference_mode()
    def predict(
        self,
        image: Image.Image | np.ndarray | str | Path,
        class_name: str = "object",
        domain: str = "industrial",
        return_attention: bool = False,
        det_score: str | None = None,
        class_names: str | None = None,
        references: References | None = None,
    ) -> Prediction | tuple[Prediction, Attention]:
        """Anomaly map, score and per-level maps of one image: a path, a PIL image, or uint8 RGB (H, W, 3).

        class_name: what the object is called in the prompts, such as "metal screw". A single image has no class
        statistics to normalise by, so the map is the calibrated one and the score is half its maximum plus half the
        image's own; `domain="medical"`: the maximum alone (docs/method.md, "Scores").
        class_names: "published" calls a class of AA-CLIP's datasets, such as "pcb3", by the name that it has in the
        published code; "catalog" leaves every name as it is; None does as training did.
        return_attention: also give `Attention`, the weights of both cross-attentions per head, for a batch of one.
        det_score: in place of the detector's own.
        references: normal images to compare with, in place of those that are remembered of the class.
        Calibrated for this class, domain, det score and references, it decides as well (`Prediction`).
        Raises `UserError` for a file that cannot be read, for a domain or det score that is not known, and where
        attention is asked of a model without cross-attention.
        """
        det_score = check_det_score(det_score or self.det_score)
        if domain not in DOMAINS:
            raise UserError(f"domain {domain}: choose one of {', '.join(DOMAINS)}")
        if return_attention and not isinstance(self.model, AdaptedCLIPWithCrossAttention):
            raise UserError(f"{self.name} has no cross-attention to show")
        image = as_image(image)
        pixels = self._pixels(image)
        references = references or self.references.get(readable_name(class_name))
        entry = None
        if self.calibration:  # without any, the digest of all weights need not be known
            subject = self.subject(class_name, domain, det_score, class_names)
            entry = self.thresholds(subject._replace(references=references and references.digest))
        side, rows = self._words_of(class_name, class_names)
        outputs = self.model(pixels, side, rows)
        if references is None:
            levels = calibrated_maps(outputs, self.clip.img_size)
        else:
            distances = self.reference_maps(references, outputs, pixels)
            levels = joined_calibrated_maps(outputs, distances, references.weight)
        mean = levels.mean(dim=0)
        score = calibrated_scores(mean, outputs, domain, det_score)
        prediction = Prediction(mean[0].cpu().numpy(), float(score[0]), levels[:, 0].cpu().numpy())
        if entry is not None:
            prediction = decided(prediction, entry, image.size)
        return (prediction, self.model.attention(pixels, side, rows)) if return_attention else prediction

    def save_pretrained(self, folder: str | Path, licence: str | None = None) -> Path:
        """Write the trained components to a folder that `load_model` takes, with a card; returns the folder.

        As `engine.detector.sharing.save_pretrained`.
        """
        return save_pretrained(self, Path(folder), licence)


def as_image(image: Image.Image | np.ndarray | str | Path) -> Image.Image:
    """RGB from a path, a PIL image, or uint8 RGB (H, W, 3); `UserError` for what cannot be read. Files alone are turned
    as their EXIF tag says."""
    if isinstance(image, (str, Path)):
        return read_image(Path(image))
    return to_rgb(Image.fromarray(image) if isinstance(image, np.ndarray) else image)


def decided(prediction: Prediction, entry: Entry, size: tuple[int, int]) -> Prediction:
    """A prediction with what thresholds make of it; size: the original image's (width, height)."""
    score, anomaly_map = torch.tensor([prediction.score]), torch.from_numpy(prediction.anomaly_map)[None]
    anomalous, masks = decisions(score, anomaly_map, entry.image_threshold, entry.pixel_threshold)
    mask = masks[0].numpy()
    return replace(
        prediction,
        decision=ANOMALOUS if anomalous else NORMAL,
        rank=float(ranks(score, torch.tensor(entry.scores))),
        mask=mask,
        regions=regions_of(mask, prediction.anomaly_map, size),
    )


def check_det_score(kind: str) -> str:
    """The det score that is asked for; `UserError` for one that does not exist."""
    if kind not in DET_SCORES:
        raise UserError(f"--det_score {kind}: choose one of {', '.join(DET_SCORES)}")
    return kind


def arguments_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What the training of a checkpoint was asked for, as far as the file or its form tells."""
    if checkpoint.config is not None:
        return checkpoint.config.get("arguments", {})
    return PUBLISHED if checkpoint.is_published else {}


def load_model(
    path: str | Path,
    *,
    clip_weights: str | Path | None = None,
    device: str = "auto",
    clip: FrozenCLIP | None = None,
    calibration: str | Path | None = None,
    **overrides: Any,
) -> Detector:
    """Load a checkpoint as a ready model: a file, the latest of a run's folder, a folder that `save_pretrained` wrote,
    or such a one on the hub, `hf://ORG/NAME@REVISION`; with the thresholds that it was calibrated to.

    clip_weights: CLIP's weights file; without it the one that training used, then the hub. clip: a CLIP that is loaded
    already. calibration: a file of thresholds, which must be this model's; without it `calibration.json` beside the
    checkpoint counts, where it has any of this model's. overrides: `model_name`, `img_size`, `activation`, `surgery`,
    `surgery_until_layer` for files that do not say (AA-CLIP's published form), or to ask for something else than the
    file says, which is logged; so, too, for a model with cross-attention, those of `CROSS_ATTENTION_OVERRIDES`.
    `det_score`: as in `Detector`.
    Raises `UserError` where the file, the weights and the device do not fit together.
    """
    named, path = path, local_path(path)
    path = find_checkpoints(path)[-1] if path.is_dir() else path
    checkpoint = read_checkpoint(path)
    device = check_device(device, "fp32")
    clip = clip or load_clip_for(checkpoint, clip_weights, **overrides)
    detector = build_detector(checkpoint, clip, **overrides).to(device)
    detector.find_calibration(named, None if calibration is None else Path(calibration))
    return detector


def load_clip_for(checkpoint: Checkpoint, clip_weights: str | Path | None = None, **overrides: Any) -> FrozenCLIP:
    """The CLIP under a checkpoint: its own choices where it says them, `overrides` where they are given."""
    asked = _asked(checkpoint, overrides)
    if checkpoint.config is None:
        name = asked.get("model_name", PUBLISHED_MODEL)
        activation = asked.get("activation", arguments_of(checkpoint).get("activation"))
        clip = load_clip(name, clip_weights, asked.get("img_size"), activation)
        logger.info("%s has no config: assumed %s at %d px", checkpoint.path, name, clip.img_size)
        log_activation(checkpoint, clip.activation, given="activation" in asked)
        return clip
    config = checkpoint.model_config()
    name = asked.get("model_name", config.model_name)
    # A folder may lie elsewhere now; whether its weights are those trained on is told by their digest.
    if name != config.model_name and not all(each.startswith("local-dir:") for each in (name, config.model_name)):
        raise UserError(f"{checkpoint.path} was trained on {config.model_name}, not on {name}")
    for choice in ("img_size", "activation"):
        if asked.get(choice, getattr(config, choice)) != getattr(config, choice):
            logger.warning(
                "%s was trained with %s %s, now %s", checkpoint.path, choice, getattr(config, choice), asked[choice]
            )
    recorded = checkpoint.config.get("arguments", {}).get("clip_weights")
    if clip_weights is None and recorded and (Path(recorded).is_file() or is_tag(name, recorded)):
        clip_weights = recorded
    return load_clip(
        name, clip_weights, asked.get("img_size", config.img_size), asked.get("activation", config.activation)
    )


def _asked(checkpoint: Checkpoint, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked for in place of what a checkpoint was trained with: a model that was shared ran with some of it."""
    given = {name: value for name, value in overrides.items() if value is not None}
    if checkpoint.shared is None:
        return given
    _, model, cross, det_score = checkpoint.shared
    kept = {"det_score": det_score, **{name: getattr(model, name) for name in MODEL_OVERRIDES}}
    trained = checkpoint.cross_attention()
    if trained and cross:
        now = {name: getattr(cross, name) for name in CROSS_ATTENTION_OVERRIDES}
        kept |= {name: value for name, value in now.items() if value != getattr(trained, name)}
    return {**kept, **given}


def log_activation(checkpoint: Checkpoint, activation: str, given: bool) -> None:
    """Say as what a file without config is taken to be trained; given: the activation was asked for."""
    if checkpoint.is_published:
        logger.info(
            "%s has the form of AA-CLIP's published files: CLIP runs under %s, %s, and classes have the published "
            "names in prompts (--activation and --class_names say otherwise)",
            checkpoint.path,
            activation,
            "as asked for" if given else "as in the published code",
        )
    elif given or activation == "gelu":
        logger.info(
            "%s has no config: assumed trained under %s, with the catalog's names in prompts (--class_names)",
            checkpoint.path,
            activation,
        )
    else:
        logger.warning(
            "%s has no config: assumed trained under %s, as these weights of CLIP need, with the catalog's names in "
            "prompts; give --activation gelu, or --class_names published, if it was trained so",
            checkpoint.path,
            activation,
        )


def build_detector(checkpoint: Checkpoint, clip: FrozenCLIP, **overrides: Any) -> Detector:
    """An adapted model with a checkpoint's weights on a CLIP that is loaded already.

    Raises `UserError` for a checkpoint that does not fit, or in which a component is missing.
    """
    config = checkpoint_config(checkpoint, clip, **overrides)
    crossed = cross_attention_choices(checkpoint, **overrides)
    try:
        model = AdaptedCLIPWithCrossAttention(clip, config, cross=crossed) if crossed else AdaptedCLIP(clip, config)
    except UserError as error:
        raise UserError(f"{checkpoint.path}: {error}") from error
    for name, component in model.components.items():
        if name in checkpoint.components:
            load_component(component, checkpoint.components[name], name, checkpoint.path)
        elif (config.text_adapted or not name.startswith("text")) and not (
            checkpoint.config is None and name.endswith("cross_attn")
        ):
            raise UserError(f"{checkpoint.path}: has no '{name}', which a model of its config needs; it is damaged")
    epochs = "an unknown number of" if checkpoint.epoch is None else checkpoint.epoch
    logger.info("%s: %s epochs", checkpoint.path, epochs)
    return Detector(model, checkpoint.name, checkpoint, det_score=_asked(checkpoint, overrides).get("det_score"))


def cross_attention_choices(checkpoint: Checkpoint, **overrides: Any) -> CrossAttentionConfig | None:
    """What cross-attention a checkpoint was trained with, changed where `overrides` ask for something else; or None.

    Of a file without config it is an assumption, which is logged. Raises `UserError` where something is asked of a
    checkpoint without cross-attention, and for the weight of a branch that is not there.
    """
    asked = _of(CROSS_ATTENTION_OVERRIDES, _asked(checkpoint, overrides))
    trained = checkpoint.cross_attention()
    if trained is None:
        if asked:
            raise UserError(f"{checkpoint.path}: has no cross-attention, so --{next(iter(asked))} asks for nothing")
        return None
    for side in ("text", "image"):
        name = f"{side}_cross_attn_weight"
        if name in asked and f"{side}_cross_attn" not in checkpoint.components:
            raise UserError(f"{checkpoint.path}: has no {side}_cross_attn, so --{name} asks for nothing")
    chosen = replace(trained, **asked)
    if checkpoint.config is None:
        logger.warning(
            "%s has cross-attention and no config: assumed weights %g (text) and %g (image), context_norm %s, "
            "cross_attn_residual %s, text_context %s, text_conditioning %s, %d heads; change these with "
            "--text_cross_attn_weight, --image_cross_attn_weight, --context_norm, --cross_attn_residual, "
            "--text_context, --text_conditioning and --cross_attn_heads",
            checkpoint.path,
            chosen.text_cross_attn_weight,
            chosen.image_cross_attn_weight,
            chosen.context_norm,
            chosen.cross_attn_residual,
            chosen.text_context,
            chosen.text_conditioning,
            chosen.cross_attn_heads,
        )
        return chosen
    for name, value in asked.items():
        if value != getattr(trained, name):
            logger.warning("%s was trained with %s %s, now %s", checkpoint.path, name, getattr(trained, name), value)
    return chosen


def checkpoint_config(checkpoint: Checkpoint, clip: FrozenCLIP, **overrides: Any) -> ModelConfig:
    """The forward of a checkpoint on `clip`; `UserError` where it was trained on other weights."""
    asked = _of(("surgery", "surgery_until_layer"), _asked(checkpoint, overrides))
    known = checkpoint.model_config() if checkpoint.config else checkpoint.shared and checkpoint.shared.model
    if known and known.weights_digest != clip.weights_digest:
        raise UserError(
            f"{checkpoint.path} was trained on other weights of {known.model_name} ({known.weights_digest}) "
            f"than those loaded ({clip.weights_digest}); give the file it was trained on with --clip_weights"
        )
    if checkpoint.config is None:
        return _assumed_config(checkpoint, clip, asked)
    config = checkpoint.model_config()
    for name, value in asked.items():
        if value != getattr(config, name):
            logger.warning("%s was trained with %s %s, now %s", checkpoint.path, name, getattr(config, name), value)
    return replace(config, img_size=clip.img_size, activation=clip.activation, **asked)


def _of(names: tuple[str, ...], asked: Mapping[str, Any]) -> dict[str, Any]:
    return {name: asked[name] for name in names if name in asked}


def _assumed_config(checkpoint: Checkpoint, clip: FrozenCLIP, asked: dict[str, Any]) -> ModelConfig:
    for name in ("text_adapter", "image_adapter"):
        if name not in checkpoint.components:
            raise UserError(f"{checkpoint.path}: has no '{name}'")
    choices = infer_choices(checkpoint.components)
    levels = clip.defaults["levels"]
    if choices.pop("n_levels") != len(levels):
        raise UserError(f"{checkpoint.path}: has another number of levels than {clip.model_name}'s {len(levels)}")
    # AA-CLIP's own code, where such files come from, puts V-V attention inside the blocks.
    assumed = {"surgery": "sequential", **choices, **asked}
    logger.info(
        "%s has no config: assumed surgery %s, adapters %s, blend weights 0.1",
        checkpoint.path,
        assumed["surgery"],
        assumed.get("adapter", ModelConfig.adapter),
    )
    return clip.model_config(**assumed)


def unadapted_detector(clip: FrozenCLIP, det_score: str | None = None) -> Detector:
    """Unadapted CLIP, the baseline, with the same prompts and scoring."""
    return Detector(UnadaptedCLIP(clip, clip.model_config(text_adapted=False)), UNADAPTED, det_score=det_score)
