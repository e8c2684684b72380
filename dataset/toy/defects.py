"""The ways in which a thing of the toy world is damaged.

A defect is a function of a `Site` (where, on what, how large) that returns a `Change`: what it does to the drawing, and
the region that it covers. Coordinates and distances are those of the image (-1 to 1).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dataset.toy.shapes import Field, Point, blob, circle, cover, grid, polyline, public_functions

INSIDE = np.array([0.05, 0.05, 0.06], np.float32)  # the dark that is seen in a hole


@dataclass(frozen=True)
class Site:
    """Where a defect goes.

    Its own generator, its centre and radius, the colour of what lies around it (RGB, 0 to 1), and the direction
    (radians) that leads out of the object; None on a texture, which has no outside.
    """

    size: int
    rng: np.random.Generator
    center: Point
    radius: float
    color: NDArray[np.float32]
    outward: float | None

    @property
    def grid(self) -> tuple[Field, Field]:
        return grid(self.size)

    @property
    def soft(self) -> float:
        """The width of an edge."""
        return 2.2 / self.size


@dataclass
class Change:
    """What a defect does (bend the coordinates, cut away, paint, press in), and the region that it covers, 0 to 1."""

    region: Field
    warp: tuple[Field, Field] | None = None
    cut: Field | None = None
    paints: list[tuple[Field, NDArray[np.float32]]] = field(default_factory=list)
    height: Field | None = None


def _against(color: NDArray[np.float32], strength: float) -> NDArray[np.float32]:
    """`color` moved towards black where it is light, towards white where it is dark."""
    target = 0.0 if float(color.mean()) > 0.42 else 1.0
    return (color * (1 - strength) + target * strength).astype(np.float32)


def _foreign_color(rng: np.random.Generator, color: NDArray[np.float32]) -> NDArray[np.float32]:
    """A colour that nobody takes for `color`: far from it in brightness or hue."""
    while True:
        other = rng.uniform(0, 1, 3).astype(np.float32)
        if np.abs(other - color).sum() > 1.1 and np.abs(other - color).max() > 0.45:
            return other


def _curve(rng: np.random.Generator, center: Point, length: float, bend: float, steps: int, jag: float) -> list[Point]:
    """Points along a stroke through `center`: its direction turns by `bend` in all and shakes by `jag` at each step."""
    heading = rng.uniform(0, 2 * np.pi) - bend / 2
    points, x, y = [], 0.0, 0.0
    for _ in range(steps + 1):
        points.append((x, y))
        angle = heading + rng.normal(0, jag)
        x, y = x + np.cos(angle) * length / steps, y + np.sin(angle) * length / steps
        heading += bend / steps
    middle = points[len(points) // 2]
    return [(px - middle[0] + center[0], py - middle[1] + center[1]) for px, py in points]


def scratch(site: Site) -> Change:
    width = site.rng.uniform(0.03, 0.042)
    stroke = polyline(
        *site.grid, _curve(site.rng, site.center, 3.4 * site.radius, site.rng.normal(0, 0.5), 3, 0.0), width
    )
    if site.rng.random() < 0.5:
        shift = site.rng.uniform(0.1, 0.16)
        stroke = np.minimum(stroke, np.roll(stroke, int(shift * site.size / 2), axis=int(site.rng.integers(2))))
    return Change(
        cover(stroke - np.float32(0.02), site.soft),
        paints=[(cover(stroke, site.soft), _against(site.color, site.rng.uniform(0.75, 0.95)))],
    )


def crack(site: Site) -> Change:
    width = site.rng.uniform(0.028, 0.038)
    trunk = _curve(site.rng, site.center, 3.4 * site.radius, 0.0, 6, 0.55)
    lines = polyline(*site.grid, trunk, width)
    for start in (2, 4):
        branch = _curve(site.rng, trunk[start], 2.0 * site.radius, 0.0, 4, 0.5)
        lines = np.minimum(lines, polyline(*site.grid, branch[2:], width * 0.8))
    dark = site.color * np.float32(0.12) if site.color.mean() > 0.25 else site.color * 0.3 + np.float32(0.6)
    return Change(
        cover(lines - np.float32(0.02), site.soft), paints=[(cover(lines, site.soft), dark.astype(np.float32))]
    )


def hole(site: Site) -> Change:
    gap = blob(*site.grid, site.center, site.radius * 0.75, site.rng, 0.2)
    return Change(cover(gap, site.soft), paints=[(cover(gap, site.soft), INSIDE)])


def stain(site: Site) -> Change:
    spot = blob(*site.grid, site.center, site.radius, site.rng, 0.35)
    tint = _foreign_color(site.rng, site.color)
    alpha = cover(spot, 5 * site.soft) * np.float32(site.rng.uniform(0.8, 0.95))
    return Change(cover(spot, site.soft), paints=[(alpha, tint)])


def contamination(site: Site) -> Change:
    specks = []
    for _ in range(int(site.rng.integers(5, 9))):
        angle, far = site.rng.uniform(0, 2 * np.pi), site.radius * np.sqrt(site.rng.uniform(0, 1.3))
        place = (site.center[0] + far * np.cos(angle), site.center[1] + far * np.sin(angle))
        specks.append(blob(*site.grid, place, site.rng.uniform(0.06, 0.095), site.rng, 0.4))
    spots = np.minimum.reduce(specks)
    color = _foreign_color(site.rng, site.color)
    return Change(cover(spots - np.float32(0.015), site.soft), paints=[(cover(spots, site.soft), color)])


def missing_part(site: Site) -> Change:
    bite = blob(*site.grid, site.center, site.radius * 1.1, site.rng, 0.3)
    return Change(cover(bite, site.soft), cut=bite)


def deformation(site: Site) -> Change:
    reach = site.radius * 2.2
    away = circle(*site.grid, 0, *site.center) / np.float32(reach)
    bump = np.clip(1 - away * away, 0, 1) ** 2
    push = site.rng.uniform(0.4, 0.55) * reach
    angle = site.rng.uniform(0, 2 * np.pi) if site.outward is None else site.outward + site.rng.choice([0, np.pi])
    return Change(
        cover((away - np.float32(0.62)) * np.float32(reach), site.soft),
        warp=(bump * np.float32(push * np.cos(angle)), bump * np.float32(push * np.sin(angle))),
    )


def fracture(site: Site) -> Change:
    bite = blob(*site.grid, site.center, site.radius * 1.1, site.rng, 0.3)
    face = cover(bite - np.float32(0.09), site.soft) * np.float32(0.9)
    return Change(cover(bite - np.float32(0.09), site.soft), cut=bite, paints=[(face, _against(site.color, 0.75))])


def bend(site: Site) -> Change:
    change = deformation(site)
    creases = []
    for _ in range(3):
        place = tuple(np.array(site.center) + site.rng.uniform(-0.5, 0.5, 2) * site.radius)
        creases.append(polyline(*site.grid, _curve(site.rng, place, 1.6 * site.radius, 0.0, 2, 0.2), 0.025))
    change.paints.append((cover(np.minimum.reduce(creases), site.soft), _against(site.color, 0.7)))
    return change


def burn(site: Site) -> Change:
    spot = blob(*site.grid, site.center, site.radius, site.rng, 0.3)
    halo = cover(spot, 10 * site.soft) * np.float32(0.8)
    core = cover(spot + np.float32(0.4 * site.radius), 6 * site.soft) * np.float32(0.9)
    brown, black = np.array([0.32, 0.18, 0.08], np.float32), np.array([0.05, 0.04, 0.04], np.float32)
    return Change(cover(spot, site.soft), paints=[(halo, brown), (core, black)])


def dent(site: Site) -> Change:
    away = circle(*site.grid, 0, *site.center) / np.float32(site.radius)
    pit = -(np.clip(1 - away * away, 0, 1) ** 2) * np.float32(site.radius * 2.0)
    return Change(cover((away - 1) * np.float32(site.radius), site.soft), height=pit)


def fibre(site: Site) -> Change:
    width = site.rng.uniform(0.03, 0.042)
    turn = site.rng.choice([-1, 1]) * site.rng.uniform(3, 6)
    thread = polyline(*site.grid, _curve(site.rng, site.center, 6 * site.radius, turn, 11, 0.1), width)
    color = _foreign_color(site.rng, site.color)
    return Change(cover(thread - np.float32(0.02), site.soft), paints=[(cover(thread, site.soft), color)])


def peeling(site: Site) -> Change:
    x, y = site.grid
    corners = int(site.rng.integers(5, 8))
    angle = np.arctan2(y - site.center[1], x - site.center[0])
    jagged = np.interp(
        angle, np.linspace(-np.pi, np.pi, corners), site.rng.uniform(0.6, 1.25, corners), period=2 * np.pi
    )
    flake = circle(x, y, 0, *site.center) - (site.radius * jagged).astype(np.float32)
    edge = cover(np.abs(flake) - np.float32(0.02), site.soft) * np.float32(0.8)
    under = _against(site.color, 0.6)
    dark = (site.color * np.float32(0.25)).astype(np.float32)
    return Change(cover(flake, site.soft), paints=[(cover(flake, site.soft), under), (edge, dark)])


DEFECTS: dict[str, Callable[[Site], Change]] = public_functions(__name__)
# These belong at the outline of an object, not inside it.
AT_THE_EDGE = frozenset({"missing_part", "deformation", "fracture", "bend"})
