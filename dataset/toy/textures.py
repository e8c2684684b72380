"""The textures of the toy world, which fill the frame.

A texture is a function of the coordinates (u, v) and of a generator that sets its proportions.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dataset.toy.shapes import Field, public_functions, smooth_noise

_FLAT = np.zeros((1, 1), np.float32)


class Surface(NamedTuple):
    """A texture over the frame: brightness around 1, share of the accent colour (0 to 1), height (for shading)."""

    tone: Field
    accent: Field = _FLAT
    height: Field = _FLAT


TextureDrawer = Callable[[Field, Field, np.random.Generator], Surface]


def wood(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    bend = np.sin(u * np.float32(rng.uniform(1, 2)) + np.float32(rng.uniform(0, 6))) * np.float32(0.08)
    lines = np.sin((v + bend) * np.float32(rng.uniform(16, 24)) + 1.5 * np.sin((v + bend) * np.float32(7)))
    return Surface(1 + np.float32(0.09) * lines)


def carpet(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    f = np.float32(rng.uniform(26, 34))
    woven = np.sin(u * f) * np.sin(v * f)
    return Surface(1 + np.float32(0.12) * woven)


def tiles(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    pitch, joint = np.float32(rng.uniform(0.5, 0.7)), np.float32(0.035)
    gap = np.minimum(pitch / 2 - np.abs(np.mod(u, pitch) - pitch / 2), pitch / 2 - np.abs(np.mod(v, pitch) - pitch / 2))
    return Surface(np.ones_like(u), np.clip((joint - gap) * 40 + 0.5, 0, 1), np.clip(gap, 0, 0.08) * np.float32(0.4))


def brick_wall(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    high, joint = np.float32(rng.uniform(0.32, 0.42)), np.float32(0.035)
    row = np.floor(v / high)
    wide = high * np.float32(2.2)
    shifted = u + row * wide / 2
    gap = np.minimum(wide / 2 - np.abs(np.mod(shifted, wide) - wide / 2), high / 2 - np.abs(np.mod(v, high) - high / 2))
    brick = np.sin(row * np.float32(12.9) + np.floor(shifted / wide) * np.float32(78.2))
    return Surface(
        1 + np.float32(0.06) * brick, np.clip((joint - gap) * 40 + 0.5, 0, 1), np.clip(gap, 0, 0.08) * np.float32(0.4)
    )


def leather(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    size = u.shape[0]
    grain = smooth_noise(rng, size, 22)
    return Surface(1 + np.float32(0.04) * grain, height=np.float32(0.012) * grain)


def wire_mesh(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    pitch = np.float32(rng.uniform(0.34, 0.44))
    wire = np.minimum(np.abs(np.mod(u, pitch) - pitch / 2), np.abs(np.mod(v, pitch) - pitch / 2))
    return Surface(np.ones_like(u), np.clip((wire - np.float32(0.06)) * 30 + 0.5, 0, 1), -np.clip(wire, 0, 0.06))


def striped_cloth(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    wave = np.sin(v * np.float32(rng.uniform(9, 16)))
    return Surface(np.ones_like(u), np.clip(wave * 4 + 0.5, 0, 1))


def checkered_floor(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    f = np.float32(rng.uniform(6, 9))
    return Surface(np.ones_like(u), np.clip(np.sin(u * f) * np.sin(v * f) * 12 + 0.5, 0, 1))


def dotted_cloth(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    pitch = np.float32(rng.uniform(0.36, 0.48))
    spots = np.hypot(np.mod(u, pitch) - pitch / 2, np.mod(v, pitch) - pitch / 2)
    return Surface(np.ones_like(u), np.clip((np.float32(0.1) - spots) * 40 + 0.5, 0, 1))


def marble(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    size = u.shape[0]
    veins = np.sin((u + v) * 5 + 1.6 * smooth_noise(rng, size, 4))
    return Surface(1 + np.float32(0.1) * veins)


def corrugated_sheet(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    wave = np.sin(v * np.float32(rng.uniform(14, 20)))
    return Surface(1 + np.float32(0.14) * wave)


# Every function above draws the texture of its name.
TEXTURES: dict[str, TextureDrawer] = {
    name.replace("_", " "): drawer for name, drawer in public_functions(__name__).items()
}
