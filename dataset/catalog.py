"""Known datasets (`catalog.json`): domain, layout, folder names, and the classes with their names in prompts."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dataset.conventions import same_name, without_separators
from dataset.toy.classes import TOY_DATASETS
from utils.fields import limited
from utils.reading import read_json

DOMAINS = ("industrial", "medical")
# For which metrics a dataset has ground truth: image labels without masks, masks without normal images, or both.
IMAGE_METRICS, PIXEL_METRICS, BOTH_METRICS = "image", "pixel", "both"


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
        metrics: The defined metrics: "image", "pixel" (all images are anomalous) or "both".
        size: The numbers of normal and anomalous test images in papers, if all copies have the same.
        source: Where to download it.
        licence: Its licence.
        notes: What papers compare, and pitfalls.
        lookalikes: Other datasets that go by this name, by the layout or the number of classes that they have instead.
    """

    domain: str
    layouts: list[str]
    folder: str
    class_names: dict[str, str]
    name: str = ""
    folders: list[str] = field(default_factory=list)
    metrics: str = limited(BOTH_METRICS, choices=(IMAGE_METRICS, PIXEL_METRICS, BOTH_METRICS))
    size: list[int] | None = None
    source: str = ""
    licence: str = ""
    notes: str = ""
    lookalikes: dict[str, str] = field(default_factory=dict)

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
# Names for several datasets, of `--dataset` and of studies.
GROUPS = {
    group: [spec.name for spec in CATALOG.values() if group in (spec.domain, "all") and spec.name not in TOY_DATASETS]
    for group in (*DOMAINS, "all")
}


def known_dataset(name: str) -> DatasetSpec | None:
    """The catalog's dataset of this name; letter case, hyphens and underscores do not matter."""
    return {without_separators(known): spec for known, spec in CATALOG.items()}.get(without_separators(name))


def expand_groups(names: Iterable[str], without: Collection[str] = ()) -> list[str]:
    """The names of datasets, with the members of groups but those in `without`; each dataset once."""
    expanded: dict[str, str] = {}
    for name in names:
        members = GROUPS.get(name.lower())
        for member in [name] if members is None else [member for member in members if member not in without]:
            spec = known_dataset(member)
            expanded.setdefault(spec.name if spec else member, member)
    return list(expanded.values())
