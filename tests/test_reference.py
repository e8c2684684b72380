"""The model against the plain reference: values, and gradients of every trainable tensor.

The reference always computes in float64; the model is compared with it in float32 and in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
from torch import Tensor, nn

from model import scoring
from model.adapter import AdaptedCLIP
from model.clip import FrozenCLIP
from model.frozen import ImageFeatures, UnadaptedCLIP, frozen_features
from model.losses import stage1_losses, stage2_losses
from model.text import Prompts
from tests import reference
from tests.helpers import (
    Batch,
    adapted_clip,
    assert_agrees,
    assert_all_agree,
    assert_gradients_agree,
    config_for,
    double_clip,
    gradients_of,
    in_double,
    random_batch,
    recorded_sides,
    same_sides,
    tiny_clip,
    tiny_prompts,
    trainable,
)

NORM_WEIGHT = 0.1
# The two sides differ in all choices, so that none of them can stand in for the other's.
DIFFERENT = {
    "text_adapt_until": 2,
    "image_adapt_until": 3,
    "text_adapt_weight": 0.1,
    "image_adapt_weight": 0.3,
    "levels": (1, 2, 5, 8),
}

adapters = pytest.mark.parametrize("adapter", ["bottleneck", "linear"])
relus = pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
surgeries = pytest.mark.parametrize("surgery", ["dual", "sequential"])
activations = pytest.mark.parametrize("quick_gelu", [True, False], ids=["quick_gelu", "gelu"])
domains = pytest.mark.parametrize("domain", ["industrial", "medical"])


@dataclass(frozen=True)
class Case:
    """A model in float32, and the reference in float64 on the same numbers."""

    model: Any
    ref: reference.Reference
    batch: Batch
    prompts: Prompts

    def precisions(self) -> Iterator[tuple[Any, Batch, float]]:
        """The model and the batch in float32 and in float64, each with the tolerance that holds there."""
        yield self.model, self.batch, 1e-5
        yield in_double(self.model), self.batch.to(torch.float64), 1e-9

    def image_anchors(self) -> list[Tensor]:
        """The reference's anchors for each image of the batch."""
        anchors = reference_anchors(self.ref, self.prompts)
        return [anchors[row] for row in self.batch.rows]


@functools.cache
def shared_clip(quick_gelu: bool) -> FrozenCLIP:
    """Built once for all cases, which do not change it."""
    return tiny_clip(quick_gelu)


def make_case(quick_gelu: bool = True, **changes: Any) -> Case:
    clip = shared_clip(quick_gelu)
    model = adapted_clip(clip, **{**DIFFERENT, **changes})
    return Case(model, reference_of(model), random_batch(clip.img_size), tiny_prompts(clip))


def reference_of(model: AdaptedCLIP) -> reference.Reference:
    weights = {name: value.detach().double().requires_grad_() for name, value in trainable(model).items()}
    cross = getattr(model, "cross_config", None)
    return reference.Reference(double_clip(model.clip).clip, weights, model.config, cross=cross)


def assert_features_agree(
    found: ImageFeatures, expected: Sequence[tuple[list[Tensor], Tensor]], tolerance: float
) -> None:
    """`expected`: the levels and det of each image."""
    for k, level in enumerate(found.levels):
        assert_agrees(level, torch.stack([levels[k] for levels, _ in expected]), tolerance, f"level {k}")
    assert_agrees(found.det, torch.stack([det for _, det in expected]), tolerance, "det")


def reference_anchors(ref: reference.Reference, prompts: Prompts) -> list[Tensor]:
    return [reference.anchor_pair(ref, tokens[: prompts.normal], tokens[prompts.normal :]) for tokens in prompts.tokens]


def stage1(model: AdaptedCLIP, batch: Batch, prompts: Prompts, levels: str = "all") -> dict[str, Tensor]:
    anchors = model.anchors(prompts)[batch.rows]
    similarities = scoring.similarities(model.frozen_features(batch.images).levels, anchors)
    return stage1_losses(similarities, anchors, batch.masks, NORM_WEIGHT, levels)[0]


def reference_stage1(case: Case, levels: str = "all") -> Tensor:
    with torch.no_grad():
        features = [reference.frozen_image(case.ref, image.double())[0] for image in case.batch.images]
    return reference.stage1_loss(features, case.image_anchors(), case.batch.masks.double(), NORM_WEIGHT, levels)


def stage2(model: AdaptedCLIP, batch: Batch, prompts: Prompts) -> dict[str, Tensor]:
    outputs = model(batch.images, model.text_side(prompts), batch.rows)
    return stage2_losses(outputs, batch.masks, batch.labels)[0]


def reference_stage2(case: Case) -> Tensor:
    with torch.no_grad():
        anchors = case.image_anchors()
    features = [reference.adapted_image(case.ref, image.double()) for image in case.batch.images]
    return reference.stage2_loss(features, anchors, case.batch.masks.double(), case.batch.labels)


def reference_gradients(ref: reference.Reference, loss: Tensor, component: str) -> dict[str, Tensor]:
    names = [name for name in ref.weights if name.startswith(component)]
    gradients = torch.autograd.grad(loss, [ref.weights[name] for name in names])
    return dict(zip(names, gradients, strict=True))


@activations
def test_the_reference_without_adapters_is_open_clip(quick_gelu: bool) -> None:
    case = make_case(quick_gelu, text_adapted=False)
    clip, images = case.ref.clip, case.batch.images.double()
    _, embedding = reference.frozen_image(case.ref, images[0])
    assert_agrees(embedding, clip.encode_image(images[:1], normalize=True)[0], 1e-9)
    prompt = case.prompts.tokens[0, 0]
    padded = nn.functional.pad(prompt, (0, clip.context_length - len(prompt)))
    assert_agrees(reference.prompt_feature(case.ref, prompt), clip.encode_text(padded[None], normalize=True)[0], 1e-9)


@activations
@adapters
def test_anchors(quick_gelu: bool, adapter: str) -> None:
    case = make_case(quick_gelu, adapter=adapter)
    expected = torch.stack(reference_anchors(case.ref, case.prompts))
    for model, _, tolerance in case.precisions():
        assert_agrees(model.anchors(case.prompts), expected, tolerance)
        assert_agrees(model.text_side(case.prompts), expected, tolerance)


def test_anchors_of_an_unadapted_text_side_are_clips_own() -> None:
    case = make_case(text_adapted=False)
    expected = torch.stack(reference_anchors(case.ref, case.prompts))
    for model, _, tolerance in case.precisions():
        assert_agrees(model.anchors(case.prompts), expected, tolerance)
        assert_agrees(UnadaptedCLIP(model.clip, model.config).text_side(case.prompts), expected, tolerance)


@activations
@adapters
@relus
def test_adapted_image(quick_gelu: bool, adapter: str, relu: bool) -> None:
    case = make_case(quick_gelu, adapter=adapter, relu=relu)
    expected = [reference.adapted_image(case.ref, image.double()) for image in case.batch.images]
    for model, batch, tolerance in case.precisions():
        assert_features_agree(model.encode_image(batch.images), expected, tolerance)


@activations
@surgeries
@pytest.mark.parametrize("until", [1, 4, 7, 9], ids=lambda until: f"until{until}")
def test_frozen_features(quick_gelu: bool, surgery: str, until: int) -> None:
    """From no V-V attention at all (1) to V-V attention in every one of the eight blocks (9)."""
    case = make_case(quick_gelu, surgery=surgery, surgery_until_layer=until, levels=(1, 2, 5, 8))
    expected = [reference.frozen_image(case.ref, image.double()) for image in case.batch.images]
    for model, batch, tolerance in case.precisions():
        assert_features_agree(frozen_features(model.clip, batch.images, model.config), expected, tolerance)


@pytest.mark.parametrize("until", [4, 9], ids=lambda until: f"until{until}")
def test_frozen_features_over_the_batch_axis(until: int) -> None:
    case = make_case(surgery="batch_axis", surgery_until_layer=until)
    expected = reference.published_frozen_images(case.ref, case.batch.images.double())
    for model, batch, tolerance in case.precisions():
        features = frozen_features(model.clip, batch.images, model.config)
        for k, level in enumerate(features.levels):
            assert_agrees(level, torch.stack([levels[k] for levels in expected]), tolerance, f"level {k}")


@adapters
@surgeries
@pytest.mark.parametrize("levels", ["all", "last"])
def test_stage1_loss_and_gradients(adapter: str, surgery: str, levels: str) -> None:
    case = make_case(adapter=adapter, surgery=surgery)
    expected = reference_stage1(case, levels)
    gradients = reference_gradients(case.ref, expected, "text_adapter")
    for model, batch, tolerance in case.precisions():
        losses = stage1(model, batch, case.prompts, levels)
        assert_agrees(losses["total"], expected, tolerance, "total")
        parts = losses["focal"] + losses["dice_normal"] + losses["dice_abnormal"] + NORM_WEIGHT * losses["overlap"]
        assert_agrees(parts, expected, tolerance, "the named parts")

    def loss_of(model: AdaptedCLIP, batch: Batch) -> Tensor:
        return stage1(model, batch, case.prompts, levels)["total"]

    assert_gradients_agree(case.model, case.batch, loss_of, gradients)


@adapters
@relus
@activations
def test_stage2_loss_and_gradients(adapter: str, relu: bool, quick_gelu: bool) -> None:
    case = make_case(quick_gelu, adapter=adapter, relu=relu)
    expected = reference_stage2(case)
    gradients = reference_gradients(case.ref, expected, "image_adapter")
    for model, batch, tolerance in case.precisions():
        losses = stage2(model, batch, case.prompts)
        assert_agrees(losses["total"], expected, tolerance, "total")
        parts = losses["focal"] + losses["dice_normal"] + losses["dice_abnormal"] + losses["classification"]
        assert_agrees(parts, expected, tolerance, "the named parts")

    def loss_of(model: AdaptedCLIP, batch: Batch) -> Tensor:
        return stage2(model, batch, case.prompts)["total"]

    assert_gradients_agree(case.model, case.batch, loss_of, gradients)


@domains
@pytest.mark.parametrize(("relu", "kind"), [(False, "abnormal"), (True, "abnormal"), (False, "difference")])
def test_maps_and_scores(domain: str, relu: bool, kind: str) -> None:
    case = make_case(relu=relu)
    with torch.no_grad():
        features = [reference.adapted_image(case.ref, image.double()) for image in case.batch.images]
        expected = reference_scores(features, case.image_anchors(), case.model.clip.img_size, domain, kind)
        for model, batch, tolerance in case.precisions():
            outputs = model(batch.images, model.text_side(case.prompts), batch.rows)
            assert_scores_agree(outputs, expected, domain, tolerance, kind)


@domains
@surgeries
def test_unadapted_clip(domain: str, surgery: str) -> None:
    """The baseline is `dual`, whatever the surgery of the model that it is compared with."""
    case = make_case(text_adapted=False)
    with torch.no_grad():
        features = [reference.frozen_image(case.ref, image.double()) for image in case.batch.images]
        expected = reference_scores(features, case.image_anchors(), case.model.clip.img_size, domain)
        for model, batch, tolerance in case.precisions():
            baseline = UnadaptedCLIP(model.clip, replace(model.config, surgery=surgery))
            outputs = baseline(batch.images, baseline.text_side(case.prompts), batch.rows)
            assert_scores_agree(outputs, expected, domain, tolerance)


class Scores(NamedTuple):
    """Published maps and scores of the images as one class, and calibrated ones of each image."""

    maps: Tensor
    det: Tensor
    of_class: Tensor
    calibrated_maps: Tensor
    calibrated: Tensor


def reference_scores(
    features: Sequence[tuple[list[Tensor], Tensor]],
    anchors: Sequence[Tensor],
    size: int,
    domain: str,
    kind: str = "abnormal",
) -> Scores:
    images = [(levels, det, pair) for (levels, det), pair in zip(features, anchors, strict=True)]
    maps = torch.stack([reference.anomaly_map(levels, pair, size, domain) for levels, _, pair in images])
    det = torch.stack([reference.det_score(det, pair, kind) for _, det, pair in images])
    return Scores(
        maps,
        det,
        reference.class_image_scores(maps, det, domain),
        torch.stack([reference.calibrated_map(levels, pair, size) for levels, _, pair in images]),
        torch.stack(
            [reference.calibrated_score(levels, det, pair, size, domain, kind) for levels, det, pair in images]
        ),
    )


def assert_scores_agree(
    outputs: scoring.Outputs, expected: Scores, domain: str, tolerance: float, kind: str = "abnormal"
) -> None:
    size = expected.maps.shape[-1]
    maps, det = scoring.anomaly_map(outputs, size, domain), scoring.det_scores(outputs, kind)
    assert_agrees(maps, expected.maps, tolerance, "anomaly map")
    assert_agrees(det, expected.det, tolerance, "det score")
    calibrated = scoring.calibrated_maps(outputs, size).mean(dim=0)
    assert_agrees(calibrated, expected.calibrated_maps, tolerance, "calibrated map")
    scores = scoring.calibrated_scores(calibrated, det, domain)
    assert_agrees(scores, expected.calibrated, tolerance, "calibrated scores")

    # Min-max normalisation magnifies the rounding of its input by the input's size over its range.
    magnified = tolerance * max(
        (values.abs().max() / (values.max() - values.min())).item() for values in (expected.maps, expected.det)
    )
    flat = maps.flatten(1)
    scores = scoring.class_image_scores(flat.amax(dim=1), flat.amin(dim=1), det, domain)
    assert_agrees(scores, expected.of_class, max(tolerance, magnified), "class scores")


@pytest.mark.parametrize("kind", scoring.DET_SCORES)
def test_extreme_det_scores_are_between_0_and_1(kind: str) -> None:
    """For opposite anchors both scores agree; for equal anchors the difference is constant."""
    outputs = scoring.Outputs([], torch.tensor([[1.0, -1.0], [-1.0, 1.0], [0.3, -0.3]]))
    assert_agrees(scoring.det_scores(outputs, kind), torch.tensor([0.0, 1.0, 0.35]), 1e-6)
    same = scoring.Outputs([], torch.tensor([[0.9, 0.9], [-0.2, -0.2]]))
    expected = {"abnormal": [0.95, 0.4], "difference": [0.5, 0.5]}[kind]
    assert_agrees(scoring.det_scores(same, kind), torch.tensor(expected), 1e-6)


@domains
@pytest.mark.parametrize("side", [9, 2])
def test_maps_of_a_single_hot_patch_show_the_blur(domain: str, side: int) -> None:
    """One patch in a corner of the grid: reflection and enlargement of it. A small grid narrows the kernel."""
    similarity = torch.zeros(1, side**2, 2, dtype=torch.float64)
    similarity[0, 0, 1] = 100.0
    outputs = scoring.Outputs([similarity], torch.zeros(1, 2, dtype=torch.float64))
    grid = reference.to_grid((similarity[0, :, 1] + 1 - similarity[0, :, 0]) / 2)
    kernel, sigma = reference.BLUR[domain]
    expected = reference.enlarge(reference.blur(grid, min(kernel, 2 * side - 1), sigma), 50)
    assert_agrees(scoring.anomaly_map(outputs, 50, domain)[0], expected, 1e-9)


def vit_l() -> FrozenCLIP:
    """ViT-L-14-336 with its real widths and depths, on an image of 5 x 5 patches; two blocks' random weights in turn.

    To fill the memory of 428 M different weights would take longer than all the rest of the test.
    """
    config = open_clip.get_model_config("ViT-L-14-336")
    torch.manual_seed(0)
    with torch.device("meta"):
        clip = open_clip.CLIP(**{**config, "vision_cfg": {**config["vision_cfg"], "image_size": 70}}, quick_gelu=True)
    assert sum(parameter.numel() for parameter in clip.parameters()) > 4.2e8
    for blocks in (clip.visual.transformer.resblocks, clip.transformer.resblocks):
        for index in range(2, len(blocks)):
            blocks[index] = blocks[index % 2]
    clip = clip.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            is_norm = "ln_" in name and name.endswith("weight")
            parameter.normal_(1.0, 0.05) if is_norm else parameter.normal_(0.0, 0.02)
        clip.attn_mask = torch.full((77, 77), -torch.inf).triu(1)
    return FrozenCLIP(clip, "ViT-L-14-336", "quick_gelu")


def test_real_sizes() -> None:
    clip = vit_l()
    assert (clip.vision_width, clip.text_width, clip.embed_dim) == (1024, 768, 768)
    assert clip.defaults == {
        "levels": (6, 12, 18, 24),
        "image_adapt_until": 6,
        "text_adapt_until": 3,
        "surgery_until_layer": 20,
    }
    torch.manual_seed(1)
    model = AdaptedCLIP(clip, config_for(clip))
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.components.items()}
    assert sizes == {"text_adapter": 2_359_296, "image_adapter": 10_223_616}

    batch = random_batch(70)
    batch = Batch(batch.images[2:3], batch.masks[2:3], batch.labels[2:3], torch.tensor([0]))
    prompts = Prompts.from_texts(clip, [(["a nut."], ["a broken nut."])])
    with recorded_sides(model) as sides:
        single = real_size_results(model, batch, prompts)
    model.double()
    batch = batch.to(torch.float64)
    expected = real_size_reference(Case(model, reference_sharing(model), batch, prompts))
    assert_all_agree(real_size_results(model, batch, prompts), expected, 1e-9)
    with same_sides(model, sides):
        assert_all_agree(single, real_size_results(model, batch, prompts), 1e-5)


def reference_sharing(model: AdaptedCLIP) -> reference.Reference:
    return reference.Reference(model.clip.clip, trainable(model), model.config)


def real_size_results(model: AdaptedCLIP, batch: Batch, prompts: Prompts) -> dict[str, Tensor]:
    """Frozen features, both stages' losses, and all gradients of both."""
    results = {f"frozen {k}": level[0] for k, level in enumerate(model.frozen_features(batch.images).levels)}
    model.zero_grad()
    results["stage 1"] = stage1(model, batch, prompts)["total"]
    results["stage 1"].backward()
    results["stage 2"] = stage2(model, batch, prompts)["total"]
    results["stage 2"].backward()
    return {**results, **gradients_of(model)}


def real_size_reference(case: Case) -> dict[str, Tensor]:
    image, masks = case.batch.images[0], case.batch.masks
    with torch.no_grad():
        levels, _ = reference.frozen_image(case.ref, image)
    results = {f"frozen {k}": level for k, level in enumerate(levels)}
    anchors = case.image_anchors()
    results["stage 1"] = reference.stage1_loss([levels], anchors, masks, NORM_WEIGHT)
    features = [reference.adapted_image(case.ref, image)]
    results["stage 2"] = reference.stage2_loss(features, [pair.detach() for pair in anchors], masks, case.batch.labels)
    for stage, component in (("stage 1", "text_adapter"), ("stage 2", "image_adapter")):
        results.update(reference_gradients(case.ref, results[stage], component))
    return results
