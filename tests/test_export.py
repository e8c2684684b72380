"""Exported files equal the model for any size and number of images, without this repository or torch."""

import json
import math
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import export as script
from dataset.images import read_image
from engine import load_model
from engine.config.tools import ExportArguments
from engine.detector.calibration import Entry, add_entry, make_entry
from engine.detector.detector import Detector
from engine.export import export
from examples import run_onnx
from model import checkpoint
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.clip import FrozenCLIP
from model.clip_loading import load_clip
from model.config import CrossAttentionConfig
from model.graph import resize
from tests.helpers import TINY_ARCHITECTURE, adapted_clip, config_for, fill_with_noise
from tests.scripts import ROOT, environment
from tests.test_checkpoint import config_of, published_states, states_of, write_pair
from utils.errors import UserError
from utils.heatmaps import overlay as heatmap_over
from utils.regions import regions_of

onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")

# Exporting takes time for each block.
SMALL: dict[str, Any] = {
    **TINY_ARCHITECTURE,
    "vision_cfg": {**TINY_ARCHITECTURE["vision_cfg"], "layers": 4},
    "text_cfg": {**TINY_ARCHITECTURE["text_cfg"], "layers": 2},
}
CLASS = "metal screw"
TARGET = export.ExportTarget(CLASS)
CROSS = {
    "cross": CrossAttentionConfig(0.8, 0.4, text_context="trained"),
    "matched": CrossAttentionConfig(0.8, 0.4, cross_attn_residual="matched", text_context="frozen"),
    "image side": CrossAttentionConfig(0.0, 1.0, context_norm="layer"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small CLIP, `clip`, and a checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    weights = open_clip.CLIP(**SMALL, quick_gelu=True)
    fill_with_noise(weights)
    (folder / "clip").mkdir()
    config = {"model_cfg": {**SMALL, "quick_gelu": True}, "preprocess_cfg": {}}
    (folder / "clip" / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({k: v.contiguous() for k, v in weights.state_dict().items()}, folder / "clip/open_clip_model.safetensors")
    clip = load_clip(f"local-dir:{folder / 'clip'}")
    write_checkpoint(folder / "base", adapted_clip(clip))
    for name, cross in CROSS.items():
        torch.manual_seed(3)
        model = AdaptedCLIPWithCrossAttention(clip, config_for(clip), cross=cross)
        fill_with_noise(model.text_cross_attn)
        write_checkpoint(folder / name, model, cross_attention=cross.to_dict())
    (folder / "published").mkdir()
    states = published_states(relu=False)
    write_pair(folder / "published", states)
    return folder


def write_checkpoint(folder: Path, model: Any, **changes: Any) -> None:
    folder.mkdir()
    content = {**states_of(model), "epoch": 3, "config": config_of(model, **changes)}
    checkpoint.save(content, folder / "image_adapter.pth")


def load(world: Path, kind: str) -> Detector:
    options = {"model_name": f"local-dir:{world / 'clip'}"} if kind == "published" else {}
    return load_model(world / kind, device="cpu", **options)


def images_of(height: int, width: int, count: int = 1) -> np.ndarray:
    rng = np.random.default_rng(height + width)
    coarse = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((width, height))) for one in coarse])


def session_of(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def assert_is_the_model(outputs: Sequence[np.ndarray], images: np.ndarray, model: Detector, maps: float) -> None:
    """Within 1e-4 in scores and `maps` in maps, for images that are resized as in the file."""
    for index, image in enumerate(images):
        expected = model.predict(export.resized(image, model.clip.img_size), CLASS)
        np.testing.assert_allclose(outputs[0][index, 0], expected.anomaly_map, atol=maps, rtol=0)
        assert outputs[1][index] == pytest.approx(expected.score, abs=1e-4)


SHAPES = ((40, 40, 1), (90, 33, 3), (1, 1, 1), (7, 300, 2))


@pytest.mark.parametrize("kind", [*CROSS, "published"])
def test_onnx_outputs_equal_the_model(kind: str, world: Path, tmp_path: Path) -> None:
    model = load(world, kind)
    found = export.export(model, TARGET, tmp_path / "model.onnx")
    assert max(found) < 1e-4
    session = session_of(tmp_path / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["anomaly_map", "pred_score"]
    for shape in SHAPES:
        images = images_of(*shape)
        assert_is_the_model(session.run(None, {"images": images}), images, model, 1e-3)
    assert session.get_inputs()[0].shape == ["batch", "height", "width", 3]
    assert session.get_outputs()[0].shape[0] == "batch"
    about = session.get_modelmeta().custom_metadata_map
    assert about["class_name"] == CLASS and about["model_digest"] == model.digest
    assert about["clip_digest"] == model.clip.weights_digest and about["clip_licence"] == "not stated"
    assert "torch" in about["versions"]
    assert not paths_in(tmp_path / "model.onnx", world)


def paths_in(file: Path, world: Path) -> list[str]:
    """The folders of the checkpoint, the code and the libraries that a file contains."""
    content = file.read_bytes()
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            content = b"".join(map(archive.read, archive.namelist()))
    folders = map(str, (world, ROOT, Path(torch.__file__).parent))
    return [folder for folder in folders if folder.encode() in content]


@pytest.fixture(scope="module")
def calibrated(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with thresholds between the values of two images, and its exported file."""
    folder = tmp_path_factory.mktemp("calibrated")
    shutil.copytree(world / "base", folder / "base")
    model = load_model(folder / "base", device="cpu")
    add_entry(folder / "base" / "calibration.json", entry_of(model))
    script_main(["--checkpoint", str(folder / "base"), "--class_name", CLASS, "--output", str(folder / "model.onnx")])
    return folder


def entry_of(model: Detector) -> Entry:
    found = [model.predict(image, CLASS) for image in images_of(40, 40, 2)]
    scores = np.linspace(*sorted(one.score for one in found), 23)[1:-1].tolist()
    peaks = np.linspace(0, np.median(found[0].anomaly_map), 21).tolist()
    return make_entry(model.calibration_key(CLASS), model.name, scores, peaks, 0.05)


def script_main(words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["export.py", *words])
        script.script.main()


def test_a_file_with_thresholds_returns_decisions(calibrated: Path) -> None:
    session = session_of(calibrated / "model.onnx")
    images = images_of(40, 40, 2)
    found = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"images": images}), strict=True))
    assert list(found) == ["anomaly_map", "pred_score", "pred_label", "pred_mask"]
    model = load_model(calibrated / "base", device="cpu")
    for shape in SHAPES:
        others = images_of(*shape)
        assert_is_the_model(session.run(None, {"images": others}), others, model, 1e-3)
    for index, image in enumerate(images):
        expected = model.predict(image, CLASS)
        assert bool(found["pred_label"][index]) == (expected.decision == "anomalous")
        assert (found["pred_mask"][index, 0] == expected.mask).mean() > 0.99
    assert sorted(found["pred_label"].tolist()) == [False, True] and 0 < found["pred_mask"].mean() < 1
    assert "5 % false alarms" in session.get_modelmeta().custom_metadata_map["calibration"]


WITHOUT = ("torch", "torchvision", "open_clip", "onnx", "onnxscript", "scipy", "engine", "model", "dataset", "utils")
REFUSING = f"""
import runpy, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {WITHOUT!r}:
            raise ImportError(f"{{name}} is not here")

sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_example_runs_without_torch(calibrated: Path, tmp_path: Path) -> None:
    images = []
    for index, pixels in enumerate(images_of(70, 50, 2)):
        images.append(tmp_path / "ab"[index] / "x.png")
        images[-1].parent.mkdir()
        Image.fromarray(pixels).save(images[-1])
    (tmp_path / "broken.png").write_bytes(b"no image")
    words = [calibrated / "model.onnx", *images, tmp_path / "broken.png", "--output_dir", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-I", "-c", REFUSING, str(ROOT / "examples/run_onnx.py"), *map(str, words)],
        cwd=tmp_path,
        env=environment(),
        text=True,
        encoding="utf-8",
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"error: {tmp_path / 'broken.png'}" in done.stderr and f"for '{CLASS}'" in done.stderr
    model = load_model(calibrated / "base", device="cpu")
    for line, path, stem in zip(done.stdout.splitlines(), images, ("x", "b_x"), strict=True):
        expected = model.predict(path, CLASS)
        shown, score, decision, found = line.split("\t")
        # Pillow's resize is the model's own.
        assert shown == str(path) and float(score) == pytest.approx(expected.score, abs=1e-3)
        assert decision == expected.decision
        assert found == " ".join(",".join(map(str, region[:4])) for region in expected.regions)
        assert Image.open(tmp_path / "out" / f"{stem}_mask.png").size == (50, 70)
        # The heatmap has the colours of the other heatmaps, and a colour bar at its right.
        drawn = np.asarray(Image.open(tmp_path / "out" / f"{stem}_map.png")).astype(int)
        heat = np.asarray(heatmap_over(Image.open(path), expected.anomaly_map)).astype(int)
        assert np.abs(drawn[:, :50] - heat).max() < 8 and drawn.shape == (70, 80, 3)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.integers(1, 90), st.integers(1, 90))
@settings(max_examples=50, deadline=None)
def test_the_example_finds_the_regions_of_the_model(seed: int, share: float, width: int, height: int) -> None:
    rng = np.random.default_rng(seed)
    anomaly_map = rng.random((12, 12), dtype=np.float32)
    mask = rng.random((12, 12)) < share
    expected = [tuple(region[:4]) for region in regions_of(mask, anomaly_map, (width, height))]
    assert run_onnx.boxes(mask, anomaly_map, (width, height)) == expected


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I", "I;16", "F", "1"])
def test_the_example_reads_images_like_the_model(mode: str, tmp_path: Path) -> None:
    grey = Image.fromarray(images_of(20, 30)[0]).convert("L")
    values = np.asarray(grey)
    image = {
        "I": Image.fromarray(values.astype(np.int32)),
        "I;16": Image.fromarray(values.astype(np.uint16) * 257),
        "F": Image.fromarray(values.astype(np.float32) / 255),
    }.get(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    (image or grey.convert(mode)).save(tmp_path / "image.tif", exif=exif)
    np.testing.assert_array_equal(run_onnx.read(tmp_path / "image.tif")[0], read_image(tmp_path / "image.tif"))


@pytest.mark.parametrize("value", [-1, np.nan, 65536])
def test_the_example_refuses_values_like_the_model(value: float, tmp_path: Path) -> None:
    Image.fromarray(np.array([[value, 1]], np.float32)).save(tmp_path / "image.tif")
    for read, error in ((run_onnx.read, ValueError), (read_image, UserError)):
        with pytest.raises(error, match="has values from"):
            read(tmp_path / "image.tif")
    Image.fromarray(np.array([[65535, 1]], np.float32)).save(tmp_path / "image.tif")
    np.testing.assert_array_equal(run_onnx.read(tmp_path / "image.tif")[0], read_image(tmp_path / "image.tif"))


def test_the_example_takes_folders(tmp_path: Path) -> None:
    for name in ("b/x.PNG", "out/x_map.png", "a.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    file = tmp_path / "notes.txt"
    assert run_onnx.images_in([tmp_path, file], tmp_path / "out") == [tmp_path / "a.jpg", tmp_path / "b/x.PNG", file]


@pytest.mark.parametrize(("kind", "features"), [("base", "both"), ("cross", "trained")])
def test_references_are_in_the_file(kind: str, features: str, world: Path, tmp_path: Path) -> None:
    model, normal, images = load(world, kind), list(images_of(55, 60, 2)), images_of(45, 52, 2)
    alone = model.predict(images[0], CLASS)
    model.add_references(normal, CLASS, weight=0.6, features=features)
    assert np.abs(model.predict(images[0], CLASS).anomaly_map - alone.anomaly_map).max() > 0.01
    export.export(model, TARGET, tmp_path / "model.onnx")
    session = session_of(tmp_path / "model.onnx")
    assert_is_the_model(session.run(None, {"images": images}), images, model, 1e-3)
    assert session.get_modelmeta().custom_metadata_map["references"].startswith("2 images")


def test_a_torch_program_equals_the_model(world: Path, tmp_path: Path) -> None:
    """References in it."""
    model = load(world, "cross")
    model.add_references(list(images_of(55, 60, 2)), CLASS)
    export.export(model, TARGET, tmp_path / "model.pt2", "torch")
    extra = {export.METADATA: ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(extra[export.METADATA])["class_name"] == CLASS
    assert not paths_in(tmp_path / "model.pt2", world)
    assert not any("token_embedding" in name for name in program.state_dict)
    images = images_of(50, 61, 3)
    outputs = [output.numpy() for output in program.module()(torch.from_numpy(images))]
    assert_is_the_model(outputs, images, model, 1e-3)


@pytest.mark.parametrize("kind", ["cross", "image side"])
def test_half_precision_is_close_and_half_the_size(kind: str, world: Path, tmp_path: Path) -> None:
    model = load(world, kind)
    before = model.predict(images_of(40, 40)[0], CLASS)
    found = export.export(model, TARGET, tmp_path / "half.onnx", precision="fp16")
    assert 1e-6 < max(found) < 2e-2
    after = model.predict(images_of(40, 40)[0], CLASS)
    np.testing.assert_array_equal(before.anomaly_map, after.anomaly_map)
    session = session_of(tmp_path / "half.onnx")
    assert {output.type for output in session.get_outputs()} == {"tensor(float)"}
    kinds = Counter()
    for tensor in onnx.load(tmp_path / "half.onnx").graph.initializer:
        kinds[onnx.TensorProto.DataType.Name(tensor.data_type)] += math.prod(tensor.dims)
    assert kinds["FLOAT16"] > 20 * kinds["FLOAT"] > 0


@pytest.mark.parametrize("off", [(2e-3, 0.0), (float("nan"), 0.0), (0.0, 2e-3)])
def test_a_file_with_different_outputs_is_not_written(
    off: tuple[float, float], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A difference in maps or scores on only the first image is enough."""

    def wrong(file: Path, kind: str) -> export.Run:
        offs = chain([off], repeat((0.0, 0.0)))

        def run(images: np.ndarray) -> list[np.ndarray]:
            found = [model.predict(export.resized(image, 40), CLASS) for image in images]
            off_map, off_score = next(offs)
            maps = np.stack([one.anomaly_map[None] + off_map for one in found])
            return [maps, np.array([one.score + off_score for one in found])]

        return run

    model = load(world, "base")
    monkeypatch.setattr(export, "to_onnx", lambda *_: b"a file")
    monkeypatch.setattr(export, "trace", lambda _: None)
    monkeypatch.setattr(export, "load_run", wrong)
    with pytest.raises(UserError, match="would differ from the model"):
        export.export(model, TARGET, tmp_path / "new" / "model.onnx")
    assert not (tmp_path / "new").exists()
    (tmp_path / "model.onnx").write_bytes(b"earlier")
    with pytest.raises(UserError, match="not written"):
        export.export(model, TARGET, tmp_path / "model.onnx")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("model.onnx", b"earlier")]


@pytest.mark.parametrize("shape", [(40, 40), (200, 320), (33, 500), (1, 1), (5, 7), (601, 602), (1200, 2300)])
@pytest.mark.parametrize("size", [40, 96])
def test_the_resize_equals_pillow(shape: tuple[int, int], size: int) -> None:
    """Bit for bit if the width is at least the height, so that Pillow resizes along the width first."""
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    found = resize(torch.from_numpy(noise)[None], size)[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found, expected)


def test_each_class_gets_a_file(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    monkeypatch.setattr(export, "export", lambda model, target, path, *_: files.append((target.class_name, path.name)))
    arguments = ExportArguments.of(checkpoint=str(world / "base"), class_name=("cup", "a/b", "cup"), format="torch")
    export.export_checkpoint(arguments)
    assert [name for name, _ in files] == ["cup", "a/b"]
    assert files[0][1] == "image_adapter_cup.pt2" and "/" not in files[1][1]


@pytest.mark.long
def test_vit_l_at_518_pixels(tmp_path: Path) -> None:
    """With random weights."""
    torch.manual_seed(0)
    settings = open_clip.get_model_config("ViT-L-14-336")
    settings["vision_cfg"]["image_size"] = 518
    clip = FrozenCLIP(open_clip.CLIP(**settings, quick_gelu=True), "ViT-L-14-336", "quick_gelu")
    found = export.export(Detector(adapted_clip(clip), "random"), TARGET, tmp_path / "vit_l.onnx")
    assert max(found) < 1e-3
