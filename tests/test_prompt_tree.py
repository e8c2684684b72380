"""Prompts with shared prefixes are encoded together, with the results of separate encoding."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dataset.prompts import build_prompts
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.config import CrossAttentionConfig
from model.text import Prompts, encode_classes, finish_prompts
from tests.helpers import (
    adapted_clip,
    assert_agrees,
    assert_all_agree,
    config_for,
    encode_prompts,
    fill_with_noise,
    gradients_of,
    random_batch,
    tiny_clip,
    tiny_prompts,
    trainable,
)
from utils.errors import UserError

NAMES = ("metal nut", "a rather long name of a thing", "a", "nut")


def prompts_of(kind: str) -> Prompts:
    clip = tiny_clip()
    return tiny_prompts(clip) if kind == "short" else Prompts.from_texts(clip, [build_prompts(name) for name in NAMES])


@pytest.mark.parametrize("kind", ["short", "real"])
def test_features_and_gradients_equal_those_of_single_prompts(kind: str) -> None:
    prompts, model = prompts_of(kind), adapted_clip(tiny_clip()).double()
    fill_with_noise(model.text_adapter)
    found = encode_classes(model.clip, prompts, model.text_modules)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    gradients = {name: value.clone() for name, value in gradients_of(model).items()}
    model.zero_grad()
    expected = encode_prompts(model.clip, prompts.tokens.flatten(0, 1), model.text_modules).view_as(found)
    (expected * weights).sum().backward()
    assert_agrees(found, expected, 1e-10)
    assert_all_agree(gradients, gradients_of(model), 1e-9)
    assert any(name.startswith("text_adapter") for name in trainable(model))


def test_shared_prefixes_are_computed_once() -> None:
    clip, prompts = tiny_clip(), prompts_of("real")
    with FlopCounterMode(display=False) as together:
        encode_classes(clip, prompts)
    with FlopCounterMode(display=False) as alone:
        encode_prompts(clip, prompts.tokens.flatten(0, 1))
    # In a tiny CLIP attention over all of a class's tokens counts for more than in a real one.
    few, all_of_them = (counter.get_flop_counts()["Global"][torch.ops.aten.addmm] for counter in (together, alone))
    assert few < 0.6 * all_of_them


@pytest.mark.parametrize("residual", ["add", "matched"])
def test_conditioned_prompts_are_encoded_alike(residual: str) -> None:
    clip, prompts = tiny_clip(), prompts_of("real")
    cross = CrossAttentionConfig(text_cross_attn_weight=0.5, cross_attn_residual=residual)
    model = AdaptedCLIPWithCrossAttention(clip, config_for(clip), cross=cross).double().eval()
    rows, context = torch.tensor([2, 0, 0, 3]), torch.randn(4, 25, 40, dtype=torch.float64)
    stream = model.text_side(prompts).stream
    found = model.conditioned_anchors(prompts, stream, rows, context)
    tokens = prompts.tokens[rows]
    x = model.attend_to_image(stream[rows].flatten(1, 2), context).unflatten(1, tokens.shape[1:]).flatten(0, 1)
    features = finish_prompts(clip, x, tokens.flatten(0, 1), model.text_modules).unflatten(0, tokens.shape[:2])
    normal, abnormal = features[:, : prompts.normal].mean(dim=1), features[:, prompts.normal :].mean(dim=1)
    expected = torch.stack([torch.nn.functional.normalize(part, dim=-1) for part in (normal, abnormal)], dim=-1)
    assert_agrees(found, expected, 1e-10)


def test_dropout_is_independent_for_every_prompt() -> None:
    """In Stage 1, where it is active, random numbers are those of separate prompts."""
    clip, prompts = tiny_clip(), prompts_of("real")
    model = AdaptedCLIPWithCrossAttention(clip, config_for(clip))
    features = model.stage1_features(random_batch(40).images, prompts, torch.tensor([0, 2, 0, 1]))
    calls = []
    taken = model.attend_to_image
    model.attend_to_image = lambda stream, context: calls.append(stream.shape[1]) or taken(stream, context)
    for training in (True, False):
        model.text_cross_attn.train(training)
        model.batch_anchors(prompts, torch.tensor([0, 2, 0, 1]), features)
    assert calls == [prompts.tokens[0].numel(), prompts.tree.tokens.shape[1]]


def test_a_prompt_that_is_too_long_is_named() -> None:
    """CLIP has 77 tokens, of which two mark start and end, and the last must stay free."""
    clip = tiny_clip()
    fitting, longer = "a " * 74, "nut " * 75
    assert Prompts.from_texts(clip, [(["a nut."], [fitting])]).tokens.shape == (1, 2, 76)
    with pytest.raises(UserError, match="the prompt 'nut nut"):
        Prompts.from_texts(clip, [(["a nut."], [fitting]), (["a nut."], [longer])])
