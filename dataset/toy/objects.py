"""What stands in the pictures: objects on a background, and textures that fill the frame.

An object is a function of its own coordinates (u, v), in which it reaches to about 0.9, and of a generator that sets
its proportions; it returns its parts from back to front. A texture returns brightness and colour mix over the frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dataset.toy.shapes import Field, box, circle, polygon, segment, smooth_noise, wavy


class Part(NamedTuple):
    """A part of an object: its distance field, brightness against the object's, whether it has the accent colour."""

    distance: Field
    tone: float = 1.0
    accent: bool = False


ObjectDrawer = Callable[[Field, Field, np.random.Generator], list[Part]]


def _plate(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    rim = rng.uniform(0.5, 0.6)
    return [Part(circle(u, v, 0.85)), Part(circle(u, v, rim), 0.86), Part(circle(u, v, rim - 0.05), 1.0)]


def _gear(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    teeth = int(rng.integers(8, 13))
    body = wavy(u, v, 0.74, 0.1, teeth, sharp=2.5)
    body = np.maximum(body, -circle(u, v, rng.uniform(0.18, 0.26)))
    return [Part(body), Part(np.abs(circle(u, v, 0.5)) - np.float32(0.03), 0.75)]


def _capsule(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    radius = rng.uniform(0.3, 0.36)
    body = segment(u, v, (-0.5, 0), (0.5, 0), radius)
    return [Part(body), Part(np.maximum(body, -u + np.float32(rng.uniform(-0.08, 0.08))), 1.0, accent=True)]


def _bottle(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    neck = rng.uniform(0.13, 0.18)
    body = np.minimum(box(u, v, 0.4, 0.52, 0, 0.36, 0.12), box(u, v, neck, 0.4, 0, -0.45, 0.04))
    shoulder = circle(u, v, 0.39, 0, -0.08)
    body = np.minimum(body, shoulder)
    label = box(u, v, 0.38, rng.uniform(0.16, 0.24), 0, 0.35)
    return [Part(body), Part(label, 1.0, accent=True), Part(box(u, v, neck + 0.04, 0.09, 0, -0.8, 0.03), 0.7)]


def _key(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    body = np.minimum(circle(u, v, 0.36, -0.5), segment(u, v, (-0.3, 0), (0.82, 0), 0.1))
    for x in (0.5, 0.72):
        body = np.minimum(body, box(u, v, 0.07, rng.uniform(0.1, 0.14), x, 0.2))
    return [Part(np.maximum(body, -circle(u, v, 0.17, -0.56)))]


def _nut(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    hole = rng.uniform(0.3, 0.4)
    body = np.maximum(polygon(u, v, 6, 0.74), -circle(u, v, hole))
    return [Part(body), Part(np.abs(circle(u, v, hole + 0.09)) - np.float32(0.03), 0.78)]


def _button(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    body = circle(u, v, 0.82)
    step = rng.uniform(0.17, 0.22)
    for sx, sy in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        body = np.maximum(body, -circle(u, v, 0.1, sx * step, sy * step))
    return [Part(body), Part(np.abs(circle(u, v, 0.62)) - np.float32(0.04), 0.8)]


def _spoon(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    long = rng.uniform(1.25, 1.45)
    bowl = (np.hypot((u + 0.5) / np.float32(long), v) - np.float32(0.3)).astype(np.float32)
    handle = np.minimum(segment(u, v, (-0.1, 0), (0.8, 0), 0.09), circle(u, v, 0.14, 0.78))
    return [Part(np.minimum(bowl, handle)), Part(bowl + np.float32(0.09), 0.85)]


def _cup(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    half = np.float32(0.5) - np.float32(rng.uniform(0, 0.14)) * v
    body = np.maximum(np.abs(u + 0.12) - half, np.abs(v) - np.float32(0.68))
    handle = np.abs(circle(u, v, 0.3, 0.42, 0.02)) - np.float32(0.08)
    return [Part(np.minimum(body, handle)), Part(np.maximum(body, v + np.float32(0.5)), 0.82)]


def _coin(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    sides = int(rng.integers(4, 7))
    return [
        Part(circle(u, v, 0.82)),
        Part(np.abs(circle(u, v, 0.7)) - np.float32(0.035), 0.78),
        Part(polygon(u, v, sides, 0.3), 0.8),
    ]


def _ring(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    return [Part(np.abs(circle(u, v, rng.uniform(0.58, 0.66))) - np.float32(rng.uniform(0.14, 0.22)))]


def _bolt(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    shaft = box(u, v, 0.55, 0.17, 0.3, 0, 0.03)
    head = box(u, v, 0.2, rng.uniform(0.36, 0.44), -0.45, 0, 0.06)
    thread = np.maximum(shaft, np.cos(u * np.float32(26)) * np.float32(0.05))
    return [Part(np.minimum(shaft, head)), Part(np.maximum(thread, -u + np.float32(0.0)), 0.72)]


def _star(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    return [Part(wavy(u, v, 0.6, rng.uniform(0.17, 0.25), 5))]


def _flower(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    petals = int(rng.integers(5, 9))
    return [Part(wavy(u, v, 0.66, 0.16, petals)), Part(circle(u, v, 0.26), 1.0, accent=True)]


def _heart(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    lobe = segment(u, v, (-0.36, -0.3), (0.0, 0.34), 0.4)
    other = segment(u, v, (0.36, -0.3), (0.0, 0.34), 0.4)
    point = polygon(u, v - np.float32(0.3), 4, rng.uniform(0.36, 0.4), np.pi / 4)
    return [Part(np.minimum(np.minimum(lobe, other), point))]


def _leaf(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    offset = rng.uniform(0.4, 0.55)
    radius = np.hypot(0.85, offset)
    body = np.maximum(circle(u, v, radius, 0, offset), circle(u, v, radius, 0, -offset))
    return [
        Part(np.minimum(body, segment(u, v, (0.7, 0), (0.95, 0), 0.04))),
        Part(segment(u, v, (-0.7, 0), (0.9, 0), 0.03), 0.7),
    ]


def _arrow(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    head = np.maximum(np.abs(v) + u - np.float32(0.85), -u + np.float32(0.2)) * np.float32(0.7)
    return [Part(np.minimum(head, box(u, v, 0.5, rng.uniform(0.14, 0.24), -0.3, 0)))]


def _triangle(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    return [Part(polygon(u, v, 3, rng.uniform(0.4, 0.48)))]


def _square(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    half = rng.uniform(0.6, 0.7)
    return [Part(box(u, v, half, half, rounding=0.06))]


def _hexagon(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    return [Part(polygon(u, v, 6, 0.72))]


def _pencil(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    tip = np.maximum(np.abs(v) * np.float32(2) + u - np.float32(0.9), -u + np.float32(0.5)) * np.float32(0.6)
    body = box(u, v, 0.7, 0.18, -0.2, 0)
    return [Part(np.minimum(body, tip)), Part(box(u, v, 0.13, 0.18, -0.77, 0), 1.0, accent=True), Part(tip, 0.75)]


def _bowl(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    body = np.maximum(circle(u, v, 0.8, 0, -0.3), -v - np.float32(0.3))
    return [Part(np.minimum(body, box(u, v, 0.3, 0.08, 0, 0.5))), Part(box(u, v, 0.8, 0.08, 0, -0.25), 0.8)]


def _can(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    body = box(u, v, 0.48, 0.75, rounding=0.1)
    return [
        Part(body),
        Part(np.maximum(body, np.abs(v) - np.float32(rng.uniform(0.3, 0.45))), 1.0, accent=True),
        Part(np.maximum(body, v + np.float32(0.64)), 0.75),
    ]


def _book(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    return [Part(box(u, v, 0.58, 0.76, rounding=0.03)), Part(box(u, v, 0.09, 0.76, -0.49, 0), 1.0, accent=True)]


OBJECTS: dict[str, ObjectDrawer] = {
    "plate": _plate,
    "gear": _gear,
    "capsule": _capsule,
    "bottle": _bottle,
    "key": _key,
    "nut": _nut,
    "button": _button,
    "spoon": _spoon,
    "cup": _cup,
    "coin": _coin,
    "ring": _ring,
    "bolt": _bolt,
    "star": _star,
    "flower": _flower,
    "heart": _heart,
    "leaf": _leaf,
    "arrow": _arrow,
    "triangle": _triangle,
    "square": _square,
    "hexagon": _hexagon,
    "pencil": _pencil,
    "bowl": _bowl,
    "can": _can,
    "book": _book,
}


class Surface(NamedTuple):
    """A texture over the frame: brightness around 1, share of the accent colour (0 to 1), height (for shading)."""

    tone: Field
    accent: Field
    height: Field


TextureDrawer = Callable[[Field, Field, np.random.Generator], Surface]


def _flat(u: Field) -> Field:
    return np.zeros_like(u)


def _wood(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    bend = np.sin(u * np.float32(rng.uniform(1, 2)) + np.float32(rng.uniform(0, 6))) * np.float32(0.08)
    lines = np.sin((v + bend) * np.float32(rng.uniform(16, 24)) + 1.5 * np.sin((v + bend) * np.float32(7)))
    return Surface(1 + np.float32(0.09) * lines, _flat(u), _flat(u))


def _weave(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    f = np.float32(rng.uniform(26, 34))
    woven = np.sin(u * f) * np.sin(v * f)
    return Surface(1 + np.float32(0.12) * woven, _flat(u), _flat(u))


def _tiles(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    pitch, joint = np.float32(rng.uniform(0.5, 0.7)), np.float32(0.035)
    gap = np.minimum(pitch / 2 - np.abs(np.mod(u, pitch) - pitch / 2), pitch / 2 - np.abs(np.mod(v, pitch) - pitch / 2))
    return Surface(np.ones_like(u), np.clip((joint - gap) * 40 + 0.5, 0, 1), np.clip(gap, 0, 0.08) * np.float32(0.4))


def _bricks(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    high, joint = np.float32(rng.uniform(0.32, 0.42)), np.float32(0.035)
    row = np.floor(v / high)
    wide = high * np.float32(2.2)
    shifted = u + row * wide / 2
    gap = np.minimum(wide / 2 - np.abs(np.mod(shifted, wide) - wide / 2), high / 2 - np.abs(np.mod(v, high) - high / 2))
    brick = np.sin(row * np.float32(12.9) + np.floor(shifted / wide) * np.float32(78.2))
    return Surface(
        1 + np.float32(0.06) * brick, np.clip((joint - gap) * 40 + 0.5, 0, 1), np.clip(gap, 0, 0.08) * np.float32(0.4)
    )


def _leather(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    size = u.shape[0]
    grain = smooth_noise(rng, size, 22)
    return Surface(1 + np.float32(0.04) * grain, _flat(u), np.float32(0.012) * grain)


def _mesh(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    pitch = np.float32(rng.uniform(0.34, 0.44))
    wire = np.minimum(np.abs(np.mod(u, pitch) - pitch / 2), np.abs(np.mod(v, pitch) - pitch / 2))
    return Surface(np.ones_like(u), np.clip((wire - np.float32(0.06)) * 30 + 0.5, 0, 1), -np.clip(wire, 0, 0.06))


def _stripes(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    wave = np.sin(v * np.float32(rng.uniform(9, 16)))
    return Surface(np.ones_like(u), np.clip(wave * 4 + 0.5, 0, 1), _flat(u))


def _checker(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    f = np.float32(rng.uniform(6, 9))
    return Surface(np.ones_like(u), np.clip(np.sin(u * f) * np.sin(v * f) * 12 + 0.5, 0, 1), _flat(u))


def _dots(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    pitch = np.float32(rng.uniform(0.36, 0.48))
    spots = np.hypot(np.mod(u, pitch) - pitch / 2, np.mod(v, pitch) - pitch / 2)
    return Surface(np.ones_like(u), np.clip((np.float32(0.1) - spots) * 40 + 0.5, 0, 1), _flat(u))


def _marble(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    size = u.shape[0]
    veins = np.sin((u + v) * 5 + 1.6 * smooth_noise(rng, size, 4))
    return Surface(1 + np.float32(0.1) * veins, _flat(u), _flat(u))


def _ribs(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    wave = np.sin(v * np.float32(rng.uniform(14, 20)))
    return Surface(1 + np.float32(0.14) * wave, _flat(u), _flat(u))


TEXTURES: dict[str, TextureDrawer] = {
    "wood": _wood,
    "carpet": _weave,
    "tiles": _tiles,
    "brick wall": _bricks,
    "leather": _leather,
    "wire mesh": _mesh,
    "striped cloth": _stripes,
    "checkered floor": _checker,
    "dotted cloth": _dots,
    "marble": _marble,
    "corrugated sheet": _ribs,
}
