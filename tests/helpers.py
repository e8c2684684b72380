"""Small random CLIPs and batches for the tests: no download, no training, every tensor filled with noise."""

from __future__ import annotations

import copy
import functools
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from dataset import toy_world
from model.adapter import AdaptedCLIP
from model.clip import FrozenCLIP
from model.config import ModelConfig
from model.text import CLIP_TEXT, Prompts, TextModules, begin_prompts, finish_prompts

# All widths differ, so that one taken for another shows. Eight blocks put the first level before the first V-V block.
TINY_ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 40,
    "vision_cfg": {"image_size": 40, "layers": 8, "width": 48, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 4},
}

TINY_NAME = "ViT-tiny-test"

# The lock file of a process on another machine.
OTHER_LOCK = "filelock/2\npid=7\nhost=elsewhere\nmode=lease\ntoken=x\nduration=120.0\n"


def write_lock(path: Path, marker: str = OTHER_LOCK, silent: float = 0.0) -> None:
    """Replace the lock file `path`, as another holder does whose last heartbeat was `silent` seconds ago."""
    path.parent.mkdir(exist_ok=True)
    new = path.with_name("new")
    new.write_text(marker, encoding="utf-8", newline="\n")
    os.utime(new, (time.time() - silent,) * 2)
    new.replace(path)


def draw_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw 6 or 8 normal images of each class of a toy dataset, and 3 of each defect."""
    monkeypatch.setattr(toy_world, "GOOD_IMAGES", {"toy_train": 8, "toy_test": 6})
    monkeypatch.setattr(
        toy_world, "toy_defects", lambda dataset, name: dict.fromkeys(toy_world.CLASSES[dataset][name].defects, 3)
    )


def fill_with_noise(module: nn.Module, scale: float = 0.05) -> None:
    """Add noise to every parameter: fresh biases are 0 and fresh layer norms 1, which hides a forgotten one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


def tiny_open_clip(quick_gelu: bool = True, image_size: int = 40, seed: int = 0) -> open_clip.CLIP:
    torch.manual_seed(seed)
    vision = {**TINY_ARCHITECTURE["vision_cfg"], "image_size": image_size}
    clip = open_clip.CLIP(**{**TINY_ARCHITECTURE, "vision_cfg": vision}, quick_gelu=quick_gelu)
    fill_with_noise(clip)
    return clip


def tiny_clip(quick_gelu: bool = True, image_size: int = 40, seed: int = 0) -> FrozenCLIP:
    return FrozenCLIP(tiny_open_clip(quick_gelu, image_size, seed), "tiny", "quick_gelu" if quick_gelu else "gelu")


def save_openai_archive(clip: open_clip.CLIP, path: Path, half: bool = False) -> Path:
    """Write `clip` as OpenAI distributes its models: TorchScript, with three numbers among the weights."""
    clip = clip.half() if half else clip
    size = clip.visual.image_size[0]
    # OpenAI's mask is no buffer, so it is not among the weights.
    mask = clip.attn_mask
    del clip.attn_mask
    clip.attn_mask = mask.to(clip.visual.conv1.weight.dtype)
    numbers = {"input_resolution": size, "context_length": clip.context_length, "vocab_size": clip.vocab_size}
    del clip.context_length, clip.vocab_size
    for name, value in numbers.items():
        clip.register_buffer(name, torch.tensor(value))
    image = torch.zeros(1, 3, size, size, dtype=clip.visual.conv1.weight.dtype)
    tokens = torch.zeros(1, 77, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace_module(clip.eval(), {"encode_image": (image,), "encode_text": (tokens,)})
        traced.save(str(path))
    return path


def config_for(clip: FrozenCLIP, **changes: Any) -> ModelConfig:
    """The defaults of this CLIP, with changes."""
    values = {**clip.defaults, **changes}
    return ModelConfig(clip.model_name, clip.weights_digest, clip.activation, clip.img_size, **values)


def adapted_clip(clip: FrozenCLIP, seed: int = 1, **changes: Any) -> AdaptedCLIP:
    torch.manual_seed(seed)
    return AdaptedCLIP(clip, config_for(clip, **changes)).to(clip.clip.logit_scale.dtype)


def trainable(model: AdaptedCLIP) -> dict[str, Tensor]:
    """The trainable tensors by the names that checkpoints carry, without CLIP's."""
    return {name: value for name, value in model.named_parameters() if not name.startswith("clip.")}


# Lengths differ, so that cutting and padding matter.
PROMPT_TEXTS = [
    (["a nut.", "a photo of the nut."], ["a damaged nut.", "a photo of a nut with flaw.", "a broken nut."]),
    (["a zipper.", "the long metal zipper."], ["a damaged zipper.", "a broken zipper.", "zipper."]),
    (["rope.", "a photo of rope."], ["a rope with a very long and rather strange defect.", "a bad rope.", "old rope."]),
]


def tiny_prompts(clip: FrozenCLIP) -> Prompts:
    return Prompts.from_texts(clip, PROMPT_TEXTS)


def encode_prompts(clip: FrozenCLIP, tokens: Tensor, modules: TextModules = CLIP_TEXT) -> Tensor:
    """Token ids (P, T) -> unit prompt features (P, D), each prompt computed separately."""
    return finish_prompts(clip, begin_prompts(clip, tokens), tokens, modules)


@dataclass(frozen=True)
class Batch:
    """images (B, 3, S, S), masks (B, S, S) in {0, 1}, labels (B,), rows (B,): each image's class."""

    images: Tensor
    masks: Tensor
    labels: Tensor
    rows: Tensor

    def to(self, dtype: torch.dtype) -> Batch:
        return Batch(self.images.to(dtype), self.masks.to(dtype), self.labels, self.rows)


def random_batch(size: int, seed: int = 2) -> Batch:
    """Four images of three classes, two of one class: masks empty, full, a rectangle, and scattered."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 3, size, size, generator=generator)
    masks = torch.zeros(4, size, size)
    masks[1] = 1
    masks[2, : size // 3, size // 4 : size // 2] = 1
    masks[3] = (torch.rand(size, size, generator=generator) < 0.3).float()
    return Batch(images, masks, torch.tensor([0, 1, 1, 1]), torch.tensor([0, 2, 0, 1]))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest value of `expected`."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    difference = (actual.detach().double() - expected.detach().double()).abs().max().item()
    largest = expected.detach().double().abs().max().item()
    return difference / largest if largest else difference


def assert_agrees(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: differs by {error:.2e} of the largest value, {tolerance:.0e} is allowed"


def assert_all_agree(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    assert set(actual) == set(expected)
    for name, value in actual.items():
        assert_agrees(value, expected[name], tolerance, name)


def equal(one: Any, two: Any) -> bool:
    """Bit for bit, through nested dicts and lists."""
    if isinstance(one, dict):
        return set(one) == set(two) and all(equal(value, two[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    return torch.equal(one, two) if isinstance(one, Tensor) else one == two


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """All gradients, including those of tensors that should have none."""
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


# Which pre-activations were above 0, at each call of each LeakyReLU of a model.
Sides = Mapping[str, list[Tensor]]
KINK_TOLERANCE = 1e-5


@contextmanager
def leaky_relu_hooks(model: nn.Module, hook: Callable[..., Tensor | None]) -> Iterator[None]:
    """Call `hook(name, module, inputs, output)` after each LeakyReLU; its return value replaces the output."""
    parts = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.LeakyReLU)]
    handles = [part.register_forward_hook(partial(hook, name)) for name, part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded_sides(model: nn.Module) -> Iterator[Sides]:
    """Which side of LeakyReLU's kink each pre-activation falls on while the context is open."""
    sides: dict[str, list[Tensor]] = defaultdict(list)

    def record(name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        sides[name].append(inputs[0].detach() > 0)

    with leaky_relu_hooks(model, record):
        yield sides


@contextmanager
def same_sides(model: nn.Module, sides: Sides) -> Iterator[None]:
    """Use the sides of another run; only pre-activations near 0 may have another side."""
    calls = {name: iter(of_calls) for name, of_calls in sides.items()}

    def take(name: str, module: nn.LeakyReLU, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        x, above = inputs[0], next(calls[name])
        flipped = (above != (x > 0)).nonzero()
        nearly_zero = KINK_TOLERANCE * x.detach().abs().max()
        far = [tuple(place) for place in flipped.tolist() if x[tuple(place)].abs() > nearly_zero]
        assert not far, f"{name}: {far} lie on the other side of the kink, by more than rounding"
        return torch.where(above, x, module.negative_slope * x)

    with leaky_relu_hooks(model, take):
        yield


def gradients_by_sides(
    model: nn.Module, loss_of: Callable[[], Tensor], sides: Sides | None = None
) -> tuple[dict[str, Tensor], Sides]:
    """All gradients of `loss_of()` and the sides of LeakyReLU's kink, which can be prescribed."""
    model.zero_grad()
    if sides is None:
        with recorded_sides(model) as sides:
            loss_of().backward()
    else:
        with same_sides(model, sides):
            loss_of().backward()
    return gradients_of(model), sides


@functools.lru_cache(maxsize=4)
def double_clip(clip: FrozenCLIP) -> FrozenCLIP:
    """A frozen CLIP in float64, once for all models on it."""
    return copy.deepcopy(clip).double()


def in_double(model: Any) -> Any:
    """A copy of a model in float64, on a CLIP that such copies share."""
    shared = {id(model.clip): double_clip(model.clip)} if hasattr(model, "clip") else {}
    return copy.deepcopy(model, shared).double()


def assert_gradients_agree(
    model: nn.Module,
    batch: Batch,
    loss_of: Callable[[Any, Batch], Tensor],
    expected: Mapping[str, Tensor],
    agree: Callable[[Mapping[str, Tensor], Mapping[str, Tensor], float], None] = assert_all_agree,
) -> None:
    """Gradients of `loss_of(model, batch)`: double precision against `expected`, and single against double precision.

    A gradient jumps where a pre-activation of LeakyReLU crosses 0. Rounding decides on which side one falls that is
    nearly 0, in another way on each CPU: single and double precision are compared on the same sides.
    """
    double, batch64 = in_double(model), batch.to(torch.float64)
    agree(gradients_by_sides(double, lambda: loss_of(double, batch64))[0], expected, 1e-9)
    single, sides = gradients_by_sides(model, lambda: loss_of(model, batch))
    agree(single, gradients_by_sides(double, lambda: loss_of(double, batch64), sides)[0], 1e-5)


class RunsCode:
    """Its pickle writes `target` if it is read without `weights_only`."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.write_text, (self.target, "ran")
