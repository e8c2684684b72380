"""Properties that hold for any weights and inputs."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import scoring
from model.adapter import AdaptedCLIP
from model.adapter_modules import blend
from model.clip import FrozenCLIP
from model.config import ModelConfig, check_depths, depth_defaults
from model.cross_attention import CrossAttention
from model.frozen import ImageFeatures, frozen_features
from model.losses import dice_loss, focal_loss, segmentation_loss, stage1_losses, stage2_losses
from model.text import CLIP_TEXT
from tests.helpers import adapted_clip, assert_agrees, config_for, encode_prompts, random_batch, tiny_clip, tiny_prompts
from utils.errors import UserError

EXACT = 1e-10  # float64; other batch sizes may take other kernels, which add up in another order

surgeries = pytest.mark.parametrize("surgery", ["dual", "sequential"])
few_examples = settings(max_examples=15, deadline=None)


@functools.cache
def clip64() -> FrozenCLIP:
    return tiny_clip().double()


@functools.cache
def model64() -> AdaptedCLIP:
    return adapted_clip(clip64(), text_adapt_until=2, image_adapt_until=3)


def images64() -> Tensor:
    return random_batch(clip64().img_size).images.double()


def features_of(kind: str, images: Tensor) -> ImageFeatures:
    if kind == "adapted":
        return model64().encode_image(images)
    return frozen_features(clip64(), images, config_for(clip64(), surgery=kind))


def assert_same_features(actual: ImageFeatures, expected: ImageFeatures, tolerance: float = EXACT) -> None:
    for k, (first, second) in enumerate(zip(actual.levels, expected.levels, strict=True)):
        assert_agrees(first, second, tolerance, f"level {k}")
    assert_agrees(actual.det, expected.det, tolerance, "det")


def rows_of(features: ImageFeatures, rows: list[int]) -> ImageFeatures:
    return ImageFeatures([level[rows] for level in features.levels], features.det[rows])


@pytest.mark.parametrize("kind", ["dual", "sequential", "adapted"])
@given(rows=st.lists(st.integers(0, 3), min_size=1, max_size=5))
@example(rows=[3, 2, 1, 0])
@example(rows=[1, 1])
@few_examples
def test_features_do_not_depend_on_the_batch(kind: str, rows: list[int]) -> None:
    """Any selection of images, in any order and with repetitions, has the features of the single images."""
    with torch.no_grad():
        together = features_of(kind, images64())
        assert_same_features(features_of(kind, images64()[rows]), rows_of(together, rows))


prompt_words = st.lists(
    st.sampled_from(["nut", "old", "screw", "with", "a", "photo", "broken", "photosynthesis", "x9", ","]), max_size=12
)


@given(prompts=st.lists(prompt_words, min_size=1, max_size=4))
@example(prompts=[[], ["nut"] * 12])
@example(prompts=[["photosynthesis"] * 100])
@few_examples
def test_truncated_text_equals_full_length_text(prompts: list[list[str]]) -> None:
    clip, texts = clip64(), [" ".join(words) for words in prompts]
    cut, full = clip.tokenize(texts), clip.tokenizer(texts)
    longest = max(int(row.argmax()) + 1 for row in full)
    assert cut.shape == (len(texts), longest)
    assert torch.equal(cut, full[:, :longest])
    with torch.no_grad():
        for modules in (CLIP_TEXT, model64().text_modules):
            features = encode_prompts(clip, full, modules)
            assert_agrees(encode_prompts(clip, cut, modules), features, EXACT)
        assert_agrees(encode_prompts(clip, cut), clip.clip.encode_text(full, normalize=True), 1e-9)


def test_train_mode_affects_trainable_parts_only() -> None:
    model = adapted_clip(tiny_clip()).eval()
    assert not any(module.training for module in model.modules())
    model.train()
    assert model.training
    assert not any(module.training for module in model.clip.modules())
    assert all(module.training for part in model.components.values() for module in part.modules())
    names = {name.split(".")[0] for name, value in model.named_parameters() if value.requires_grad}
    assert names == {"text_adapter", "image_adapter"}
    assert not any(value.requires_grad for value in model.clip.parameters())


@pytest.mark.parametrize("module", ["adapters", "cross-attention"])
def test_fresh_weights_are_xavier_uniform_with_zero_biases(module: str) -> None:
    torch.manual_seed(0)
    kinds: list[dict[str, Any]] = [{}, {"adapter": "linear", "relu": True}]
    fresh = [part for kind in kinds for part in adapted_clip(tiny_clip(), **kind).components.values()]
    for part in fresh if module == "adapters" else [CrossAttention(96, 40, 64, weight=0.1, heads=8, dropout=0.0)]:
        for name, value in part.named_parameters():
            if name.endswith("bias"):
                assert module == "cross-attention" and not value.any()
                continue
            bound = (6 / sum(value.shape)) ** 0.5
            assert 0.9 * bound < value.abs().max() <= bound
            assert abs(value.std().item() / (bound / 3**0.5) - 1) < 0.1


@given(
    silent=st.sets(st.integers(0, 4)),
    weight=st.sampled_from([0.0, 0.1, 1.0]),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e6]),
)
@example(silent={0, 1, 2, 3, 4}, weight=0.1, size=1.0)
@few_examples
def test_blend_is_finite_where_an_adapter_gives_zero(silent: set[int], weight: float, size: float) -> None:
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    adapted = size * torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
    adapted[:, sorted(silent)] = 0
    adapted.requires_grad_()
    blended = blend(x, adapted, weight)
    blended.square().sum().backward()
    assert all(value.isfinite().all() for value in (blended, x.grad, adapted.grad))
    for token in silent:
        assert torch.equal(blended[:, token], (1 - weight) * x[:, token])


def test_constant_maps_normalise_to_zero() -> None:
    values = torch.full((3,), 0.7)
    assert torch.equal(scoring.min_max(values, values.min(), values.max()), torch.zeros(3))
    for domain in scoring.DOMAINS:
        assert torch.equal(scoring.class_image_scores(values, values, values, domain), torch.zeros(3))


finite = st.floats(-100, 100, width=32)


@given(
    maxima=st.lists(finite, min_size=1, max_size=6),
    spread=st.floats(0, 10),
    domain=st.sampled_from(["industrial", "medical"]),
)
@few_examples
def test_class_scores_lie_between_0_and_1_and_keep_the_order(maxima: list[float], spread: float, domain: str) -> None:
    highest = torch.tensor(maxima, dtype=torch.float64)
    scores = scoring.class_image_scores(highest, highest - spread, torch.zeros_like(highest), domain)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert (scores[highest.argsort()].diff() >= 0).all()


@given(fraction=st.sampled_from([0.0, 0.2, 1.0]), sharpness=st.sampled_from([0.0, 1.0, 1e2, 1e4]))
@few_examples
def test_losses_stay_finite_at_extreme_logits(fraction: float, sharpness: float) -> None:
    """log-softmax instead of log(softmax): the loss of a confident error is large but finite."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(2, 8, 8, generator=generator) < fraction).float()
    logits = (sharpness * torch.randn(2, 2, 8, 8, generator=generator)).requires_grad_()
    p = logits.softmax(dim=1)
    loss = focal_loss(logits, mask) + dice_loss(p[:, 0], 1 - mask) + dice_loss(p[:, 1], mask)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_losses_and_scores_by_hand() -> None:
    """One image of one pixel; the defaults are the exact focal loss and the published det score."""
    even, mask = torch.zeros(1, 1, 2), torch.ones(1, 1, 1)
    assert segmentation_loss(even, mask).focal.item() == pytest.approx(0.25 * math.log(2))
    assert focal_loss(torch.zeros(1, 2, 1, 1), mask).item() == pytest.approx(0.25 * math.log(2))
    sure = torch.tensor([[[-50.0, 50.0]]])
    for _, abnormal in (
        stage1_losses([even, sure], torch.zeros(1, 4, 2), mask, 0.1),
        stage2_losses(scoring.Outputs([even, sure], torch.zeros(1, 2)), mask, torch.ones(1, dtype=torch.long)),
    ):
        assert abnormal.tolist() == [[[0.75]]]
    outputs = scoring.Outputs([], torch.tensor([[0.2, 0.6]]))
    assert scoring.det_scores(outputs).item() == pytest.approx(0.8)
    assert scoring.calibrated_scores(mask, scoring.det_scores(outputs), "industrial").item() == pytest.approx(0.9)


def test_decisions_and_ranks_by_hand() -> None:
    """A score at the threshold is normal, and a normal image does not rank above its equal."""
    scores, maps = torch.tensor([0.1, 0.5, 0.7]), torch.tensor([[[0.2, 0.3, 0.4]]])
    images, pixels = scoring.decisions(scores, maps, 0.5, 0.3)
    assert (images.tolist(), pixels.tolist()) == ([False, False, True], [[[False, False, True]]])
    assert scoring.ranks(scores, torch.tensor([0.5, 0.3, 0.6])).tolist() == [0, 0.25, 0.75]


@surgeries
def test_bfloat16_autocast_is_near_float32(surgery: str) -> None:
    model = adapted_clip(tiny_clip(), surgery=surgery)
    batch, prompts = random_batch(40), tiny_prompts(model.clip)

    def run() -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
        anchors = model.anchors(prompts)[batch.rows]
        similarities = scoring.similarities(model.frozen_features(batch.images).levels, anchors)
        first, _ = stage1_losses(similarities, anchors, batch.masks, 0.1)
        outputs = model(batch.images, model.text_side(prompts), batch.rows)
        second, _ = stage2_losses(outputs, batch.masks, batch.labels)
        return [anchors, *similarities, *outputs.levels, outputs.det], first, second

    tensors, *losses = run()
    with torch.autocast("cpu", torch.bfloat16):
        half_tensors, *half_losses = run()
    for half, full in zip(half_tensors, tensors, strict=True):
        assert half.dtype == torch.float32
        assert_agrees(half, full, 0.05)
    for half, full in zip(half_losses, losses, strict=True):
        assert half["total"].item() == pytest.approx(full["total"].item(), rel=0.05)
        half["total"].backward()
    gradients = [value.grad for part in model.components.values() for value in part.parameters()]
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)


@given(layers=st.integers(4, 60), text_layers=st.integers(1, 40), levels=st.lists(st.integers(-1, 61), max_size=5))
@example(layers=24, text_layers=12, levels=[6, 12, 18, 24])
@settings(deadline=None)
def test_default_depths_exist_in_every_clip(layers: int, text_layers: int, levels: list[int]) -> None:
    defaults = depth_defaults(layers, text_layers)
    assert len(defaults["levels"]) == 4 and defaults["levels"][-1] == layers
    config = ModelConfig("any", "", "gelu", 40, **defaults)
    check_depths(config, layers, text_layers)
    assert ModelConfig.from_dict(config.to_dict()) == config
    asked = ModelConfig("any", "", "gelu", 40, **{**defaults, "levels": tuple(levels)})
    if levels and levels == sorted(set(levels)) and levels[0] >= 1 and levels[-1] <= layers:
        check_depths(asked, layers, text_layers)
    else:
        with pytest.raises(UserError, match="--levels"):
            check_depths(asked, layers, text_layers)
