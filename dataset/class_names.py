"""What classes are called in prompts: the catalog's names, those of a file, or the class's own words."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dataset.catalog import DatasetSpec, readable_name
from utils.errors import UserError
from utils.reading import parse_user_json, read_user_text, shown

# Bytes: a name for each of ten thousand classes fits.
_LARGEST_FILE = 2**20


def class_display_names(
    spec: DatasetSpec, override_file: Path | None = None, class_names: Iterable[str] = ()
) -> dict[str, str]:
    """The name that each class has in prompts: the catalog's, or that of a JSON object {"class": "readable name"}.

    `class_names` are the classes met in the metadata: another name of one that the catalog has (`known_class`) is
    called as that one, those that it lacks are called by their own words. The file needs to hold only the names that it
    changes. Raises UserError for a file that cannot be read or is no such object, and for classes in it that the
    dataset does not have.
    """
    replaced = {} if override_file is None else _read_class_names(Path(override_file))
    names = dict(spec.class_names)
    meant = {name: spec.known_class(name) for name in class_names}
    for name, known in meant.items():
        names.setdefault(name, readable_name(name) if known is None else replaced.get(known, spec.class_names[known]))
    unknown = [class_name for class_name in replaced if names and class_name not in names]
    if unknown:
        raise UserError(
            f"{override_file}: {spec.name} has no class {', '.join(map(shown, unknown[:5]))}; "
            f"its classes are {', '.join(names)}"
        )
    return names | replaced


def _read_class_names(path: Path) -> dict[str, str]:
    names = parse_user_json(read_user_text(path, "--class_names", _LARGEST_FILE), f"--class_names {path}")
    if not isinstance(names, dict):
        raise UserError(f'--class_names {path} must hold one JSON object of the form {{"class": "readable name"}}')
    for class_name, name in names.items():
        if not isinstance(name, str) or not name.strip():
            raise UserError(
                f"--class_names {path}: {shown(class_name)} must be a text that is not empty, as in one JSON "
                f'object of the form {{"class": "readable name"}}, not {shown(name)}'
            )
    return {class_name: " ".join(name.split()) for class_name, name in names.items()}
