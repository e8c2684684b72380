"""`notebooks/explore_checkpoint.ipynb`: committed with its pictures, and it runs from top to bottom on another run.

`python -m tests.test_notebook` draws the committed pictures anew, after `python run.py demo`.
"""

import base64
import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from PIL import Image

from engine.cli.demo import CONFIG, TEST_DATASET, feedback_from
from engine.training.feedback import train_feedback
from tests.helpers import draw_few
from tests.scripts import ROOT, environment

NOTEBOOK = ROOT / "notebooks" / "explore_checkpoint.ipynb"
# What `python run.py demo` shows in it; every picture has text before it.
PICTURES = {"heatmap", "levels", "attention-maps", "prompt-bars", "history-curves"}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(work|tmp|root|home|Users|mnt|opt|usr|var)\b|\b[A-Z]:\\\\")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small toy_test in `data`, and in `run` one loop of feedback from scratch on some of it."""
    folder = tmp_path_factory.mktemp("world")
    base = replace(
        CONFIG,
        dataset=TEST_DATASET,
        training_mode="few_shot",
        shot=2,
        device="cpu",
        num_workers=0,
        tracker="none",
        data_root=folder / "data",
        save_path=folder / "base",
    )
    loops = {"num_feedback_loops": 1, "text_epochs_per_loop": (1,), "image_epochs_per_loop": (1,)}
    scratch = {"load_base_text_adapter": None, "load_base_image_adapter": None}
    with pytest.MonkeyPatch.context() as patch:
        draw_few(patch)
        train_feedback(feedback_from(base, **loops, **scratch, save_path=folder / "run"))
    return folder


@pytest.fixture(autouse=True)
def own_jupyter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent of the user's IPython profile and running kernels."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))


def execute(notebook: NotebookNode, cwd: Path) -> NotebookNode:
    """Run a notebook in a kernel that starts in `cwd`, without recording time or place."""
    resources = {"metadata": {"path": str(cwd)}}
    client = NotebookClient(notebook, kernel_name="python3", timeout=300, record_timing=False, resources=resources)
    client.execute(env=environment())
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def execute_with(cwd: Path, **parameters: str | int) -> NotebookNode:
    """Run the notebook with values for its parameters set in a cell after theirs, as papermill does."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = next(index for index, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    values = [
        f"{name} = Path({value!r})" if name in ("RUN", "DATA_ROOT") else f"{name} = {value!r}"
        for name, value in parameters.items()
    ]
    # A kernel of another environment would test that one.
    own = f"assert sys.prefix == {sys.prefix!r}, sys.prefix"
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell("\n".join([own, *values])))
    return execute(notebook, cwd)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook: NotebookNode) -> dict[str, Image.Image]:
    """The picture of each cell that has one, by the cell's id."""
    found = {}
    for cell in code_cells(notebook):
        encoded = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
        assert len(encoded) <= 1, cell.id
        for data in encoded:
            found[cell.id] = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    return found


def check_pictures(notebook: NotebookNode) -> None:
    """Every cell that draws has its picture, which is large enough to read and not blank."""
    found = pictures(notebook)
    assert set(found) == {cell.id for cell in code_cells(notebook) if "plt.subplots(" in cell.source} == PICTURES
    for name, picture in found.items():
        assert picture.width > 700 and picture.height > 200, name
        assert np.asarray(picture).std() > 10, name


@pytest.fixture(scope="module")
def committed() -> NotebookNode:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_the_committed_notebook_has_outputs_in_order(committed: NotebookNode) -> None:
    """Without tracebacks, printed lines, and paths of the machine that ran it."""
    check_pictures(committed)
    cells = code_cells(committed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"display_data", "execute_result"}
    assert committed.metadata == METADATA
    texts = [str(output.data.get("text/plain", "")) for output in outputs]
    assert not any(ABSOLUTE_PATH.search(text) for text in [*texts, *(cell.source for cell in committed.cells)])
    assert NOTEBOOK.stat().st_size < 1_500_000


def test_the_notebook_runs_in_its_folder_on_another_run(world: Path) -> None:
    run, data = str(world / "run"), str(world / "data")
    notebook = execute_with(NOTEBOOK.parent, RUN=run, DATA_ROOT=data, DATASET=TEST_DATASET, CLASS="coin", INDEX=3)
    check_pictures(notebook)
    verdicts = next(cell for cell in code_cells(notebook) if cell.id == "history").outputs[0].data["text/plain"]
    assert len(verdicts.splitlines()) == 4
    # Another run and image than the committed one's, so the values that were set have counted.
    before = pictures(nbformat.read(NOTEBOOK, as_version=4))
    assert all(picture != before.get(name) for name, picture in pictures(notebook).items())


def test_a_missing_checkpoint_is_an_error_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(CellExecutionError) as caught:
        execute_with(ROOT, RUN=str(tmp_path / "missing"), DATA_ROOT=str(tmp_path))
    assert caught.value.ename == "UserError"
    assert "`python run.py demo`" in caught.value.evalue
    assert "\n" not in caught.value.evalue


if __name__ == "__main__":
    nbformat.write(execute(nbformat.read(NOTEBOOK, as_version=4), NOTEBOOK.parent), NOTEBOOK)
