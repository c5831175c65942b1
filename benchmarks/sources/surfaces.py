# SPDX-License-Identifier: Apache-2.0

"""Products that are all surface: textures, weaves, arrays, prints. Each is a function of one seed for the product.

A surface gives, for each photo, a picture in 0..1 of shape ``(size, size, 3)`` and the region in which defects may lie.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # float32; OpenCV says less of what it returns
Rng = np.random.Generator
Drawing = tuple[Array, Array]
Product = Callable[[Rng, int], Drawing]


def noise(rng: Rng, size: int, length: float, across: float | None = None, angle: float = 0.0) -> Array:
    """Gaussian noise of unit deviation, shape ``(size, size)``.

    Args:
        rng (Rng): Random numbers.
        size (int): Side in pixels.
        length (float): Correlation length in pixels.
        across (float | None): Correlation length across it; the same by default.
        angle (float): Direction of ``length`` in degrees.
    """
    side = size if across is None else int(1.5 * size)
    values: Array = rng.standard_normal((side, side)).astype(np.float32)
    values = cv2.GaussianBlur(values, (0, 0), sigmaX=length, sigmaY=length if across is None else across)
    if across is not None:
        turn = cv2.getRotationMatrix2D((side / 2, side / 2), angle, 1.0)
        edge = (side - size) // 2
        values = cv2.warpAffine(values, turn, (side, side), borderMode=cv2.BORDER_REFLECT)
        values = values[edge : edge + size, edge : edge + size]
    return (values / max(float(values.std()), 1e-6)).astype(np.float32)


def colors(rng: Rng, count: int, spread: float = 0.35) -> Array:
    """Related colors in 0..1, shape ``(count, 3)``, from dark to light around one tint."""
    tint = 1 + rng.uniform(-0.25, 0.25, 3)
    levels = np.clip(rng.uniform(0.3, 0.7) + np.linspace(-spread, spread, count), 0.05, 0.95)
    return np.clip(levels[:, None] * tint + rng.normal(0, 0.02, (count, 3)), 0, 1).astype(np.float32)


def colored(value: Array, palette: Array) -> Array:
    """Map values 0..1 onto a palette, shape ``(H, W)`` to ``(H, W, 3)``."""
    at = np.clip(value, 0, 1) * (len(palette) - 1)
    low = np.minimum(at.astype(int), len(palette) - 2)
    share = (at - low)[..., None]
    return (palette[low] * (1 - share) + palette[low + 1] * share).astype(np.float32)


def everywhere(size: int) -> Array:
    """A region without limits."""
    return np.ones((size, size), np.float32)


def grain(design: Rng) -> Product:
    """Granular or brushed surfaces, leather and wood: noise of one to three lengths, along a direction or not."""
    palette = colors(design, 3, design.uniform(0.08, 0.35))
    layers = [
        (design.uniform(0.8, 14), design.choice([1.0, 1.0, 6.0, 20.0]), design.uniform(0.3, 1))
        for _ in range(design.integers(1, 4))
    ]
    angle = float(design.choice([0, 90, design.uniform(0, 180)]))
    veins = bool(design.random() < 0.3)

    def draw(rng: Rng, size: int) -> Drawing:
        value: Array = np.zeros((size, size), np.float32)
        for length, ratio, weight in layers:
            value += weight * noise(rng, size, length * ratio, length, angle)
        value /= max(float(value.std()), 1e-6)
        value = np.abs(value) * 0.5 if veins else 0.5 + 0.2 * value
        return colored(value.astype(np.float32), palette), everywhere(size)

    return draw


def weave(design: Rng) -> Product:
    """Woven or ribbed cloth, grids and meshes: two crossing waves that drift a little."""
    palette = colors(design, 3, design.uniform(0.1, 0.4))
    waves = design.uniform(8, 34, 2) * np.array([1, design.choice([0.0, 1.0, 1.0])])
    power, angle, drift = design.uniform(0.4, 2), design.uniform(0, 90) * (design.random() < 0.5), design.uniform(0, 1)

    def draw(rng: Rng, size: int) -> Drawing:
        y, x = np.mgrid[:size, :size].astype(np.float32) / size
        turn = np.deg2rad(angle + rng.normal(0, 1))
        x, y = x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)
        bend = 0.01 * drift * noise(rng, size, size / 6)
        phases = rng.uniform(0, 2 * np.pi, 2)
        parts = [
            np.sin(2 * np.pi * wave * (axis + bend) + p) for wave, axis, p in zip(waves, (x, y), phases, strict=True)
        ]
        value = (parts[0] + parts[1]) / 2
        value = 0.5 + 0.4 * np.sign(value) * np.abs(value) ** power + 0.05 * noise(rng, size, 0.8)
        return colored(value.astype(np.float32), palette), everywhere(size)

    return draw


def stones(design: Rng) -> Product:
    """Terrazzo, cobbles, cells: the nearest of many points decides the color."""
    palette = colors(design, 6, design.uniform(0.15, 0.45))
    count, joint = int(design.integers(30, 500)), design.uniform(0, 3)

    def draw(rng: Rng, size: int) -> Drawing:
        seeds = np.ones((size, size), np.uint8)
        points = rng.integers(0, size, (count, 2))
        seeds[points[:, 0], points[:, 1]] = 0
        distance, labels = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5)
        shade = rng.uniform(0, 1, labels.max() + 1).astype(np.float32)[labels]
        edges = cv2.morphologyEx(shade, cv2.MORPH_GRADIENT, np.ones((3, 3))) > 0
        value = shade + 0.04 * noise(rng, size, 1.0) - 0.01 * distance / max(1, count / 100)
        image = colored(value.astype(np.float32), palette)
        if joint > 1:
            image = np.where(edges[..., None], palette[0] * 0.7, image)
        return image.astype(np.float32), everywhere(size)

    return draw


def _glyph(design: Rng, side: int) -> Array:
    """A small part, 0..1, shape ``(side, side)``: a disk, ring, bar, cross or polygon."""
    shape = np.zeros((side, side), np.float32)
    middle, reach = (side // 2, side // 2), int(side * design.uniform(0.25, 0.46))
    kind = design.integers(5)
    if kind == 0:
        cv2.circle(shape, middle, reach, 1.0, -1, cv2.LINE_AA)
    elif kind == 1:
        cv2.circle(shape, middle, reach, 1.0, max(2, reach // 3), cv2.LINE_AA)
    elif kind == 2:
        half = (reach, max(2, int(reach * design.uniform(0.3, 0.9))))
        start, end = ([m + sign * h for m, h in zip(middle, half, strict=True)] for sign in (-1, 1))
        cv2.rectangle(shape, start, end, 1.0, -1)
    elif kind == 3:
        for step in ((reach, 0), (0, reach)):
            start, end = ([m + sign * s for m, s in zip(middle, step, strict=True)] for sign in (-1, 1))
            cv2.line(shape, start, end, 1.0, max(2, reach // 2), cv2.LINE_AA)
    else:
        corners = np.sort(design.uniform(0, 2 * np.pi, int(design.integers(3, 8))))
        points = np.stack([np.cos(corners), np.sin(corners)], 1) * reach + side / 2
        cv2.fillPoly(shape, [points.astype(np.int32)], 1.0, cv2.LINE_AA)
    return shape


def array(design: Rng) -> Product:
    """Parts in rows and columns: pins, pads, holes, tablets in a blister."""
    pitch = int(design.integers(18, 72))
    glyph = _glyph(design, pitch)
    palette = colors(design, 4, 0.4)
    jitter, raised, texture = design.uniform(0, 0.06), design.random() < 0.5, design.uniform(0, 0.04)

    def draw(rng: Rng, size: int) -> Drawing:
        cells = size // pitch + 2
        value = np.tile(glyph, (cells, cells))
        if jitter > 0.02:  # each part a little out of place
            rows = [np.roll(glyph, rng.normal(0, jitter * pitch, 2).astype(int), (0, 1)) for _ in range(cells * cells)]
            value = np.concatenate([np.concatenate(rows[i * cells : (i + 1) * cells], 1) for i in range(cells)], 0)
        offset = rng.integers(0, max(2, pitch // 8), 2)
        value = value[offset[0] : offset[0] + size, offset[1] : offset[1] + size]
        if raised:
            light = cv2.GaussianBlur(value, (0, 0), pitch / 12)
            value = value * 0.7 + 2 * (np.roll(light, (2, 2), (0, 1)) - light)
        value = 0.2 + 0.6 * value + texture * noise(rng, size, 1.0)
        return colored(value.astype(np.float32), palette), everywhere(size)

    return draw


def printed(design: Rng) -> Product:
    """A label or plate: fixed text, bars, frames and symbols on a plain ground."""
    layout_seed = int(design.integers(2**31))
    ground, ink = colors(design, 2, design.uniform(0.2, 0.4))[:: design.choice([-1, 1])]

    def draw(rng: Rng, size: int) -> Drawing:
        layout = np.random.default_rng(layout_seed)
        sheet = np.zeros((size, size), np.float32)
        for _ in range(int(layout.integers(4, 12))):
            x, y = (int(value) for value in layout.uniform(0.02, 0.8, 2) * size)
            kind = layout.integers(4)
            if kind == 0:
                text = "".join(layout.choice(list("ABCDEFGHKLMNPRSTXYZ0123456789"), int(layout.integers(2, 10))))
                scale = float(layout.uniform(0.4, 1.6))
                letters = np.zeros((size, size), np.uint8)  # text is drawn in bytes only
                cv2.putText(
                    letters,
                    text,
                    (x, y + 20),
                    cv2.FONT_HERSHEY_SIMPLEX,
                    scale,
                    255,
                    int(layout.integers(1, 4)),
                    cv2.LINE_AA,
                )
                sheet = np.maximum(sheet, letters.astype(np.float32) / 255)
            elif kind == 1:
                for bar in np.cumsum(layout.integers(2, 7, 16)):
                    cv2.line(sheet, (x + int(bar), y), (x + int(bar), y + size // 8), 1.0, int(layout.integers(1, 4)))
            elif kind == 2:
                cv2.rectangle(
                    sheet,
                    (x, y),
                    (x + int(layout.integers(20, 120)), y + int(layout.integers(10, 80))),
                    1.0,
                    int(layout.integers(1, 4)),
                )
            else:
                part = _glyph(layout, int(layout.integers(20, 60)))
                end = (min(size, y + len(part)), min(size, x + len(part)))
                sheet[y : end[0], x : end[1]] = np.maximum(
                    sheet[y : end[0], x : end[1]], part[: end[0] - y, : end[1] - x]
                )
        image = ground * (1 - sheet[..., None]) + ink * sheet[..., None]
        return (image + 0.012 * noise(rng, size, 1.2)[..., None]).astype(np.float32), everywhere(size)

    return draw


def traces(design: Rng) -> Product:
    """Wiring whose layout is another one in each photo: only its elements recur."""
    palette = colors(design, 3, 0.4)
    width, lanes = int(design.integers(2, 7)), int(design.integers(8, 22))
    fixed = design.random() < 0.4
    layout_seed = int(design.integers(2**31))

    def draw(rng: Rng, size: int) -> Drawing:
        layout = np.random.default_rng(layout_seed) if fixed else rng
        value = np.full((size, size), 0.15, np.float32)
        for lane in np.linspace(0.04, 0.96, lanes):
            bends = np.sort(layout.uniform(0.05, 0.95, int(layout.integers(0, 4))))
            x, y = [0.0], [float(lane)]
            for bend in bends:
                step = layout.choice([-1, 0, 1]) / lanes
                x += [bend, bend + abs(step)]
                y += [y[-1], y[-1] + step]
            points = (np.array([[*x, 1.0], [*y, y[-1]]]).T * size).astype(np.int32)
            points = points if lanes % 2 else points[:, ::-1].copy()
            cv2.polylines(value, [points], isClosed=False, color=0.65, thickness=width, lineType=cv2.LINE_AA)
            for point in points[1:-1:2]:
                cv2.circle(value, point.tolist(), width + 2, 0.95, -1, cv2.LINE_AA)
        return colored(value + 0.02 * noise(rng, size, 1.0), palette), everywhere(size)

    return draw
