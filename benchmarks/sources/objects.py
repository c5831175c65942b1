# SPDX-License-Identifier: Apache-2.0

"""Products that are objects before a background: machined parts, castings, round and glossy things, cables."""

import cv2
import numpy as np

from benchmarks.sources.surfaces import Array, Drawing, Product, Rng, colored, colors, noise


def _outline(design: Rng) -> Array:
    """Corners of a closed shape around 0, radius at most 1, shape ``(N, 2)``: round, toothed or with straight edges."""
    kind = design.integers(3)
    angles = np.linspace(0, 2 * np.pi, 240, endpoint=False)
    if kind == 0:  # waves of a few orders
        waves = [design.uniform(-0.08, 0.08) * np.cos(n * angles + design.uniform(0, 6)) for n in range(2, 6)]
        radius: Array = 0.8 + np.sum(waves, axis=0)
    elif kind == 1:  # teeth
        radius = 0.85 + 0.1 * np.sign(np.sin(design.integers(6, 24) * angles))
    else:
        turns = np.sort(design.uniform(0, 2 * np.pi, int(design.integers(4, 9))))
        corners = np.stack([np.cos(turns), np.sin(turns)], 1) * design.uniform(0.6, 0.95, (len(turns), 1))
        return corners.astype(np.float32)
    stretch = np.array([1.0, design.uniform(0.5, 1.0)])
    return (np.stack([np.cos(angles), np.sin(angles)], 1) * radius[:, None] * stretch).astype(np.float32)


def _placed(points: Array, size: int, center: Array, scale: float, degrees: float) -> Array:
    turn = np.deg2rad(degrees)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return ((points @ matrix.T) * scale * size / 2 + center * size).astype(np.int32)


def part(design: Rng) -> Product:
    """A machined or cast part with holes, slots and edges; it lies at any angle, or always the same way."""
    outline, palette = _outline(design), colors(design, 4, 0.35)
    holes = [(design.uniform(-0.5, 0.5, 2), design.uniform(0.04, 0.16)) for _ in range(design.integers(0, 7))]
    slots = [design.uniform(-0.5, 0.5, (2, 2)) for _ in range(design.integers(0, 5))]
    free = design.random() < 0.45
    scale, rough, dark = design.uniform(0.6, 0.95), design.uniform(0.01, 0.08), design.uniform(0.03, 0.5)
    length = design.uniform(0.8, 4)

    def draw(rng: Rng, size: int) -> Drawing:
        degrees = rng.uniform(0, 360) if free else rng.normal(0, 1.5)
        center = 0.5 + rng.normal(0, 0.015, 2)

        def place(points: Array) -> Array:
            return _placed(points, size, center, scale, degrees)

        shape = np.zeros((size, size), np.float32)
        cv2.fillPoly(shape, [place(outline)], 1.0, cv2.LINE_AA)
        value = 0.55 * shape
        for where, radius in holes:
            spot = place(where[None])[0].tolist()
            cv2.circle(value, spot, int(radius * scale * size / 2) + 2, 0.8, -1, cv2.LINE_AA)
            cv2.circle(value, spot, int(radius * scale * size / 2), 0.12, -1, cv2.LINE_AA)
        for slot in slots:
            start, end = place(slot).tolist()
            cv2.line(value, start, end, 0.35, max(2, size // 50), cv2.LINE_AA)
        relief = cv2.GaussianBlur(value, (0, 0), 2)
        value = value + 1.2 * (np.roll(relief, (2, 2), (0, 1)) - relief) + rough * noise(rng, size, length)
        image = colored((value * shape).astype(np.float32), palette)
        table = dark + 0.015 * noise(rng, size, size / 8)
        return (image * shape[..., None] + table[..., None] * (1 - shape[..., None])).astype(np.float32), shape

    return draw


def round_thing(design: Rng) -> Product:
    """Bottles, lids and rings from above: circles in circles, with a highlight that moves with the light."""
    radii = np.sort(design.uniform(0.15, 0.92, int(design.integers(2, 7))))[::-1]
    palette, shades = colors(design, 5, 0.4), design.uniform(0.1, 0.95, 8)
    gloss, marks = design.uniform(0, 0.5), int(design.choice([0, 0, 6, 12, 30]))

    def draw(rng: Rng, size: int) -> Drawing:
        center = (0.5 + rng.normal(0, 0.012, 2)) * size
        y, x = np.mgrid[:size, :size].astype(np.float32)
        distance = np.hypot(y - center[1], x - center[0]) / (size / 2)
        angle = np.arctan2(y - center[1], x - center[0])
        value = np.full((size, size), 0.1, np.float32)
        for radius, shade in zip(radii, shades, strict=False):
            edge = 1 / (1 + np.exp(np.clip((distance - radius) * 120, -50, 50)))
            value = value * (1 - edge) + shade * edge
        if marks:
            value += (
                0.15 * (np.cos(marks * angle + rng.uniform(0, 6)) > 0.6) * (np.abs(distance - radii[0] * 0.8) < 0.06)
            )
        light = rng.normal(0.6, 0.15)
        value += gloss * np.exp(-(((angle - light) / 0.25) ** 2)) * (distance < radii[0])
        value += 0.015 * noise(rng, size, 1.0)
        return colored(value.astype(np.float32), palette), (distance < radii[0]).astype(np.float32)

    return draw


def relief(design: Rng) -> Product:
    """A casting or molding whose pattern recurs nowhere: one fixed landscape, lit from a side that varies a little."""
    pattern_seed = int(design.integers(2**31))
    lengths, palette = design.uniform(3, 30, 2), colors(design, 4, 0.4)
    rough = design.uniform(0.01, 0.05)

    def draw(rng: Rng, size: int) -> Drawing:
        pattern = np.random.default_rng(pattern_seed)
        height = noise(pattern, size, lengths[0]) + 0.6 * noise(pattern, size, lengths[1])
        height = np.where(height > 0.3, height + 1.0, height).astype(np.float32)
        turn = 0.8 + rng.normal(0, 0.1)
        slope_x, slope_y = cv2.Sobel(height, cv2.CV_32F, 1, 0), cv2.Sobel(height, cv2.CV_32F, 0, 1)
        value = 0.5 + 0.08 * (np.cos(turn) * slope_x + np.sin(turn) * slope_y) + rough * noise(rng, size, 1.0)
        return colored(value.astype(np.float32), palette), np.ones((size, size), np.float32)

    return draw


def cables(design: Rng) -> Product:
    """Parallel strands, zippers, brushes: many alike, side by side, slightly bent."""
    count, palette = int(design.integers(4, 18)), colors(design, 5, 0.4)
    order, twist = design.uniform(0.2, 0.9, count), design.uniform(0, 30)
    upright = bool(design.random() < 0.5)

    def draw(rng: Rng, size: int) -> Drawing:
        y, x = np.mgrid[:size, :size].astype(np.float32) / size
        x = x + 0.012 * noise(rng, size, size / 5) + rng.normal(0, 0.004)
        lane = np.clip(x * count, 0, count - 1e-3)
        across = lane - np.floor(lane) - 0.5
        value = order[lane.astype(int)] * np.sqrt(np.clip(1 - 3.6 * across**2, 0, 1))
        value += 0.12 * np.sin(2 * np.pi * (twist * y + 2 * across)) + 0.02 * noise(rng, size, 1.0)
        value = value if upright else value.T
        return colored(np.ascontiguousarray(value).astype(np.float32), palette), np.ones((size, size), np.float32)

    return draw
