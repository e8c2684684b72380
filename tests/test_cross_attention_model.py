"""Cross-attention against the plain reference, and properties for any weights (docs/method.md)."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model import scoring
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.blocks import run_block
from model.clip import FrozenCLIP
from model.clip_loading import load_clip
from model.config import CrossAttentionConfig
from model.cross_attention import CrossAttention
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
    fill_with_noise,
    gradients_of,
    random_batch,
    tiny_clip,
    tiny_prompts,
    trainable,
)
from tests.test_reference import NORM_WEIGHT, Case, assert_features_agree, reference_of, stage2

EXACT = 1e-10  # float64; other batch sizes may take other kernels, which add up in another order

# The two weights and the numbers of heads differ from the defaults and from each other, so that a swap shows.
CROSS = {
    "text_cross_attn_weight": 0.3,
    "image_cross_attn_weight": 0.2,
    "cross_attn_heads": 4,
    "cross_attn_dropout": 0.0,
}
# The rest of what a model can be, by the fields of both configs; defaults where nothing is said.
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "eval": {"cross_attn_dropout": 0.5},
    "raw": {"context_norm": "none"},
    "no_conditioning": {"text_conditioning": "none"},
    "trained": {"text_context": "trained"},
    "trained_raw": {"text_context": "trained", "context_norm": "none"},
    "trained_early_levels": {"text_context": "trained", "levels": (1, 5)},
    "projectors": {"text_context": "projectors"},
    "one_text_adapter": {"text_adapt_until": 1},
    "projectors_sequential": {"text_context": "projectors", "surgery": "sequential", "context_norm": "none"},
    "layer": {"context_norm": "layer"},
    "layer_matched": {"context_norm": "layer", "cross_attn_residual": "matched"},
    "matched": {"cross_attn_residual": "matched"},
    "layer_matched_trained": {"context_norm": "layer", "cross_attn_residual": "matched", "text_context": "trained"},
    "matched_raw": {"cross_attn_residual": "matched", "context_norm": "none"},
    "projectors_relu": {"text_context": "projectors", "relu": True},
    "linear_relu": {"adapter": "linear", "relu": True},
    "sequential": {"surgery": "sequential"},
    "surgery_before_level_0": {"surgery_until_layer": 8, "levels": (4, 8)},
    "no_inner_adapters": {"text_adapt_until": 0, "image_adapt_until": 0},
    "text_only": {"image_cross_attn_weight": 0.0, "text_context": "trained"},
    "image_only": {"text_cross_attn_weight": 0.0},
}
cases = pytest.mark.parametrize("name", list(CASES))

MODEL_FIELDS = ("adapter", "relu", "surgery", "surgery_until_layer", "levels", "text_adapt_until", "image_adapt_until")


@functools.cache
def shared_clip() -> FrozenCLIP:
    """Built once for all cases, which do not change it."""
    return tiny_clip()


def cross_model(clip: FrozenCLIP, seed: int = 4, **changes: Any) -> AdaptedCLIPWithCrossAttention:
    """A model whose cross-attentions have non-zero biases and attend sharply to few tokens."""
    values = {"text_adapt_until": 2, "image_adapt_until": 3, **changes}
    of_model = {name: values.pop(name) for name in MODEL_FIELDS if name in values}
    torch.manual_seed(seed)
    model = AdaptedCLIPWithCrossAttention(
        clip, config_for(clip, **of_model), cross=CrossAttentionConfig(**{**CROSS, **values})
    )
    for part in (model.text_cross_attn, model.image_cross_attn):
        fill_with_noise(part)
        with torch.no_grad():
            # Layer-normalised tokens are long enough by themselves.
            sharper = 1 if model.cross_config.context_norm == "layer" else 4
            part.q_proj.weight.mul_(sharper)
            part.k_proj.weight.mul_(sharper)
    return model.to(clip.clip.logit_scale.dtype)


@functools.cache
def model64(**changes: Any) -> AdaptedCLIPWithCrossAttention:
    return cross_model(double_clip(shared_clip()), **changes).eval()


class CrossCase(Case):
    """With the contexts of cross-attention."""

    def words(self) -> list[Tensor]:
        """The context of each image's tokens."""
        return [reference.words_of(self.ref, list(self.prompts.tokens[row])) for row in self.batch.rows]

    def patches(self) -> list[Tensor | None]:
        """The context of each image's prompts."""
        if self.ref.cross.text_conditioning == "none":
            return [None] * len(self.batch.rows)
        images = self.batch.images.double()
        if self.ref.cross.text_context == "frozen":
            return [reference.frozen_patches(self.ref, image) for image in images]
        if self.ref.cross.text_context == "projectors":
            return [reference.projected_patches(self.ref, image) for image in images]
        return [
            reference.trained_patches(self.ref, image, words) for image, words in zip(images, self.words(), strict=True)
        ]

    def anchors(self, patches: list[Tensor | None]) -> list[Tensor]:
        """Each image's anchors, conditioned on its entry of `patches`."""
        normal = self.prompts.normal
        return [
            reference.anchor_pair(self.ref, tokens[:normal], tokens[normal:], context)
            for tokens, context in zip(self.prompts.tokens[self.batch.rows], patches, strict=True)
        ]

    def adapted_images(self) -> list[tuple[list[Tensor], Tensor]]:
        images = self.batch.images.double()
        return [
            reference.adapted_image(self.ref, image, words) for image, words in zip(images, self.words(), strict=True)
        ]


def make_case(name: str) -> CrossCase:
    model = cross_model(shared_clip(), **CASES[name]).train(name != "eval")
    return CrossCase(model, reference_of(model), random_batch(model.clip.img_size), tiny_prompts(model.clip))


def stage1(model: AdaptedCLIPWithCrossAttention, batch: Batch, prompts: Prompts) -> dict[str, Tensor]:
    features = model.stage1_features(batch.images, prompts, batch.rows)
    anchors = model.batch_anchors(prompts, batch.rows, features)
    similarities = scoring.similarities(features.levels, anchors)
    return stage1_losses(similarities, anchors, batch.masks, NORM_WEIGHT)[0]


def reference_stage1(case: CrossCase) -> tuple[list[Tensor], Tensor]:
    """Each image's anchors, and the loss."""
    with torch.no_grad():
        if case.ref.cross.text_context == "frozen":
            features = [reference.frozen_image(case.ref, image.double())[0] for image in case.batch.images]
        elif case.ref.cross.text_context == "projectors":
            features = [reference.projected_image(case.ref, image.double())[0] for image in case.batch.images]
        else:
            features = [levels for levels, _ in case.adapted_images()]
    anchors = case.anchors(case.patches())
    return anchors, reference.stage1_loss(features, anchors, case.batch.masks.double(), NORM_WEIGHT)


def reference_gradients(case: CrossCase, loss: Tensor, side: str) -> dict[str, Tensor]:
    parts = [f"{side}_adapter."]
    off = side == "text" and case.ref.cross.text_conditioning == "none"
    if getattr(case.ref.cross, f"{side}_cross_attn_weight") != 0 and not off:
        parts.append(f"{side}_cross_attn.")
    names = [name for name in case.ref.weights if name.startswith(tuple(parts))]
    gradients = torch.autograd.grad(loss, [case.ref.weights[name] for name in names])
    return dict(zip(names, gradients, strict=True))


def agree_by_branch(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """As `assert_all_agree`, but the bias of keys is compared with the largest gradient of its branch.

    It shifts all scores of a query alike, so its gradient is 0 up to rounding.
    """
    assert set(actual) == set(expected)
    cancelling = [name for name in expected if name.endswith("k_proj.bias")]
    for name in cancelling:
        branch = name.split(".")[0]
        size = max(value.abs().max() for key, value in expected.items() if key.startswith(branch))
        assert (actual[name].double() - expected[name]).abs().max() <= tolerance * size, name
    kept = [name for name in expected if name not in cancelling]
    assert_all_agree({name: actual[name] for name in kept}, {name: expected[name] for name in kept}, tolerance)


@cases
def test_stage1(name: str) -> None:
    """Conditioned anchors, loss, and gradients, which reach only the text side."""
    case = make_case(name)
    anchors, expected = reference_stage1(case)
    gradients = reference_gradients(case, expected, "text")
    for model, batch, tolerance in case.precisions():
        features = model.stage1_features(batch.images, case.prompts, batch.rows)
        found = model.batch_anchors(case.prompts, batch.rows, features)
        assert_agrees(found, torch.stack(anchors), tolerance, "anchors")
        assert_agrees(stage1(model, batch, case.prompts)["total"], expected, tolerance, "total")
    assert {key.split(".")[0] for key in gradients} == set(case.model.trained_components("text"))

    def loss_of(model: AdaptedCLIPWithCrossAttention, batch: Batch) -> Tensor:
        return stage1(model, batch, case.prompts)["total"]

    assert_gradients_agree(case.model, case.batch, loss_of, gradients, agree_by_branch)


@cases
def test_stage2(name: str) -> None:
    """Features, scores against each image's own anchors, loss, and gradients, which reach only the image side."""
    case = make_case(name)
    features = case.adapted_images()
    with torch.no_grad():
        anchors = case.anchors(case.patches())
    expected = reference.stage2_loss(features, anchors, case.batch.masks.double(), case.batch.labels)
    gradients = reference_gradients(case, expected, "image")
    for model, batch, tolerance in case.precisions():
        text_side = model.text_side(case.prompts)
        found = model.image_features(batch.images, text_side, batch.rows)
        outputs = model(batch.images, text_side, batch.rows)
        assert_features_agree(found, features, tolerance)
        for k in range(len(found.levels)):
            scores = [reference.similarity(image[0][k], pair) for image, pair in zip(features, anchors, strict=True)]
            assert_agrees(outputs.levels[k], torch.stack(scores), tolerance, f"similarity {k}")
        assert_agrees(stage2(model, batch, case.prompts)["total"], expected, tolerance, "total")
    assert {key.split(".")[0] for key in gradients} == set(case.model.trained_components("image"))

    def loss_of(model: AdaptedCLIPWithCrossAttention, batch: Batch) -> Tensor:
        return stage2(model, batch, case.prompts)["total"]

    assert_gradients_agree(case.model, case.batch, loss_of, gradients, agree_by_branch)


@pytest.mark.parametrize("name", ["eval", "trained"])
def test_the_joint_forward_is_the_forward_with_gradients(name: str) -> None:
    case = make_case(name)
    model, batch = case.model.eval(), case.batch
    joint = model.joint_forward(batch.images, case.prompts, batch.rows)
    alone = model(batch.images, model.text_side(case.prompts), batch.rows)
    assert_agrees(torch.stack(joint.levels), torch.stack(alone.levels), 1e-5)
    assert_agrees(joint.det, alone.det, 1e-5)
    # With dropout every prompt is encoded separately.
    model.train().text_cross_attn.dropout = model.image_cross_attn.dropout = 1e-12
    dropped = model.joint_forward(batch.images, case.prompts, batch.rows)
    assert_agrees(torch.stack(dropped.levels), torch.stack(alone.levels), 1e-5)


def test_state_dict_keys() -> None:
    model = cross_model(shared_clip())
    keys = {f"{part}_proj.{kind}" for part in ("q", "k", "v", "out") for kind in ("weight", "bias")}
    for part in (model.text_cross_attn, model.image_cross_attn):
        assert set(part.state_dict()) == keys
    assert list(model.components) == ["text_adapter", "text_cross_attn", "image_adapter", "image_cross_attn"]
    assert {name.split(".")[0] for name in trainable(model)} == set(model.components)


def test_options_of_a_disabled_branch_are_not_refused() -> None:
    off = {"text_cross_attn_weight": 0.0, "image_cross_attn_weight": 0.0}
    cross_model(shared_clip(), cross_attn_init="zero", cross_attn_residual="matched", **off)
    cross_model(shared_clip(), image_cross_attn_weight=1.5)


def copied_from(base: nn.Module, model: AdaptedCLIPWithCrossAttention) -> AdaptedCLIPWithCrossAttention:
    for name in ("text_adapter", "image_adapter"):
        getattr(model, name).load_state_dict(getattr(base, name).state_dict())
    return model


@pytest.mark.parametrize("conditioning", ["image", "none"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_at_weight_0_the_model_is_the_base_bit_for_bit(conditioning: str, train: bool) -> None:
    """Outputs, losses and gradients of both stages."""
    clip = shared_clip()
    base = adapted_clip(clip, seed=5, text_adapt_until=2, image_adapt_until=3).train(train)
    off = {"text_cross_attn_weight": 0.0, "image_cross_attn_weight": 0.0, "text_conditioning": conditioning}
    model = copied_from(base, cross_model(clip, **off)).train(train)
    batch, prompts = random_batch(40), tiny_prompts(clip)
    outputs, losses = [], []
    for each in (base, model):
        outputs.append(each(batch.images, each.text_side(prompts), batch.rows))
        frozen = each.frozen_features(batch.images)
        anchors = each.batch_anchors(prompts, batch.rows, frozen)
        first = stage1_losses(scoring.similarities(frozen.levels, anchors), anchors, batch.masks, NORM_WEIGHT)[0]
        second = stage2_losses(outputs[-1], batch.masks, batch.labels)[0]
        (first["total"] + second["total"]).backward()
        losses.append((first["total"], second["total"]))
    for first, second in zip((*outputs[0].levels, outputs[0].det), (*outputs[1].levels, outputs[1].det), strict=True):
        assert torch.equal(first, second)
    assert losses[0] == losses[1]
    expected = gradients_of(base)
    assert set(gradients_of(model)) == set(expected)
    for name, gradient in gradients_of(model).items():
        assert torch.equal(gradient, expected[name])


def test_zero_init_starts_at_the_base() -> None:
    """The image side is bit-identical; prompts are expanded per image, so their sums may have another order."""
    clip = model64().clip
    base = adapted_clip(clip, text_adapt_until=2, image_adapt_until=3)
    torch.manual_seed(3)
    model = AdaptedCLIPWithCrossAttention(
        clip, base.config, cross=CrossAttentionConfig(cross_attn_heads=4, cross_attn_init="zero")
    ).double()
    copied_from(base, model).train()
    batch, prompts = random_batch(40).to(torch.float64), tiny_prompts(clip)
    text_side = model.text_side(prompts)
    found, expected = model.image_features(batch.images, text_side, batch.rows), base.encode_image(batch.images)
    for first, second in zip((*found.levels, found.det), (*expected.levels, expected.det), strict=True):
        assert torch.equal(first, second)
    anchors = model.batch_anchors(prompts, batch.rows, model.frozen_features(batch.images))
    assert_agrees(anchors, base.text_side(prompts)[batch.rows], 1e-13)
    stream = text_side.stream[batch.rows].flatten(1, 2)
    context = model.text_context(model.frozen_features(batch.images))
    assert torch.equal(model.attend_to_image(stream, context), stream)
    # It can leave the start: the output projection has a gradient, the silent rest follows.
    stage2(model, batch, prompts)["total"].backward()
    assert model.image_cross_attn.out_proj.weight.grad.abs().max() > 0
    stage1(model, batch, prompts)["total"].backward()
    assert model.text_cross_attn.out_proj.weight.grad.abs().max() > 0


def test_returned_attention_is_that_of_the_forward_pass() -> None:
    """The weights sum to 1, are 0 at padding, and with the values give the branch's output in the forward."""
    model = model64()
    batch, prompts = random_batch(40).to(torch.float64), tiny_prompts(model.clip)
    text_side = model.text_side(prompts)
    with torch.no_grad():
        attention = model.attention(batch.images, text_side, batch.rows)
        count, length = prompts.tokens.shape[1:]
        assert_agrees(attention.text.sum(dim=-1), torch.ones(4, 4, count, length), 1e-12)
        assert_agrees(attention.image.sum(dim=(-2, -1)), torch.ones(4, 4, 26), 1e-12)
        padding = ~attention.words[:, None, None].expand_as(attention.image)
        assert padding.any() and not attention.image[padding].any()
        x = run_block(model.clip.clip.visual.transformer.resblocks[0], model.clip.embed_image(batch.images))
        words = text_side.context[batch.rows]
        found = weighted_values(model.image_cross_attn, attention.image.flatten(3), words)
        assert_agrees(found, model.image_cross_attn(x, words, text_side.mask[batch.rows]), EXACT)
        patches = model.text_context(model.frozen_features(batch.images))
        found = weighted_values(model.text_cross_attn, attention.text.flatten(2, 3), patches)
        stream = text_side.stream[batch.rows].flatten(1, 2)
        assert_agrees(found, model.text_cross_attn(stream, patches), EXACT)


def weighted_values(branch: CrossAttention, weights: Tensor, context: Tensor) -> Tensor:
    """weights (B, heads, T, M) on the values of context (B, M, C_c) -> (B, T, C_q)."""
    values = branch.v_proj(context).chunk(branch.heads, dim=-1)
    return branch.out_proj(torch.cat([weights[:, head] @ value for head, value in enumerate(values)], dim=-1))


@pytest.mark.parametrize("text_context", ["frozen", "trained"])
@given(rows=st.lists(st.integers(0, 3), min_size=1, max_size=5))
@example(rows=[3, 2, 1, 0])
@example(rows=[1, 1])
@settings(max_examples=6, deadline=None)
def test_an_image_does_not_depend_on_its_batch(text_context: str, rows: list[int]) -> None:
    """Features and scores of Stage 2 and testing, and the anchors of Stage 1."""
    model = model64(text_context=text_context)
    batch, prompts = random_batch(40).to(torch.float64), tiny_prompts(model.clip)
    text_side = model.text_side(prompts)

    def results(images: Tensor, classes: Tensor) -> list[Tensor]:
        outputs = model(images, text_side, classes)
        features = model.image_features(images, text_side, classes)
        of_stage1 = features if text_context == "trained" else model.frozen_features(images)
        anchors = model.batch_anchors(prompts, classes, of_stage1)
        return [*outputs.levels, outputs.det, *features.levels, features.det, anchors]

    with torch.no_grad():
        together = results(batch.images, batch.rows)
        for found, expected in zip(results(batch.images[rows], batch.rows[rows]), together, strict=True):
            assert_agrees(found, expected[rows], EXACT)


@torch.no_grad()
@pytest.mark.parametrize("text_context", ["frozen", "projectors"])
def test_an_image_is_tested_independently_of_stage_1(text_context: str) -> None:
    """`--surgery batch_axis`: features of Stage 1 depend on the batch, the context of anchors in testing does not."""
    model = model64(text_context=text_context)
    model.config = replace(model.config, surgery="batch_axis", surgery_until_layer=9)
    batch, prompts = random_batch(40).to(torch.float64), tiny_prompts(model.clip)
    together, alone = (
        model.stage1_features(batch.images[:count], prompts, batch.rows[:count]).context for count in (4, 1)
    )
    assert (together[:1] - alone).abs().max() > 1e-3
    text_side = model.text_side(prompts)
    outputs = model(batch.images, text_side, batch.rows)
    for number in range(4):
        one = model(batch.images[number : number + 1], text_side, batch.rows[number : number + 1])
        for found, expected in zip([*one.levels, one.det], [*outputs.levels, outputs.det], strict=True):
            assert_agrees(found[0], expected[number], EXACT)


def test_stage_1_gives_the_image_side_no_gradient() -> None:
    """Even if its features require one."""
    model = cross_model(shared_clip(), text_context="trained")
    batch, prompts = random_batch(40), tiny_prompts(model.clip)
    features = model.image_features(batch.images, model.text_side(prompts), batch.rows)
    assert features.levels[0].requires_grad
    features.levels[0].retain_grad()
    model.batch_anchors(prompts, batch.rows, features)[..., 0].sum().backward()
    assert features.levels[0].grad is None
    assert {name.split(".")[0] for name in gradients_of(model)} == {"text_adapter", "text_cross_attn"}


@given(padding=st.lists(st.integers(0, 49405), min_size=1, max_size=12))
@example(padding=[0])
@settings(max_examples=6, deadline=None)
def test_padding_does_not_matter(padding: list[int]) -> None:
    """Its length and tokens do not change images, anchors or scores."""
    model = model64()
    batch, prompts = random_batch(40).to(torch.float64), tiny_prompts(model.clip)
    length = prompts.tokens.shape[-1]
    tokens = F.pad(prompts.tokens, (0, len(padding)))
    positions = torch.arange(tokens.shape[-1])
    after = positions > tokens.argmax(dim=-1, keepdim=True)
    filled = torch.where(after, torch.tensor(padding)[positions % len(padding)], tokens)
    assert after[..., :length].any() and after[..., length:].all()
    with torch.no_grad():
        frozen = model.frozen_features(batch.images)
        results = []
        for each in (prompts, Prompts(filled, prompts.normal)):
            outputs = model(batch.images, model.text_side(each), batch.rows)
            results.append([*outputs.levels, outputs.det, model.batch_anchors(each, batch.rows, frozen)])
    for found, expected in zip(results[1], results[0], strict=True):
        assert_agrees(found, expected, EXACT)


def test_dropout_acts_on_the_attention_weights_in_train_mode() -> None:
    """With values of 1, a head's output is the sum of its remaining weights: one number for all its channels."""
    torch.manual_seed(0)
    branch = CrossAttention(8, 6, 8, weight=1.0, heads=2, dropout=0.1)
    with torch.no_grad():
        branch.v_proj.weight.zero_()
        branch.v_proj.bias.fill_(1)
        branch.out_proj.weight.copy_(torch.eye(8))
        out = branch(torch.randn(3, 400, 8), torch.randn(3, 50, 6)).unflatten(-1, (2, 4))
        assert_agrees(out, out[..., :1].expand_as(out), 1e-6)
        assert out.std() > 0.01
        # What is dropped is made up for: the mean stays.
        assert out.mean().item() == pytest.approx(1, abs=0.01)
        branch.eval()
        assert_agrees(branch(torch.randn(3, 4, 8), torch.randn(3, 5, 6)), torch.ones(3, 4, 8), 1e-6)


# Row 1: cross-attention output added at full scale, from raw context.

NEW = {"image_cross_attn_weight": 0.1, "context_norm": "unit"}
OLD = {"image_cross_attn_weight": 1.0, "context_norm": "none"}


@functools.cache
def toy_clip() -> FrozenCLIP:
    """Trained weights: the tokens of a random text encoder are much shorter than those of a trained one."""
    return load_clip("toy")


def toy_model(**changes: Any) -> AdaptedCLIPWithCrossAttention:
    """New, without text cross-attention, so that two models differ in the image side only."""
    clip = toy_clip()
    torch.manual_seed(0)
    cross = CrossAttentionConfig(**{"text_cross_attn_weight": 0.0, **changes})
    return AdaptedCLIPWithCrossAttention(clip, config_for(clip), cross=cross).eval()


def contribution(model: AdaptedCLIPWithCrossAttention) -> float:
    """|w * out| / |x|, mean over tokens: the cross-attention's share of the stream."""
    batch, text_side = random_batch(model.clip.img_size), model.text_side(tiny_prompts(model.clip))
    with torch.no_grad():
        x = run_block(model.clip.clip.visual.transformer.resblocks[0], model.clip.embed_image(batch.images))
        added = model.attend_to_text(x, text_side.context[batch.rows], text_side.mask[batch.rows]) - x
    return (added.norm(dim=-1) / x.norm(dim=-1)).mean().item()


def image_gradient(model: AdaptedCLIPWithCrossAttention) -> float:
    """Norm of the image adapter's gradient in Stage 2."""
    stage2(model, random_batch(model.clip.img_size), tiny_prompts(model.clip))["total"].backward()
    return torch.stack([value.grad.norm() for value in model.image_adapter.parameters()]).norm().item()


def check_a_fresh_cross_attention_is_a_small_disturbance(**setting: Any) -> None:
    model = toy_model(**setting)
    assert 0 < contribution(model) < 0.05
    assert image_gradient(model) >= 0.8 * image_gradient(toy_model(image_cross_attn_weight=0.0))


def test_row1_a_new_cross_attention_is_a_small_disturbance() -> None:
    check_a_fresh_cross_attention_is_a_small_disturbance(**NEW)
    with pytest.raises(AssertionError):
        check_a_fresh_cross_attention_is_a_small_disturbance(**OLD)


def test_row1_raw_context_at_full_scale_contributes_many_times_as_much() -> None:
    new, old = contribution(toy_model(**NEW)), contribution(toy_model(**OLD))
    assert old > 10 * new
    # Both parts of the mending count: the weight by its factor, and unit context by itself.
    assert contribution(toy_model(**{**OLD, "image_cross_attn_weight": 0.1})) == pytest.approx(old / 10, rel=1e-3)
    assert contribution(toy_model(**{**NEW, "context_norm": "none"})) > 1.5 * new
