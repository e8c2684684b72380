"""A training step waits for the device once, to check that loss and gradient are finite."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.overrides import TorchFunctionMode

from engine.config.training import BaseConfig
from engine.training.schedules import Schedule, halved_at
from engine.training.stage1 import TextStage
from engine.training.stage2 import ImageStage
from engine.training.stages import Stage, class_rows, present_classes, watch_abnormal
from engine.training.trainer import Trainer, gradient_norms
from model.adapter import AdaptedCLIP
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.config import CrossAttentionConfig, LoopForward
from tests.helpers import config_for, random_batch, tiny_clip, tiny_prompts

CLASSES = ("nut", "zipper", "rope")
SIZE = 40
STAGES = {"text": TextStage, "image": ImageStage}
MODELS: dict[str, CrossAttentionConfig | None] = {
    "base": None,
    "words": CrossAttentionConfig(),
    "matched": CrossAttentionConfig(cross_attn_residual="matched"),
}
LOOPS = {"first": LoopForward("frozen", True), "later": LoopForward("trained", True)}
# What fetches a value from the device, or needs one to know the shape of its result.
NAMES = (
    "item tolist cpu numpy __bool__ __int__ __float__ __index__ __contains__ nonzero argwhere unique "
    "unique_consecutive masked_select bincount equal allclose is_nonzero"
)
FETCHING = frozenset(NAMES.split())


class CountFetches(TorchFunctionMode):
    """Counts calls that would wait for a GPU, boolean indexing among them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Sequence[Any] = (), named: Any = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name in FETCHING:
            self.found[name] += 1
        if name in ("__getitem__", "__setitem__") and chooses_by_mask(arguments[1]):
            self.found["boolean index"] += 1
        return function(*arguments, **(named or {}))


def chooses_by_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) for part in parts)


def make_stage(side: str, kind: str, loop: str, device: str = "cpu") -> Stage:
    clip, cross = tiny_clip(), MODELS[kind]
    config = config_for(clip)
    model = AdaptedCLIP(clip, config) if cross is None else AdaptedCLIPWithCrossAttention(clip, config, cross=cross)
    model.to(device)
    stage = STAGES[side](model, tiny_prompts(clip).to(device), CLASSES, BaseConfig(), LOOPS[loop])
    stage.begin()
    return stage


def make_batch(device: str = "cpu") -> dict[str, Any]:
    batch = random_batch(SIZE)
    return {
        "image": batch.images.to(device),
        "mask": batch.masks[:, None].to(device),
        "label": batch.labels.to(device),
        "class_name": [CLASSES[row] for row in batch.rows.tolist()],
    }


COMBINATIONS = [
    (side, kind, loop) for kind in MODELS for side in STAGES for loop in LOOPS if kind != "base" or loop == "first"
]


@pytest.mark.parametrize(("side", "kind", "loop"), COMBINATIONS)
def test_forward_and_backward_do_not_synchronise(side: str, kind: str, loop: str) -> None:
    stage, batch = make_stage(side, kind, loop), make_batch()
    with CountFetches() as calls:
        stage(batch).losses["total"].backward()
        gradient_norms(stage.trained)
    assert not calls.found


def test_synchronisations_are_counted() -> None:
    values = torch.arange(4.0)
    with CountFetches() as calls:
        values[values > 1].sum()
        values.unique()
        if values.sum() > 0:
            values.max().item()
    assert calls.found == Counter({"boolean index": 1, "unique": 1, "__bool__": 1, "item": 1})


@pytest.fixture(autouse=True)
def accelerate_as_new() -> Iterator[None]:
    """accelerate keeps the first device of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def epoch_of(stage: Stage, batches: Sequence[dict[str, Any]]) -> None:
    parameters = [parameter for part in stage.trained.values() for parameter in part.parameters()]
    # Adam counts its steps in tensors that stay on the CPU, whose values cost no waiting.
    optimizer = torch.optim.SGD(parameters, lr=1e-4)
    accelerator = Accelerator(cpu=batches[0]["image"].device.type == "cpu")
    schedule = Schedule({optimizer: 1e-4}, halved_at(()))
    Trainer(stage, stage.trained, batches, schedule, accelerator, max_norm=1.0).train_epoch("epoch")


def counted(side: str, kind: str, steps: int) -> Counter[str]:
    stage, batch = make_stage(side, kind, "first"), make_batch()
    with CountFetches() as counting:
        epoch_of(stage, [batch] * steps)
    return counting.found


@pytest.mark.parametrize("kind", ["base", "words"])
@pytest.mark.parametrize("side", STAGES)
def test_a_step_synchronises_once(side: str, kind: str) -> None:
    """Synchronisations at the end of an epoch do not depend on its steps."""
    few, many = counted(side, kind, 2), counted(side, kind, 5)
    assert many - few == Counter(tolist=3)


@pytest.fixture
def sync_warnings() -> Iterator[list[warnings.WarningMessage]]:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["base", "words"])
@pytest.mark.parametrize("side", STAGES)
def test_a_step_on_a_gpu_synchronises_once(side: str, kind: str, sync_warnings: list[warnings.WarningMessage]) -> None:
    stage, batch = make_stage(side, kind, "first", "cuda"), make_batch("cuda")
    epoch_of(stage, [batch] * 2)  # libraries set themselves up
    counts = []
    for steps in (2, 5):
        sync_warnings.clear()
        torch.cuda.set_sync_debug_mode("warn")
        epoch_of(stage, [batch] * steps)
        torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in sync_warnings))
    assert counts[1] - counts[0] == 3


def test_rows_of_classes_are_those_of_their_names() -> None:
    order = {"nut": 0, "zipper": 1, "rope": 2}
    batch = {"class_name": ["rope", "nut", "rope", "rope"], "image": torch.zeros(4)}
    assert class_rows(batch, order).tolist() == [2, 0, 2, 2]
    present, rows = present_classes(batch, order)
    assert present.tolist() == [0, 2] and rows.tolist() == [1, 0, 1, 1]


def test_p_abnormal_is_summed_inside_and_outside_the_masks() -> None:
    abnormal = torch.tensor([[[0.5, 0.25], [torch.nan, 1.0]]])
    mask = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    found = {name: value.item() for name, value in watch_abnormal(abnormal, mask).items()}
    assert math.isnan(found.pop("inside_sum"))
    assert found == {"inside_pixels": 2, "outside_sum": 1.25, "outside_pixels": 2}
