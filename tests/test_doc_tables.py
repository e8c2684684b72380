"""Tables in the documentation follow from the files of studies, and their gains from the seeds."""

import csv
import statistics
from collections import defaultdict
from pathlib import Path

import pytest

from benchmarks.doc_tables import DOCS, seed_means, updated
from tests.documented import pages, read_page
from utils.errors import UserError

VERDICTS = """compared_with,setting,arm,metric,seeds,gain,low,high,p,p_holm,verdict
base,,other,pixel_ap,6,6.33,1.5,9.004,0.03,0.03,better
base,,one seed,pixel_ap,1,-0.2,,,,,not decided
other,,base,pixel_ap,6,-6.33,-9,-1,0.03,0.03,worse
"""


@pytest.mark.parametrize("page", pages())
def test_tables_equal_the_studies_results(page: str) -> None:
    text = read_page(page)
    assert updated(text, DOCS / "results") == text


@pytest.mark.parametrize("file", sorted((DOCS / "results").glob("*_verdicts.csv")), ids=lambda file: file.stem)
def test_gains_are_computed_from_the_seeds(file: Path) -> None:
    """Gains were computed before the values of the seeds were rounded."""
    values: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    with file.with_name(file.name.replace("_verdicts", "")).open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            for metric, value in list(row.items())[5:]:
                pair = f"{row['seed']} {row['train']} {row['test']}"
                values[row["arm"]][metric][pair] = float(value)
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            arm, base = (values[row[name]][row["metric"]] for name in ("arm", "compared_with"))
            differences = [arm[pair] - base[pair] for pair in arm.keys() & base.keys()]
            assert not row["gain"] or float(row["gain"]) == pytest.approx(statistics.mean(differences), abs=0.006), row


def test_a_table_contains_the_named_arms_and_metrics(tmp_path: Path) -> None:
    (tmp_path / "mine_verdicts.csv").write_text(VERDICTS, encoding="utf-8")
    page = "Text.\n\n<!-- study: mine, compared with base: pixel_ap -->\n| old |\n| --- |\n\nMore.\n"
    table = "| Arm | Pixel AP |\n| --- | ---: |\n| other | +6.33 (+1.50 to +9.00) |\n| one seed | -0.20 |\n\nMore.\n"
    assert updated(page, tmp_path) == f"{page.partition('| old')[0]}{table}"
    chosen = "<!-- study: mine, compared with base: pixel_ap; arms: one seed -->\n"
    assert updated(chosen, tmp_path) == f"{chosen}| Arm | Pixel AP |\n| --- | ---: |\n| one seed | -0.20 |\n"
    for block in (
        "yours, compared with base: pixel_ap",
        "mine, compared with x: pixel_ap",
        "mine, compared with base: x",
        "mine, compared with base: pixel_ap; arms: x",
    ):
        with pytest.raises(UserError, match="no gains over"):
            updated(f"<!-- study: {block} -->\n", tmp_path)


def test_seeds_have_means_over_classes(tmp_path: Path) -> None:
    lines = ["setting,arm,seed,train,test,class,pixel_auroc", ",a,0,x,y,nut,80", ",a,0,x,y,cup,90", ",a,1,x,y,nut,70"]
    (tmp_path / "study.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    expected = ["setting,arm,seed,train,test,pixel_auroc", ",a,0,x,y,85.000", ",a,1,x,y,70.000"]
    assert seed_means(tmp_path / "study.csv").splitlines() == expected
