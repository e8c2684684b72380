"""The page in Gradio: layout and events. `session.py` does the work, `drawing.py` makes the HTML."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from engine.app.drawing import messages_html, result_html, thumbnails
from engine.app.examples import Example
from engine.app.session import Session
from engine.app.uploads import ENDINGS, MAX_BYTES, MAX_IMAGES, MAX_NORMAL, MAX_PIXELS, MAX_REFERENCES, make_uploads
from engine.detector.detector import Detector
from model.config import MOST_TILES, TILES
from model.graph import Thresholds
from utils.errors import UserError

CSS = Path(__file__).with_name("page.css")
_FONTS = ["system-ui", "sans-serif"]
# Installed fonts: others would be loaded from the network.
THEME = gr.themes.Default(font=_FONTS, font_mono=["ui-monospace", "monospace"], primary_hue="blue")
RATES = {"1 % (99 images or more)": 0.01, "5 % (19 or more)": 0.05, "10 % (9 or more)": 0.1, "20 % (4 or more)": 0.2}
OPACITY, THRESHOLD = 0.5, 0.5
# Seconds after which a visitor's state and uploads are deleted.
EXPIRY = 6 * 3600
LIMITS = (
    f"Up to {MAX_IMAGES} images at once, each up to {MAX_BYTES // 2**20} MiB and {MAX_PIXELS // 10**6} megapixels. "
    "They stay on this machine and are deleted when the server stops."
)
NO_IMAGES = "No images yet: upload some, or try one of the examples below."
_SHOW_OPACITY = "value => { document.documentElement.style.setProperty('--heat', value); return []; }"
_DOWNLOAD = "() => document.querySelector('#zip a, a#zip, #zip')?.click()"
_PROGRESS = gr.Progress()
# Arguments of all events, of those that run a model, and of quick ones. A model uses the whole machine, so only one
# runs at a time, for all visitors; repeated clicks are merged.
_PRIVATE: dict[str, Any] = {"api_visibility": "private"}
_MODEL: dict[str, Any] = {**_PRIVATE, "concurrency_id": "model", "concurrency_limit": 1, "trigger_mode": "always_last"}
_QUICK: dict[str, Any] = {**_PRIVATE, "show_progress": "hidden", "trigger_mode": "always_last"}
_GALLERY: dict[str, Any] = {
    "show_label": False,
    "height": "auto",
    "allow_preview": False,
    "interactive": False,
    "buttons": [],
}


class _Page(gr.Blocks):
    """A page that rejects URLs from the browser, because Gradio would download them."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        if _contains_url(inputs):
            raise gr.Error("This page accepts files, not URLs.")
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)


def _contains_url(value: Any) -> bool:
    if isinstance(value, dict):
        return "://" in str(value.get("path", "")) or any(map(_contains_url, value.values()))
    return isinstance(value, list) and any(map(_contains_url, value))


def build_page(
    models: Mapping[str, Detector], examples: Sequence[Example], folder: Path, domain: str = "industrial"
) -> gr.Blocks:
    """Build the page.

    Args:
        models: The models by their names on the page; the last one is selected.
        examples: Images to try.
        folder: Folder for downloads.
        domain: How images are scored.
    """
    with _Page(title="Anomaly detection", analytics_enabled=False, delete_cache=(3600, EXPIRY)) as page:
        detector = next(iter(models.values()))
        _Layout(list(models), examples, detector.clip.limits, detector.tiles).connect(
            _Handlers(models, examples, folder, domain)
        )
    return page


class _Layout:
    """The components of the page."""

    def __init__(self, names: list[str], examples: Sequence[Example], limits: str | None, tiles: str) -> None:
        self.state = gr.State(None, time_to_live=EXPIRY)
        gr.Markdown("# Anomaly detection\nUpload images and name what they show; the model marks anomalous regions.")
        if limits:
            gr.Markdown(f"**{limits}.**")
        with gr.Row(elem_id="layout"):
            with gr.Column(elem_id="inputs"):
                self._add_inputs(names, tiles)
            with gr.Column(elem_id="outputs"):
                self._add_outputs(examples)
            with gr.Column(elem_id="panels"):
                self._add_panels()

    def _add_inputs(self, names: list[str], tiles: str) -> None:
        self.files = _files("Images", "images")
        self.class_name = gr.Textbox(
            label="Class name",
            placeholder="object",
            max_length=200,
            elem_id="class_name",
            info="What the images show, for example: metal screw",
        )
        self.model = gr.Dropdown(names, value=names[-1], label="Model", elem_id="model", filterable=False)
        self.tiles = gr.Dropdown(
            [*TILES, *map(str, range(1, MOST_TILES + 1))],
            value=tiles,
            label="Tiles",
            elem_id="tiles",
            filterable=False,
            info="For small defects in large images: slower",
        )
        self.analyze = gr.Button("Analyze", variant="primary", elem_id="analyze")
        gr.Markdown(LIMITS)

    def _add_panels(self) -> None:
        with gr.Accordion("Compare with normal images", open=False):
            gr.Markdown(
                f"Up to {MAX_REFERENCES} normal images of this class. All images are then also compared with their "
                "patches. Remove them to stop comparing."
            )
            self.references = _files("Normal images to compare with", "references")
        with gr.Accordion("Find thresholds", open=False):
            gr.Markdown(
                f"Up to {MAX_NORMAL} other normal images of this class. Their scores set the threshold above which an "
                "image is anomalous, for the selected model."
            )
            self.normals = _files("Normal images for thresholds", "normals")
            self.rate = gr.Dropdown(list(RATES), value=list(RATES)[1], label="Accepted false alarms", filterable=False)
            self.calibrate = gr.Button("Find thresholds", elem_id="calibrate")

    def _add_outputs(self, examples: Sequence[Example]) -> None:
        self.messages = gr.HTML(messages_html([NO_IMAGES]), elem_id="messages")
        self.overview = gr.Gallery(visible=False, columns=4, elem_id="overview", object_fit="contain", **_GALLERY)
        with gr.Row(visible=False) as self.controls:
            self.thresholds = [_slider(f"{name} threshold", THRESHOLD) for name in ("Image", "Pixel")]
            self.opacity = _slider("Opacity", OPACITY, 0.01)
        self.result = gr.HTML(elem_id="result")
        self.save = gr.Button("Download all results", visible=False, elem_id="save", size="sm")
        # Hidden: the button above fills it and clicks on it.
        self.archive = gr.DownloadButton(visible="hidden", elem_id="zip")
        # The HTTP interface: an event of the page, so that Gradio checks the files that it gets.
        self.request, self.answer = gr.Button(visible=False, elem_id="request"), gr.JSON(visible=False)
        gr.Markdown("### Examples of the toy dataset")
        pictures = [(example.image.read(), example.caption) for example in examples]
        self.examples = gr.Gallery(pictures, columns=8, elem_id="examples", **_GALLERY)

    def connect(self, handlers: _Handlers) -> None:
        """Connect the events of the components to their handlers."""
        state, images = self.state, [self.state, *self.thresholds]
        request: list[Any] = [state, self.model, self.class_name, self.tiles, self.references]
        results = [state, self.messages, self.overview, self.controls, *self.thresholds, self.result, self.save]
        analysis: dict[str, Any] = {"fn": handlers.analyze, "inputs": request, "outputs": results, **_MODEL}
        self.files.change(handlers.upload, [state, self.files], state, **_PRIVATE).success(**analysis)
        changes = [self.analyze.click, self.class_name.submit, self.model.input, self.tiles.input]
        gr.on([*changes, self.references.change], **analysis)
        public = {**_MODEL, "api_visibility": "public", "api_name": "predict", "trigger_mode": "multiple"}
        inputs = [self.files, self.class_name, self.model, self.tiles]
        self.request.click(handlers.predict, inputs, self.answer, **public)
        self.examples.select(handlers.try_example, state, [state, self.class_name], **_PRIVATE).success(**analysis)
        self.calibrate.click(handlers.analyze, [*request, self.normals, self.rate], results, **_MODEL)
        sliders = [slider.input for slider in self.thresholds]
        gr.on(sliders, handlers.set_thresholds, images, [state, self.overview, self.result], **_QUICK)
        self.overview.select(handlers.select, state, [state, self.result], **_QUICK)
        self.opacity.input(None, self.opacity, None, js=_SHOW_OPACITY, **_PRIVATE)
        download = self.save.click(handlers.write_zip, [state, self.opacity], self.archive, **_PRIVATE)
        download.success(None, None, None, js=_DOWNLOAD, **_PRIVATE)


class _Handlers:
    """The handlers of the events. Each takes the visitor's session, which is None at first."""

    def __init__(self, models: Mapping[str, Detector], examples: Sequence[Example], folder: Path, domain: str) -> None:
        self.models, self.examples, self.folder, self.domain = models, examples, folder, domain

    def _session(self, session: Session | None) -> Session:
        return session or Session(self.models, self.domain)

    def upload(self, session: Session | None, files: list[str] | None) -> Session:
        session = self._session(session)
        session.uploads = ()
        try:
            session.uploads = make_uploads(files, MAX_IMAGES)
        except UserError as error:
            raise gr.Error(str(error)) from error
        return session

    def try_example(self, session: Session | None, event: gr.SelectData) -> tuple[Session, str]:
        session, example = self._session(session), self.examples[_index(event, self.examples)]
        session.uploads = [example.image]
        return session, example.class_name

    def analyze(
        self,
        session: Session | None,
        model: str,
        name: str,
        tiles: str,
        references: list[str] | None,
        normals: list[str] | None = None,
        rate: str | None = None,
        progress: gr.Progress = _PROGRESS,
    ) -> list[Any]:
        """Analyze the uploads; with a rate of false alarms, find the thresholds on normal images first."""
        session = self._session(session)
        session.tiles = tiles

        def report(done: int, total: int) -> None:
            progress((done, total), unit="images")

        problems = []
        try:
            session.compare_with(make_uploads(references, MAX_REFERENCES), model, name)
            if rate is not None:
                session.calibrate(make_uploads(normals, MAX_NORMAL), model, name, RATES[rate], report)
            session.analyze(model, name, report)
        except UserError as error:
            problems = [str(error)]
        return _results(session, [*problems, *session.problems])

    def predict(self, images: list[str] | None, class_name: str, model: str, tiles: str) -> dict[str, Any]:
        """The result of each image, the most anomalous first, with decisions by the checkpoint's thresholds."""
        try:
            session = Session(self.models, self.domain, make_uploads(images, MAX_IMAGES), tiles=tiles)
            session.analyze(model, class_name)
        except UserError as error:
            raise gr.Error(str(error)) from error
        results = [{"name": result.name, **result.prediction.to_dict()} for result in session.results]
        return {"results": results, "problems": session.problems}

    def set_thresholds(self, session: Session | None, image: float, pixel: float) -> tuple[Session, Any, str]:
        session = self._session(session)
        session.manual = Thresholds(image, pixel)
        return session, thumbnails(session), _selected(session)

    def select(self, session: Session | None, event: gr.SelectData) -> tuple[Session, str]:
        session = self._session(session)
        session.selected = _index(event, session.results)
        return session, _selected(session)

    def write_zip(self, session: Session | None, opacity: float) -> str:
        path = Path(tempfile.mkdtemp(dir=self.folder)) / "results.zip"
        self._session(session).write_zip(path, opacity)
        return str(path)


def _files(label: str, name: str) -> gr.File:
    return gr.File(label=label, file_count="multiple", file_types=ENDINGS, type="filepath", elem_id=name, height=150)


def _slider(label: str, value: float, step: float = 0.001) -> gr.Slider:
    name = label.lower().replace(" ", "_")
    return gr.Slider(0, 1, value, step=step, label=label, elem_id=name, buttons=[], min_width=180)


def _index(event: gr.SelectData, items: Sequence[Any]) -> int:
    """The index of the selected item; the first one if a browser sends an invalid index."""
    return event.index if isinstance(event.index, int) and 0 <= event.index < len(items) else 0


def _selected(session: Session) -> str:
    if not 0 <= session.selected < len(session.results):
        return ""
    return result_html(session.results[session.selected], session.manual)


def _results(session: Session, problems: Sequence[str]) -> list[Any]:
    """What the page shows after an analysis: the results, or the previous ones with an error."""
    results = session.results
    several = len(results) > 1
    lines = [f"{len(results)} images, the most anomalous first: select one."] if several else []
    if not results and not problems:
        lines = [NO_IMAGES]
    entry = results[0].entry if results else None
    values = (THRESHOLD, THRESHOLD) if entry is None else (entry.image_threshold, entry.pixel_threshold)
    return [
        session,
        messages_html(lines, problems),
        gr.Gallery(thumbnails(session) if several else None, visible=several, selected_index=0 if several else None),
        gr.Row(visible=bool(results)),
        *(gr.Slider(value=round(value, 4)) if session.manual is None else gr.skip() for value in values),
        _selected(session),
        gr.Button(visible=bool(results)),
    ]
