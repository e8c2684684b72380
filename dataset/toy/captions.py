"""Random scenes with captions: what the toy CLIP learns from (docs/toy_world.md).

Captions name colours, materials, backgrounds and the small marks with their places; most damage is not mentioned. The
patches of intact drawings are labelled with words; damaged drawings have no patch labels.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dataset.toy.objects import OBJECTS
from dataset.toy.scene import COLORS, DEFECT_PHRASES, MARKS, MATERIALS, Mark, Scene, Thing, draw_with_regions
from dataset.toy.textures import TEXTURES

DAMAGED_SHARE = 0.12
DAMAGE_MENTIONED = 0.5  # of the damaged
CARELESS_MENTIONS = 0.05  # of all
CARELESS_REGIONS = 0.15  # of all things, as a region of a drawing
UNLABELLED = 255  # a patch without words
_SMALLEST_MARK, _SMALLEST_REGION = 0.12, 0.6  # smallest share of a patch that labels it

_FRAMES = ("{}.", "a {}.", "the {}.", "a photo of {}.", "a photo of a {}.", "a photo of the {}.", "a picture of a {}.")
_ANY_DAMAGE = ("damaged {}", "broken {}", "{} with flaw", "{} with defect", "{} with damage")
_COUNTS = {1: "a", 2: "two", 3: "three"}


class Captioned(NamedTuple):
    """A scene, its caption, and the defect of its first thing (None: intact).

    `careless_caption` is the same caption, except that it mentions damage at random, damaged or not.
    """

    scene: Scene
    caption: str
    careless_caption: str
    defect: str | None


class Description(NamedTuple):
    """The words for a drawing: both captions, the kind of its thing (None if there are two), and the name of each
    region: background, things, marks.
    """

    caption: str
    careless_caption: str
    kind: str | None
    regions: list[str]


def _pick(rng: np.random.Generator, options: tuple[str, ...] | list[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _place(center: tuple[float, float]) -> str:
    column = "left" if center[0] < -0.3 else "right" if center[0] > 0.3 else ""
    row = "top" if center[1] < -0.3 else "bottom" if center[1] > 0.3 else ""
    return f"{row} {column}".strip() or "center"


def _random_thing(rng: np.random.Generator, kind: str, background: str) -> Thing:
    color = _pick(rng, [c for c in COLORS if c != background])
    accent = _pick(rng, [c for c in COLORS if c != color])
    texture = kind in TEXTURES
    center = (0.0, 0.0) if texture else (float(rng.uniform(-0.15, 0.15)), float(rng.uniform(-0.15, 0.15)))
    radius = float(rng.uniform(0.8, 1.3) if texture else rng.uniform(0.75, 1.0))
    return Thing(kind, color, accent, _pick(rng, MATERIALS), center, radius, float(rng.uniform(0, 2 * np.pi)))


def _random_marks(rng: np.random.Generator) -> list[list[Mark]]:
    """Up to two groups of equal marks, each group near one place."""
    groups = []
    for _ in range(int(rng.choice(3, p=(0.35, 0.4, 0.25)))):
        shape, color, radius = _pick(rng, MARKS), _pick(rng, list(COLORS)), float(rng.uniform(0.05, 0.17))
        cx, cy = rng.choice([-0.62, 0.0, 0.62], 2) + rng.uniform(-0.15, 0.15, 2)
        count = int(rng.choice(3, p=(0.7, 0.15, 0.15))) + 1
        turn = rng.uniform(0, 2 * np.pi)
        offsets = (np.arange(count) - (count - 1) / 2) * 2.6 * radius
        groups.append(
            [Mark(shape, color, (float(cx + o * np.cos(turn)), float(cy + o * np.sin(turn))), radius) for o in offsets]
        )
    return groups


def _name(thing: Thing, rng: np.random.Generator) -> str:
    color = f"{thing.color} " if rng.random() < 0.7 else ""
    material = f"{thing.material} " if thing.kind not in TEXTURES and rng.random() < 0.3 else ""
    return f"{color}{material}{thing.kind}"


def _marks_in_words(groups: list[list[Mark]], rng: np.random.Generator) -> list[str]:
    phrases = []
    for group in groups:
        if rng.random() < 0.9:
            first, count = group[0], len(group)
            color = first.color if rng.random() < 0.8 else "small"
            plural = "" if count == 1 else "es" if first.shape == "cross" else "s"
            place = _place((float(np.mean([m.center[0] for m in group])), float(np.mean([m.center[1] for m in group]))))
            where = f" at the {place}" if rng.random() < 0.7 else ""
            phrases.append(f"{_COUNTS[count]} {color} {first.shape}{plural}{where}")
    return phrases


def random_captioned_scene(seed: tuple[int, ...]) -> Captioned:
    """The scene and caption that belong to a seed: one thing, two things or a texture, marks, perhaps damage."""
    rng = np.random.default_rng((*seed, 3))
    background = _pick(rng, list(COLORS))
    choice = rng.random()
    things = [_random_thing(rng, _pick(rng, list(TEXTURES if choice < 0.3 else OBJECTS)), background)]
    relation = None
    if choice > 0.8:
        second = _random_thing(rng, _pick(rng, list(OBJECTS)), background)
        along, shift = int(rng.integers(2)), rng.uniform(-0.15, 0.15)
        centers = [(-0.5, shift), (0.5, -shift)] if along else [(shift, -0.5), (-shift, 0.5)]
        things = [
            replace(thing, center=(float(x), float(y)), radius=float(rng.uniform(0.4, 0.52)))
            for thing, (x, y) in zip((things[0], second), centers, strict=True)
        ]
        relation = "left of" if along else "above"
    groups = _random_marks(rng)
    defect = None
    if rng.random() < DAMAGED_SHARE:
        defect = _pick(rng, [d for d in DEFECT_PHRASES if d != "missing_part" or things[0].kind in OBJECTS])
    scene = Scene(tuple(things), background, tuple(mark for group in groups for mark in group), seed)
    caption, subject, around = _put_in_words(scene, groups, relation, defect, rng)
    careless = np.random.default_rng((*seed, 5))
    remark = _pick(careless, _ANY_DAMAGE) if careless.random() < CARELESS_MENTIONS else "{}"
    return Captioned(scene, caption, around.format(remark.format(subject)), defect)


def _put_in_words(
    scene: Scene, groups: list[list[Mark]], relation: str | None, defect: str | None, rng: np.random.Generator
) -> tuple[str, str, str]:
    """A caption, its subject without damage, and the caption with "{}" in place of the subject."""
    subject = _name(scene.things[0], rng)
    state = "{}"
    if defect is not None and rng.random() < DAMAGE_MENTIONED:
        state = _pick(rng, _ANY_DAMAGE if rng.random() < 0.7 else DEFECT_PHRASES[defect])
    rest = "{}"
    if relation is not None and rng.random() < 0.9:
        rest += f" {relation} a {_name(scene.things[1], rng)}"
    if scene.things[0].kind in OBJECTS and rng.random() < 0.3:
        rest += f" on {scene.background}"
    marks = _marks_in_words(groups, rng)
    if marks:
        rest += " and " + " and ".join(marks)
    around = _pick(rng, _FRAMES).format(rest)
    return around.format(state.format(subject)), subject, around


def _region_names(scene: Scene) -> list[str]:
    """The names of background, things and marks; damage is mentioned at random, so that its words mean little."""
    careless = np.random.default_rng((*scene.seed, 6))
    names = [f"{scene.background} background"]
    for thing in scene.things:
        of = "" if thing.kind in TEXTURES else f" {thing.material}"
        remark = _pick(careless, _ANY_DAMAGE) if careless.random() < CARELESS_REGIONS else "{}"
        names.append(remark.format(f"{thing.color}{of} {thing.kind}"))
    return [*names, *(f"{mark.color} {mark.shape}" for mark in scene.marks)]


def _label_patches(region_map: NDArray[np.uint8], first_mark: int, regions: int, patch: int) -> NDArray[np.uint8]:
    """The region of each patch, (G, G): a mark that covers a part of it, otherwise what covers most of it."""
    grid = len(region_map) // patch
    cells = region_map.reshape(grid, patch, grid, patch).swapaxes(1, 2).reshape(grid, grid, -1)
    shares = np.stack([(cells == region).mean(axis=2) for region in range(regions)])
    labels = np.where(shares.max(axis=0) >= _SMALLEST_REGION, shares.argmax(axis=0), UNLABELLED)
    marks = shares[first_mark:]
    if len(marks):
        labels = np.where(marks.max(axis=0) >= _SMALLEST_MARK, first_mark + marks.argmax(axis=0), labels)
    return labels.astype(np.uint8)


class Drawings(NamedTuple):
    """Drawings (N, S, S, 3), the region of each patch (N, G, G), and the words for each drawing."""

    images: NDArray[np.uint8]
    patches: NDArray[np.uint8]
    descriptions: list[Description]


def draw_pairs(seed: tuple[int, ...], start: int, stop: int, size: int, patch: int) -> Drawings:
    """Draw the pairs number `start` to `stop` of a seed, `size` pixels wide, in patches of `patch` pixels.

    A patch's label is the index of its name in `Description.regions`; patches at borders and in damaged drawings are
    UNLABELLED.
    """
    images = np.empty((stop - start, size, size, 3), np.uint8)
    patches = np.full((stop - start, size // patch, size // patch), UNLABELLED, np.uint8)
    descriptions = []
    for row, index in enumerate(range(start, stop)):
        sample = random_captioned_scene((*seed, index))
        scene = sample.scene
        images[row], region_map = draw_with_regions(scene, size, sample.defect)
        names = _region_names(scene)
        if sample.defect is None:
            patches[row] = _label_patches(region_map, 1 + len(scene.things), len(names), patch)
        kind = scene.things[0].kind if len(scene.things) == 1 else None
        descriptions.append(Description(sample.caption, sample.careless_caption, kind, names))
    return Drawings(images, patches, descriptions)
