"""HTML pages from templates, which share `base.html` (style) and `macros.html` (charts, facts, tables)."""

from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from utils.files import replacing
from utils.version import project_version

SHARED = Path(__file__).with_name("templates")


def render_page(template: Path, **content: Any) -> str:
    """A page from a template, which may extend those in `templates`; all content is escaped.

    Templates also have `written`: the time and the version of this project.
    """
    return _read(template).render(content)


def write_page(template: Path, path: Path, **content: Any) -> None:
    """As `render_page`, to a file, atomically; content from iterators is not kept in memory."""
    with (
        replacing(path, essential=False) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file,
    ):
        file.writelines(_read(template).generate(content))


def _read(template: Path) -> Template:
    environment = Environment(
        loader=FileSystemLoader([template.parent, SHARED]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written = f"{datetime.now():%Y-%m-%d %H:%M}, version {project_version()}"
    return environment.get_template(template.name, globals={"written": written})
