"""`visualize_comparison.py`: its images, models and figures (in this process, with a tiny CLIP)."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from dataset.prompts import build_prompts
from dataset.records import Record
from engine import load_model
from engine.config.evaluation import VisualizationArguments
from engine.data.task import load_task
from engine.evaluation.image_heatmaps import predict_heatmap, read_dataset_image
from engine.evaluation.side_by_side import anomalous_records, list_images
from tests.evaluating import visualize_comparison
from tests.scripts import error_line, save, train_small_runs
from utils.errors import UserError
from utils.heatmaps import attention_range


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_small_runs(tmp_path_factory.mktemp("world"))


def draw(world: Path, folder: Path, image_idx: tuple[int | str, ...] = (0,), **runs: object) -> list[str]:
    """Names of the figures that were drawn of cork."""
    figures = visualize_comparison("cork", image_idx, world / "test", output_dir=folder, **runs)
    return [figure.name for figure in figures]


def test_one_figure_per_image_and_one_per_model(world: Path, tmp_path: Path) -> None:
    runs = {"base_path": world / "base", "feedback_path": world / "feedback", "attention": True}
    assert draw(world, tmp_path, (2, 0), **runs) == ["cork_002.png", "cork_000.png"]
    stacked = {f"cork_{index}_{model}.png" for index in ("000", "002") for model in ("base", "feedback_loop_2")}
    assert {path.name for path in tmp_path.iterdir()} == {"cork_000.png", "cork_002.png", *stacked}
    with Image.open(tmp_path / "cork_000.png") as with_attention:
        height = with_attention.height
    assert draw(world, tmp_path, base_path=world / "base") == ["cork_000.png"]
    with Image.open(tmp_path / "cork_000.png") as without:
        assert without.height < height / 2


def test_all_images_or_the_worst_by_score(world: Path, tmp_path: Path) -> None:
    assert draw(world, tmp_path, ("all",), base_path=world / "base") == [f"cork_00{index}.png" for index in range(3)]
    model = load_model(world / "base" / "image_adapter.pth", device="cpu")
    records = anomalous_records(load_task(str(world / "test")), "cork")
    scores = [model.predict(world / "test" / record.image_path, "cork").score for record in records]
    worst = [f"cork_{index:03d}.png" for index in np.argsort(scores)[:2]]
    assert draw(world, tmp_path, worst=2, base_path=world / "base") == worst


def test_indices_count_the_anomalous_images_in_metadata_order(world: Path) -> None:
    lines = list_images(VisualizationArguments(class_name="reed", dataset=str(world / "test")))
    assert [line.split() for line in lines] == [[str(n), f"reed/test/spot/{n:03d}.png"] for n in range(3)]


def test_attention_is_relative_to_uniform_attention(world: Path) -> None:
    data = load_task(str(world / "test"))
    record: Record = anomalous_records(data, "cork")[0]
    model = load_model(world / "feedback" / "loop_2_final.pth", device="cpu")
    picture = replace(read_dataset_image(data, record), mask=np.ones((40, 40), bool))
    seen = predict_heatmap(model, picture, "loop 2", attention=True)
    assert seen.auroc is None
    maps = seen.attention
    assert maps["Abnormal prompts look at"].shape == (5, 5)
    assert maps["Abnormal prompts look at"].mean() == pytest.approx(1, abs=1e-5)
    weights = model.predict(picture.image, picture.class_name, return_attention=True).attention
    # Short prompts are filled up; what fills them looks somewhere too, and means nothing.
    lengths = [len(model.clip.tokenize([prompt])[0]) for prompt in build_prompts("cork")[1]]
    real = torch.cat([weights.text[0, :, 6 + p, :n] for p, n in enumerate(lengths)], dim=1)  # (heads, words, N)
    expected = real.mean(dim=(0, 1)).reshape(5, 5) * 25
    np.testing.assert_allclose(maps["Abnormal prompts look at"], expected, rtol=1e-5)
    assert min(lengths) < max(lengths) == weights.text.shape[3]
    # A tiny fresh module attends almost evenly; by the number of prompts it would be 10 of 16, whatever their lengths.
    assert maps["Looks at abnormal words"].mean() == pytest.approx(1, abs=0.1)


def test_titles_tell_classes_and_kinds_apart(world: Path) -> None:
    data = load_task(str(world / "test"))
    picture = read_dataset_image(data, anomalous_records(data, "cork")[0])
    assert picture.title == "cork, spot"
    # Several classes may share a name in prompts, and medical folders are called the same on both sides.
    pcb = replace(picture.record, class_name="pcb_1", image_path="test/Ungood/img/1.png")
    assert replace(picture, record=pcb, class_name="printed circuit board").title == "pcb 1, img"
    assert replace(picture, record=pcb, domain="medical").title == "pcb 1, anomalous"
    assert replace(picture, record=replace(pcb, label=0), domain="medical").title == "pcb 1, normal"


def test_a_mask_of_another_size_is_an_error(world: Path) -> None:
    data = load_task(str(world / "test"))
    record = anomalous_records(data, "cork")[1]
    smaller = replace(record, mask_path="smaller.png")
    save(world / "test" / "smaller.png", np.zeros((20, 20)))
    with pytest.raises(UserError, match="resize the mask to the size of the image"):
        read_dataset_image(data, smaller)


def test_the_caption_contains_score_and_pixel_auroc(world: Path) -> None:
    data = load_task(str(world / "test"))
    picture = read_dataset_image(data, anomalous_records(data, "cork")[0])
    model = load_model(world / "base" / "image_adapter.pth", device="cpu")
    found = predict_heatmap(model, picture, "base")
    prediction = model.predict(picture.image, "cork")
    auroc = 100 * roc_auc_score(picture.mask.ravel(), prediction.anomaly_map.ravel())
    score, of_pixels = re.fullmatch(r"score (\d\.\d\d), AUROC (\d+\.\d)", found.caption).groups()
    assert (float(score), float(of_pixels)) == (
        pytest.approx(prediction.score, abs=0.0051),
        pytest.approx(auroc, abs=0.051),
    )


def test_listing_an_unknown_class_is_an_error(world: Path) -> None:
    arguments = ["--class_name", "nail", "--dataset", world / "test", "--list_images"]
    assert "no such class; it has cork, reed" in error_line("visualize_comparison.py", *arguments)


def test_a_class_name_cannot_leave_the_folder(world: Path, tmp_path: Path) -> None:
    rows = [
        {"image_path": f"cork/test/{kind}/000.png", "label": int(kind == "spot"), "class_name": "../../evil"}
        | ({"mask_path": "cork/ground_truth/spot/000_mask.png"} if kind == "spot" else {})
        for kind in ("spot", "good")
    ]
    file = tmp_path / "list.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    folder = tmp_path / "a" / "b" / "out"
    (figure,) = visualize_comparison(
        "../../evil", (0,), world / "test", metadata=file, base_path=world / "base", output_dir=folder
    )
    assert figure.parent == folder and len(list(folder.iterdir())) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"list.jsonl", "a"}


def test_small_differences_of_attention_do_not_fill_the_colour_range() -> None:
    assert attention_range([np.array([0.98, 1.0]), np.array([1.02])]) == (0.5, 1.5)
    assert attention_range([np.array([0.9, 3.0])]) == (-1.0, 3.0)
