"""Tables in the documentation that show the gains of a study, or the catalog of datasets.

    python -m benchmarks.doc_tables [FOLDER ...]

reads finished studies (`runs/studies/NAME`) and writes two files each to `docs/results`: `NAME.csv`, every seed's means
over classes, and `NAME_verdicts.csv`, the comparisons of arms. Then it updates every table that follows a line such as

    <!-- study: confirmation, compared with base continued: pixel_ap, image_auroc; arms: joint; feedback -->

(the study, the arm that the others are compared with, the metrics; optionally the arms, otherwise all), or a line
`<!-- catalog: NAME -->` with one of `CATALOG_TABLES`.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from dataset.catalog import CATALOG, GROUPS
from dataset.layouts import LAYOUTS
from engine.study.report import gain_cell
from engine.study.results import metric_title
from utils.errors import UserError
from utils.files import write_text
from utils.reading import read_table
from utils.text import csv_table, list_names, markdown_table

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(
    r"(?P<mark><!-- study: (?P<study>\w+), compared with (?P<arm>[^:>]+): (?P<metrics>[\w, ]+)"
    r"(; arms: (?P<arms>[^>]+))? -->)\n(\|.*\n)*"
)
CATALOG_BLOCK = re.compile(r"(?P<mark><!-- catalog: (?P<table>\w+) -->)\n(\|.*\n)*")
CATALOG_TABLES = {
    "datasets": [
        "name",
        "domain",
        "classes",
        "test images (normal + anomalous)",
        "metrics",
        "licence",
        "source",
        "folder",
    ],
    "notes": ["name", "names in prompts", "what papers compare, and pitfalls"],
    "layouts": ["datasets", "files"],
}
KEYS = ("setting", "arm", "seed", "train", "test")


def seed_means(study_csv: Path) -> str:
    """The metrics of a study as CSV: a row for each arm, seed and pair of datasets, the means over classes."""
    rows = defaultdict(list)
    metrics: list[str] = []
    for _, row in read_table(study_csv):
        metrics = [name for name in row if name not in (*KEYS, "class")]
        rows[tuple(row[key] for key in KEYS)].append([float(row[name]) for name in metrics])
    means = ((*key, *(f"{sum(c) / len(c):.3f}" for c in zip(*values, strict=True))) for key, values in rows.items())
    return csv_table([[*KEYS, *metrics], *means])


def gains_table(verdicts_csv: Path, compared_with: str, metrics: Sequence[str], names: Sequence[str] = ()) -> str:
    """A Markdown table of gains over one arm, of all or the named arms, with intervals, from a study's verdicts."""
    arms: dict[str, dict[str, str]] = defaultdict(dict)
    for _, row in read_table(verdicts_csv) if verdicts_csv.is_file() else ():
        if row["compared_with"] == compared_with:
            numbers = (float(row[name] or "nan") for name in ("gain", "low", "high"))
            arms[row["arm"]][row["metric"]] = gain_cell(*numbers)
    missing = {*metrics} - set().union(*arms.values()) | {*names} - {*arms}
    if missing:
        raise UserError(f"{verdicts_csv}: no gains over {compared_with!r} in {', '.join(sorted(missing))}")
    rows = [[arm, *map(arms[arm].__getitem__, metrics)] for arm in names or arms]
    return markdown_table(["Arm", *map(metric_title, metrics)], rows)


def catalog_table(table: str) -> str:
    """One of `CATALOG_TABLES`, in Markdown."""
    rows = []
    specs = [CATALOG[name] for name in GROUPS["all"]]
    for spec in specs if table != "layouts" else ():
        size = "counted" if spec.size is None else " + ".join(map(str, spec.size))
        folders = ", ".join(f"`{folder}`" for folder in (spec.folder, *spec.folders))
        prompts = list_names(list(dict.fromkeys(spec.class_names.values())), 4)
        facts = [spec.domain, str(len(spec.class_names)), size, spec.metrics, spec.licence, spec.source, folders]
        rows.append([f"`{spec.name}`", *([prompts, spec.notes] if table == "notes" else facts)])
    for key, layout in LAYOUTS.items() if table == "layouts" else ():
        rows.append([", ".join(spec.name for spec in specs if key in spec.layouts), f"`{layout.expected}`"])
    return markdown_table(CATALOG_TABLES[table], rows, "---")


def updated(page: str, results: Path) -> str:
    """The text of a page, with its tables made from the studies in `results`."""

    def fill(match: re.Match[str]) -> str:
        file = results / f"{match['study']}_verdicts.csv"
        names = match["arms"].split("; ") if match["arms"] else ()
        return f"{match['mark']}\n{gains_table(file, match['arm'], match['metrics'].split(', '), names)}\n"

    page = CATALOG_BLOCK.sub(lambda match: f"{match['mark']}\n{catalog_table(match['table'])}\n", page)
    return BLOCK.sub(fill, page)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER", help="folders of finished studies")
    for folder in parser.parse_args(arguments).folders:
        verdicts = (folder / "study_verdicts.csv").read_text(encoding="utf-8")
        write_text(DOCS / "results" / f"{folder.name}.csv", seed_means(folder / "study.csv"))
        write_text(DOCS / "results" / f"{folder.name}_verdicts.csv", verdicts)
    for file in sorted([DOCS.parent / "README.md", *DOCS.glob("*.md")]):
        text = file.read_text(encoding="utf-8")
        if (now := updated(text, DOCS / "results")) != text:
            write_text(file, now)


if __name__ == "__main__":
    main()
