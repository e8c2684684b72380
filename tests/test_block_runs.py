"""Skipped, checkpointed and compiled blocks give the same results."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import model.adapter
import model.blocks
import model.frozen
from engine.config.training import LOOP_BATCH, BaseConfig
from engine.runtime.device import check_compiler
from engine.training.base import train_base
from engine.training.setup import compiled_sizes
from engine.training.stages import Stage
from model import blocks
from model.blocks import BlockRunner
from model.frozen import SharedStreams, surgery_stream
from tests.helpers import (
    adapted_clip,
    assert_agrees,
    assert_all_agree,
    config_for,
    gradients_of,
    random_batch,
    tiny_clip,
)
from tests.scripts import small_runs, write_clip, write_dataset
from tests.test_waiting import COMBINATIONS, make_batch, make_stage
from utils.errors import UserError


@contextmanager
def everything_computed() -> Iterator[None]:
    """All tokens of the last block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.frozen, "run_block_for_class", blocks.run_block)
        patch.setattr(model.adapter, "run_block_for_class", blocks.run_block)
        patch.setattr(model.frozen, "run_block_dual_for_class", blocks.run_block_dual)
        yield


def flops_of(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("surgery", ["dual", "sequential", "batch_axis"])
@pytest.mark.parametrize("levels", [(2, 4, 6, 8), (2,), (2, 5)])
@pytest.mark.parametrize("until", [1, 2, 7, 9])
def test_skipping_unused_computation_leaves_frozen_features_unchanged(
    surgery: str, levels: tuple[int, ...], until: int
) -> None:
    clip, images = tiny_clip(), random_batch(40).images
    config = config_for(clip, surgery=surgery, surgery_until_layer=until)

    def streams() -> tuple[list[Tensor], Tensor]:
        return surgery_stream(clip, images, config, levels)

    found, cost = streams(), flops_of(streams)
    with everything_computed():
        expected, cost_of_all = streams(), flops_of(streams)
    for stream, other in zip([*found[0], found[1]], [*expected[0], expected[1]], strict=True):
        assert_agrees(stream, other, 1e-5)
    # With neither V-V attention nor fewer levels the patches of the last block are read.
    assert cost == cost_of_all if until == 1 and levels[-1] == 8 else cost < cost_of_all


def test_the_class_token_after_the_last_level_needs_no_patches() -> None:
    clip, images = tiny_clip(), random_batch(40).images
    model = adapted_clip(clip, levels=(2, 5))
    found = model.encode_image(images, with_context=True)
    with everything_computed():
        expected = model.encode_image(images, with_context=True)
    assert_agrees(found.context, expected.context, 1e-5)


def test_shared_streams_equal_those_of_each_model() -> None:
    """Each surgery and depth has its own streams at its levels, each computed once."""
    clip, images, shared = tiny_clip(), random_batch(40).images, SharedStreams()
    for surgery, until, levels in (
        ("dual", 7, (2,)),
        ("dual", 7, (2, 5)),
        ("dual", 3, (2, 5)),
        ("sequential", 7, (2, 5)),
        ("dual", 7, (5,)),
    ):
        config = config_for(clip, surgery=surgery, surgery_until_layer=until)
        found, cls = shared.get(clip, images, config, levels)
        expected, expected_cls = surgery_stream(clip, images, config, levels)
        for stream, other in zip([*found, cls], [*expected, expected_cls], strict=True):
            assert_agrees(stream, other, 1e-5)
        again, _ = shared.get(clip, images, config, levels)
        assert all(one is other for one, other in zip(found, again, strict=True))


def losses_and_gradients(stage: Stage, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    stage.zero_grad()
    loss = stage(batch).losses["total"]
    loss.backward()
    return loss.detach(), {name: value.clone() for name, value in gradients_of(stage).items()}


def assert_same_step(side: str, kind: str, loop: str, run: BlockRunner, tolerance: float) -> Callable[[], Any]:
    """A step has the same loss and gradients with `run`; returns a function that repeats it."""
    stage, batch = make_stage(side, kind, loop), make_batch()
    loss, gradients = losses_and_gradients(stage, batch)
    stage.model.clip.run = run
    again, same = losses_and_gradients(stage, batch)
    assert_agrees(again, loss, tolerance)
    assert_all_agree(same, gradients, max(10 * tolerance, 1e-6))
    return lambda: losses_and_gradients(stage, batch)


class Storages(TorchDispatchMode):
    """The tensors that operations created, and the memory still held."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        found = function(*arguments, **(named or {}))
        self.calls[function.overloadpacket.__name__] += 1
        for value in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self.made[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return found

    def held(self) -> int:
        return sum(size for storage, size in self.made.values() if not storage.expired())


def test_checkpointed_blocks_use_less_memory_and_compute_attention_once() -> None:
    stage, batch = make_stage("image", "base", "first"), make_batch()
    kept, backward = {}, {}
    for checkpointed in (False, True):
        stage.model.clip.run = BlockRunner(checkpointed=checkpointed)
        with Storages() as storages:
            loss = stage(batch).losses["total"]
        kept[checkpointed] = storages.held()
        with Storages() as storages:
            loss.backward()
        backward[checkpointed] = storages.calls
    assert kept[True] < 0.7 * kept[False]
    again = backward[True] - backward[False]
    assert again["addmm"] > 0
    assert not any("attention" in name for name in again)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The graphs of compiled code, which run without a compiler to save time."""
    taken: list[torch.fx.GraphModule] = []

    def note(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        taken.append(graph)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: real(function, backend=note, **how))
    blocks.compiled.cache_clear()
    torch._dynamo.reset()
    yield taken
    blocks.compiled.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize(("side", "kind", "loop"), COMBINATIONS)
def test_checkpointed_blocks_have_the_same_gradients(side: str, kind: str, loop: str) -> None:
    """With dropout: each block uses the same random numbers again."""
    assert_same_step(side, kind, loop, BlockRunner(checkpointed=True), 0)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("side", ["text", "image"])
def test_one_graph_serves_all_blocks(side: str, checkpointed: bool, graphs: list[torch.fx.GraphModule]) -> None:
    again = assert_same_step(side, "words", "later", BlockRunner(checkpointed, [4]), 1e-6)
    # Images: without gradient, and with it after the first adapter; text: the same, and the prompts of all classes.
    assert 2 <= len(graphs) <= 5
    count = len(graphs)
    again()
    assert len(graphs) == count


def test_compiled_blocks_have_the_same_gradients() -> None:
    """Forward and backward with torch's own compiler."""
    try:
        check_compiler("cpu")
    except UserError as error:
        pytest.skip(str(error))
    assert_same_step("image", "base", "first", BlockRunner(compiled=[4]), 1e-4)


def test_batches_of_another_size_are_not_compiled(graphs: list[torch.fx.GraphModule]) -> None:
    clip = tiny_clip()
    clip.run = BlockRunner(compiled=[3])
    config = config_for(clip)
    surgery_stream(clip, random_batch(40).images, config, config.levels)
    assert not graphs
    surgery_stream(clip, random_batch(40).images[:3], config, config.levels)
    assert graphs


def test_a_restart_of_a_compiled_run_ends_with_the_same_weights(
    graphs: list[torch.fx.GraphModule], tmp_path: Path
) -> None:
    """Equal to 1e-4; `--compile` may change when a run resumes."""
    write_clip(tmp_path / "clip")
    write_dataset(tmp_path / "train", count=2)
    whole = replace(small_runs(tmp_path, compile=True)[0], image_epoch=2)
    train_base(whole)
    again = replace(whole, save_path=tmp_path / "again")
    train_base(replace(again, image_epoch=1))
    train_base(again)
    assert graphs
    ends = (torch.load(run.save_path / "image_adapter.pth", weights_only=True) for run in (again, whole))
    assert_all_agree(*(end["image_adapter"] for end in ends), 1e-4)
    train_base(replace(again, image_epoch=3, compile=False))


def test_a_missing_compiler_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError(
            "backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found\n\nSet TORCH_LOGS"
        )

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    with pytest.raises(UserError, match=r"--compile: .*No working C\+\+ compiler found.*omit --compile") as found:
        check_compiler("cpu")
    assert "\n" not in str(found.value)


def test_a_process_compiles_for_its_share_of_a_step() -> None:
    config = BaseConfig.of(dataset="any", text_batch_size=12, image_batch_size=4, compile=True)
    assert compiled_sizes(config, 1) == (12, 4, LOOP_BATCH)
    assert compiled_sizes(config, 2) == (6, 2, LOOP_BATCH), "each process tests in batches of its own"
    assert compiled_sizes(BaseConfig.of(dataset="any"), 1) == ()
