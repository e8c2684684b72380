"""The web page: its results without a browser, its protection against other requests, and its use in Chromium."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect

from dataset.images import read_image
from engine.app import uploads as limits
from engine.app.drawing import result_html
from engine.app.models import load_models, short_names
from engine.app.serve import MAX_WAITING, check_address, page_served
from engine.app.session import Session, decide_on
from engine.app.uploads import Upload, make_uploads
from engine.cli.checks import check_files
from engine.config.tools import AppArguments
from engine.detector.calibration import read_calibration
from engine.detector.detector import Detector
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.graph import Thresholds
from tests.browser import browser  # noqa: F401
from tests.documented import blocks, read_page
from tests.evaluating import calibrate_images
from tests.scripts import environment, free_port, train_small_runs
from tests.test_inference_script import published_form
from utils.errors import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_small_runs(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def models(world: Path) -> dict[str, Detector]:
    chosen = ("none", str(world / "base" / "image_adapter.pth"), str(world / "feedback"))
    return load_models(AppArguments.of(checkpoint=chosen, device="cpu"))


@pytest.fixture(scope="module")
def images(world: Path) -> list[Path]:
    return sorted((world / "test" / "cork").rglob("test/*/*.png"))


@pytest.fixture(scope="module")
def normals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twenty-four images, all different."""
    folder = tmp_path_factory.mktemp("normals")
    rng = np.random.default_rng(5)
    for index in range(24):
        Image.fromarray(rng.integers(60, 120, (40, 40, 3)).astype(np.uint8)).save(folder / f"{index:03d}.png")
    return sorted(folder.iterdir())


def uploads_of(paths: list[Path]) -> list[Upload]:
    return [Upload(path.name, path) for path in paths]


def test_models_have_distinct_titles_and_share_one_clip(models: dict[str, Detector]) -> None:
    assert list(models) == ["unadapted", "image_adapter", "loop_1_final", "loop_2_final"]
    assert len({id(model.clip) for model in models.values()}) == 1
    paths = [Path("a/run/x.pth"), Path("b/run/x.pth"), Path("b/y.pth"), Path("b/y.pth")]
    assert list(short_names(paths)) == ["a/run/x", "b/run/x", "y"]


def test_results_are_those_of_predict(models: dict[str, Detector], images: list[Path]) -> None:
    session = Session(models, uploads=uploads_of(images))
    for name, model in models.items():
        session.analyze(name, "cork")
        assert session.problems == []
        scores = [result.prediction.score for result in session.results]
        assert scores == sorted(scores, reverse=True)
        for result in session.results:
            path = next(path for path in images if read_image(path).tobytes() == result.image.tobytes())
            wanted = model.predict(path, "cork")
            assert result.prediction.score == wanted.score
            np.testing.assert_array_equal(result.prediction.anomaly_map, wanted.anomaly_map)
            assert result.prediction.decision is None
            assert bool(result.attention) == isinstance(model.model, AdaptedCLIPWithCrossAttention)
            page = result_html(result, None)
            assert f"{wanted.score:.4f}" in page
            assert page.count("<figure>") == 2 + len(wanted.level_maps) + len(result.attention)


def test_unreadable_images_are_reported_and_the_others_analyzed(
    models: dict[str, Detector], images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_PIXELS", 5000)
    monkeypatch.setattr(limits, "MAX_BYTES", 20_000)
    (tmp_path / "broken.png").write_bytes(images[0].read_bytes()[:200])
    (tmp_path / "words.png").write_bytes(b"no image at all")
    (tmp_path / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    (tmp_path / "heavy.png").write_bytes(bytes(20_001))
    Image.new("L", (100, 60)).save(tmp_path / "large.png")
    bad = [*sorted(tmp_path.iterdir()), tmp_path / "gone.png"]
    session = Session(models, uploads=uploads_of([*bad, images[0]]))
    session.analyze("image_adapter", "cork")
    assert [result.name for result in session.results] == [images[0].name]
    problems = "\n".join(session.problems)
    assert len(session.problems) == len(bad)
    for words in (
        "broken.png cannot be read",
        "words.png cannot be read",
        "program.png cannot be read",
        "gone.png was deleted",
        "heavy.png is larger than",
        "large.png has 100 x 60 pixels; the limit is 5,000",
    ):
        assert words in problems
    assert str(tmp_path) not in problems, "paths of the server"
    with pytest.raises(UserError, match="7 images at once: the limit is 3"):
        make_uploads([str(path) for path in [*bad, images[0]]], 3)


def test_references_belong_to_one_visitor(models: dict[str, Detector], images: list[Path], normals: list[Path]) -> None:
    session, other = Session(models, uploads=uploads_of(images)), Session(models, uploads=uploads_of(images))
    session.compare_with(uploads_of(normals[:3]), "image_adapter", "cork")
    for name in ("image_adapter", "loop_2_final"):
        session.analyze(name, "cork")
        result = session.results[0]
        model = models[name]
        path = next(path for path in images if read_image(path).tobytes() == result.image.tobytes())
        plain = model.predict(path, "cork")
        model.add_references(normals[:3], "cork")
        wanted = model.predict(path, "cork")
        del model.references["cork"]
        assert result.references == 3
        assert not np.array_equal(plain.anomaly_map, wanted.anomaly_map)
        np.testing.assert_array_equal(result.prediction.anomaly_map, wanted.anomaly_map)
        other.analyze(name, "cork")
        assert other.results[0].references == 0
        session.analyze(name, "reed")
        assert session.results[0].references == 0, "they are of another class"
    # An image compared with itself says nothing.
    session.uploads = uploads_of([normals[1], images[0]])
    session.analyze("image_adapter", "cork")
    assert len(session.results) == 1
    assert "001.png is one of the images" in session.problems[0]
    # One that cannot be read changes nothing; none at all ends it.
    with pytest.raises(UserError, match="was deleted"):
        session.compare_with([Upload("x.png", Path("gone.png"))], "image_adapter", "cork")
    session.analyze("image_adapter", "cork")
    assert session.results[0].references == 3
    session.compare_with([], "image_adapter", "cork")
    session.analyze("image_adapter", "cork")
    assert [result.references for result in session.results] == [0, 0]


def test_thresholds_belong_to_one_visitor(
    world: Path, models: dict[str, Detector], images: list[Path], normals: list[Path]
) -> None:
    session = Session(models, uploads=uploads_of(images))
    with pytest.raises(UserError, match=r"18 normal images are too few for 5 % .* 19"):
        session.calibrate(uploads_of(normals[:18]), "image_adapter", "cork", 0.05)
    with pytest.raises(UserError, match=r"18 normal images are too few"):
        session.calibrate(uploads_of([*normals[:18], normals[0]]), "image_adapter", "cork", 0.05)
    entry = session.calibrate(uploads_of(normals[:20]), "image_adapter", "cork", 0.05)
    scores = sorted(models["image_adapter"].predict(path, "cork").score for path in normals[:20])
    assert entry.scores == scores
    session.analyze("image_adapter", "cork")
    for result in session.results:
        assert result.prediction.decision == (
            "anomalous" if result.prediction.score > entry.image_threshold else "normal"
        )
        assert "Anomalous above" in result_html(result, None)
    for model, name in (("image_adapter", "reed"), ("loop_1_final", "cork")):
        session.analyze(model, name)
        assert {result.prediction.decision for result in session.results} == {None}
    # With references scores are others; images for thresholds must not be among them.
    session.compare_with(uploads_of(normals[:2]), "image_adapter", "cork")
    session.analyze("image_adapter", "cork")
    assert {result.entry for result in session.results} == {None}
    with pytest.raises(UserError, match=r"000\.png is one of the images"):
        session.calibrate(uploads_of(normals[:20]), "image_adapter", "cork", 0.05)
    session.calibrate(uploads_of(normals[2:22]), "image_adapter", "cork", 0.05)
    session.analyze("image_adapter", "cork")
    assert all(result.prediction.decision for result in session.results)
    other = Session(models, uploads=uploads_of(images[:1]))
    other.analyze("image_adapter", "cork")
    assert other.results[0].entry is None
    assert not list(world.rglob("calibration.json")), "nothing is written beside the checkpoint"


def test_thresholds_next_to_the_checkpoint_decide(world: Path, images: list[Path], normals: list[Path]) -> None:

    file = world / "base" / "image_adapter.pth"
    calibrate_images(str(file), normals[0].parent, "cork", false_alarms=0.05, device="cpu")
    try:
        calibrated = load_models(AppArguments.of(checkpoint=(str(file),), device="cpu"))
    finally:
        (world / "base" / "calibration.json").unlink()
    session = Session(calibrated, uploads=uploads_of(images))
    session.analyze("image_adapter", "cork")
    assert all(result.prediction.decision for result in session.results)


def test_a_published_checkpoint_next_to_unadapted_clip(world: Path, tmp_path: Path) -> None:
    file = published_form(world, tmp_path / "published", relu=True)
    chosen, name = (str(file), "none"), f"local-dir:{world / 'clip'}"
    both = load_models(AppArguments.of(checkpoint=chosen, model_name=name, device="cpu"))
    alone = load_models(AppArguments.of(checkpoint=("none",), model_name=name, device="cpu"))
    # The published code uses GELU; unadapted CLIP uses the activation of its training.
    assert [model.clip.activation for model in both.values()] == ["quick_gelu", "gelu"]
    assert both["unadapted"].digest == alone["unadapted"].digest
    assert list(both) == ["unadapted", "image_adapter_20"]


def test_manual_thresholds_decide(models: dict[str, Detector], images: list[Path]) -> None:
    session = Session(models, uploads=uploads_of(images))
    session.analyze("image_adapter", "cork")
    result = session.results[0]
    assert decide_on(result)[1].decision == ""
    assert "no decision" in result_html(result, None)
    score, peak = result.prediction.score, float(result.prediction.anomaly_map.max())
    above, below = Thresholds(score + 1e-4, peak), Thresholds(score - 1e-4, peak - 1e-4)
    (prediction, finding), (anomalous, _) = (decide_on(result, manual) for manual in (above, below))
    assert (finding.decision, prediction.regions, finding.region) == ("normal", (), None)
    assert anomalous.decision == "anomalous"
    assert anomalous.mask.sum() == (anomalous.anomaly_map > below.pixel).sum() > 0
    assert "Manual thresholds" in result_html(result, below)


def test_the_archive_contains_the_results(
    models: dict[str, Detector], images: list[Path], normals: list[Path], tmp_path: Path
) -> None:
    names = ["../../escaped.png", "C:\\windows\\con.png", "<b>&.png", "a.png", "a.png", "a.png"]
    session = Session(models, uploads=[Upload(name, path) for name, path in zip(names, images, strict=True)])
    session.calibrate(uploads_of(normals[:20]), "image_adapter", "cork", 0.05)
    session.analyze("image_adapter", "cork")
    assert "<b>" not in result_html(next(result for result in session.results if result.name == names[2]), None)
    session.write_zip(tmp_path / "results.zip", 0.5)
    with zipfile.ZipFile(tmp_path / "results.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
        inside = archive.namelist()
        rows = list(csv.DictReader(io.StringIO(archive.read("scores.csv").decode("utf-8"))))
    assert not any(".." in Path(name).parts or "\\" in name or ":" in name for name in inside)
    heatmaps = [name for name in inside if name.endswith("_heatmap.png")]
    assert len(heatmaps) == len(images)
    assert [float(row["score"]) for row in rows] == pytest.approx(
        [result.prediction.score for result in session.results]
    )
    assert {row["decision"] for row in rows} <= {"anomalous", "normal"}
    entries = read_calibration(tmp_path / "unpacked" / "calibration.json")
    assert [entry.class_name for entry in entries] == ["cork"]
    with Image.open(tmp_path / "unpacked" / heatmaps[0]) as drawn:
        assert drawn.size == (40, 40)


def test_too_long_class_names_are_rejected(models: dict[str, Detector], images: list[Path]) -> None:
    session = Session(models, uploads=uploads_of(images[:1]))
    with pytest.raises(UserError):
        session.analyze("image_adapter", "very " * 100 + "long")
    session.analyze("image_adapter", "  ")
    assert session.results[0].finding.class_name == "object"


def test_errors_before_the_page_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="must begin with /"):
        AppArguments.of(root_path="anomalies").check()
    with pytest.raises(UserError, match=r"gone.pth"):
        check_files(AppArguments.of(checkpoint=("none", "gone.pth")))
    with pytest.raises(UserError, match="no such address"):
        check_address("256.0.0.1", 7860)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port}: cannot listen there"):
            check_address("127.0.0.1", port)
    monkeypatch.setattr("engine.config.tools.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"requirements-app\.txt"):
        AppArguments.of(checkpoint=("none",)).check()


def test_without_the_demo_the_page_has_unadapted_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    models = load_models(AppArguments.of())
    assert [model.clip.model_name for model in models.values()] == ["toy"]
    assert "holds no models: python run.py demo trains them" in caplog.text


def test_the_demos_models_are_the_default(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("base", "feedback"):
        shutil.copytree(world / name, tmp_path / "runs" / "demo" / name)
    monkeypatch.chdir(tmp_path)
    assert list(load_models(AppArguments.of())) == ["unadapted", "base", "loop 1", "loop 2"]
    assert torch.is_grad_enabled()


class Served:
    """A served page, with the requests of a browser or an attacker."""

    def __init__(self, address: str, folder: Path) -> None:
        self.address, self.folder = address.rstrip("/"), folder
        self.config = json.loads(self.get("/config"))
        self.ids = {part["props"].get("elem_id"): part["id"] for part in self.config["components"]}

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.address + path, timeout=60) as answer:
            return answer.read()

    def status(self, path: str) -> int:
        try:
            self.get(path)
        except urllib.error.HTTPError as error:
            return error.code
        return 200

    def index(self, name: str, event: str) -> int:
        """The index of the handler of an event."""
        wanted = [self.ids[name], event]
        return next(one["id"] for one in self.config["dependencies"] if wanted in [list(t) for t in one["targets"]])

    def ask(self, function: int, data: list[Any], session: str) -> dict[str, Any]:
        """The final answer of the queue; {} if the queue is full."""
        body = {"data": data, "fn_index": function, "session_hash": session, "event_data": None}
        request = urllib.request.Request(
            f"{self.address}/gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            urllib.request.urlopen(request, timeout=60).close()
        except urllib.error.HTTPError as error:
            assert error.code == 503, error.read()
            return {}
        with urllib.request.urlopen(
            f"{self.address}/gradio_api/queue/data?session_hash={session}", timeout=120
        ) as events:
            for line in events:
                message = json.loads(line[6:]) if line.startswith(b"data: ") else {}
                if message.get("msg") == "process_completed":
                    return message
        raise AssertionError("no answer")


@pytest.fixture(scope="module")
def served(models: Mapping[str, Detector], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The page with tiny models; it must not connect to other machines."""
    elsewhere: list[Any] = []
    connect, lookup = socket.socket.connect, socket.getaddrinfo

    def watched_connect(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            elsewhere.append(address)
        connect(self, address)

    def watched_lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in ("127.0.0.1", "::1", "localhost", None):
            elsewhere.append(host)
        return lookup(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(socket.socket, "connect", watched_connect)
        patched.setattr(socket, "getaddrinfo", watched_lookup)
        patched.chdir(tmp_path_factory.mktemp("here"))
        patched.setenv("GRADIO_ALLOWED_PATHS", "/")
        for name, value in {"http_proxy": "http://127.0.0.1:1", "all_proxy": "socks5://127.0.0.1:1"}.items():
            patched.setenv(name, value)
        for name in ("no_proxy", "NO_PROXY"):
            patched.setenv(name, "example.org")  # also restored at the end
        with page_served(models, "127.0.0.1", free_port()) as address:
            yield Served(address, Path.cwd())
        assert list(Path.cwd().iterdir()) == []
    assert elsewhere == []


def test_a_page_behind_a_reverse_proxy(models: dict[str, Detector]) -> None:
    with page_served(models, "127.0.0.1", free_port(), root_path="/anomalies") as address:
        assert Served(address, Path()).config["root"].endswith("/anomalies")


def test_files_cannot_be_read_by_their_paths(served: Served, images: list[Path], world: Path) -> None:
    assert served.status("/") == 200
    for path in (images[0], Path(__file__), world / "base" / "image_adapter.pth", Path("/etc/hostname")):
        assert served.status(f"/gradio_api/file={path.as_posix()}") in (403, 404)
    # As the page sends an uploaded file.
    for number, given_path in enumerate(
        (images[0].as_posix(), "../../../etc/hostname", "http://127.0.0.1:1/image.png", "https://example.org/image.png")
    ):
        file = {"path": given_path, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}
        answer = served.ask(served.index("images", "change"), [None, [file]], f"path{number}")
        assert answer["success"] is False
        answer = served.ask(served.index("analyze", "click"), [None, "image_adapter", file], f"text{number}")
        assert answer["success"] is False
        answer = served.ask(served.index("request", "click"), [[file], "cork", "image_adapter", "off"], f"api{number}")
        assert answer["success"] is False


def test_the_documented_request_gets_the_results_of_predict(
    served: Served, models: Mapping[str, Detector], images: list[Path]
) -> None:
    page = "docs/deploying.md"
    (example,) = [
        "\n".join(block.lines) for block in blocks(page, read_page(page)) if "gradio_client" in str(block.lines)
    ]
    for documented, here in (
        ("http://127.0.0.1:7860", served.address),
        ("data/toy_test/cup/test/bend/000.png", images[0].as_posix()),
        ('"base"', '"image_adapter"'),
        ('tiles="off"', 'tiles="2"'),
    ):
        assert documented in example
        example = example.replace(documented, here)
    # In a process of its own, because the client looks up the hub.
    code = f"{example}\nimport json\nprint(json.dumps(answer))"
    command = [sys.executable, "-c", code]
    variables = {**environment(), "GRADIO_ANALYTICS_ENABLED": "False", "no_proxy": "*"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, encoding="utf-8", check=True)
    expected = models["image_adapter"].predict(images[0], "cup", tiles=2).to_dict()
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer == {"results": [{"name": images[0].name, **expected}], "problems": []}


def test_too_large_uploads_are_rejected(served: Served) -> None:
    content = bytes(limits.MAX_BYTES + 1000)
    body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.png"\r\n\r\n' + content + b"\r\n--b--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    request = urllib.request.Request(f"{served.address}/gradio_api/upload", body, kind)
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=60)
    assert error.value.code == 413


def test_a_full_queue_rejects_requests_and_recovers(
    served: Served, models: Mapping[str, Detector], monkeypatch: pytest.MonkeyPatch
) -> None:
    resume = threading.Event()
    look = Session.analyze
    monkeypatch.setattr(Session, "analyze", lambda *args: (resume.wait(60), look(*args))[1])
    function, count = served.index("analyze", "click"), MAX_WAITING + 12
    with ThreadPoolExecutor(count) as pool:
        click = [None, "image_adapter", "cork", "off", None]
        asked = [pool.submit(served.ask, function, click, f"many{index}") for index in range(count)]
        wait(asked, 60, return_when=FIRST_COMPLETED)
        resume.set()
        answers = [one.result() for one in asked]
    assert {} in answers
    assert sum(bool(answer) for answer in answers) >= MAX_WAITING
    assert all(answer["success"] for answer in answers if answer)
    assert served.ask(function, click, "after")["success"]


@pytest.fixture(scope="module")
def windows(browser: Browser) -> Iterator[BrowserContext]:  # noqa: F811
    """A cache shared by all windows."""
    with browser.new_context() as context:
        yield context


@pytest.fixture(params=[1280, 320], ids=["desk", "phone"])
def page(request: pytest.FixtureRequest, windows: BrowserContext, served: Served) -> Iterator[Page]:
    """The page in a window; it must not send requests elsewhere, log errors, or scroll sideways."""
    page = windows.new_page()
    page.set_viewport_size({"width": request.param, "height": 800})
    page.set_default_timeout(60_000)
    own, complaints = (served.address, "data:", "blob:"), []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda sent: complaints.append(sent.url) if not sent.url.startswith(own) else None)
    page.goto(served.address)
    page.wait_for_selector("#examples img")
    yield page
    width = page.evaluate("document.documentElement.scrollWidth")
    page.close()
    assert width <= request.param, "it scrolls sideways"
    assert complaints == []


def upload(page: Page, where: str, files: list[Path] | list[Any]) -> None:
    page.locator(f"#{where} input[type=file]").set_input_files(files)


def test_an_uploaded_image_gets_a_map(page: Page, models: Mapping[str, Detector], images: list[Path]) -> None:
    page.locator("#class_name textarea, #class_name input").fill("cork")
    upload(page, "images", images[:1])
    result = page.locator("#result .analysis")
    wanted = models["loop_2_final"].predict(images[0], "cork").score
    expect(result).to_contain_text(f"{wanted:.4f}")
    expect(result).to_contain_text("Attention")
    pictures = "[...document.querySelectorAll('#result img')].map(i => [i.complete, i.naturalWidth])"
    assert all(complete and width > 0 for complete, width in page.evaluate(pictures))
    page.locator("#model input").click()
    page.get_by_role("option", name="image_adapter").click()
    wanted = models["image_adapter"].predict(images[0], "cork").score
    expect(result).to_contain_text(f"{wanted:.4f}")
    expect(result).not_to_contain_text("Attention")
    expect(result).to_contain_text("no decision")
    page.locator("#image_threshold input[type=number]").fill("0.001")
    page.locator("#image_threshold input[type=number]").press("Tab")
    expect(result.locator(".decision")).to_have_text("anomalous")
    before = page.evaluate("getComputedStyle(document.querySelector('#result .heat')).opacity")
    page.locator("#opacity input[type=range]").fill("0.9")
    page.wait_for_function(
        "before => getComputedStyle(document.querySelector('#result .heat')).opacity !== before", arg=before
    )


def test_several_images_with_a_broken_one_and_a_download(page: Page, images: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(images[0].read_bytes()[:100])
    # Its table of regions is wide for a phone.
    large = tmp_path / ("large_" * 20 + ".png")
    read_image(images[-1]).resize((4000, 3000), Image.Resampling.NEAREST).save(large)
    upload(page, "images", [images[0], broken, large])
    expect(page.locator("#messages")).to_contain_text("broken.png cannot be read as an image")
    expect(page.locator("#overview img")).to_have_count(2)
    shown = page.locator("#result .headline .name")
    first = shown.inner_text()
    page.locator("#overview img").nth(1).click()
    expect(shown).not_to_have_text(first)
    with page.expect_download() as download:
        page.locator("#save").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert "scores.csv" in archive.namelist()
        assert "report.html" in archive.namelist()
        assert len(archive.namelist()) == 4


def test_twenty_quick_clicks(page: Page, images: list[Path]) -> None:
    upload(page, "images", images[:2])
    expect(page.locator("#overview img")).to_have_count(2)
    page.evaluate("for (let i = 0; i < 20; i++) document.querySelector('#analyze').click()")
    page.locator("#examples img").last.click()
    expect(page.locator("#result .headline .name")).to_contain_text("normal")


def test_references_and_thresholds_from_normal_images(page: Page, images: list[Path], normals: list[Path]) -> None:
    page.locator("#class_name textarea, #class_name input").fill("cork")
    upload(page, "images", images[:1])
    result = page.locator("#result .analysis")
    expect(result).to_contain_text("no decision")
    page.get_by_text("Find thresholds").first.click()
    upload(page, "normals", normals[:18])
    page.locator("#calibrate").click()
    expect(page.locator("#messages")).to_contain_text("18 normal images are too few for 5 % false alarms")
    upload(page, "normals", normals[18:])
    expect(page.locator("#normals")).to_contain_text(normals[-1].stem)
    page.locator("#calibrate").click()
    expect(result).to_contain_text("Anomalous above")
    expect(result.locator(".decision")).to_have_text(re.compile("^(anomalous|normal)$"))
    page.get_by_text("Compare with normal images").first.click()
    upload(page, "references", normals[:2])
    expect(page.locator("#references")).to_contain_text(normals[1].stem)
    expect(result).to_contain_text("compared with 2 normal images")
