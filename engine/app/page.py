"""The page's layout, in Gradio, and what its controls do: all work is in `session.py` and `drawing.py`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from engine.app.drawing import result, said, thumbnails
from engine.app.dropped import ENDINGS, MOST_BYTES, MOST_IMAGES, MOST_NORMAL, MOST_PIXELS, MOST_REFERENCES, dropped
from engine.app.examples import Example
from engine.app.session import Progress, Session, Thresholds
from engine.detector.detector import Detector
from utils.errors import UserError

CSS = Path(__file__).with_name("page.css")
_FONTS = ["system-ui", "sans-serif"]
# Fonts that every machine has: others would be asked for elsewhere.
THEME = gr.themes.Default(font=_FONTS, font_mono=["ui-monospace", "monospace"], primary_hue="blue")
RATES = {"1 % (99 images or more)": 0.01, "5 % (19 or more)": 0.05, "10 % (9 or more)": 0.1, "20 % (4 or more)": 0.2}
OPACITY, THRESHOLD = 0.5, 0.5
# Seconds for which a visitor's images are kept, and after which dropped files are deleted.
KEPT = 6 * 3600
LIMITS = (
    f"Up to {MOST_IMAGES} images at once, each up to {MOST_BYTES // 2**20} MiB and {MOST_PIXELS // 10**6} megapixels. "
    "They stay on this machine, and are deleted when the page ends."
)
_SHOW_OPACITY = "value => { document.documentElement.style.setProperty('--heat', value); return []; }"
_DOWNLOAD = "() => document.querySelector('#zip a, a#zip, #zip')?.click()"


class _Page(gr.Blocks):
    """A page that takes no address from a browser: Gradio would fetch what is there."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *rest: Any, **named: Any) -> list[Any]:
        if _names_an_address(inputs):
            raise gr.Error("This page takes files, no addresses.")
        return await super().preprocess_data(block_fn, inputs, *rest, **named)


def _names_an_address(value: Any) -> bool:
    """Whether there is a file in what a browser sent that lies elsewhere."""
    if isinstance(value, dict):
        return "://" in str(value.get("path", "")) or any(map(_names_an_address, value.values()))
    return isinstance(value, list) and any(map(_names_an_address, value))


def build_page(
    models: Mapping[str, Detector], examples: Sequence[Example], folder: Path, domain: str = "industrial"
) -> gr.Blocks:
    """The page; `models` by what they are called on it, the last chosen first; folder: for files to download."""
    names = list(models)
    with _Page(title="Anomaly detection", analytics_enabled=False, delete_cache=(3600, KEPT)) as page:
        state = gr.State(None, time_to_live=KEPT)
        gr.Markdown("# Where is it anomalous?\nDrop images, say what they show, and see where a model finds defects.")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                files = _files("Images", "images")
                class_name = gr.Textbox(
                    label="What they show",
                    placeholder="object",
                    max_length=200,
                    elem_id="class_name",
                    info="In the words of the prompts, such as: metal screw",
                )
                model = gr.Dropdown(names, value=names[-1], label="Model", elem_id="model", filterable=False)
                look = gr.Button("Look", variant="primary", elem_id="look")
                gr.Markdown(LIMITS)
                with gr.Accordion("Compare with normal images", open=False, elem_id="references_of"):
                    gr.Markdown(
                        f"A few normal images, up to {MOST_REFERENCES}, of what is written above. Every image is then "
                        "compared with their patches as well as with words. Without images: no longer."
                    )
                    references = _files("Normal images to compare with", "references")
                    compare = gr.Button("Compare with these", elem_id="compare")
                with gr.Accordion("Find thresholds", open=False, elem_id="calibration_of"):
                    gr.Markdown(
                        f"Other normal images, up to {MOST_NORMAL}, of what is written above: from their scores "
                        "follows above which one an image is called anomalous, for the model that is chosen."
                    )
                    normals = _files("Normal images for thresholds", "normals")
                    rate = gr.Dropdown(
                        list(RATES),
                        value=list(RATES)[1],
                        label="Normal images that may be called anomalous",
                        filterable=False,
                    )
                    calibrate = gr.Button("Find thresholds", elem_id="calibrate")
            with gr.Column(scale=5, min_width=280):
                status = gr.HTML(said(["Nothing dropped yet: try one of the examples below."]), elem_id="status")
                overview = gr.Gallery(
                    visible=False,
                    show_label=False,
                    columns=4,
                    height="auto",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_id="overview",
                    object_fit="contain",
                )
                with gr.Row(visible=False) as controls:
                    image_threshold = _slider("Image threshold", THRESHOLD, "image_threshold")
                    pixel_threshold = _slider("Pixel threshold", THRESHOLD, "pixel_threshold")
                    opacity = _slider("Opacity", OPACITY, "opacity", 0.01)
                shown = gr.HTML(elem_id="result")
                save = gr.Button("Download all results", visible=False, elem_id="save", size="sm")
                # In the page, though not to be seen: the button above fills it and clicks on it.
                archive = gr.DownloadButton(visible="hidden", elem_id="zip")
                gr.Markdown("### Examples of the toy world")
                tried = gr.Gallery(
                    [(example.image.read(), example.caption) for example in examples],
                    show_label=False,
                    columns=8,
                    height="auto",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_id="examples",
                )
        results = [state, status, overview, controls, image_threshold, pixel_threshold, shown, save]

        def of(session: Session | None) -> Session:
            return session or Session(models, domain)

        def look_at(session: Session | None, chosen: str, name: str, progress: gr.Progress = _PROGRESS) -> list[Any]:
            session = of(session)
            return _shown(session, lambda: session.look(chosen, name, _steps(progress, "looking")))

        def take(session: Session | None, found: list[str] | None) -> Session:
            session = of(session)
            try:
                session.dropped = dropped(found, MOST_IMAGES)
            except UserError as error:
                session.dropped = ()
                raise gr.Error(str(error)) from error
            return session

        def try_example(session: Session | None, event: gr.SelectData) -> tuple[Session, str]:
            session, example = of(session), examples[_index(event, examples)]
            session.dropped = [example.image]
            return session, example.class_name

        def compare_with(
            session: Session | None, found: list[str] | None, chosen: str, name: str, progress: gr.Progress = _PROGRESS
        ) -> list[Any]:
            session = of(session)

            def work() -> None:
                session.compare_with(dropped(found, MOST_REFERENCES), chosen, name)
                session.look(chosen, name, _steps(progress, "looking"))

            return _shown(session, work)

        def find_thresholds(
            session: Session | None,
            found: list[str] | None,
            chosen: str,
            name: str,
            asked: str,
            progress: gr.Progress = _PROGRESS,
        ) -> list[Any]:
            session = of(session)

            def work() -> None:
                images = dropped(found, MOST_NORMAL)
                session.calibrate(images, chosen, name, RATES[asked], _steps(progress, "calibrating"))
                session.look(chosen, name, _steps(progress, "looking"))

            return _shown(session, work)

        def by_hand(session: Session | None, image: float, pixel: float) -> tuple[Session, Any, str]:
            session = of(session)
            session.by_hand = Thresholds(image, pixel)
            return session, thumbnails(session), _chosen(session)

        def choose(session: Session | None, event: gr.SelectData) -> tuple[Session, str]:
            session = of(session)
            session.chosen = _index(event, session.seen)
            return session, _chosen(session)

        def write_zip(session: Session | None, heat: float) -> str:
            place = Path(tempfile.mkdtemp(dir=folder)) / "results.zip"
            return str(of(session).write_zip(place, heat))

        # One at a time, for all visitors: the model takes all of the machine. Quick clicks become one.
        model_work = {"concurrency_id": "model", "concurrency_limit": 1, "trigger_mode": "always_last"}
        private = {"api_visibility": "private"}
        asked = [state, model, class_name]
        files.change(take, [state, files], state, **private).success(look_at, asked, results, **model_work, **private)
        gr.on([look.click, class_name.submit, model.input], look_at, asked, results, **model_work, **private)
        tried.select(try_example, state, [state, class_name], **private).success(
            look_at, asked, results, **model_work, **private
        )
        compare.click(compare_with, [state, references, model, class_name], results, **model_work, **private)
        calibrate.click(find_thresholds, [state, normals, model, class_name, rate], results, **model_work, **private)
        quiet = {"show_progress": "hidden", "trigger_mode": "always_last", **private}
        sliders = [image_threshold, pixel_threshold]
        gr.on([one.input for one in sliders], by_hand, [state, *sliders], [state, overview, shown], **quiet)
        overview.select(choose, state, [state, shown], **quiet)
        opacity.input(None, opacity, None, js=_SHOW_OPACITY, **private)
        save.click(write_zip, [state, opacity], archive, **private).success(None, None, None, js=_DOWNLOAD, **private)
    return page


_PROGRESS = gr.Progress()


def _files(label: str, name: str) -> gr.File:
    return gr.File(label=label, file_count="multiple", file_types=ENDINGS, type="filepath", elem_id=name, height=150)


def _slider(label: str, value: float, name: str, step: float = 0.001) -> gr.Slider:
    return gr.Slider(0, 1, value, step=step, label=label, elem_id=name, buttons=[], min_width=180)


def _steps(progress: gr.Progress, doing: str) -> Progress:
    return lambda done, total: progress((done, total), desc=doing, unit="images")


def _index(event: gr.SelectData, things: Sequence[Any]) -> int:
    """What was clicked on; the first where a browser says what cannot be."""
    return event.index if isinstance(event.index, int) and 0 <= event.index < len(things) else 0


def _chosen(session: Session) -> str:
    if not 0 <= session.chosen < len(session.seen):
        return ""
    return result(session.seen[session.chosen], session.by_hand)


def _shown(session: Session, work: Callable[[], None]) -> list[Any]:
    """Do the work, and give what the page shows afterwards: results, or the mistake in words beside the old ones."""
    mistakes = []
    try:
        work()
    except UserError as error:
        mistakes = [str(error)]
    seen = session.seen
    entry = seen[0].entry if seen else None
    several = len(seen) > 1
    lines = [f"{len(seen)} images, the most anomalous first: choose one."] if several else []
    if not seen and not session.problems and not mistakes:
        lines = ["Nothing dropped yet: drop images, or try one of the examples below."]
    values = (THRESHOLD, THRESHOLD) if entry is None else (entry.image_threshold, entry.pixel_threshold)
    return [
        session,
        said(lines, [*mistakes, *session.problems]),
        gr.Gallery(thumbnails(session) if several else None, visible=several, selected_index=0 if several else None),
        gr.Row(visible=bool(seen)),
        *(gr.Slider(value=round(value, 4)) if session.by_hand is None else gr.skip() for value in values),
        _chosen(session),
        gr.Button(visible=bool(seen)),
    ]
