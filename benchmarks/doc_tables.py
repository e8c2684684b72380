"""Tables of the documentation that come from studies.

    python -m benchmarks.doc_tables [FOLDER ...]

takes what studies have found (`runs/studies/NAME`) into `docs/results`: `NAME.md` as the study wrote it (and
`NAME_against_ARM.md`), `NAME.csv` with every seed's means over classes. Then every table in a page that
stands below a line such as

    <!-- study: base, Means: Pixel AUROC, Image AUROC -->

(the study, the heading of a table in its file, the columns; all where none are named) is made anew.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from utils.errors import UserError
from utils.files import write_text
from utils.tables import markdown_table

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(
    r"<!-- study: (?P<study>\w+), (?P<heading>[^:>]+?)(: (?P<columns>[^>]+?))? -->\n(?P<table>(\|.*\n)*)"
)
KEYS = ("setting", "arm", "seed", "train", "test")


def means_of_seeds(study_csv: Path) -> str:
    """A study's figures as text of a CSV file: a row for each arm, seed and pair, the means over classes."""
    with study_csv.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        metrics = [name for name in reader.fieldnames or () if name not in (*KEYS, "class")]
        rows = defaultdict(list)
        for row in reader:
            rows[tuple(row[key] for key in KEYS)].append([float(row[name]) for name in metrics])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*KEYS, *metrics])
    for key, values in rows.items():
        writer.writerow([*key, *(f"{sum(column) / len(values):.3f}" for column in zip(*values, strict=True))])
    return text.getvalue()


def table_under(heading: str, page: str) -> list[list[str]]:
    """The cells of the first table below a heading of the second level."""
    below = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in below.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not set(line) <= set("|-: ")]


def made_anew(page: str, results: Path) -> str:
    """A page's text with its tables as the studies in `results` have them."""

    def fill(found: re.Match[str]) -> str:
        file = results / f"{found['study']}.md"
        cells = table_under(found["heading"], file.read_text(encoding="utf-8")) if file.is_file() else []
        if not cells:
            raise UserError(f"{file} holds no table under {found['heading']!r}")
        header, *rows = cells
        wanted = found["columns"].split(", ") if found["columns"] else header[1:]
        unknown = [name for name in wanted if name not in header]
        if unknown:
            raise UserError(f"{file}: the table under {found['heading']!r} has no column {unknown[0]!r}")
        places = [0, *(header.index(name) for name in wanted)]
        first = found[0].partition("\n")[0]
        chosen = [[row[place] for place in places] for row in (header, *rows)]
        return f"{first}\n{markdown_table(chosen[0], chosen[1:])}\n"

    return BLOCK.sub(fill, page)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER", help="of finished studies")
    for folder in parser.parse_args(arguments).folders:
        for page in sorted(folder.glob("study*.md")):
            name = folder.name + page.stem.removeprefix("study")
            write_text(DOCS / "results" / f"{name}.md", page.read_text(encoding="utf-8"))
        write_text(DOCS / "results" / f"{folder.name}.csv", means_of_seeds(folder / "study.csv"))
    for file in sorted([DOCS.parent / "README.md", *DOCS.glob("*.md")]):
        text = file.read_text(encoding="utf-8")
        if (now := made_anew(text, DOCS / "results")) != text:
            write_text(file, now)


if __name__ == "__main__":
    main()
