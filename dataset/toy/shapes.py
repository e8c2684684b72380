"""Distance fields and noise: the few primitives that every drawing of the toy world is made of.

A *field* is a float32 array, size x size, over an image whose coordinates run from -1 to 1 in x (right) and y (down).
A distance field is negative inside its shape. Distances are exact or close to it near the outline, which is all that
anti-aliasing and bevels need.
"""

import sys
from collections.abc import Sequence
from functools import lru_cache
from inspect import isfunction
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Field: TypeAlias = NDArray[np.float32]
Point: TypeAlias = tuple[float, float]


@lru_cache(maxsize=8)
def grid(size: int) -> tuple[Field, Field]:
    """The x and y coordinates of the pixel centres of a size x size image."""
    axis = ((np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    x.setflags(write=False)
    y.setflags(write=False)
    return x, y


def circle(u: Field, v: Field, radius: float, cx: float = 0.0, cy: float = 0.0) -> Field:
    """Distance to a disc."""
    return np.hypot(u - cx, v - cy) - np.float32(radius)


def box(
    u: Field, v: Field, half_w: float, half_h: float, cx: float = 0.0, cy: float = 0.0, rounding: float = 0
) -> Field:
    """Distance to an axis-parallel rectangle, its corners rounded by `rounding`."""
    qx = np.abs(u - np.float32(cx)) - np.float32(half_w - rounding)
    qy = np.abs(v - np.float32(cy)) - np.float32(half_h - rounding)
    outside = np.hypot(np.maximum(qx, 0), np.maximum(qy, 0))
    return outside + np.minimum(np.maximum(qx, qy), 0) - np.float32(rounding)


def segment(u: Field, v: Field, start: Point, end: Point, radius: float) -> Field:
    """Distance to a straight stroke with round ends."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = max(dx * dx + dy * dy, 1e-9)
    pu, pv = u - np.float32(start[0]), v - np.float32(start[1])
    t = np.clip((pu * np.float32(dx) + pv * np.float32(dy)) / np.float32(length), 0, 1)
    return np.hypot(pu - t * np.float32(dx), pv - t * np.float32(dy)) - np.float32(radius)


def polyline(u: Field, v: Field, points: Sequence[Point], radius: float) -> Field:
    """Distance to a stroke through `points`."""
    strokes = [segment(u, v, a, b, radius) for a, b in pairwise(points)]
    return np.minimum.reduce(strokes)


def polygon(u: Field, v: Field, sides: int, apothem: float, turn: float = 0.0) -> Field:
    """Distance to a regular polygon, `apothem` from its centre to a side."""
    sector = 2 * np.pi / sides
    angle = np.mod(np.arctan2(v, u) - np.float32(turn) + np.float32(sector / 2), np.float32(sector)) - sector / 2
    return (np.hypot(u, v) * np.cos(angle) - np.float32(apothem)).astype(np.float32)


def wavy(u: Field, v: Field, radius: float, depth: float, waves: int, sharp: float = 0.0, turn: float = 0.0) -> Field:
    """Distance to a disc whose rim goes in and out `waves` times by `depth`; `sharp` > 0 squares the waves (teeth)."""
    wave = np.cos(np.arctan2(v, u) * np.float32(waves) + np.float32(turn))
    if sharp:
        wave = np.clip(wave * np.float32(sharp), -1, 1)
    return np.hypot(u, v) - np.float32(radius) - np.float32(depth) * wave


def blob(u: Field, v: Field, center: Point, radius: float, rng: np.random.Generator, rough: float = 0.25) -> Field:
    """Distance to an irregular, slightly stretched spot about `radius` wide."""
    turn, stretch = rng.uniform(0, np.pi), rng.uniform(0.75, 1.3)
    du, dv = u - np.float32(center[0]), v - np.float32(center[1])
    c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    pu, pv = (c * du + s * dv) * np.float32(stretch), (c * dv - s * du) / np.float32(stretch)
    angle = np.arctan2(pv, pu)
    edge = np.full_like(u, radius)
    for waves in (2, 3, 5):
        edge += np.float32(radius * rough * rng.uniform(0.2, 1) / np.sqrt(waves)) * np.cos(
            waves * angle + np.float32(rng.uniform(0, 2 * np.pi))
        )
    return np.hypot(pu, pv) - edge


def cover(distance: Field, softness: float) -> Field:
    """How much of each pixel a shape covers, 0 to 1; `softness` is the transition's width (a pixel: anti-aliasing)."""
    return np.clip(0.5 - distance / np.float32(softness), 0, 1)


def smooth_noise(rng: np.random.Generator, size: int, cells: int) -> Field:
    """Noise with about `cells` bumps along a side, standard deviation about 1 at the bumps."""
    coarse = rng.standard_normal((cells + 1, cells + 1)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def public_functions(module: str) -> dict[str, Any]:
    """The functions that a module defines, without private ones, by name and in order."""
    functions = {name: value for name, value in vars(sys.modules[module]).items() if isfunction(value)}
    return {n: f for n, f in functions.items() if f.__module__ == module and not n.startswith("_")}
