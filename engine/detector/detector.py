"""A model that predicts on single images: anomaly map, score, and a decision if it is calibrated."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from PIL import Image
from torch import nn

from dataset.images import content_digest, image_tensor
from dataset.prompts import PUBLISHED_NAMES, build_prompts, readable_name
from engine.detector.calibration import CalibrationKey, Entry, mismatch_reason, read_calibration
from engine.detector.hub import calibration_files
from engine.detector.prediction import ImageInput, Prediction, apply_thresholds, as_image
from model.adapter import AdaptedCLIP
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.checkpoint import Checkpoint, state_of
from model.clip import FrozenCLIP
from model.config import BATCH_SIZE, REFERENCE_FEATURES, REFERENCE_WEIGHT, TILES, LoopForward, tiles_choice
from model.frozen import UnadaptedCLIP
from model.references import References, joined_calibrated_maps, patch_features
from model.scoring import DET_SCORES, DOMAINS, Outputs, calibrated_maps, calibrated_scores, det_scores
from model.shared import Shared
from model.text import Prompts
from utils.errors import UserError

# The name of unadapted CLIP in tables and figures.
UNADAPTED = "unadapted"
# AA-CLIP's published code trained with these, whatever CLIP's weights need.
PUBLISHED_ARGUMENTS = {"activation": "gelu", "class_names": PUBLISHED_NAMES}


class _Request(NamedTuple):
    """What `predict` needs for each batch; the fields are its arguments, and what follows from them."""

    text_side: Any
    domain: str
    det_score: str
    tiles: str
    batch_size: int
    return_attention: bool
    references: References | None
    entry: Entry | None


class Detector(nn.Module):
    """A model with its scoring, calibration and references; `load_model` builds it from a checkpoint.

    Args:
        model: an adapted model, or unadapted CLIP.
        name: its name in tables.
        checkpoint: the file that it was loaded from, if any.
        loop_forward: the forward of a feedback loop, in training.
        det_score: which det score is part of image scores, one of `DET_SCORES`. Default: the published one.
        tiles: the tiles of images, as for `predict`. Default: off.

    Attributes:
        epoch, loop, config: of the checkpoint; None if unknown.
        arguments: the training arguments, as far as they are known.
        source: the checkpoint without tensors.
        calibration: thresholds; only those of this model are used.
        references: normal images to compare with, by class.
    """

    def __init__(
        self,
        model: AdaptedCLIP | UnadaptedCLIP,
        name: str,
        checkpoint: Checkpoint | None = None,
        loop_forward: LoopForward | None = None,
        det_score: str | None = None,
        tiles: str | int | None = None,
    ) -> None:
        super().__init__()
        self.loop_forward = loop_forward
        self.det_score = check_det_score(det_score or DET_SCORES[0])
        self.tiles = tiles_choice(TILES[0] if tiles is None else tiles)
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.source: Checkpoint | None = None
        self.arguments: Mapping[str, Any] = {}
        if checkpoint is not None:
            empty: dict[str, Any] = {part: {} for part in checkpoint.components}
            self.source = replace(checkpoint, components=empty, optimizers={})
            self.arguments = arguments_of(checkpoint)
        self.epoch = checkpoint.epoch if checkpoint else None
        self.loop = checkpoint.loop if checkpoint else None
        self.config = checkpoint.config if checkpoint else None
        self.calibration: Sequence[Entry] = ()
        self._required_calibration: Path | None = None
        self.references: dict[str, References] = {}

    def text_side(self, prompts: Prompts) -> Any:
        """The text side's part of the forward, which is the same for all images."""
        return self.model.text_side(prompts, self.loop_forward)

    @property
    def clip(self) -> FrozenCLIP:
        return self.model.clip

    @property
    def device(self) -> torch.device:
        return self.clip.clip.visual.conv1.weight.device

    @cached_property
    def digest(self) -> str:
        """A hex digest of everything that determines scores, except image, class and det score.

        It covers weights and choices of the forward, so that it does not depend on where the checkpoint is.
        """
        config = {name: value for name, value in self.model.config.to_dict().items() if name != "model_name"}
        cross = getattr(self.model, "cross_config", None)
        loop = self.loop_forward
        choices = [type(self.model).__name__, config, cross and asdict(cross), loop and loop._asdict()]
        digest = hashlib.sha256(json.dumps([self.clip.weights_digest, choices], sort_keys=True).encode("utf-8"))
        for name, component in self._components().items():
            if name.startswith("text") and not self.model.config.text_adapted:
                continue  # fresh weights, which no score depends on
            for key, value in sorted(component.state_dict().items()):
                digest.update(f"{name}.{key}".encode())
                digest.update(value.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def _components(self) -> Mapping[str, nn.Module]:
        return {} if isinstance(self.model, UnadaptedCLIP) else self.model.components

    def name_in_prompts(self, class_name: str, class_names: str | Mapping[str, str] | None = None) -> str:
        """The name of a class in prompts; class_names: as for `predict`."""
        if isinstance(class_names, Mapping):
            return class_names[class_name]
        if (class_names or self.arguments.get("class_names")) == PUBLISHED_NAMES:
            from dataset.class_names import published_name  # loads the dataset catalog, which is rarely needed here

            return published_name(class_name) or readable_name(class_name)
        return readable_name(class_name)

    def calibration_key(
        self,
        class_name: str,
        domain: str = "industrial",
        det_score: str | None = None,
        class_names: str | Mapping[str, str] | None = None,
        tiles: str | int | None = None,
    ) -> CalibrationKey:
        """The key of thresholds for this model, a class and its references; arguments as for `predict`."""
        name, references = self.name_in_prompts(class_name, class_names), self.references.get(readable_name(class_name))
        digest = None if references is None else references.digest
        tiles = self.tiles if tiles is None else tiles_choice(tiles)
        return CalibrationKey(self.digest, name, domain, det_score or self.det_score, digest, tiles)

    @torch.inference_mode()
    def add_references(
        self,
        images: Sequence[ImageInput],
        class_name: str = "object",
        weight: float = REFERENCE_WEIGHT,
        features: str = REFERENCE_FEATURES[0],
        class_names: str | Mapping[str, str] | None = None,
    ) -> References:
        """Compare images of a class with these normal images from now on (docs/method.md, "References").

        Args:
            images: at least one normal image, as for `predict`.
            class_name: the class, as for `predict`.
            weight: share of the distance to references in the map, in [0, 1]; the rest is that of the prompts.
            features: "trained" (those compared with prompts), "frozen" (CLIP's own with V-V attention, which needs
                a second forward pass), or "both".
            class_names: as for `predict`.

        Returns:
            The references, which `references` holds from now on.

        Raises:
            UserError: no image, an image that cannot be read, or unknown `features`.
        """
        if features not in REFERENCE_FEATURES:
            raise UserError(f"--reference_features {features}: choose one of {', '.join(REFERENCE_FEATURES)}")
        if not images:
            raise UserError(f"no normal images of '{class_name}' to compare with")
        from engine.detector.views import views_of  # not needed to load a model

        side = self._encode_class(class_name, class_names)
        patches, digests = [], []
        for image in map(as_image, images):
            views = [view for _, view in views_of(image, self.tiles, self.clip.img_size)]
            for start in range(0, len(views), BATCH_SIZE):
                pixels = torch.cat([self.as_input(view) for view in views[start : start + BATCH_SIZE]])
                patches.append(patch_features(self.model, self._forward(pixels, side), pixels, features))
            digests.append(content_digest(image))
        memory = tuple(torch.cat([views.flatten(0, 1) for views in level]) for level in zip(*patches, strict=True))
        references = References(memory, weight, features, tuple(digests), self.tiles)
        self.references[readable_name(class_name)] = references
        return references

    def as_input(self, image: Image.Image) -> torch.Tensor:
        """An RGB image as model input, (1, 3, S, S)."""
        return image_tensor(image, self.clip.img_size, self.clip.mean, self.clip.std)[None].to(self.device)

    def _encode_class(self, class_name: str, class_names: str | Mapping[str, str] | None) -> Any:
        """The text side of one class."""
        prompts = Prompts.from_texts(self.clip, [build_prompts(self.name_in_prompts(class_name, class_names))])
        return self.text_side(prompts.to(self.device))

    def _forward(self, pixels: torch.Tensor, side: Any) -> Outputs:
        """The forward of images of the class of a text side."""
        return self.model(pixels, side, torch.zeros(len(pixels), dtype=torch.long, device=self.device))

    def find_calibration(self, checkpoint: str | Path, calibration: Path | None = None) -> None:
        """Use the thresholds of the file `calibration`, or else those kept for `checkpoint`, if there are any.

        A file that is given must hold thresholds of this model, and `predict` rejects classes without any. Raises
        `UserError` for a file that is damaged or of another model.
        """
        candidates = calibration_files(checkpoint, self.source.path if self.source else None)
        files = list(filter(Path.is_file, candidates)) if calibration is None else [calibration]
        if not files:
            return
        self.calibration = [entry for file in files for entry in read_calibration(file)]
        self._required_calibration = calibration
        if calibration is not None and all(entry.checkpoint != self.digest for entry in self.calibration):
            raise UserError(
                f"{calibration} holds no thresholds of {self.name}: calibrate it first (inference.py --calibrate)"
            )

    def thresholds(self, key: CalibrationKey) -> Entry | None:
        """The thresholds of a key; None, or `UserError` if a given file was required to hold them."""
        entry = next((entry for entry in self.calibration if entry.key == key), None)
        if entry is None and self._required_calibration is not None:
            raise UserError(
                f"{self._required_calibration}: {mismatch_reason(self.calibration, key)}; calibrate for it "
                "(inference.py --calibrate)"
            )
        return entry

    @overload
    def predict(self, image: ImageInput, *options: Any, **named: Any) -> Prediction: ...

    @overload
    def predict(self, image: list[Any] | tuple[Any, ...], *options: Any, **named: Any) -> list[Prediction]: ...

    @torch.inference_mode()
    def predict(
        self,
        image: ImageInput | list[Any] | tuple[Any, ...],
        class_name: str = "object",
        domain: str = "industrial",
        return_attention: bool = False,
        det_score: str | None = None,
        class_names: str | Mapping[str, str] | None = None,
        tiles: str | int | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Prediction | list[Prediction]:
        """Predict the anomaly map and score of one image, or of each in a list.

            model.predict("image.png", class_name="metal screw").score

        A single image has no class statistics to normalise by. So the map is the calibrated one, and the score is
        half its maximum plus half the det score, or for `domain="medical"` the maximum (docs/method.md, "Scores").

        Args:
            image: a path, a PIL image, or uint8 RGB (H, W, 3), or a list of these. EXIF orientation is applied.
            class_name: the object's name in prompts; domain: "industrial" or "medical".
            return_attention: also return cross-attention weights, in `Prediction.attention`.
            det_score: one of `DET_SCORES`. Default: the detector's.
            class_names: "published" uses the published names for classes of AA-CLIP's datasets, "catalog" leaves
                names as they are; or the name in prompts of each class. Default: as in training.
            tiles: "off"; a number of overlapping square tiles along the shorter side, from which maps are blended
                (docs/testing.md, "Large images"); or "auto", by the image's size. Default: the detector's.
            batch_size: images and tiles in a forward pass.

        Returns:
            The prediction, with a decision if there is a calibration for this class, domain, det score, tiles and
            references; for a list, a list of predictions.

        Raises:
            UserError: an unreadable image or another type, an unknown domain or det score, no cross-attention,
                references of other tiles, or a score of NaN.
        """
        if return_attention and not isinstance(self.model, AdaptedCLIPWithCrossAttention):
            raise UserError(f"{self.name} has no cross-attention to show")
        det_score = check_det_score(det_score or self.det_score)
        tiles = self.tiles if tiles is None else tiles_choice(tiles)
        if domain not in DOMAINS:
            raise UserError(f"domain {domain}: choose one of {', '.join(DOMAINS)}")
        references, entry = self._references_of(class_name, tiles), None
        if self.calibration:  # computing the digest for the key takes time
            entry = self.thresholds(self.calibration_key(class_name, domain, det_score, class_names, tiles))
        side = self._encode_class(class_name, class_names)
        request = _Request(side, domain, det_score, tiles, batch_size, return_attention, references, entry)
        images = image if isinstance(image, (list, tuple)) else [image]
        batches = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
        predictions = [prediction for batch in batches for prediction in self._predict(batch, request)]
        return predictions if images is image else predictions[0]

    def _predict(self, images: Sequence[ImageInput], request: _Request) -> Iterator[Prediction]:
        from engine.detector.views import score_views  # not needed to load a model

        def score(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            outputs = self._forward(pixels, request.text_side)
            return self._level_maps(outputs, pixels, request.references), det_scores(outputs, request.det_score)

        opened = list(map(as_image, images))
        scored = score_views(opened, self.as_input, score, (request.tiles, self.clip.img_size), request.batch_size)
        for image, (levels, det) in zip(opened, scored, strict=True):
            mean = levels.mean(dim=0)
            score_of_image = self._check_finite(float(calibrated_scores(mean[None], det[None], request.domain)))
            prediction = Prediction(mean.cpu().numpy(), score_of_image, levels.cpu().numpy())
            if request.entry is not None:
                prediction = apply_thresholds(prediction, request.entry, image.size)
            if request.return_attention and isinstance(self.model, AdaptedCLIPWithCrossAttention):
                pixels, row = self.as_input(image), torch.zeros(1, dtype=torch.long, device=self.device)
                prediction = replace(prediction, attention=self.model.attention(pixels, request.text_side, row))
            yield prediction

    def _references_of(self, class_name: str, tiles: str) -> References | None:
        references = self.references.get(readable_name(class_name))
        if references is not None and references.tiles != tiles:
            raise UserError(
                f"the references of '{class_name}' were added with tiles {references.tiles}, not {tiles}: set the "
                "detector's tiles, and add them again"
            )
        return references

    def _level_maps(self, outputs: Outputs, pixels: torch.Tensor, references: References | None) -> torch.Tensor:
        """The calibrated maps of all levels (levels, B, S, S), joined with the distances to references."""
        if references is None:
            return calibrated_maps(outputs, self.clip.img_size)
        return joined_calibrated_maps(outputs, references.maps(self.model, outputs, pixels), references.weight)

    def _check_finite(self, score: float) -> float:
        if not math.isfinite(score):
            raise UserError(f"{self.name}: the score of an image is not finite, so its weights cannot be used")
        return score

    def save_pretrained(self, folder: str | Path, licence: str | None = None, address: str | None = None) -> Path:
        """Write the trained components, thresholds and a model card to a folder that `load_model` accepts.

        CLIP's weights are not written, only their digest. The model card includes metrics found next to the checkpoint.

        Args:
            folder: a new folder, or one that was written by this method.
            licence: licence of the trained components, for the model card.
            address: what the model card passes to `load_model`. Default: the folder's name.

        Returns:
            The folder.

        Raises:
            UserError: the model has no trained components, or the folder holds something else.
        """
        from engine.detector.sharing import write_pretrained  # rarely needed, so not loaded with the module

        if self.source is None:
            raise UserError(f"{self.name} has no trained components to share; give a checkpoint")
        parts = {name: state_of(part) for name, part in self._components().items() if name in self.source.components}
        shared = Shared(self.name, self.model.config, getattr(self.model, "cross_config", None), self.det_score)
        entries = [entry for entry in self.calibration if entry.checkpoint == self.digest]
        checkpoint = replace(self.source, components=parts)
        return write_pretrained(checkpoint, shared, entries, Path(folder), licence, address)


def arguments_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The arguments that a checkpoint was trained with, as far as its config or its form shows them."""
    if checkpoint.config is not None:
        return checkpoint.config.get("arguments", {})
    return PUBLISHED_ARGUMENTS if checkpoint.is_published else {}


def check_det_score(kind: str) -> str:
    """The name of a det score; `UserError` for an unknown one."""
    if kind not in DET_SCORES:
        raise UserError(f"--det_score {kind}: choose one of {', '.join(DET_SCORES)}")
    return kind
