"""Tables of the documentation follow from what studies wrote, and those from the seeds."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from pathlib import Path

import pytest

from benchmarks.doc_tables import DOCS, KEYS, made_anew, means_of_seeds, table_under
from engine.study.results import readable
from tests.documented import pages, read_page
from utils.errors import UserError

STUDY = """# A study

## Means

In percent.

| Arm | Seeds | Pixel AUROC | Image AUROC |
| --- | ---: | ---: | ---: |
| base | 2 | 62.81 ± 2.74 | 58.90 ± 6.02 |

## Gains

| Arm | Pixel AUROC |
| --- | ---: |
| other | +6.33 |
"""


@pytest.mark.parametrize("page", pages())
def test_tables_in_the_pages_are_those_of_the_studies(page: str) -> None:
    text = read_page(page)
    assert made_anew(text, DOCS / "results") == text


@pytest.mark.parametrize("file", sorted((DOCS / "results").glob("*.md")), ids=lambda file: file.stem)
def test_means_follow_from_the_seeds(file: Path) -> None:
    """Those shown were taken before the seeds' figures were rounded."""
    figures: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with file.with_name(f"{file.stem.partition('_against_')[0]}.csv").open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            for metric in row.keys() - set(KEYS):
                figures[row["arm"], readable(metric)][row["seed"]].append(float(row[metric]))
    header, *rows = table_under("Means", file.read_text(encoding="utf-8"))
    for arm, _, *cells in rows:
        for title, cell in zip(header[2:], cells, strict=True):
            seeds = [statistics.mean(pairs) for pairs in figures[arm, title].values()]
            mean, _, spread = cell.partition(" ± ")
            assert float(mean) == pytest.approx(statistics.mean(seeds), abs=0.006), (arm, title)
            assert not spread or float(spread) == pytest.approx(statistics.stdev(seeds), abs=0.006), (arm, title)


def test_tables_are_taken_by_heading_and_column(tmp_path: Path) -> None:
    (tmp_path / "mine.md").write_text(STUDY, encoding="utf-8")
    before = (
        "Text.\n\n<!-- study: mine, Means: Image AUROC -->\n| old |\n| --- |\n\nMore.\n<!-- study: mine, Gains -->\n"
    )
    after = made_anew(before, tmp_path)
    assert "| Arm | Image AUROC |\n| --- | ---: |\n| base | 58.90 ± 6.02 |\n\nMore." in after
    assert after.endswith("| Arm | Pixel AUROC |\n| --- | ---: |\n| other | +6.33 |\n")
    assert made_anew(after, tmp_path) == after


@pytest.mark.parametrize("block", ["yours, Means", "mine, Losses", "mine, Means: Pixel AP"])
def test_what_a_study_does_not_hold_is_an_error(tmp_path: Path, block: str) -> None:
    (tmp_path / "mine.md").write_text(STUDY, encoding="utf-8")
    with pytest.raises(UserError):
        made_anew(f"<!-- study: {block} -->\n", tmp_path)


def test_seeds_have_means_over_classes(tmp_path: Path) -> None:
    lines = ["setting,arm,seed,train,test,class,pixel_auroc", ",a,0,x,y,nut,80", ",a,0,x,y,cup,90", ",a,1,x,y,nut,70"]
    (tmp_path / "study.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    expected = ["setting,arm,seed,train,test,pixel_auroc", ",a,0,x,y,85.000", ",a,1,x,y,70.000"]
    assert means_of_seeds(tmp_path / "study.csv").splitlines() == expected
