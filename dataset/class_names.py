"""What classes are called in prompts: the catalog's names, the published ones, those of a file, or their own words."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from dataset.catalog import CATALOG, DatasetSpec, readable_name
from dataset.options import CATALOG_NAMES, PUBLISHED_NAMES
from utils.errors import UserError
from utils.reading import MIB, read_json, short_repr

logger = logging.getLogger(__name__)

# By dataset and class, as that code has them.
_PUBLISHED_FILE = Path(__file__).with_name("published_class_names.json")


def class_display_names(
    spec: DatasetSpec, source: str | Path | None = None, class_names: Iterable[str] = ()
) -> dict[str, str]:
    """The name that each class has in prompts: the catalog's, the published one, or that of a file.

    source: one of `NAMES` (None: the catalog), or the path of a JSON object {"class": "readable name"}, which needs to
    hold only the names that it changes. `class_names` are the classes met in the metadata: another name of one that the
    catalog has (`known_class`) is called as that one, those that it lacks are called by their own words; a file may
    have a class under either name. Classes without a published name keep the catalog's, which is said. Raises UserError
    for a file that cannot be read or is no such object, and for classes in it that the dataset does not have.
    """
    met = list(class_names)
    known = {name: spec.known_class(name) for name in (*spec.class_names, *met)}
    if source == PUBLISHED_NAMES:
        replaced = _published_names(spec, met or spec.class_names)
    else:
        replaced = {} if source in (None, CATALOG_NAMES) else read_class_names(Path(source))
    unknown = [name for name in replaced if known and name not in known and spec.known_class(name) is None]
    if unknown:
        raise UserError(
            f"{source}: {spec.name} has no class {', '.join(map(short_repr, unknown[:5]))}; "
            f"its classes are {', '.join(known)}"
        )
    # A class goes by the name it has there before any other.
    called = {spec.known_class(name) or name: text for name, text in replaced.items()} | replaced
    names = {}
    for name, meant in known.items():
        own = readable_name(name) if meant is None else spec.class_names[meant]
        names[name] = called.get(name, called.get(meant, own))
    return names or replaced


def published_name(class_name: str) -> str | None:
    """The published name of a class of whichever dataset has one of this name; None where none has."""
    for dataset in _published():
        spec = CATALOG[dataset]
        text = _of_classes(spec).get(spec.known_class(class_name))
        if text is not None:
            return text
    return None


def _published_names(spec: DatasetSpec, classes: Iterable[str]) -> dict[str, str]:
    """The published names of a dataset's classes; says for which of `classes` there are none."""
    names = _of_classes(spec)
    without = [name for name in classes if spec.known_class(name) not in names]
    if without:
        which = (
            ", ".join(map(short_repr, without[:5])) + (", ..." if len(without) > 5 else "") if names else "its classes"
        )
        logger.warning("%s: there are no published names of %s, the catalog's are taken", spec.name, which)
    return names


def _of_classes(spec: DatasetSpec) -> dict[str, str]:
    """Published names by the classes of a dataset, under whichever of their names the published code has them."""
    named = _published().get(spec.name, {}).items()
    return {known: text for name, text in named if (known := spec.known_class(name)) is not None}


@cache
def _published() -> dict[str, dict[str, str]]:
    return read_json(_PUBLISHED_FILE)


def read_class_names(path: Path) -> dict[str, str]:
    """What a file calls its classes; UserError where it cannot be read or is no such object."""
    names = read_json(path, name="--class_names", max_bytes=MIB)
    if not isinstance(names, dict):
        raise UserError(f'--class_names {path} must hold one JSON object of the form {{"class": "readable name"}}')
    for class_name, name in names.items():
        if not isinstance(name, str) or not name.strip():
            raise UserError(
                f"--class_names {path}: {short_repr(class_name)} must be a non-empty text, as in one JSON "
                f'object of the form {{"class": "readable name"}}, not {short_repr(name)}'
            )
    return {class_name: " ".join(name.split()) for class_name, name in names.items()}
