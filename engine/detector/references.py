"""A few normal images as a memory to compare with, without training (docs/method.md, "References")."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from dataset.normals import choose_normals
from model.config import REFERENCE_FEATURES, REFERENCE_WEIGHT
from model.references import reference_maps
from utils.errors import UserError
from utils.paths import is_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReferenceChoice:
    """Which normal images are compared with, and how: the arguments `--references` and `--reference_*`.

    folder: theirs; shots: how many of each class, None for all of the folder; seed: which. Without a folder they come
    from a dataset's own training images. weight, features: as for `Detector.remember`.
    """

    folder: Path | None = None
    shots: int | None = None
    seed: int = 0
    weight: float = REFERENCE_WEIGHT
    features: str = REFERENCE_FEATURES[0]

    @classmethod
    def of(cls, arguments: object) -> ReferenceChoice | None:
        """What a script's arguments ask for; None where neither a folder nor a number of images is given."""
        asked = cls(**{item.name: getattr(arguments, _argument(item.name)) for item in fields(cls)})
        return None if asked.folder is None and asked.shots is None else asked

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that ask for this, without those at their default."""
        values = ((item.name, getattr(self, item.name), item.default) for item in fields(self))
        return {_argument(name): value for name, value, default in values if value != default}

    def __str__(self) -> str:
        count = "the" if self.shots is None else f"{self.shots}"
        source = "from the dataset's own for training" if self.folder is None else f"in {self.folder.as_posix()}"
        seed = "" if self.shots is None else f" (choice {self.seed})"
        return f"{count} normal images of each class {source}{seed}, {self.features} features, weight {self.weight:g}"

    @property
    def suffix(self) -> str:
        """What is added to the names of files of results, so that they do not take the place of those without."""
        return "_references" if self.shots is None else f"_{self.shots}_references"

    def choose(self, images: Mapping[str, Sequence[Path]]) -> dict[str, list[Path]]:
        """Of the normal images of each class those to compare with."""
        return {name: choose_normals(found, self.shots, self.seed, name) for name, found in images.items()}


def _argument(name: str) -> str:
    """The argument that a field of `ReferenceChoice` comes from."""
    return "references" if name == "folder" else f"reference_{name}"


def said_of_references(choice: ReferenceChoice | None) -> str:
    """What is added to a heading where images were compared with normal ones."""
    return "" if choice is None else ", compared with normal references"


@dataclass(frozen=True, eq=False)
class References:
    """The patch features of K normal images of a class, and the weight of the map that they give.

    memory: unit features of each level (and branch), (K * N, D); images: digests of the images' content
    (`dataset.images.content_digest`).
    """

    memory: tuple[Tensor, ...]
    weight: float
    features: str
    images: tuple[str, ...]

    @property
    def digest(self) -> str:
        """A hex digest of the set of images, whatever their order, and of how they are compared with."""
        content = json.dumps([sorted(self.images), self.weight, self.features])
        return hashlib.sha256(content.encode("ascii")).hexdigest()

    def maps(self, features: Sequence[Tensor], size: int, levels: int) -> Tensor:
        """Distances of images to these, (levels, B, size, size), as `model.references.reference_maps` gives them.

        features: (B, N, D) of each level, of two branches one after the other; their maps are averaged.
        """
        memory = [level.to(features[0].device) for level in self.memory]
        return reference_maps(features, memory, size).unflatten(0, (-1, levels)).mean(dim=0)


def check_apart(references: Iterable[Path], tested: Iterable[Path]) -> None:
    """Refuse a reference whose file is, byte for byte, an image that is tested: it would be compared with itself."""
    by_size: dict[int, list[Path]] = {}
    for path in references:
        by_size.setdefault(path.stat().st_size, []).append(path)
    for path in tested:
        for reference in by_size.get(path.stat().st_size, ()) if is_file(path) else ():
            if reference.read_bytes() == path.read_bytes():
                raise UserError(f"the reference {reference} is the tested image {path}: take others")
