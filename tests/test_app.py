"""The page: what it finds without a browser, who may ask it for what, and how it is used in Chromium."""

from __future__ import annotations

import csv
import io
import json
import re
import socket
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
from engine.app import dropped as limits
from engine.app.drawing import result
from engine.app.dropped import Dropped, dropped
from engine.app.models import load_models, named
from engine.app.serve import MOST_WAITING, page_served
from engine.app.session import Session, Thresholds, verdict
from engine.cli.checks import check_page
from engine.config.app import AppArguments
from engine.detector.calibration import read_calibration
from engine.detector.detector import Detector
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from tests.browser import browser  # noqa: F401
from tests.evaluating import calibrate_images
from tests.scripts import train_small_runs
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


def given(paths: list[Path]) -> list[Dropped]:
    return [Dropped(path.name, path) for path in paths]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


# What is found


def test_models_are_named_by_what_tells_them_apart_and_share_one_clip(models: dict[str, Detector]) -> None:
    assert list(models) == ["unadapted", "image_adapter", "loop_1_final", "loop_2_final"]
    assert len({id(model.clip) for model in models.values()}) == 1
    paths = [Path("a/run/x.pth"), Path("b/run/x.pth"), Path("b/y.pth"), Path("b/y.pth")]
    assert list(named(paths)) == ["a/run/x", "b/run/x", "y"]


def test_the_page_sees_what_predict_sees(models: dict[str, Detector], images: list[Path]) -> None:
    session = Session(models, dropped=given(images))
    for name, model in models.items():
        session.look(name, "cork")
        assert session.problems == []
        scores = [seen.prediction.score for seen in session.seen]
        assert scores == sorted(scores, reverse=True)
        for seen in session.seen:
            path = next(path for path in images if read_image(path).tobytes() == seen.image.tobytes())
            wanted = model.predict(path, "cork")
            assert seen.prediction.score == wanted.score
            np.testing.assert_array_equal(seen.prediction.anomaly_map, wanted.anomaly_map)
            assert seen.prediction.decision is None
            assert bool(seen.attention) == isinstance(model.model, AdaptedCLIPWithCrossAttention)
            page = result(seen, None)
            assert f"{wanted.score:.4f}" in page
            assert page.count("<figure>") == 2 + len(wanted.level_maps) + len(seen.attention)


def test_what_cannot_be_read_is_said_and_the_rest_is_seen(
    models: dict[str, Detector], images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MOST_PIXELS", 5000)
    monkeypatch.setattr(limits, "MOST_BYTES", 20_000)
    (tmp_path / "broken.png").write_bytes(images[0].read_bytes()[:200])
    (tmp_path / "words.png").write_bytes(b"no image at all")
    (tmp_path / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    (tmp_path / "heavy.png").write_bytes(bytes(20_001))
    Image.new("L", (100, 60)).save(tmp_path / "large.png")
    bad = [*sorted(tmp_path.iterdir()), tmp_path / "gone.png"]
    session = Session(models, dropped=given([*bad, images[0]]))
    session.look("image_adapter", "cork")
    assert [seen.name for seen in session.seen] == [images[0].name]
    said = "\n".join(session.problems)
    assert len(session.problems) == len(bad)
    for words in (
        "broken.png cannot be read",
        "words.png cannot be read",
        "program.png cannot be read",
        "gone.png is no longer",
        "heavy.png is larger than",
        "large.png has 100 x 60 pixels: 5,000",
    ):
        assert words in said
    assert str(tmp_path) not in said, "a visitor is told where the server keeps files"
    with pytest.raises(UserError, match="7 images at once: 3 are the most"):
        dropped([str(path) for path in [*bad, images[0]]], 3)


def test_references_are_a_visitors_own(models: dict[str, Detector], images: list[Path], normals: list[Path]) -> None:
    session, other = Session(models, dropped=given(images)), Session(models, dropped=given(images))
    assert session.compare_with(given(normals[:3]), "image_adapter", "cork") == 3
    for name in ("image_adapter", "loop_2_final"):
        session.look(name, "cork")
        seen = session.seen[0]
        model = models[name]
        path = next(path for path in images if read_image(path).tobytes() == seen.image.tobytes())
        plain = model.predict(path, "cork")
        references = model.remember(normals[:3], "cork")
        del model.references["cork"]
        wanted = model.predict(path, "cork", references=references)
        assert seen.references == 3
        assert not np.array_equal(plain.anomaly_map, wanted.anomaly_map)
        np.testing.assert_array_equal(seen.prediction.anomaly_map, wanted.anomaly_map)
        other.look(name, "cork")
        assert other.seen[0].references == 0
        session.look(name, "reed")
        assert session.seen[0].references == 0, "they are of another class"
    # An image compared with itself says nothing.
    session.dropped = given([normals[1], images[0]])
    session.look("image_adapter", "cork")
    assert len(session.seen) == 1
    assert "001.png is one of the normal images" in session.problems[0]
    # One that cannot be read changes nothing; none at all ends it.
    with pytest.raises(UserError, match="no longer kept"):
        session.compare_with([Dropped("x.png", Path("gone.png"))], "image_adapter", "cork")
    session.look("image_adapter", "cork")
    assert session.seen[0].references == 3
    session.compare_with([], "image_adapter", "cork")
    session.look("image_adapter", "cork")
    assert [seen.references for seen in session.seen] == [0, 0]


def test_thresholds_are_a_visitors_own_and_hold_for_what_they_were_found_for(
    world: Path, models: dict[str, Detector], images: list[Path], normals: list[Path]
) -> None:
    session = Session(models, dropped=given(images))
    with pytest.raises(UserError, match=r"18 normal images are too few for 5 % .* 19"):
        session.calibrate(given(normals[:18]), "image_adapter", "cork", 0.05)
    with pytest.raises(UserError, match=r"18 normal images are too few"):
        session.calibrate(given([*normals[:18], normals[0]]), "image_adapter", "cork", 0.05)
    entry = session.calibrate(given(normals[:20]), "image_adapter", "cork", 0.05)
    scores = sorted(models["image_adapter"].predict(path, "cork").score for path in normals[:20])
    assert entry.scores == scores
    session.look("image_adapter", "cork")
    for seen in session.seen:
        assert seen.prediction.decision == ("anomalous" if seen.prediction.score > entry.image_threshold else "normal")
        assert "Anomalous above" in result(seen, None)
    for model, name in (("image_adapter", "reed"), ("loop_1_final", "cork")):
        session.look(model, name)
        assert {seen.prediction.decision for seen in session.seen} == {None}
    # With references scores are others; images for thresholds must not be among them.
    session.compare_with(given(normals[:2]), "image_adapter", "cork")
    session.look("image_adapter", "cork")
    assert {seen.entry for seen in session.seen} == {None}
    with pytest.raises(UserError, match=r"000\.png is one of the normal images"):
        session.calibrate(given(normals[:20]), "image_adapter", "cork", 0.05)
    session.calibrate(given(normals[2:22]), "image_adapter", "cork", 0.05)
    session.look("image_adapter", "cork")
    assert all(seen.prediction.decision for seen in session.seen)
    other = Session(models, dropped=given(images[:1]))
    other.look("image_adapter", "cork")
    assert other.seen[0].entry is None
    assert not list(world.rglob("calibration.json")), "nothing is written beside the checkpoint"


def test_thresholds_beside_the_checkpoint_decide(world: Path, images: list[Path], normals: list[Path]) -> None:

    file = world / "base" / "image_adapter.pth"
    calibrate_images(str(file), normals[0].parent, "cork", false_alarms=0.05, device="cpu")
    try:
        found = load_models(AppArguments.of(checkpoint=(str(file),), device="cpu"))
    finally:
        (world / "base" / "calibration.json").unlink()
    session = Session(found, dropped=given(images))
    session.look("image_adapter", "cork")
    assert all(seen.prediction.decision for seen in session.seen)


def test_a_published_checkpoint_is_looked_through(world: Path, images: list[Path], tmp_path: Path) -> None:
    file = published_form(world, tmp_path / "published", relu=True)
    chosen, name = (str(file), "none"), f"local-dir:{world / 'clip'}"
    both = load_models(AppArguments.of(checkpoint=chosen, model_name=name, device="cpu"))
    alone = load_models(AppArguments.of(checkpoint=("none",), model_name=name, device="cpu"))
    # Under GELU as its code has it, and CLIP beside it as it was trained.
    assert [model.clip.activation for model in both.values()] == ["quick_gelu", "gelu"]
    assert both["unadapted"].digest == alone["unadapted"].digest
    name = f"local-dir:{world / 'clip'}"
    found = load_models(AppArguments.of(checkpoint=(str(file), "none"), model_name=name, device="cpu"))
    assert list(found) == ["unadapted", "image_adapter_20"]
    session = Session(found, dropped=given(images))
    session.look("image_adapter_20", "cork")
    assert len(session.seen) == len(images)


def test_thresholds_set_by_hand_decide(models: dict[str, Detector], images: list[Path]) -> None:
    session = Session(models, dropped=given(images))
    session.look("image_adapter", "cork")
    seen = session.seen[0]
    assert verdict(seen).decision == ""
    assert "no decision" in result(seen, None)
    score, peak = seen.prediction.score, float(seen.prediction.anomaly_map.max())
    above, below = Thresholds(score + 1e-4, peak), Thresholds(score - 1e-4, peak - 1e-4)
    assert (verdict(seen, above).decision, verdict(seen, above).regions) == ("normal", ())
    assert verdict(seen, below).decision == "anomalous"
    assert verdict(seen, below).mask.sum() == (seen.prediction.anomaly_map > below.pixel).sum() > 0
    assert "By hand" in result(seen, below)


def test_the_archive_holds_what_was_found(
    models: dict[str, Detector], images: list[Path], normals: list[Path], tmp_path: Path
) -> None:
    names = ["../../escaped.png", "C:\\windows\\con.png", "<b>&.png", "a.png", "a.png", "a.png"]
    session = Session(models, dropped=[Dropped(name, path) for name, path in zip(names, images, strict=True)])
    session.calibrate(given(normals[:20]), "image_adapter", "cork", 0.05)
    session.look("image_adapter", "cork")
    assert "<b>" not in result(next(seen for seen in session.seen if seen.name == names[2]), None)
    with zipfile.ZipFile(session.write_zip(tmp_path / "results.zip", 0.5)) as archive:
        archive.extractall(tmp_path / "unpacked")
        inside = archive.namelist()
        rows = list(csv.DictReader(io.StringIO(archive.read("scores.csv").decode("utf-8"))))
    assert not any(".." in Path(name).parts or "\\" in name or ":" in name for name in inside)
    heatmaps = [name for name in inside if name.endswith("_heatmap.png")]
    assert len(heatmaps) == len(images)
    assert [float(row["score"]) for row in rows] == [round(seen.prediction.score, 6) for seen in session.seen]
    assert {row["decision"] for row in rows} <= {"anomalous", "normal"}
    entries = read_calibration(tmp_path / "unpacked" / "calibration.json")
    assert [entry.class_name for entry in entries] == ["cork"]
    with Image.open(tmp_path / "unpacked" / heatmaps[0]) as drawn:
        assert drawn.size == (40, 40)


def test_names_that_no_prompt_holds_are_refused(models: dict[str, Detector], images: list[Path]) -> None:
    session = Session(models, dropped=given(images[:1]))
    with pytest.raises(UserError):
        session.look("image_adapter", "very " * 100 + "long")
    session.look("image_adapter", "  ")
    assert session.seen[0].class_name == "object"


# Where it is started


def test_mistakes_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"runs.demo holds no models of the demo: .*run.py demo"):
        check_page(AppArguments.of())
    with pytest.raises(UserError, match=r"gone.pth"):
        check_page(AppArguments.of(checkpoint=("none", "gone.pth")))
    with pytest.raises(UserError, match="no such address"):
        check_page(AppArguments.of(checkpoint=("none",), host="256.0.0.1"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port}: cannot listen there"):
            check_page(AppArguments.of(checkpoint=("none",), port=port))
    monkeypatch.setattr("engine.cli.checks.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"requirements-app\.txt"):
        check_page(AppArguments.of(checkpoint=("none",)))


def test_the_demos_models_are_the_default(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    demo = tmp_path / "runs" / "demo"
    demo.mkdir()
    for name in ("base", "feedback"):
        (demo / name).mkdir()
        for file in (world / name).glob("*.pth"):
            (demo / name / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    check_page(AppArguments.of(port=free_port()))
    assert list(load_models(AppArguments.of())) == ["unadapted", "base", "loop 1", "loop 2"]
    assert torch.is_grad_enabled()


# Who may ask it for what


class Served:
    """A page that is served, and asked as a browser asks, or as somebody who means no good."""

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
        """The number of what follows an event of a part of the page."""
        wanted = [self.ids[name], event]
        return next(one["id"] for one in self.config["dependencies"] if wanted in [list(t) for t in one["targets"]])

    def ask(self, function: int, data: list[Any], session: str) -> dict[str, Any]:
        """What the queue answers at last; {} where it takes no more."""
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
        ) as said:
            for line in said:
                message = json.loads(line[6:]) if line.startswith(b"data: ") else {}
                if message.get("msg") == "process_completed":
                    return message
        raise AssertionError("no answer")


@pytest.fixture(scope="module")
def served(models: Mapping[str, Detector], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The page with tiny models; nothing may be asked of another machine while it is there."""
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
        with page_served(models, "127.0.0.1", free_port()) as address:
            yield Served(address, Path.cwd())
        assert list(Path.cwd().iterdir()) == [], "files are left where the page was started"
    assert elsewhere == []


def test_no_file_is_given_out_or_taken_by_its_path(served: Served, images: list[Path], world: Path) -> None:
    assert served.status("/") == 200
    for path in (images[0], Path(__file__), world / "base" / "image_adapter.pth", Path("/etc/hostname")):
        assert served.status(f"/gradio_api/file={path.as_posix()}") in (403, 404)
    # As the page would say it of a file that was dropped.
    for number, given_path in enumerate(
        (images[0].as_posix(), "../../../etc/hostname", "http://127.0.0.1:1/image.png", "https://example.org/image.png")
    ):
        file = {"path": given_path, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}
        answer = served.ask(served.index("images", "change"), [None, [file]], f"path{number}")
        assert answer["success"] is False
        answer = served.ask(served.index("look", "click"), [None, "image_adapter", file], f"text{number}")
        assert answer["success"] is False


def test_files_that_are_too_large_are_refused_on_their_way(served: Served) -> None:
    content = bytes(limits.MOST_BYTES + 1000)
    body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.png"\r\n\r\n' + content + b"\r\n--b--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    request = urllib.request.Request(f"{served.address}/gradio_api/upload", body, kind)
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=60)
    assert error.value.code == 413


def test_more_visitors_than_the_queue_holds_are_told_so_and_the_page_goes_on(
    served: Served, models: Mapping[str, Detector], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    look = Session.look
    monkeypatch.setattr(Session, "look", lambda *args: (go_on.wait(60), look(*args))[1])
    function, count = served.index("look", "click"), MOST_WAITING + 12
    with ThreadPoolExecutor(count) as pool:
        asked = [
            pool.submit(served.ask, function, [None, "image_adapter", "cork"], f"many{index}") for index in range(count)
        ]
        # All others wait for the model.
        wait(asked, 60, return_when=FIRST_COMPLETED)
        go_on.set()
        answers = [one.result() for one in asked]
    assert {} in answers
    assert sum(bool(answer) for answer in answers) >= MOST_WAITING
    assert all(answer["success"] for answer in answers if answer)
    assert served.ask(function, [None, "image_adapter", "cork"], "after")["success"]


# How it is used


@pytest.fixture(scope="module")
def windows(browser: Browser) -> Iterator[BrowserContext]:  # noqa: F811
    """What windows share: what they have fetched once."""
    with browser.new_context() as context:
        yield context


@pytest.fixture(params=[1280, 320], ids=["desk", "phone"])
def page(request: pytest.FixtureRequest, windows: BrowserContext, served: Served) -> Iterator[Page]:
    """The page in a window; it must ask nobody else for anything, and log no error."""
    page = windows.new_page()
    page.set_viewport_size({"width": request.param, "height": 800})
    page.set_default_timeout(60_000)
    complaints: list[str] = []
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda asked: complaints.append(asked.url) if not _of_the_page(asked.url, served) else None)
    page.goto(served.address)
    page.wait_for_selector("#examples img")
    yield page
    width = page.evaluate("document.documentElement.scrollWidth")
    page.close()
    assert width <= request.param, "it scrolls sideways"
    assert complaints == []


def _of_the_page(url: str, served: Served) -> bool:
    return url.startswith((served.address, "data:", "blob:"))


def drop(page: Page, where: str, files: list[Path] | list[Any]) -> None:
    page.locator(f"#{where} input[type=file]").set_input_files(files)


def loaded_pictures(page: Page) -> list[list[Any]]:
    return page.evaluate("[...document.querySelectorAll('#result img')].map(i => [i.complete, i.naturalWidth])")


def test_an_image_that_is_dropped_gives_a_map(page: Page, models: Mapping[str, Detector], images: list[Path]) -> None:
    page.locator("#class_name textarea, #class_name input").fill("cork")
    drop(page, "images", images[:1])
    result = page.locator("#result .seen")
    wanted = models["loop_2_final"].predict(images[0], "cork").score
    expect(result).to_contain_text(f"{wanted:.4f}")
    expect(result).to_contain_text("Attention")
    assert all(complete and width > 0 for complete, width in loaded_pictures(page))
    # Another model, and a threshold by hand.
    page.locator("#model input").click()
    page.get_by_role("option", name="image_adapter").click()
    wanted = models["image_adapter"].predict(images[0], "cork").score
    expect(result).to_contain_text(f"{wanted:.4f}")
    expect(result).not_to_contain_text("Attention")
    expect(result).to_contain_text("no decision")
    page.locator("#image_threshold input[type=number]").fill("0.001")
    page.locator("#image_threshold input[type=number]").press("Tab")
    expect(result.locator(".verdict")).to_have_text("anomalous")
    before = page.evaluate("getComputedStyle(document.querySelector('#result .heat')).opacity")
    page.locator("#opacity input[type=range]").fill("0.9")
    page.wait_for_function(
        "before => getComputedStyle(document.querySelector('#result .heat')).opacity !== before", arg=before
    )


def test_several_images_with_a_broken_one_and_a_download(page: Page, images: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(images[0].read_bytes()[:100])
    # Its regions have long numbers, which a phone must hold.
    large = tmp_path / ("large_" * 20 + ".png")
    read_image(images[-1]).resize((4000, 3000), Image.Resampling.NEAREST).save(large)
    drop(page, "images", [images[0], broken, large])
    expect(page.locator("#status")).to_contain_text("broken.png cannot be read as an image")
    expect(page.locator("#overview img")).to_have_count(2)
    shown = page.locator("#result .headline .name")
    first = shown.inner_text()
    page.locator("#overview img").nth(1).click()
    expect(shown).not_to_have_text(first)
    with page.expect_download() as download:
        page.locator("#save").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert "scores.csv" in archive.namelist()
        assert len(archive.namelist()) == 3


def test_twenty_quick_clicks(page: Page, images: list[Path]) -> None:
    drop(page, "images", images[:2])
    expect(page.locator("#overview img")).to_have_count(2)
    page.evaluate("for (let i = 0; i < 20; i++) document.querySelector('#look').click()")
    page.locator("#examples img").last.click()
    expect(page.locator("#result .headline .name")).to_contain_text("normal")


def test_references_and_thresholds_by_dropping_normal_images(
    page: Page, images: list[Path], normals: list[Path]
) -> None:
    page.locator("#class_name textarea, #class_name input").fill("cork")
    drop(page, "images", images[:1])
    result = page.locator("#result .seen")
    expect(result).to_contain_text("no decision")
    page.get_by_text("Find thresholds").first.click()
    drop(page, "normals", normals[:18])
    page.locator("#calibrate").click()
    expect(page.locator("#status")).to_contain_text("18 normal images are too few for 5 % false alarms")
    drop(page, "normals", normals[18:])
    expect(page.locator("#normals")).to_contain_text(normals[-1].stem)
    page.locator("#calibrate").click()
    expect(result).to_contain_text("Anomalous above")
    expect(result.locator(".verdict")).to_have_text(re.compile("^(anomalous|normal)$"))
    page.get_by_text("Compare with normal images").first.click()
    drop(page, "references", normals[:2])
    expect(page.locator("#references")).to_contain_text(normals[1].stem)
    page.locator("#compare").click()
    expect(result).to_contain_text("compared with 2 normal images")
