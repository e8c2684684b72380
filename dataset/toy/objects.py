"""The objects of the toy world.

An object is a function of its own coordinates (u, v), in which it reaches to about 0.9, and of a generator that sets
its proportions; it returns its parts from back to front.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dataset.toy.shapes import Field, box, circle, polygon, public_functions, segment, wavy


class Part(NamedTuple):
    """A part of an object: its distance field, brightness against the object's, whether it has the accent colour."""

    distance: Field
    tone: float = 1.0
    accent: bool = False


ObjectDrawer = Callable[[Field, Field, np.random.Generator], list[Part]]


def plate(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    rim = rng.uniform(0.5, 0.6)
    return [Part(circle(u, v, 0.85)), Part(circle(u, v, rim), 0.86), Part(circle(u, v, rim - 0.05), 1.0)]


def gear(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    teeth = int(rng.integers(8, 13))
    body = wavy(u, v, 0.74, 0.1, teeth, sharp=2.5)
    body = np.maximum(body, -circle(u, v, rng.uniform(0.18, 0.26)))
    return [Part(body), Part(np.abs(circle(u, v, 0.5)) - np.float32(0.03), 0.75)]


def capsule(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    radius = rng.uniform(0.3, 0.36)
    body = segment(u, v, (-0.5, 0), (0.5, 0), radius)
    return [Part(body), Part(np.maximum(body, -u + np.float32(rng.uniform(-0.08, 0.08))), 1.0, accent=True)]


def bottle(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    neck = rng.uniform(0.13, 0.18)
    body = np.minimum(box(u, v, 0.4, 0.52, 0, 0.36, 0.12), box(u, v, neck, 0.4, 0, -0.45, 0.04))
    shoulder = circle(u, v, 0.39, 0, -0.08)
    body = np.minimum(body, shoulder)
    label = box(u, v, 0.38, rng.uniform(0.16, 0.24), 0, 0.35)
    return [Part(body), Part(label, 1.0, accent=True), Part(box(u, v, neck + 0.04, 0.09, 0, -0.8, 0.03), 0.7)]


def key(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    body = np.minimum(circle(u, v, 0.36, -0.5), segment(u, v, (-0.3, 0), (0.82, 0), 0.1))
    for x in (0.5, 0.72):
        body = np.minimum(body, box(u, v, 0.07, rng.uniform(0.1, 0.14), x, 0.2))
    return [Part(np.maximum(body, -circle(u, v, 0.17, -0.56)))]


def nut(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    hole = rng.uniform(0.3, 0.4)
    body = np.maximum(polygon(u, v, 6, 0.74), -circle(u, v, hole))
    return [Part(body), Part(np.abs(circle(u, v, hole + 0.09)) - np.float32(0.03), 0.78)]


def button(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    body = circle(u, v, 0.82)
    step = rng.uniform(0.17, 0.22)
    for sx, sy in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        body = np.maximum(body, -circle(u, v, 0.1, sx * step, sy * step))
    return [Part(body), Part(np.abs(circle(u, v, 0.62)) - np.float32(0.04), 0.8)]


def spoon(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    long = rng.uniform(1.25, 1.45)
    bowl = (np.hypot((u + 0.5) / np.float32(long), v) - np.float32(0.3)).astype(np.float32)
    handle = np.minimum(segment(u, v, (-0.1, 0), (0.8, 0), 0.09), circle(u, v, 0.14, 0.78))
    return [Part(np.minimum(bowl, handle)), Part(bowl + np.float32(0.09), 0.85)]


def cup(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    half = np.float32(0.5) - np.float32(rng.uniform(0, 0.14)) * v
    body = np.maximum(np.abs(u + 0.12) - half, np.abs(v) - np.float32(0.68))
    handle = np.abs(circle(u, v, 0.3, 0.42, 0.02)) - np.float32(0.08)
    return [Part(np.minimum(body, handle)), Part(np.maximum(body, v + np.float32(0.5)), 0.82)]


def coin(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    sides = int(rng.integers(4, 7))
    return [
        Part(circle(u, v, 0.82)),
        Part(np.abs(circle(u, v, 0.7)) - np.float32(0.035), 0.78),
        Part(polygon(u, v, sides, 0.3), 0.8),
    ]


def ring(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    return [Part(np.abs(circle(u, v, rng.uniform(0.58, 0.66))) - np.float32(rng.uniform(0.14, 0.22)))]


def bolt(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    shaft = box(u, v, 0.55, 0.17, 0.3, 0, 0.03)
    head = box(u, v, 0.2, rng.uniform(0.36, 0.44), -0.45, 0, 0.06)
    thread = np.maximum(shaft, np.cos(u * np.float32(26)) * np.float32(0.05))
    return [Part(np.minimum(shaft, head)), Part(np.maximum(thread, -u + np.float32(0.0)), 0.72)]


def star(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    return [Part(wavy(u, v, 0.6, rng.uniform(0.17, 0.25), 5))]


def flower(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    petals = int(rng.integers(5, 9))
    return [Part(wavy(u, v, 0.66, 0.16, petals)), Part(circle(u, v, 0.26), 1.0, accent=True)]


def heart(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    lobe = segment(u, v, (-0.36, -0.3), (0.0, 0.34), 0.4)
    other = segment(u, v, (0.36, -0.3), (0.0, 0.34), 0.4)
    point = polygon(u, v - np.float32(0.3), 4, rng.uniform(0.36, 0.4), np.pi / 4)
    return [Part(np.minimum(np.minimum(lobe, other), point))]


def leaf(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    offset = rng.uniform(0.4, 0.55)
    radius = np.hypot(0.85, offset)
    body = np.maximum(circle(u, v, radius, 0, offset), circle(u, v, radius, 0, -offset))
    return [
        Part(np.minimum(body, segment(u, v, (0.7, 0), (0.95, 0), 0.04))),
        Part(segment(u, v, (-0.7, 0), (0.9, 0), 0.03), 0.7),
    ]


def arrow(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    head = np.maximum(np.abs(v) + u - np.float32(0.85), -u + np.float32(0.2)) * np.float32(0.7)
    return [Part(np.minimum(head, box(u, v, 0.5, rng.uniform(0.14, 0.24), -0.3, 0)))]


def triangle(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    return [Part(polygon(u, v, 3, rng.uniform(0.4, 0.48)))]


def square(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    half = rng.uniform(0.6, 0.7)
    return [Part(box(u, v, half, half, rounding=0.06))]


def hexagon(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    return [Part(polygon(u, v, 6, 0.72))]


def pencil(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    tip = np.maximum(np.abs(v) * np.float32(2) + u - np.float32(0.9), -u + np.float32(0.5)) * np.float32(0.6)
    body = box(u, v, 0.7, 0.18, -0.2, 0)
    return [Part(np.minimum(body, tip)), Part(box(u, v, 0.13, 0.18, -0.77, 0), 1.0, accent=True), Part(tip, 0.75)]


def bowl(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    body = np.maximum(circle(u, v, 0.8, 0, -0.3), -v - np.float32(0.3))
    return [Part(np.minimum(body, box(u, v, 0.3, 0.08, 0, 0.5))), Part(box(u, v, 0.8, 0.08, 0, -0.25), 0.8)]


def can(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    body = box(u, v, 0.48, 0.75, rounding=0.1)
    return [
        Part(body),
        Part(np.maximum(body, np.abs(v) - np.float32(rng.uniform(0.3, 0.45))), 1.0, accent=True),
        Part(np.maximum(body, v + np.float32(0.64)), 0.75),
    ]


def book(u: Field, v: Field, rng: np.random.Generator) -> list[Part]:
    return [Part(box(u, v, 0.58, 0.76, rounding=0.03)), Part(box(u, v, 0.09, 0.76, -0.49, 0), 1.0, accent=True)]


# Every function above draws the object of its name.
OBJECTS: dict[str, ObjectDrawer] = public_functions(__name__)
