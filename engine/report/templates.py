"""Pages made from templates, which share `base.html` (the style) and `macros.html` (charts, facts, tables)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

SHARED = Path(__file__).parent


def render_page(template: Path, **content: Any) -> str:
    """A template, which may extend those of this folder, with its content; nothing in it is unescaped."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, SHARED]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(content)
