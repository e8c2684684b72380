"""What is known of each dataset before its folder is looked at: domain, layout, folder names, and classes' names."""

from __future__ import annotations

from dataclasses import dataclass, field

from dataset.folders import same_name
from dataset.toy.classes import TOY_DATASETS


@dataclass(frozen=True)
class DatasetSpec:
    """The facts of a dataset.

    `domain` is "industrial" or "medical" and decides the scoring (docs/method.md); `layouts` are keys of
    `dataset.layouts.LAYOUTS`, of which the one that is found counts. `folder` is the folder's name under the data root
    as distributed, `folders` are other names in common use; both may be nested, and letter case and separators do not
    matter. `class_names` maps a class to its name in prompts, in class order.
    """

    name: str
    domain: str
    layouts: tuple[str, ...]
    folder: str
    class_names: dict[str, str]
    folders: tuple[str, ...] = field(default=())

    def is_own_name(self, name: str) -> bool:
        """Whether a name is one that the dataset or its folder goes by."""
        own = (self.name, self.folder, *self.folders)
        return any(same_name(name, known.rpartition("/")[2]) for known in own)

    def known_class(self, name: str) -> str | None:
        """The class that a list made elsewhere means by `name`; None where it is none of this dataset's.

        A dataset of one class goes by many names: what others list as `CVC-300` is the class `Colon_cvc300` here.
        """
        if name in self.class_names:
            return name
        if len(self.class_names) == 1 and self.is_own_name(name):
            return next(iter(self.class_names))
        return next((known for known in self.class_names if same_name(known, name)), None)


def readable_name(class_name: str) -> str:
    """A class folder's name as words: "metal_nut" becomes "metal nut"."""
    return " ".join(class_name.replace("_", " ").split())


def same_words(*class_names: str) -> dict[str, str]:
    """Classes that are called in prompts by their own words."""
    return {name: readable_name(name) for name in class_names}


_MVTEC_CLASSES = same_words(
    "bottle",
    "cable",
    "capsule",
    "carpet",
    "grid",
    "hazelnut",
    "leather",
    "metal_nut",
    "pill",
    "screw",
    "tile",
    "toothbrush",
    "transistor",
    "wood",
    "zipper",
)

_VISA_CLASSES = {
    "candle": "candle",
    "capsules": "capsule",
    "cashew": "cashew nut",
    "chewinggum": "chewing gum",
    "fryum": "fryum snack",
    "macaroni1": "macaroni",
    "macaroni2": "macaroni",
    "pcb1": "printed circuit board",
    "pcb2": "printed circuit board",
    "pcb3": "printed circuit board",
    "pcb4": "printed circuit board",
    "pipe_fryum": "pipe-shaped fryum snack",
}

# The distribution only numbers its three products; the nouns say what their images show.
_BTAD_CLASSES = {"01": "round plastic part", "02": "wooden panel", "03": "metal ring"}

_MPDD_CLASSES = {
    "bracket_black": "black metal bracket",
    "bracket_brown": "brown metal bracket",
    "bracket_white": "white metal bracket",
    "connector": "metal connector",
    "metal_plate": "metal plate",
    "tubes": "metal tube",
}


def _medical(name: str, noun: str, *folders: str) -> DatasetSpec:
    return DatasetSpec(name, "medical", ("medical",), name, {name: noun}, folders)


def _colon(name: str, folder: str, *folders: str) -> DatasetSpec:
    nested = tuple(f"{parent}/{folder}" for parent in ("Colon", "TestDataset"))
    return DatasetSpec(name, "medical", ("colon",), folder, {name: "colon"}, (name, *folders, *nested))


def _toy(name: str) -> DatasetSpec:
    return DatasetSpec(name, "industrial", ("mvtec",), name, dict(TOY_DATASETS[name]))


CATALOG: dict[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        DatasetSpec(
            "MVTec",
            "industrial",
            ("mvtec",),
            "mvtec_anomaly_detection",
            _MVTEC_CLASSES,
            ("MVTec", "mvtec_ad", "mvtec2d"),
        ),
        DatasetSpec(
            "VisA",
            "industrial",
            ("visa", "mvtec"),
            "VisA",
            _VISA_CLASSES,
            ("VisA_20220922", "VisA_pytorch/1cls", "VisA_pytorch"),
        ),
        DatasetSpec("BTAD", "industrial", ("mvtec",), "BTech_Dataset_transformed", _BTAD_CLASSES, ("BTAD", "BTech")),
        DatasetSpec("MPDD", "industrial", ("mvtec",), "MPDD", _MPDD_CLASSES),
        _medical("Brain", "brain", "Brain_AD", "BraTS2021_slice"),
        _medical("Liver", "liver", "Liver_AD"),
        _medical("Retina", "retina", "Retina_RESC", "Retina_RESC_AD", "RESC"),
        _colon("Colon_clinicDB", "CVC-ClinicDB"),
        _colon("Colon_colonDB", "CVC-ColonDB"),
        _colon("Colon_Kvasir", "Kvasir", "Kvasir-SEG"),
        _colon("Colon_cvc300", "CVC-300"),
        *(_toy(name) for name in TOY_DATASETS),
    )
}
