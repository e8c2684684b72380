"""Drawing a picture of the toy world: background, things, small marks, a defect, light, blur and noise."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dataset.toy.defects import AT_THE_EDGE, DEFECTS, INSIDE, Change, Site
from dataset.toy.objects import OBJECTS
from dataset.toy.shapes import Field, box, circle, cover, grid, polygon, segment, smooth_noise
from dataset.toy.textures import TEXTURES
from utils.reading import read_json

_WORDS = read_json(Path(__file__).with_name("words.json"), dict[str, dict[str, list[Any]]])
COLORS: dict[str, list[float]] = _WORDS["colors"]  # RGB in [0, 1]
# Captions that name a defect, "{}" for the thing.
DEFECT_PHRASES: dict[str, list[str]] = _WORDS["defect_phrases"]
MATERIALS = ("plastic", "metal", "wooden", "stone", "ceramic", "rubber")
MARKS = ("dot", "ring", "square", "cross", "bar", "triangle")


@dataclass(frozen=True)
class Thing:
    """One thing in the scene: kind, colours and material by name; centre and radius in image coordinates."""

    kind: str
    color: str
    accent: str
    material: str
    center: tuple[float, float] = (0.0, 0.0)
    radius: float = 0.8
    turn: float = 0.0


@dataclass(frozen=True)
class Mark:
    """A small painted sign: shape and colour by name, centre and radius in image coordinates."""

    shape: str
    color: str
    center: tuple[float, float]
    radius: float


@dataclass(frozen=True)
class Scene:
    """The content of a drawing; `seed` decides everything else (proportions, grain, light)."""

    things: tuple[Thing, ...]
    background: str
    marks: tuple[Mark, ...] = ()
    seed: tuple[int, ...] = (0,)


@dataclass
class _Stage:
    """A drawing in the making: colours (size x size x 3), height for the shading, what is body, and its outline.

    `regions` holds the region of each pixel: 0 the background, then the things, then the marks, in the scene's order.
    """

    rgb: NDArray[np.float32]
    height: Field
    body: Field
    outline: Field
    regions: NDArray[np.uint8]


_NOTHING = Change(np.zeros((1, 1), np.float32))


def _tinted(rng: np.random.Generator, name: str, spread: float = 0.05) -> NDArray[np.float32]:
    return np.clip(np.array(COLORS[name]) + rng.normal(0, spread, 3), 0.02, 0.98).astype(np.float32)


def _paint(rgb: NDArray[np.float32], alpha: Field, color: NDArray[np.float32]) -> None:
    rgb += alpha[..., None] * (color - rgb)


def _grain(material: str, u: Field, v: Field, rng: np.random.Generator) -> Field:
    """Brightness of a material's surface, around 1."""
    size = u.shape[0]
    if material == "metal":
        streaks = ndimage.gaussian_filter1d(rng.standard_normal(160), 1.2).astype(np.float32)
        return 1 + np.float32(0.09) * streaks[np.clip((v * 40 + 80).astype(np.intp), 0, 159)]
    if material == "wooden":
        f, phase = np.float32(rng.uniform(12, 18)), np.float32(rng.uniform(0, 6))
        return 1 + np.float32(0.09) * np.sin((v + np.float32(0.06) * np.sin(2 * u + phase)) * f)
    if material == "stone":
        return 1 + np.float32(0.07) * smooth_noise(rng, size, 30)
    if material == "rubber":
        return np.float32(0.9) + np.float32(0.015) * smooth_noise(rng, size, 40)
    shine = np.float32(0.35 if material == "ceramic" else 0.18)
    return 1 + shine * np.exp(-((u + 0.3) ** 2 + (v + 0.35) ** 2) * np.float32(6))


def _to_object(x: Field, y: Field, thing: Thing) -> tuple[Field, Field]:
    c, s = np.float32(np.cos(thing.turn) / thing.radius), np.float32(np.sin(thing.turn) / thing.radius)
    dx, dy = x - np.float32(thing.center[0]), y - np.float32(thing.center[1])
    return c * dx + s * dy, c * dy - s * dx


def _draw_texture(stage: _Stage, thing: Thing, rng: np.random.Generator, x: Field, y: Field, change: Change) -> Field:
    """Draw a texture over everything; returns what it covers, 0 to 1, as the next two do."""
    u, v = _to_object(x, y, thing)
    surface = TEXTURES[thing.kind](u, v, rng)
    color, accent = _tinted(rng, thing.color, 0.03), _tinted(rng, thing.accent, 0.03)
    stage.rgb[:] = (color + surface.accent[..., None] * (accent - color)) * surface.tone[..., None]
    stage.height += surface.height
    if change.cut is not None:
        _paint(stage.rgb, cover(change.cut, 2.0 / len(x)), INSIDE)
    stage.body[:] = 1
    stage.outline[:] = np.maximum(np.abs(x), np.abs(y)) - np.float32(1)
    return stage.body


def _draw_object(stage: _Stage, thing: Thing, rng: np.random.Generator, x: Field, y: Field, change: Change) -> Field:
    u, v = _to_object(x, y, thing)
    scale, pixel = np.float32(thing.radius), 2.0 / len(x)
    parts = OBJECTS[thing.kind](u, v, rng)
    color, accent = _tinted(rng, thing.color, 0.03), _tinted(rng, thing.accent, 0.03)
    grain = _grain(thing.material, u, v, rng)
    outline = np.minimum.reduce([part.distance for part in parts]) * scale
    clean = outline
    if change.cut is not None:
        outline = np.maximum(outline, -change.cut)
    shadow = cover(np.roll(outline, (3 * len(x) // 96, 2 * len(x) // 96), (0, 1)), 8 * pixel)
    stage.rgb *= 1 - np.float32(0.4) * shadow[..., None]
    body = cover(outline, pixel)
    for part in parts:
        paint = (accent if part.accent else color) * np.float32(part.tone)
        alpha = np.minimum(cover(part.distance * scale, pixel), body)
        _paint(stage.rgb, alpha, paint)
    stage.rgb *= 1 + body[..., None] * (grain[..., None] - 1)
    bevel = np.float32(0.12 * scale)
    stage.height += np.sqrt(np.clip(-outline / bevel, 0, 1)) * bevel * np.float32(0.35)
    np.maximum(stage.body, body, out=stage.body)
    np.minimum(stage.outline, clean, out=stage.outline)
    return body


def _draw_mark(stage: _Stage, mark: Mark, rng: np.random.Generator) -> Field:
    x, y = grid(len(stage.rgb))
    u, v = x - np.float32(mark.center[0]), y - np.float32(mark.center[1])
    r = mark.radius
    if mark.shape == "dot":
        distance = circle(u, v, r)
    elif mark.shape == "ring":
        distance = np.abs(circle(u, v, r)) - np.float32(0.03)
    elif mark.shape == "square":
        distance = box(u, v, r * 0.85, r * 0.85)
    elif mark.shape == "cross":
        distance = np.minimum(box(u, v, r, r * 0.28), box(u, v, r * 0.28, r))
    elif mark.shape == "bar":
        angle = rng.uniform(0, np.pi)
        end = (2 * r * float(np.cos(angle)), 2 * r * float(np.sin(angle)))
        distance = segment(u, v, (-end[0], -end[1]), end, 0.03)
    else:
        distance = polygon(u, v, 3, r * 0.6, rng.uniform(0, 2))
    alpha = cover(distance, 2.0 / len(x))
    _paint(stage.rgb, alpha, _tinted(rng, mark.color))
    return alpha


def _compose(scene: Scene, size: int, change: Change) -> _Stage:
    """The scene before light and camera. The same scene gives the same drawing, whatever the change leaves alone."""
    rng = np.random.default_rng(scene.seed)
    x, y = grid(size)
    if change.warp is not None:
        x, y = x - change.warp[0], y - change.warp[1]
    ground = _tinted(rng, scene.background, 0.04) * (1 + np.float32(0.025) * smooth_noise(rng, size, 6)[..., None])
    far = np.full((size, size), 9, np.float32)
    nothing = np.zeros_like(far)
    stage = _Stage(ground.astype(np.float32), nothing, nothing.copy(), far, nothing.astype(np.uint8))
    for number, thing in enumerate(scene.things, start=1):
        own = np.random.default_rng(rng.integers(2**32))
        draw = _draw_texture if thing.kind in TEXTURES else _draw_object
        stage.regions[draw(stage, thing, own, x, y, change) > 0.5] = number
    own = np.random.default_rng(rng.integers(2**32))
    for number, mark in enumerate(scene.marks, start=1 + len(scene.things)):
        stage.regions[_draw_mark(stage, mark, own) > 0.5] = number
    for alpha, color in change.paints:
        _paint(stage.rgb, alpha * stage.body, color)
    if change.height is not None:
        stage.height += change.height * stage.body
    return stage


def _photograph(scene: Scene, stage: _Stage) -> NDArray[np.uint8]:
    """Light (slanted, uneven), a little blur, noise, 8 bits."""
    size = len(stage.rgb)
    rng = np.random.default_rng((*scene.seed, 1))
    x, y = grid(size)
    angle, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.22)
    light = np.float32(rng.uniform(0.85, 1.1)) + np.float32(slope) * (
        np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
    )
    gy, gx = np.gradient(stage.height, np.float32(2 / size))
    shade = np.clip(-np.float32(0.6) * (np.float32(np.cos(angle)) * gx + np.float32(np.sin(angle)) * gy), -0.5, 0.5)
    rgb = stage.rgb * (light * (1 - shade))[..., None]
    rgb = ndimage.gaussian_filter(rgb, (s := rng.uniform(0.2, 0.6) * size / 96, s, 0), truncate=2.5)
    rgb += rng.standard_normal(rgb.shape, np.float32) * np.float32(rng.uniform(0.008, 0.025))
    return (np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8)


def _place_defect(scene: Scene, stage: _Stage, defect: str, rng: np.random.Generator, severity: float) -> Site:
    """A centre on the body (inside, or at the outline where the defect belongs there) and a radius."""
    size = len(stage.rgb)
    textured = scene.things[0].kind in TEXTURES
    if textured:
        fits = stage.outline < -0.3
    elif defect in AT_THE_EDGE:
        fits = np.abs(stage.outline) < 0.03
    else:
        fits = stage.outline < max(0.55 * float(stage.outline.min()), -0.12)
    rows, cols = np.nonzero(fits)
    pick = int(rng.integers(len(rows)))
    row, col = int(rows[pick]), int(cols[pick])
    x, y = grid(size)
    low, high = max(row - 3, 0), max(col - 3, 0)
    around = (slice(low, row + 4), slice(high, col + 4))
    weight = stage.body[around][..., None] + np.float32(1e-3)
    color = (stage.rgb[around] * weight).sum((0, 1)) / weight.sum()
    radius = rng.uniform(0.2, 0.38) if textured else rng.uniform(0.19, 0.34)
    outward = None
    if not textured:
        near = stage.outline[max(row - 1, 0) : row + 2, max(col - 1, 0) : col + 2]
        rise, run = np.gradient(near)
        outward = float(np.arctan2(rise.mean(), run.mean()))
    return Site(
        size, rng, (float(x[row, col]), float(y[row, col])), severity * radius, color.astype(np.float32), outward
    )


def draw(scene: Scene, size: int, defect: str | None = None) -> NDArray[np.uint8]:
    """The picture of a scene, size x size x 3; `defect` damages its first thing."""
    return draw_with_regions(scene, size, defect)[0]


def draw_with_regions(
    scene: Scene, size: int, defect: str | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The picture of a scene and the region of each pixel: 0 is the background, then things, then marks."""
    stage = _compose(scene, size, _NOTHING)
    if defect is not None:
        stage = _compose(scene, size, _change(scene, stage, defect))
    return _photograph(scene, stage), stage.regions


def draw_with_mask(
    scene: Scene, size: int, defect: str, severity: float = 1.0
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The picture of a damaged scene and where the damage is, size x size.

    `severity` scales the defect. A defect covers its own region of the body; a bent body, before and after the bend.
    """
    sound = _compose(scene, size, _NOTHING)
    change = _change(scene, sound, defect, severity)
    damaged = _compose(scene, size, change)
    mask = change.region * np.maximum(sound.body, damaged.body if change.warp is not None else 0) > 0.4
    return _photograph(scene, damaged), mask


def _change(scene: Scene, sound: _Stage, defect: str, severity: float = 1.0) -> Change:
    rng = np.random.default_rng((*scene.seed, 2))
    return DEFECTS[defect](_place_defect(scene, sound, defect, rng, severity))
