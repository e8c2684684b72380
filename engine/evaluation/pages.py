"""Pages made from templates, which share `base.html` (the style) and `macros.html` (charts, facts, tables)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from utils.files import replacing

SHARED = Path(__file__).with_name("templates")


def render_page(template: Path, **content: Any) -> str:
    """A template, which may extend those of this folder, with its content; nothing in it is unescaped."""
    return _read(template).render(content)


def write_page(template: Path, path: Path, **content: Any) -> None:
    """As `render_page`, to a file, whole or not at all; what iterators give is written as it comes and not kept."""
    how = {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
    with replacing(path, essential=False) as temporary, temporary.open("w", **how) as file:
        file.writelines(_read(template).generate(content))


def _read(template: Path) -> Template:
    environment = Environment(
        loader=FileSystemLoader([template.parent, SHARED]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name)
