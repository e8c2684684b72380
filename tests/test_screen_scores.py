"""The screening of image scores: what is computed, and the table in the documentation."""

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import screen_scores
from model.scoring import Outputs
from tests.documented import ROOT, read_page

RESULTS = ROOT / "docs" / "results" / "screening.csv"


def test_the_published_table_follows_from_the_results() -> None:
    with RESULTS.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert screen_scores.table(rows, range(5)) in read_page("docs/results.md")


def test_scores_are_those_of_one_image() -> None:
    torch.manual_seed(0)
    levels = [torch.randn(3, 16, 2) for _ in range(2)]
    outputs = Outputs(levels, torch.tensor([[0.1, 0.3], [0.2, -0.4], [0.0, 0.9]]))
    token, own = torch.tensor([0.2, 0.4, 0.6]), torch.tensor([0.1, 0.5, 0.9])
    scores = screen_scores.candidates(outputs, token, own, 40)
    peak, det = scores["maximum"], torch.tensor([0.65, 0.3, 0.95])
    torch.testing.assert_close(scores["half maximum, half det (default)"], 0.5 * peak + 0.5 * det)
    torch.testing.assert_close(scores["half maximum, half CLIP's class token"], 0.5 * peak + 0.5 * token)
    assert (scores["mean of the top 0.1 %"] <= peak).all() and (scores["CLIP's class token and anchors"] == own).all()
    # A lower logit scale brings p closer to 0.5.
    softer = scores["maximum, a quarter of the logit scale"]
    assert ((softer - 0.5).abs() < (peak - 0.5).abs()).all() and (softer > 0.5).all()
    alone = [screen_scores.candidates(Outputs([x[:1] for x in levels], outputs.det[:1]), token[:1], own[:1], 40)]
    for name, values in alone[0].items():
        torch.testing.assert_close(values, scores[name][:1])


def test_ties_are_counted_within_a_class() -> None:
    classes, labels = ["a", "a", "a", "b", "b"], [False, True, True, False, True]
    auroc, tied = screen_scores.summary(classes, labels, [0.1, 0.1, 0.9, 0.1, 0.0])
    assert auroc == pytest.approx(100 * (0.75 + 0) / 2) and tied == 40


def test_seeds_and_pairs_have_columns(tmp_path: Path) -> None:
    keys = {"score": "maximum", "train": "x", "test": "y", "saturated_tied": "10"}
    rows = [{**keys, "seed": str(seed), "image_auroc": str(value)} for seed, value in ((0, 80), (50, 90), (51, 92))]
    rows.append({**keys, "train": "y", "test": "x", "seed": "50", "image_auroc": "70"})
    assert screen_scores.table(rows, range(5)).splitlines()[2] == "| maximum | 80.00 | 91.00 | 70.00 | 10.0 |"
