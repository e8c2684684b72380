"""The names of classes in prompts: the catalog's, those of AA-CLIP's published code, or those of a file."""

import logging
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from dataset.catalog import CATALOG, DatasetSpec
from dataset.prompts import CATALOG_NAMES, PUBLISHED_NAMES, readable_name
from utils.errors import UserError
from utils.reading import MIB, read_json, short_repr
from utils.text import list_names

logger = logging.getLogger(__name__)


def class_display_names(
    spec: DatasetSpec, source: str | Path | None = None, class_names: Iterable[str] = ()
) -> dict[str, str]:
    """The name of each class in prompts.

    Args:
        spec: The dataset.
        source: One of `dataset.options.NAMES`, or a JSON file {"class": "readable name"} with the names to change.
            Default: the catalog's names.
        class_names: The classes of the images, which may have other names than in the catalog
            (`DatasetSpec.known_class`).

    Returns:
        The name of each class of the dataset and of `class_names`. Classes that neither the source nor the catalog
        names are called by their own words.

    Raises:
        UserError: The file is invalid, or has a class that the dataset does not have.
    """
    present = list(class_names)
    classes = list(dict.fromkeys([*spec.class_names, *present]))
    changed: dict[str, str] = {}
    if source == PUBLISHED_NAMES:
        changed = _published_names(spec)
        if without := [name for name in present or classes if spec.known_class(name) not in changed]:
            which = list_names(list(map(short_repr, without))) if changed else "its classes"
            logger.warning("%s: there are no published names of %s; the catalog's are used", spec.name, which)
    elif source not in (None, CATALOG_NAMES):
        changed = read_class_names(Path(source or ""))
    unknown = [name for name in changed if name not in classes and spec.known_class(name) is None]
    if unknown:
        raise UserError(
            f"{source}: {spec.name} has no class {', '.join(map(short_repr, unknown[:5]))}; "
            f"its classes are {', '.join(classes)}"
        )
    # A name of exactly this class comes before the name of the same class under another name.
    changed = {spec.known_class(name) or name: text for name, text in changed.items()} | changed
    names = {}
    for name in classes:
        known = spec.known_class(name)
        default = readable_name(name) if known is None else spec.class_names[known]
        names[name] = changed.get(name, changed.get(known or name, default))
    return names


def published_name(class_name: str) -> str | None:
    """The published name of a class of any dataset, None if there is none."""
    for dataset in _published_file():
        spec = CATALOG[dataset]
        known = spec.known_class(class_name)
        if known is not None and known in (names := _published_names(spec)):
            return names[known]
    return None


def _published_names(spec: DatasetSpec) -> dict[str, str]:
    """The published names of a dataset's classes; the published code has some classes under other names."""
    names = _published_file().get(spec.name, {})
    return {known: text for name, text in names.items() if (known := spec.known_class(name)) is not None}


@cache
def _published_file() -> dict[str, dict[str, str]]:
    return read_json(Path(__file__).with_name("published_class_names.json"))


def read_class_names(path: Path) -> dict[str, str]:
    """The names in a file of `--class_names`; `UserError` if it is not an object of non-empty texts."""
    names = read_json(path, name="--class_names", max_bytes=MIB)
    if not isinstance(names, dict):
        raise UserError(f'--class_names {path} must hold one JSON object of the form {{"class": "readable name"}}')
    for class_name, name in names.items():
        if not isinstance(name, str) or not name.strip():
            raise UserError(
                f"--class_names {path}: {short_repr(class_name)} must be non-empty text, not {short_repr(name)}"
            )
    return {class_name: " ".join(name.split()) for class_name, name in names.items()}
