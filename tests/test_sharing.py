"""Shared models: a folder that loads identically anywhere, its card, and the hub (with a replaced client)."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from engine import load_model
from engine.app.models import load_models
from engine.cli import share
from engine.cli.share import SharingArguments
from engine.config.tools import AppArguments
from engine.detector import hub
from engine.detector.calibration import add_entry, make_entry, read_calibration
from engine.detector.detector import Detector
from engine.detector.hub import read_address
from engine.detector.loading import unadapted_detector
from engine.evaluation.inference import load_detectors
from engine.runtime.run_folder import find_latest
from model import checkpoint, clip_loading
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.clip import FrozenCLIP
from model.clip_loading import load_clip
from model.config import CrossAttentionConfig
from tests.evaluating import score_images
from tests.helpers import adapted_clip, config_for, fill_with_noise
from tests.scripts import write_clip
from tests.test_checkpoint import config_of, published_states, states_of, write_pair
from utils.errors import UserError

IMAGE = np.random.default_rng(0).integers(0, 255, (60, 50, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny CLIP, `clip`, and a checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("shared")
    clip = load_clip(f"local-dir:{write_clip(folder / 'clip')}")
    write_base(folder / "base", clip)
    write_cross(folder / "cross", clip, CrossAttentionConfig(0.5, 0.2))
    (folder / "published").mkdir()
    write_pair(folder / "published", published_states(relu=False))
    return folder


def write_base(folder: Path, clip: FrozenCLIP) -> None:
    model = adapted_clip(clip, text_adapt_until=2, image_adapt_until=3)
    said = {
        "dataset": "toy_train",
        "training_mode": "few_shot",
        "shot": 4,
        "arguments": {
            "dataset": "/home/me/secret/toy_train",
            "model_name": clip.model_name,
            "data_root": "/home/me/secret",
            "save_path": "C:\\secret\\run",
            "clip_weights": "/home/me/secret/clip.pt",
            "class_names": "secret.json",
        },
    }
    folder.mkdir()
    content = {**states_of(model), "epoch": 3, "config": config_of(model, **said), "image_optimizer": None}
    checkpoint.save(content, folder / "image_adapter.pth")


def write_cross(folder: Path, clip: FrozenCLIP, cross: CrossAttentionConfig) -> None:
    torch.manual_seed(3)
    model = AdaptedCLIPWithCrossAttention(clip, config_for(clip), cross=cross)
    fill_with_noise(model.text_cross_attn)
    folder.mkdir()
    config = config_of(model, cross_attention=cross.to_dict())
    checkpoint.save({**states_of(model), "epoch": 3, "loop": 2, "config": config}, folder / "loop_2_final.pth")


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "base": ("base", {}),
    "base, otherwise": (
        "base",
        {"img_size": 48, "surgery": "sequential", "det_score": "difference", "image_feature": "class_token"},
    ),
    "cross": ("cross", {}),
    "cross, otherwise": ("cross", {"text_cross_attn_weight": 0.9, "context_norm": "none"}),
    "published": ("published", {"model_name": "clip"}),
    "published, otherwise": ("published", {"model_name": "clip", "activation": "quick_gelu", "surgery": "dual"}),
}


def load(world: Path, kind: str) -> Detector:
    name, asked = KINDS[kind]
    if "model_name" in asked:
        asked = {**asked, "model_name": f"local-dir:{world / 'clip'}"}
    return load_model(world / name, device="cpu", **asked)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_model_is_identical_on_a_machine_with_clip_elsewhere(kind: str, world: Path, tmp_path: Path) -> None:
    model = load(world, kind)
    folder = model.save_pretrained(tmp_path / "model")
    shutil.copytree(world / "clip", tmp_path / "elsewhere")
    again = load_model(folder, device="cpu", model_name=f"local-dir:{tmp_path / 'elsewhere'}")
    before, after = model.predict(IMAGE, "metal screw"), again.predict(IMAGE, "metal screw")
    np.testing.assert_array_equal(before.level_maps, after.level_maps)
    assert before.score == after.score
    assert (again.name, again.epoch, again.loop) == (model.name, model.epoch, model.loop)
    assert (again.config is None) == (model.config is None)
    assert again.arguments.get("class_names") == (None if "base" in kind else model.arguments.get("class_names"))


def test_the_folder_contains_trained_weights_only_and_no_local_path(world: Path, tmp_path: Path) -> None:
    model = load(world, "base")
    folder = model.save_pretrained(tmp_path / "model", licence="apache-2.0")
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert {key.split(".")[0] for key in load_file(folder / "model.safetensors")} == {"text_adapter", "image_adapter"}
    text = "".join((folder / name).read_text(encoding="utf-8") for name in ("README.md", "config.json"))
    for private in ("secret", str(world), "home"):
        assert private not in text
    assert (
        json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]["arguments"]["dataset"]
        == "toy_train"
    )
    assert model.clip.weights_digest in text and "local-dir:clip" in text


def test_the_card_contains_data_metrics_licence_and_loading(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "base", tmp_path / "base")
    results = tmp_path / "base" / "results"
    results.mkdir()
    rows = "model,dataset,class,images,anomalous,det_score,pixel_auroc\n"
    rows += "image_adapter,toy_test,nut,4,2,abnormal,11.0\nother,toy_test,average,8,4,abnormal,12.0\n"
    (results / "evaluation_toy_test.csv").write_text(
        f"{rows}image_adapter,toy_test,average,8,4,abnormal,93.123456\n", encoding="utf-8"
    )
    stale = results / "evaluation_stale.csv"
    stale.write_text(f"{rows}image_adapter,stale,average,8,4,abnormal,93.123456\n", encoding="utf-8")
    os.utime(stale, (time.time() - 1e6,) * 2)
    model = load_model(tmp_path / "base", device="cpu", model_name=f"local-dir:{world / 'clip'}")
    card = (model.save_pretrained(tmp_path / "model", "My: own") / "README.md").read_text(encoding="utf-8")
    assert 'license: other\nlicense_name: "My: own"' in card
    assert "| toy_test | 8 | 4 | abnormal | 93.12 |" in card and "stale" not in card and "12.0" not in card
    assert "3 image epochs on toy_train (4 images per class), seed 0" in card
    assert 'load_model("model")' in card and "Trained components: My: own" in card
    assert "Not zero-shot" not in card
    (results / "evaluation_toy_test.csv").write_text(
        f"{rows}image_adapter,toy_train,average,8,4,abnormal,93.1\n", encoding="utf-8"
    )
    again = load_model(tmp_path / "base", device="cpu", model_name=f"local-dir:{world / 'clip'}")
    assert "Not zero-shot" in (again.save_pretrained(tmp_path / "model") / "README.md").read_text(encoding="utf-8")


def test_thresholds_are_shared_and_still_decide(world: Path, tmp_path: Path) -> None:
    model = load(world, "base, otherwise")
    found = model.predict(IMAGE, "cup")
    below = [found.score * (1 - step / 100) for step in range(1, 20)]
    entry = make_entry(model.calibration_key("cup"), model.name, below, below, 0.05)
    model.calibration = [entry, replace(entry, checkpoint="another")]
    folder = model.save_pretrained(tmp_path / "model")
    assert [kept.checkpoint for kept in read_calibration(folder / "calibration.json")] == [model.digest]
    again = load_model(folder, device="cpu", model_name=f"local-dir:{world / 'clip'}")
    assert again.predict(IMAGE, "cup").decision == "anomalous" and again.predict(IMAGE, "nut").decision is None
    load(world, "base").save_pretrained(folder)
    assert not (folder / "calibration.json").exists()


def test_the_web_page_uses_the_clip_of_each_shared_model(world: Path, tmp_path: Path) -> None:
    asked = {"model_name": f"local-dir:{world / 'clip'}", "device": "cpu"}
    for kind in ("base, otherwise", "published", "published, otherwise"):
        load(world, kind).save_pretrained(tmp_path / kind)
    chosen = (str(world / "base"), *map(str, sorted(tmp_path.iterdir())))
    models = load_models(AppArguments.of(checkpoint=chosen, **asked))
    clips = [(model.clip.img_size, model.clip.activation) for model in models.values()]
    alone = [load_model(checkpoint, **asked).clip for checkpoint in chosen]
    assert clips == [(clip.img_size, clip.activation) for clip in alone]
    assert len(set(clips)) == 3


def test_every_checkpoint_option_accepts_a_shared_folder(world: Path, tmp_path: Path) -> None:
    folder = load(world, "base").save_pretrained(tmp_path / "model")
    assert find_latest(folder, "--base_path") == folder / "model.safetensors"
    models = load_detectors(str(folder), None, "cpu", model_name=f"local-dir:{world / 'clip'}")
    assert [model.name for model in models] == ["image_adapter"]


def test_other_weights_of_clip_are_refused(world: Path, tmp_path: Path) -> None:
    """Also for a model from a file without config."""
    folder = load(world, "published").save_pretrained(tmp_path / "model")
    state = load_file(world / "clip" / "open_clip_model.safetensors")
    state["ln_final.weight"] += 1
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="other weights of local-dir:clip"):
        load_model(
            folder, device="cpu", model_name=f"local-dir:{world / 'clip'}", clip_weights=tmp_path / "other.safetensors"
        )


DAMAGES: dict[str, tuple[str, bytes]] = {
    "no config": ("config.json", b""),
    "cut": ("model.safetensors", b"\x00" * 100),
    "pointer": ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
    "no JSON": ("config.json", b"{"),
    "foreign": ("config.json", b'{"architectures": ["BertModel"]}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_an_error(damage: str, world: Path, tmp_path: Path) -> None:
    folder = load(world, "cross").save_pretrained(tmp_path / "model")
    name, content = DAMAGES[damage]
    (folder / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_model(folder, device="cpu", model_name=f"local-dir:{world / 'clip'}")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert ("Git LFS" in str(caught.value)) == (damage == "pointer")


def test_other_files_are_not_overwritten(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    model = load(world, "base")
    with pytest.raises(UserError, match=r"holds README\.md, and no shared model"):
        model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]
    # Any model on the hub has files of these names.
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}', encoding="utf-8")
    with pytest.raises(UserError, match="no shared model"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"
    model.save_pretrained(tmp_path / "new")
    model.save_pretrained(tmp_path / "new")
    assert "are replaced" in caplog.text
    with pytest.raises(UserError, match="no trained components"):
        unadapted_detector(model.clip).save_pretrained(tmp_path / "none")


class StandInHub:
    """huggingface_hub's client, as far as it is used here: repositories are folders."""

    def __init__(self, root: Path) -> None:
        self.root, self.made = root, []

    def repo_exists(self, repo_id: str) -> bool:
        return (self.root / repo_id).is_dir()

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert private and exist_ok
        self.made.append(repo_id)
        (self.root / repo_id).mkdir(parents=True)

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str) -> None:
        assert commit_message
        for name in allow_patterns:
            if (folder_path / name).exists():
                shutil.copy(folder_path / name, self.root / repo_id / name)

    def snapshot_download(
        self, repo_id: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool
    ) -> str:
        assert "model.safetensors" in allow_patterns
        if not self.repo_exists(repo_id) or revision not in (None, "v1") or local_files_only:
            raise huggingface_hub.errors.RepositoryNotFoundError(
                "404 Client Error\n\nRepository Not Found", response=NotFound()
            )
        return str(self.root / repo_id)


class NotFound:
    headers: ClassVar[dict[str, str]] = {}
    request = None
    status_code = 404


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    client = StandInHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: client)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", client.snapshot_download)
    monkeypatch.setattr(clip_loading, "reach_hub", lambda: None)
    return client


def test_to_the_hub_and_back(world: Path, tmp_path: Path, stand_in: StandInHub) -> None:
    name = f"local-dir:{world / 'clip'}"
    arguments = SharingArguments.of(
        checkpoint=str(world / "cross"), output=tmp_path / "model", push="org/name", model_name=name
    )
    share.share(arguments)
    share.share(arguments)
    assert stand_in.made == ["org/name"]
    card = (stand_in.root / "org/name/README.md").read_text(encoding="utf-8")
    assert 'load_model("hf://org/name")' in card
    expected = load(world, "cross").predict(IMAGE)
    for address in ("hf://org/name", "hf://org/name@v1"):
        assert load_model(address, device="cpu", model_name=name).predict(IMAGE).score == expected.score
    assert load_detectors("hf://org/name@v1", None, "cpu", model_name=name)[0].name == "loop_2_final"


def test_thresholds_come_from_the_hub_or_the_local_file(
    world: Path, tmp_path: Path, stand_in: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = {"model_name": f"local-dir:{world / 'clip'}", "device": "cpu"}
    model, score = load(world, "base"), load(world, "base").predict(IMAGE, "cup").score
    model.save_pretrained(stand_in.root / "org/name")
    Image.fromarray(IMAGE).save(tmp_path / "image.png")

    def decision(class_name: str) -> set[str]:
        """The messages of the script, `load_model` and the page."""
        (found,) = score_images("hf://org/name", tmp_path / "image.png", class_name, output_dir=tmp_path / "o", **asked)
        page = load_models(AppArguments.of(checkpoint=("hf://org/name",), **asked))
        models = [load_model("hf://org/name", **asked), *page.values()]
        return {found.decision, *(one.predict(IMAGE, class_name).decision or "" for one in models)}

    assert decision("cup") == {""}
    for folder, value in (("hub/org/name", score - 0.1), ("results", score + 0.1)):
        entry = make_entry(model.calibration_key("cup"), model.name, [value] * 19, [value] * 19, 0.05)
        add_entry(tmp_path / folder / "calibration.json", entry)
        assert decision("cup") == {"anomalous" if value < score else "normal"}
        assert decision("nut") == {""}


@pytest.mark.parametrize("address", ["hf://org/other", "hf://org/name@v2"])
def test_a_missing_model_on_the_hub_is_an_error(address: str, stand_in: StandInHub) -> None:
    (stand_in.root / "org/name").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"^{address} cannot be downloaded \(.+\)$") as caught:
        load_model(address, device="cpu")
    assert "\n" not in str(caught.value)


def test_without_network_an_earlier_download_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreachable() -> None:
        raise TimeoutError("no answer")

    def cached(repo_id: str, *, local_files_only: bool, **_: object) -> str:
        assert local_files_only
        return str(tmp_path)

    monkeypatch.setattr(clip_loading, "reach_hub", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    (tmp_path / "model.safetensors").touch()
    assert hub.fetch("hf://org/name") == tmp_path
    assert "using an earlier download, if there is one (no answer)" in caplog.text


def test_a_failed_push_is_an_error_and_leaves_the_folder(
    world: Path, tmp_path: Path, stand_in: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**_: object) -> None:
        raise huggingface_hub.errors.HfHubHTTPError("401 Unauthorized\nmore", response=NotFound())

    monkeypatch.setattr(stand_in, "upload_folder", refused)
    arguments = SharingArguments.of(
        checkpoint=str(world / "base"),
        output=tmp_path / "model",
        push="org/name",
        model_name=f"local-dir:{world / 'clip'}",
    )
    with pytest.raises(UserError, match="401 Unauthorized") as caught:
        share.share(arguments)
    assert "\n" not in str(caught.value) and (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "text", ["hf://", "hf://name", "hf://org/name@", "hf://../name", "hf://org/name/more", "hf:// /x"]
)
def test_addresses_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="hf://ORG/NAME"):
        read_address(text)
