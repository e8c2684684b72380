"""Checkpoint files of this project and of others: which load, and the errors of the others."""

import functools
import io
import logging
import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model import checkpoint
from model.adapter import AdaptedCLIP
from model.checkpoint_schema import SCHEMA, without_wrappers
from model.clip import FrozenCLIP
from model.clip_loading import load_clip
from tests import reference
from tests.helpers import (
    RunsCode,
    adapted_clip,
    assert_agrees,
    config_for,
    equal,
    random_batch,
    tiny_clip,
    tiny_prompts,
)
from utils.errors import UserError

State = dict[str, Tensor]


@functools.cache
def clip() -> FrozenCLIP:
    return tiny_clip()


def model_of(**changes: Any) -> AdaptedCLIP:
    return adapted_clip(clip(), **{"text_adapt_until": 2, "image_adapt_until": 3, **changes})


def states_of(model: AdaptedCLIP) -> dict[str, State]:
    return {name: checkpoint.state_of(part) for name, part in model.components.items()}


def config_of(adapted: AdaptedCLIP, **changes: Any) -> dict[str, Any]:
    """The smallest `config` of a checkpoint."""
    return {
        "schema": SCHEMA,
        "model": adapted.config.to_dict(),
        "dataset": "any",
        "metadata_digest": "0",
        "prompt_names": {},
        "training_mode": "full_shot",
        "seed": 0,
        "arguments": {"dataset": "any"},
        **changes,
    }


def published_states(relu: bool) -> dict[str, State]:
    """AA-CLIP's keys, written out by hand: two text adapters and a projector, three image adapters, four levels."""
    generator = torch.Generator().manual_seed(0)

    def weight(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    projector = "fc.0.weight" if relu else "fc.weight"
    text = {"0.fc.0.weight": weight(32, 32), "1.fc.0.weight": weight(32, 32), "2.fc.0.weight": weight(40, 32)}
    image = {f"layer_adapters.{index}.fc.0.weight": weight(48, 48) for index in range(3)}
    image.update({f"seg_proj.{level}.{projector}": weight(40, 48) for level in range(4)})
    image[f"det_proj.{projector}"] = weight(40, 48)
    return {"text_adapter": text, "image_adapter": image}


def write_pair(folder: Path, states: dict[str, State], epoch: int | None = 20) -> Path:
    """As published: text and image side in a file each, no config."""
    position = {} if epoch is None else {"epoch": epoch}
    torch.save({**position, "text_adapter": states["text_adapter"]}, folder / "text_adapter.pth")
    image = folder / "image_adapter_20.pth"
    torch.save({**position, "image_adapter": states["image_adapter"]}, image)
    return image


def load_by_its_keys(path: Path) -> AdaptedCLIP:
    """A file without config, loaded into a model inferred from its keys."""
    read = checkpoint.read_checkpoint(path)
    choices = checkpoint.infer_choices(read.components)
    assert choices.pop("n_levels") == 4
    model = AdaptedCLIP(clip(), config_for(clip(), **choices))
    for name, part in model.components.items():
        checkpoint.load_component(part, read.components[name], name, path)
    return model


def one_line(caught: pytest.ExceptionInfo[UserError], *parts: object) -> str:
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message
    return message


def assert_refused(file: Path, *parts: object) -> None:
    with pytest.raises(UserError) as caught:
        checkpoint.read_checkpoint(file)
    one_line(caught, *(parts or [file]))


@pytest.mark.parametrize("relu", [False, True])
def test_a_published_checkpoint_gives_published_outputs(relu: bool, tmp_path: Path) -> None:
    states = published_states(relu)
    model = load_by_its_keys(write_pair(tmp_path, states))
    config = model.config
    assert (config.adapter, config.relu, config.text_adapt_until, config.image_adapt_until) == ("linear", relu, 2, 3)
    weights = {f"{part}.{key}": value for part, state in states.items() for key, value in state.items()}
    ref = reference.Reference(clip().clip, weights, config)
    images, prompts = random_batch(40).images[:1], tiny_prompts(clip())
    with torch.no_grad():
        levels, det = reference.adapted_image(ref, images[0])
        features = model.encode_image(images)
        for level, expected in zip(features.levels, levels, strict=True):
            assert_agrees(level[0], expected, 1e-5)
        assert_agrees(features.det[0], det, 1e-5)
        tokens = prompts.tokens[0]
        expected = reference.anchor_pair(ref, tokens[: prompts.normal], tokens[prompts.normal :])
        assert_agrees(model.anchors(prompts)[0], expected, 1e-5)


@pytest.mark.parametrize("adapter", ["bottleneck", "linear"])
@pytest.mark.parametrize("relu", [False, True])
def test_a_file_without_config_loads_by_its_keys(adapter: str, relu: bool, tmp_path: Path) -> None:
    model = model_of(adapter=adapter, relu=relu)
    states = states_of(model)
    assert ("0.fc1.weight" in states["text_adapter"]) == (adapter == "bottleneck")
    loaded = load_by_its_keys(write_pair(tmp_path, states))
    assert (loaded.config.adapter, loaded.config.relu) == (adapter, relu)
    assert equal(states_of(loaded), states)


@pytest.mark.parametrize("place", ["file", "component", "inside"])
@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrapping_modules_are_ignored(wrapper: str, place: str, tmp_path: Path) -> None:
    states: dict[str, Any] = states_of(model_of())
    old, new = {"file": ("", ""), "component": ("", wrapper), "inside": (".", f".{wrapper}")}[place]
    states = {
        (wrapper if place == "file" else "") + name: {key.replace(old, new, 1): value for key, value in state.items()}
        for name, state in states.items()
    }
    torch.save(states, tmp_path / "image_adapter.pth")
    load_by_its_keys(tmp_path / "image_adapter.pth")
    both = {f"{wrapper}a": 1, "a": 2}  # neither replaces the other
    assert without_wrappers(both) == both


NOT_ITSELF = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "is a Git LFS pointer"),
    "page": (b"\n<!DOCTYPE html>\n<html></html>", "is a web page"),
    "pickle": (pickle.dumps(torch.Size([1])), "holds Python objects"),
    "objects": (torch.nn.Linear(1, 1), "holds Python objects"),
}


@pytest.mark.parametrize("kind", NOT_ITSELF)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("read", [checkpoint.read_any, partial(load_clip, "ViT-B-32")])
def test_a_file_that_holds_something_else_says_what(read: Any, ending: str, kind: str, tmp_path: Path) -> None:
    content, says = NOT_ITSELF[kind]
    file = tmp_path / f"weights.{ending}"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    if isinstance(content, bytes) or ending == "pth":
        with pytest.raises(UserError, match=says) as caught:
            read(file)
        one_line(caught, file)


def test_one_file_may_contain_both_sides(tmp_path: Path) -> None:
    states = states_of(model_of())
    torch.save({"epoch": 4, **states}, tmp_path / "both.pth")
    read = checkpoint.read_checkpoint(tmp_path / "both.pth")
    assert set(read.components) == {"text_adapter", "image_adapter"}
    assert (read.epoch, read.loop, read.config, read.optimizers) == (4, None, None, {})
    with pytest.raises(ValueError, match="no config"):
        read.model_config()


def test_the_text_side_in_the_file_is_preferred_to_the_separate_file(tmp_path: Path) -> None:
    states, other = states_of(model_of()), states_of(model_of(adapter="linear"))
    image = write_pair(tmp_path, other)
    torch.save({"epoch": 4, **states}, image)
    assert "0.fc1.weight" in checkpoint.read_checkpoint(image).components["text_adapter"]


def test_the_text_side_and_its_optimizer_come_from_the_separate_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    states = states_of(model_of())
    moments = {"state": {}, "param_groups": []}
    image = write_pair(tmp_path, states)
    text = {"epoch": 5, "text_adapter": states["text_adapter"], "text_optimizer": moments}
    torch.save(text, tmp_path / "text_adapter.pth")
    with caplog.at_level(logging.INFO):
        read = checkpoint.read_checkpoint(image)
    assert set(read.components) == {"text_adapter", "image_adapter"}
    assert read.optimizers == {"text_optimizer": moments}
    assert (read.path, read.epoch) == (image, 20)
    assert str(tmp_path / "text_adapter.pth") in caplog.text


def test_an_unadapted_text_side_needs_no_file(tmp_path: Path) -> None:
    """`--text_epoch 0`: the config says that there is no text side to look for."""
    model = model_of(text_adapted=False)
    config = config_of(model)
    path = tmp_path / "image_adapter.pth"
    checkpoint.save({"image_adapter": checkpoint.state_of(model.image_adapter), "epoch": 1, "config": config}, path)
    read = checkpoint.read_checkpoint(path)
    assert set(read.components) == {"image_adapter"}
    assert read.model_config() == model.config


def test_a_missing_epoch_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = write_pair(tmp_path, published_states(relu=False), epoch=None)
    with caplog.at_level(logging.WARNING):
        read = checkpoint.read_checkpoint(image)
    assert read.epoch is None
    assert str(image) in caplog.text and "epochs" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.read_checkpoint(write_pair(tmp_path, published_states(relu=False))).epoch == 20
    assert not caplog.records


def test_a_missing_text_side_is_an_error(tmp_path: Path) -> None:
    image, text = write_pair(tmp_path, published_states(relu=False)), tmp_path / "text_adapter.pth"
    assert_refused(text, text, "image_adapter")
    torch.save({"epoch": 1, "image_adapter": {}}, text)
    assert_refused(image, text, "text_adapter")
    text.unlink()
    assert_refused(image, image, text)


@pytest.mark.parametrize(
    "content",
    [
        {"model": {}},
        {},
        [1, 2],
        torch.zeros(3),
        {"image_adapter": 5, "text_adapter": {}, "epoch": 1},
        {"image_adapter": {"det_proj.fc.weight": "text"}, "text_adapter": {}, "epoch": 1},
        {"image_adapter": {}, "text_adapter": {}, "epoch": 1, "config": "base run"},
    ],
    ids=["other keys", "empty", "list", "tensor", "number for a component", "text for a tensor", "text for a config"],
)
def test_other_files_are_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "image_adapter.pth")
    assert_refused(tmp_path / "image_adapter.pth")


def test_additional_keys_of_later_versions_are_ignored(tmp_path: Path) -> None:
    model = model_of()
    path = tmp_path / "image_adapter.pth"
    config = config_of(model, script="train.py", arguments={"dataset": "any", "temperature": 2})
    checkpoint.save({**states_of(model), "epoch": 1, "config": config, "note": {"any": torch.zeros(2)}}, path)
    assert checkpoint.read_any(path).config == config


WEIGHT = ("image_adapter", "det_proj.fc.weight")
WEIGHT_KEY = "image_adapter['det_proj.fc.weight']"
INVALID: list[tuple[tuple[Any, ...], Any, str]] = [
    (("config", "schema"), 99, "schema 99"),
    (("config", "schema"), "1", "config.schema is '1'"),
    (("config", "model"), None, "config.model is null"),
    (("config", "model", "surgery"), "triple", "surgery is 'triple', expected one of dual, sequential, batch_axis"),
    (("config", "model", "img_size"), "518", "config.model.img_size is '518', expected a whole number"),
    (("config", "model", "img_size"), 10**9, "config.model.img_size is 1000000000, expected 1 to "),
    (("config", "model", "levels"), [2, "4"], "config.model.levels[1] is '4'"),
    (("config", "model", "text_adapt_weight"), 2.0, "config.model.text_adapt_weight is 2.0"),
    (("config", "model", "temperature"), 1, "unknown key 'temperature'; use the version that wrote it"),
    (("config", "cross_attention"), {"depth": 2}, "config.cross_attention has an unknown key 'depth'"),
    (("config", "cross_attention"), {"cross_attn_heads": True}, "config.cross_attention.cross_attn_heads is True"),
    (("config", "prompt_names"), {"bolt": 3}, "config.prompt_names['bolt'] is 3, expected text"),
    (("config", "arguments"), {}, "config.arguments has no 'dataset'"),
    (("config", "arguments", "more"), [[[[[[[[[[]]]]]]]]]], "nested"),
    (("config", "arguments", "more"), torch.zeros(1), "not plain data"),
    (("config", "seed"), 10**500, "config.seed is a huge number"),
    (("config", 5), 5, "a key of config is 5"),
    (("epoch",), "20", "epoch is '20', expected a whole number"),
    (("epoch",), -1, "epoch is -1"),
    (("loop",), 0, "loop is 0"),
    (("steps",), {"text": "many"}, "steps['text'] is 'many'"),
    (("image_adapter",), {0: torch.zeros(2)}, "a key of image_adapter is 0"),
    (("image_optimizer",), {"state": {}}, "image_optimizer has no 'param_groups'"),
    (("image_optimizer",), {"state": {"0": {}}, "param_groups": []}, "a key of image_optimizer.state is '0'"),
    (("image_optimizer",), {"state": {0: {"m": torch.zeros(2).to_sparse()}}, "param_groups": []}, "'m'"),
    (("image_optimizer",), {"state": {}, "param_groups": [{"params": ["0"]}]}, "param_groups[0].params[0] is '0'"),
    ((7,), 8, "a key of it is 7"),
    (WEIGHT, torch.zeros(40, 48).to_sparse(), WEIGHT_KEY),
    (WEIGHT, torch.zeros(40, 48, device="meta"), WEIGHT_KEY),
    (WEIGHT, torch.zeros(40, 48, dtype=torch.complex64), WEIGHT_KEY),
    (WEIGHT, torch.zeros(40, 48, dtype=torch.long), WEIGHT_KEY),
    (WEIGHT, torch.full((40, 48), float("nan")), WEIGHT_KEY),
    (WEIGHT, torch.zeros(1, 1).expand(10**6, 10**6), WEIGHT_KEY),
    (WEIGHT, 1.0, WEIGHT_KEY),
    (WEIGHT, None, WEIGHT_KEY),
]


@pytest.mark.parametrize(("place", "value", "words"), INVALID)
def test_invalid_content_is_an_error_that_names_the_key(
    place: tuple[Any, ...], value: Any, words: str, tmp_path: Path
) -> None:
    model = model_of()
    content: dict[Any, Any] = {**states_of(model), "epoch": 1, "config": config_of(model)}
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    torch.save(content, tmp_path / "image_adapter.pth")
    with pytest.raises(UserError) as caught:
        checkpoint.read_any(tmp_path / "image_adapter.pth")
    one_line(caught, tmp_path / "image_adapter.pth", words)


def refusal(module: nn.Module, state: State, name: str) -> str:
    """The error message; nothing may have been loaded."""
    before = checkpoint.state_of(module)
    with pytest.raises(UserError) as caught:
        checkpoint.load_component(module, state, name, Path("run/image_adapter.pth"))
    assert equal(checkpoint.state_of(module), before)
    return one_line(caught, "run/image_adapter.pth", name)


def test_a_wrong_shape_is_reported_with_its_key_and_both_shapes() -> None:
    model = model_of()
    state = checkpoint.state_of(model.image_adapter)
    state["seg_proj.2.fc.weight"] = torch.zeros(40, 64)
    message = refusal(model.image_adapter, state, "image_adapter")
    for part in ("'seg_proj.2.fc.weight'", "(40, 64)", "(40, 48)", "--model_name"):
        assert part in message


def test_missing_and_unknown_keys_are_errors() -> None:
    model = model_of()
    state = checkpoint.state_of(model.text_adapter)
    assert "'0.bias'" in refusal(model.text_adapter, {**state, "0.bias": torch.zeros(3)}, "text_adapter")
    del state["2.fc.0.weight"]
    assert "'2.fc.0.weight'" in refusal(model.text_adapter, state, "text_adapter")


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_file_that_contains_code_is_refused_and_not_run(form: str, tmp_path: Path) -> None:
    path, target = tmp_path / "image_adapter.pth", tmp_path / "ran"
    content = {"image_adapter": {}, "text_adapter": {}, "epoch": RunsCode(target)}
    if form == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    assert_refused(path)
    assert not target.exists()


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        checkpoint.read_checkpoint(tmp_path / "image_adapter.pth")
    assert_refused(tmp_path)


@functools.cache
def whole_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"epoch": 1, **published_states(relu=False)}, buffer)
    return buffer.getvalue()


@given(fraction=st.floats(0, 0.99))
@settings(max_examples=30, deadline=None)
def test_a_truncated_file_is_refused(fraction: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("truncated") / "image_adapter.pth"
    path.write_bytes(whole_file()[: int(fraction * len(whole_file()))])
    assert_refused(path)


def test_nested_tensors_are_saved_without_gradient(tmp_path: Path) -> None:
    value = {"weight": nn.Parameter(torch.ones(2)), "nested": [({"deep": nn.Parameter(torch.ones(1))},)], "epoch": 3}
    checkpoint.save(value, tmp_path / "state.pth")
    read = torch.load(tmp_path / "state.pth", weights_only=True)
    assert type(read["weight"]) is Tensor and not read["nested"][0][0]["deep"].requires_grad and read["epoch"] == 3


def test_a_failure_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image_adapter.pth"
    checkpoint.save({"epoch": 1}, path)
    before = path.read_bytes()

    def disk_full(_: object, file: io.BufferedWriter) -> None:
        file.write(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save({"epoch": 2}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save({"epoch": 2}, tmp_path / "new" / "image_adapter.pth")
    assert list(tmp_path.iterdir()) == [path]


def test_a_state_is_a_copy_of_the_live_parameters() -> None:
    model = model_of()
    state = checkpoint.state_of(model.text_adapter)
    kept = {key: value.clone() for key, value in state.items()}
    with torch.no_grad():
        for parameter in model.text_adapter.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, kept[key]) and not value.requires_grad for key, value in state.items())


def test_state_dict_keys_are_the_published_names() -> None:
    names = {name for name, _ in model_of().named_parameters() if not name.startswith("clip.")}
    patterns = (
        r"text_adapter\.[01]\.fc[12]\.weight",
        r"text_adapter\.2\.fc\.0\.weight",
        r"image_adapter\.layer_adapters\.[0-2]\.fc[12]\.weight",
        r"image_adapter\.seg_proj\.[0-3]\.fc\.weight",
        r"image_adapter\.det_proj\.fc\.weight",
    )
    assert all(any(re.fullmatch(pattern, name) for pattern in patterns) for name in names)
    assert len(names) == 2 * 2 + 1 + 3 * 2 + 4 + 1
