"""Known datasets (`catalog.json`): domain, layout, folder names, and the classes with their names in prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dataset.conventions import same_name
from dataset.toy.classes import TOY_DATASETS
from utils.reading import read_json


@dataclass(frozen=True)
class DatasetSpec:
    """The facts about a dataset.

    Args:
        domain: "industrial" or "medical"; decides the image score (docs/method.md).
        layouts: Keys of `dataset.layouts.LAYOUTS`; the one with most classes in the folder is used.
        folder: The folder's name under the data root as distributed; it may be nested. Letter case and separators do
            not matter.
        class_names: The name of each class in prompts, in class order.
        name: The dataset's name.
        folders: Other common names of the folder.
    """

    domain: str
    layouts: list[str]
    folder: str
    class_names: dict[str, str]
    name: str = ""
    folders: list[str] = field(default_factory=list)

    def is_own_name(self, name: str) -> bool:
        """Whether the dataset or its folder goes by this name."""
        own = (self.name, self.folder, *self.folders)
        return any(same_name(name, known.rpartition("/")[2]) for known in own)

    def known_class(self, name: str) -> str | None:
        """The class that other lists call `name`, None if there is none.

        A dataset with a single class may be called by any of its names: other lists call the class `Colon_cvc300`
        "CVC-300".
        """
        if name in self.class_names:
            return name
        if len(self.class_names) == 1 and self.is_own_name(name):
            return next(iter(self.class_names))
        return next((known for known in self.class_names if same_name(known, name)), None)


def mvtec_spec(name: str, class_names: dict[str, str], domain: str = "industrial") -> DatasetSpec:
    """A dataset in MVTec's layout, in a folder of its name."""
    return DatasetSpec(domain, ["mvtec"], name, class_names, name)


def _read_catalog() -> dict[str, DatasetSpec]:
    rows = read_json(Path(__file__).with_name("catalog.json"), dict[str, DatasetSpec])
    specs = [DatasetSpec(**{**row, "name": name}) for name, row in rows.items()]
    toys = [mvtec_spec(name, class_names) for name, class_names in TOY_DATASETS.items()]
    return {spec.name: spec for spec in (*specs, *toys)}


CATALOG = _read_catalog()
