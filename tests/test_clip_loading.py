"""Weights files in common formats, and errors if they do not fit."""

import json
import logging
import socket
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import model.clip_loading
from model.clip import FrozenCLIP
from model.clip_loading import load_clip
from tests.helpers import (
    TINY_ARCHITECTURE,
    TINY_NAME,
    RunsCode,
    assert_agrees,
    random_batch,
    save_openai_archive,
    tiny_clip,
    tiny_open_clip,
)
from tests.scripts import write_clip
from utils.errors import UserError

FORMATS = ("plain", "state_dict", "module_prefix", "compiled", "safetensors", "archive")


def weights_file(kind: str, folder: Path) -> Path:
    """The tiny CLIP's weights, written in one of the formats that open_clip reads."""
    if kind == "archive":
        return save_openai_archive(tiny_open_clip(), folder / "archive.pt")
    state = tiny_open_clip().state_dict()
    file = folder / f"{kind}.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "safetensors":
        save_file(state, file)
    elif kind == "compiled":
        torch.save({f"_orig_mod.{key}": value for key, value in state.items()}, file)
    elif kind == "module_prefix":
        torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, file)
    else:
        torch.save({"state_dict": state} if kind == "state_dict" else state, file)
    return file


def local_folder(folder: Path, **model_cfg: object) -> str:
    config = {
        "model_cfg": {**TINY_ARCHITECTURE, **model_cfg},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tiny_open_clip().state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def assert_is_the_tiny_clip(loaded: FrozenCLIP, quick_gelu: bool = True, tolerance: float = 1e-6) -> None:
    """Same image and text embeddings as the CLIP whose weights were written, computed by open_clip itself."""
    expected = tiny_open_clip(quick_gelu).eval()
    images, tokens = random_batch(40).images, loaded.tokenizer(["a nut.", "a broken nut."])
    with torch.no_grad():
        assert_agrees(loaded.clip.encode_image(images), expected.encode_image(images), tolerance)
        assert_agrees(loaded.clip.encode_text(tokens), expected.encode_text(tokens), tolerance)


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", FORMATS)
def test_every_weight_format_gives_the_same_clip(kind: str, tiny_name: str, tmp_path: Path) -> None:
    loaded = load_clip(tiny_name, weights_file(kind, tmp_path), activation="quick_gelu")
    assert_is_the_tiny_clip(loaded)
    assert loaded.weights_digest == tiny_clip().weights_digest
    assert loaded.img_size == 40 and loaded.grid == 5
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in loaded.parameters())
    buffers, expected = (dict(clip.named_buffers()) for clip in (loaded.clip, tiny_open_clip()))
    assert buffers.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in buffers.items())


def test_a_local_folder_is_a_complete_model(tmp_path: Path) -> None:
    loaded = load_clip(local_folder(tmp_path, quick_gelu=True))
    assert_is_the_tiny_clip(loaded)
    assert loaded.activation == "quick_gelu"
    assert (loaded.mean, loaded.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert loaded.weights_digest == tiny_clip().weights_digest


def test_a_local_folder_without_an_entry_is_gelu(tmp_path: Path) -> None:
    loaded = load_clip(local_folder(tmp_path))
    assert loaded.activation == "gelu"
    assert_is_the_tiny_clip(loaded, quick_gelu=False)


def test_other_weights_have_another_digest(tiny_name: str, tmp_path: Path) -> None:
    state = tiny_open_clip().state_dict()
    state["visual.conv1.weight"].view(-1)[7] += 1e-3
    torch.save(state, tmp_path / "other.pt")
    loaded = load_clip(tiny_name, tmp_path / "other.pt", activation="quick_gelu")
    assert loaded.weights_digest != tiny_clip().weights_digest


def test_the_activation_of_a_state_dict_from_an_archive_is_recognised(tiny_name: str, tmp_path: Path) -> None:
    state = tiny_open_clip().state_dict()
    numbers = {"input_resolution": torch.tensor(40), "context_length": torch.tensor(77), "vocab_size": torch.tensor(9)}
    torch.save({**state, **numbers}, tmp_path / "openai.pt")
    assert load_clip(tiny_name, tmp_path / "openai.pt").activation == "quick_gelu"


def test_the_activation_follows_from_a_configuration_next_to_the_weights(tiny_name: str, tmp_path: Path) -> None:
    for stated, expected in ((True, "quick_gelu"), (False, "gelu")):
        local_folder(tmp_path, quick_gelu=stated)
        assert load_clip(tiny_name, tmp_path / "open_clip_model.safetensors").activation == expected


def test_weights_without_known_activation_are_an_error(tiny_name: str, tmp_path: Path) -> None:
    file = weights_file("plain", tmp_path)
    with pytest.raises(UserError) as caught:
        load_clip(tiny_name, file)
    message = one_line(caught)
    assert str(file) in message and "--activation quick_gelu" in message and "--activation gelu" in message
    for activation in ("gelu", "quick_gelu"):
        loaded = load_clip(tiny_name, file, activation=activation)
        assert loaded.activation == activation
        assert_is_the_tiny_clip(loaded, activation == "quick_gelu")


def test_the_other_activation_can_be_chosen_and_is_logged(
    tiny_name: str, openai_archive: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        loaded = load_clip(tiny_name, openai_archive, activation="gelu")
    assert_is_the_tiny_clip(loaded, quick_gelu=False)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "quick_gelu" in caplog.text and "--activation" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_clip(tiny_name, openai_archive, activation="quick_gelu")
    assert not caplog.records


def resized_positions(position: Tensor, grid: int) -> Tensor:
    """The class token's row as it is; patch rows interpolated, bicubic and antialiased, as open_clip does."""
    old = int((len(position) - 1) ** 0.5)
    patches = position[1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(patches, (grid, grid), mode="bicubic", antialias=True)
    return torch.cat([position[:1], patches[0].flatten(1).T])


@pytest.mark.parametrize("size", [16, 40, 56])
@pytest.mark.parametrize("kind", ["plain", "half archive", "half safetensors"])
def test_positions_follow_the_image_size(kind: str, size: int, tiny_name: str, tmp_path: Path) -> None:
    """OpenAI's archives are float16 and run in float32."""
    if kind == "half archive":
        file = save_openai_archive(tiny_open_clip(), tmp_path / "half.pt", half=True)
    elif kind == "half safetensors":
        file = tmp_path / "half.safetensors"
        save_file({key: value.half() for key, value in tiny_open_clip().state_dict().items()}, file)
    else:
        file = weights_file("plain", tmp_path)
    loaded = load_clip(tiny_name, file, img_size=size, activation="quick_gelu")
    assert (loaded.img_size, loaded.grid) == (size, size // 8)
    assert all(value.dtype == torch.float32 for value in loaded.parameters())
    original = tiny_open_clip().visual.positional_embedding.detach()
    expected = original if size == 40 else resized_positions(original, size // 8)
    assert_agrees(loaded.clip.visual.positional_embedding, expected, 1e-6 if kind == "plain" else 1e-3)
    assert (loaded.weights_digest == tiny_clip().weights_digest) == (kind == "plain")
    assert loaded.clip.encode_image(torch.zeros(1, 3, size, size)).shape == (1, 40)


@pytest.mark.parametrize("size", [41, 12, 8, 0, -40])
def test_an_image_size_without_whole_patches_is_an_error(size: int, tiny_name: str, openai_archive: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_clip(tiny_name, openai_archive, img_size=size)
    message = one_line(caught)
    assert f"--img_size {size}" in message and "8 px" in message
    near = int(message.split("such as ")[1])
    assert near % 8 == 0 and near >= 16


def test_default_image_sizes() -> None:
    config = open_clip.get_model_config("ViT-L-14-336")
    assert model.clip_loading.check_image_size("ViT-L-14-336", config, None) == 518
    assert model.clip_loading.check_image_size("ViT-L-14-336", config, 336) == 336
    assert model.clip_loading.check_image_size("ViT-B-16", open_clip.get_model_config("ViT-B-16"), None) == 224


@pytest.mark.parametrize("name", ["ViT-nonsense", "", "vit-l-14-336", "RN50", "ViT-B-16-SigLIP", "convnext_base"])
def test_an_unknown_or_unsupported_model_is_an_error(name: str) -> None:
    with pytest.raises(UserError) as caught:
        load_clip(name)
    assert f"--model_name {name}" in one_line(caught)


def test_an_encoder_with_other_blocks_is_refused() -> None:
    clip = tiny_open_clip()
    clip.visual.pool_type = "avg"
    with pytest.raises(UserError, match="plain ViT"):
        FrozenCLIP(clip, "odd", "gelu")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"embed_dim": 44}, ("'text_projection'", "(32, 44)", "(32, 40)")),
        ({"vision_cfg": {**TINY_ARCHITECTURE["vision_cfg"], "layers": 7}}, ("'visual.transformer.resblocks.7.",)),
        ({"vision_cfg": {**TINY_ARCHITECTURE["vision_cfg"], "layers": 9}}, ("'visual.transformer.resblocks.8.",)),
    ],
)
def test_weights_of_another_architecture_name_the_key(
    changes: dict[str, Any], parts: tuple[str, ...], tiny_name: str, tmp_path: Path
) -> None:
    torch.save(open_clip.CLIP(**{**TINY_ARCHITECTURE, **changes}).state_dict(), tmp_path / "other.pt")
    with pytest.raises(UserError) as caught:
        load_clip(tiny_name, tmp_path / "other.pt", activation="gelu")
    message = one_line(caught)
    for part in ("other.pt", TINY_NAME, "--model_name", *parts):
        assert part in message


def damaged(kind: str, folder: Path) -> Path:
    file = folder / ("damaged.safetensors" if kind.startswith("safetensors") else "damaged.pt")
    if kind == "truncated":
        whole = weights_file("plain", folder).read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    elif kind == "checkpoint of this project":
        torch.save({"epoch": 1, "text_adapter": {"0.fc1.weight": torch.zeros(2, 2)}}, file)
    elif kind == "code":
        torch.save({"state_dict": {}, "extra": RunsCode(folder / "ran")}, file)
    elif kind == "missing":
        pass
    elif kind == "list":
        torch.save([torch.zeros(2)], file)
    else:
        file.write_bytes(b"404: not found\n")
    return file


@pytest.mark.parametrize(
    "kind", ["truncated", "text", "safetensors text", "list", "code", "missing", "checkpoint of this project"]
)
def test_a_damaged_file_is_an_error_that_names_it(kind: str, tiny_name: str, tmp_path: Path) -> None:
    file = damaged(kind, tmp_path)
    with pytest.raises(UserError) as caught:
        load_clip(tiny_name, file, activation="gelu")
    assert str(file) in one_line(caught)
    assert not (tmp_path / "ran").exists()


def test_the_weights_in_a_folder_are_used(tiny_name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weights file"):
        load_clip(tiny_name, tmp_path)
    (tmp_path / "model.safetensors").write_text("of transformers", encoding="utf-8")
    local_folder(tmp_path, quick_gelu=True)
    assert load_clip(tiny_name, tmp_path).weights_digest == tiny_clip().weights_digest


def test_weights_in_the_format_of_transformers_are_named(tiny_name: str, tmp_path: Path) -> None:
    save_file({"text_model.final_layer_norm.bias": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    for name, weights in ((tiny_name, tmp_path), (f"local-dir:{tmp_path}", None)):
        with pytest.raises(UserError, match="these weights have transformers' format"):
            load_clip(name, weights)


def test_a_missing_local_folder_or_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"open_clip_config\.json"):
        load_clip(f"local-dir:{tmp_path / 'nowhere'}")
    name = local_folder(tmp_path)
    with pytest.raises(UserError, match=r"nowhere\.pt"):
        load_clip(name, tmp_path / "nowhere.pt")
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights file"):
        load_clip(name)
    (tmp_path / "open_clip_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"open_clip_config\.json: not valid JSON"):
        load_clip(name)


@pytest.mark.parametrize("name", ["ViT-L-14-336", "ViT-B-32"])
def test_without_network_the_error_names_the_file_to_download(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise OSError("We couldn't connect to the hub\nand a second line")

    monkeypatch.setattr(model.clip_loading, "reach_hub", lambda: None)
    monkeypatch.setattr(model.clip_loading, "download_pretrained", unreachable)
    with pytest.raises(UserError) as caught:
        load_clip(name)
    message = one_line(caught)
    assert "https://huggingface.co/" in message and "https://openaipublic.azureedge.net/" in message
    assert "--clip_weights" in message and name in message and "openai" in message


def test_an_unreachable_hub_is_an_error_without_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(model.clip_loading.huggingface_hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(model.clip_loading.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(model.clip_loading, "HUB_TIMEOUT", 0.1)
        monkeypatch.setattr(model.clip_loading, "download_pretrained", lambda _: pytest.fail("asked for a file"))
        with pytest.raises(UserError, match=r"cannot be downloaded .*timed out"):
            load_clip("ViT-B-32")


def test_downloaded_weights_need_no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for file in ("open_clip_model.safetensors", "own.safetensors", "own.bin"):
        monkeypatch.setattr(
            model.clip_loading.huggingface_hub,
            "try_to_load_from_cache",
            lambda repository, name, kept=file: f"{repository}/{name}" if name == kept else None,
        )
        hub = "org/model" if file.startswith("open_clip") else "org/model/own.bin"
        assert model.clip_loading._cached_weights(hub) == f"org/model/{file}"
        assert model.clip_loading._cached_weights("") is None


def test_hub_weights_run_with_their_own_activation(
    tiny_name: str, openai_archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tag determines activation and normalisation for any file format."""
    known = {"openai": {"quick_gelu": True, "mean": (0.5, 0.5, 0.5)}, "own": {"quick_gelu": False}}
    monkeypatch.setattr(model.clip_loading, "list_pretrained_tags_by_model", lambda _: list(known))
    monkeypatch.setattr(model.clip_loading, "get_pretrained_cfg", lambda _, tag: known[tag])
    monkeypatch.setattr(model.clip_loading, "download_pretrained", lambda _: str(openai_archive))
    loaded = load_clip(tiny_name)
    assert loaded.activation == "quick_gelu" and loaded.mean == (0.5, 0.5, 0.5)
    assert load_clip(tiny_name, "own").activation == "gelu"
    with pytest.raises(UserError, match=r"--clip_weights other: .*openai, own"):
        load_clip(tiny_name, "other")


CONFIG_DAMAGE: list[tuple[tuple[str, ...], Any, str]] = [
    (("model_cfg",), None, "has no 'model_cfg'"),
    (("model_cfg", "embed_dim"), None, "model_cfg has no 'embed_dim'"),
    (("model_cfg", "embed_dim"), "40", "model_cfg.embed_dim is '40', expected a whole number"),
    (("model_cfg", "vision_cfg", "layers"), 10**6, "model_cfg.vision_cfg.layers is 1000000, expected 1 to 1000"),
    (("model_cfg", "vision_cfg", "depth"), 8, "model_cfg.vision_cfg has an unknown key 'depth'"),
    (("preprocess_cfg", "mean"), [0.5, 0.5], "preprocess_cfg.mean is a list, expected a list of 3"),
    (("preprocess_cfg", "std"), [0.5, 0.5, 0], "preprocess_cfg.std[2] is 0"),
    # Rejected before memory is allocated.
    (("model_cfg", "vision_cfg", "width"), 2**20, "clip"),
    (("model_cfg", "text_cfg", "heads"), 7, "clip"),
    (("model_cfg", "vision_cfg", "head_width"), 1000, "clip"),
]


@pytest.mark.parametrize(("path", "value", "words"), CONFIG_DAMAGE, ids=str)
def test_a_damaged_configuration_is_refused_with_its_key(
    path: tuple[str, ...], value: Any, words: str, tmp_path: Path
) -> None:
    folder = write_clip(tmp_path / "clip")
    file = folder / "open_clip_config.json"
    config = holder = json.loads(file.read_text(encoding="utf-8"))
    for key in path[:-1]:
        holder = holder[key]
    if value is None:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_clip(f"local-dir:{folder}")
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", ["complex", "nan", "sparse", "one number"])
def test_invalid_weights_are_refused_with_their_key(kind: str, tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip")
    state = tiny_open_clip().state_dict()
    key = "visual.positional_embedding"
    value = state[key]
    state[key] = {
        "complex": value.to(torch.complex64),
        "nan": value * float("nan"),
        "sparse": value.to_sparse(),
        "one number": value[0, 0],
    }[kind]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError) as caught:
        load_clip(f"local-dir:{folder}", tmp_path / "weights.pth")
    assert "weights.pth: " in str(caught.value) and key in str(caught.value)
