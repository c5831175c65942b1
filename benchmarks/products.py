# SPDX-License-Identifier: Apache-2.0

"""Procedurally drawn products with defects and masks, so that the whole pipeline can be tried without any data set.

Three textures (weave, grain, tiles) and three objects (pill, washer, board), each with defects of several types, in
MVTec AD's folder layout. Every image depends on the seed, its product and its own name alone.
"""

import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Rng = np.random.Generator


def _noise(rng: Rng, size: int, sigma: float) -> Array:
    """Gaussian noise of the given correlation length in pixels, with unit deviation, shape ``(size, size)``."""
    noise = cv2.GaussianBlur(rng.standard_normal((size, size)).astype(np.float32), (0, 0), sigma)
    return noise / noise.std()


def _gray(value: Array, tint: tuple[float, float, float]) -> Array:
    return np.clip(value, 0, 1)[..., None] * np.array(tint, np.float32)


def weave(rng: Rng, size: int) -> tuple[Array, Array]:
    """Woven cloth: two crossing gratings with a random phase and a little drift."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    phase = rng.uniform(0, 2 * np.pi, 2)
    drift = 0.01 * _noise(rng, size, size / 6)
    value = 0.5 + 0.16 * np.sin(2 * np.pi * 22 * (x + drift) + phase[0]) + 0.16 * np.sin(2 * np.pi * 22 * y + phase[1])
    return _gray(value + 0.03 * _noise(rng, size, 0.8), (0.75, 0.85, 1.0)), np.ones((size, size), np.float32)


def grain(rng: Rng, size: int) -> tuple[Array, Array]:
    """Leather-like grain: noise of two lengths."""
    value = 0.45 + 0.10 * _noise(rng, size, size / 60) + 0.05 * _noise(rng, size, size / 20)
    return _gray(value, (0.8, 0.6, 0.45)), np.ones((size, size), np.float32)


def tiles(rng: Rng, size: int) -> tuple[Array, Array]:
    """A tiled wall: bright tiles of slightly different shades, dark grout, a random offset."""
    step = size // 5
    offset = rng.integers(0, step, 2)
    shades = np.kron(rng.uniform(0.66, 0.78, (7, 7)), np.ones((step, step))).astype(np.float32)
    value = shades[offset[0] : offset[0] + size, offset[1] : offset[1] + size]
    y, x = (np.mgrid[:size, :size] + offset[:, None, None]) % step
    value = np.where((x < 3) | (y < 3), 0.3, value) + 0.02 * _noise(rng, size, 1.0)
    return _gray(value.astype(np.float32), (1.0, 0.97, 0.9)), np.ones((size, size), np.float32)


def _disk(size: int, center: tuple[float, float], radius: float) -> Array:
    disk = np.zeros((size, size), np.float32)
    cv2.circle(disk, (round(center[0]), round(center[1])), round(radius), 1.0, -1, cv2.LINE_AA)
    return disk


def _compose(rng: Rng, size: int, shade: Array, shape: Array, tint: tuple[float, float, float]) -> tuple[Array, Array]:
    """Put a shaded object on a dark, slightly uneven table."""
    table = _gray(0.14 + 0.015 * _noise(rng, size, size / 8), (1, 1, 1))
    return table * (1 - shape[..., None]) + _gray(shade, tint) * shape[..., None], shape


def pill(rng: Rng, size: int) -> tuple[Array, Array]:
    """An oval pill with a score line, rotated and moved a little."""
    center = (size / 2 + rng.uniform(-0.04, 0.04) * size, size / 2 + rng.uniform(-0.04, 0.04) * size)
    angle = float(rng.uniform(-20, 20))
    shape = np.zeros((size, size), np.float32)
    cv2.ellipse(shape, (center, (0.72 * size, 0.44 * size), angle), 1.0, -1, cv2.LINE_AA)
    shade = 0.82 * cv2.GaussianBlur(shape, (0, 0), size / 40) + 0.015 * _noise(rng, size, 2.0)
    across = np.deg2rad(angle + 90)
    reach = 0.2 * size * np.array([np.cos(across), np.sin(across)])
    start, end = (tuple(int(value) for value in np.array(center) + sign * reach) for sign in (-1, 1))
    cv2.line(shade, start, end, 0.55, max(2, size // 70), cv2.LINE_AA)
    return _compose(rng, size, shade, shape, (1.0, 0.95, 0.85))


def washer(rng: Rng, size: int) -> tuple[Array, Array]:
    """A steel washer with a ring of holes, rotated at random."""
    center = (size / 2 + rng.uniform(-0.03, 0.03) * size, size / 2 + rng.uniform(-0.03, 0.03) * size)
    shape = _disk(size, center, 0.40 * size) - _disk(size, center, 0.14 * size)
    turn = rng.uniform(0, 2 * np.pi)
    for hole in range(8):
        angle = turn + hole * np.pi / 4
        place = (center[0] + 0.27 * size * np.cos(angle), center[1] + 0.27 * size * np.sin(angle))
        shape -= _disk(size, place, 0.045 * size)
    shape = np.clip(shape, 0, 1)
    shade = 0.6 + 0.05 * _noise(rng, size, 1.2)
    return _compose(rng, size, shade, shape, (0.92, 0.96, 1.0))


def board(rng: Rng, size: int) -> tuple[Array, Array]:
    """A circuit board: one fixed layout of traces and pads, moved a little."""
    layout = np.random.default_rng(7)  # the layout belongs to the product, not to the photo
    shift = rng.integers(-size // 50, size // 50 + 1, 2)
    value = np.full((size, size), 0.28, np.float32)
    for lane in np.linspace(0.1, 0.9, 9):
        bend, other = layout.uniform(0.2, 0.8), lane + layout.choice([-0.05, 0.0, 0.05])
        points = np.array([[0.0, lane], [bend, lane], [bend + 0.05, other], [1.0, other]]) * size + shift
        cv2.polylines(value, [points.astype(np.int32)], isClosed=False, color=0.6, thickness=max(2, size // 60))
        for pad in layout.uniform(0.05, 0.95, 2):
            cv2.circle(value, (int(pad * size + shift[0]), int(lane * size + shift[1])), size // 36, 0.85, -1)
    return _gray(value + 0.02 * _noise(rng, size, 1.0), (0.5, 1.0, 0.6)), np.ones((size, size), np.float32)


PRODUCTS: dict[str, Callable[[Rng, int], tuple[Array, Array]]] = {
    "weave": weave,
    "grain": grain,
    "tiles": tiles,
    "pill": pill,
    "board": board,
    "washer": washer,
}


def _scratch(rng: Rng, size: int, start: NDArray[np.float64]) -> Array:
    """A thin, nearly straight line."""
    shape = np.zeros((size, size), np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    end = start + rng.uniform(0.15, 0.35) * size * np.array([np.cos(angle), np.sin(angle)])
    cv2.line(shape, start.astype(int).tolist(), end.astype(int).tolist(), 1.0, max(2, size // 90), cv2.LINE_AA)
    return shape


def _crack(rng: Rng, size: int, start: NDArray[np.float64]) -> Array:
    """A jagged line: a random walk that keeps its direction."""
    shape = np.zeros((size, size), np.float32)
    angles = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.5, 14))
    steps = 0.025 * size * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    points = np.concatenate([start[None], start + np.cumsum(steps, axis=0)])
    cv2.polylines(shape, [points.astype(np.int32)], isClosed=False, color=1.0, thickness=max(1, size // 110))
    return cv2.GaussianBlur(shape, (0, 0), 0.6).astype(np.float32)


def _spot(rng: Rng, size: int, start: NDArray[np.float64]) -> Array:
    """A filled, uneven blob."""
    distance = np.hypot(*(np.mgrid[:size, :size][::-1] - start[:, None, None]))
    edge = rng.uniform(0.03, 0.07) * size * (1 + 0.3 * _noise(rng, size, size / 16))
    return np.clip(edge - distance, 0, 1).astype(np.float32)


DEFECTS: dict[str, Callable[[Rng, int, NDArray[np.float64]], Array]] = {
    "scratch": _scratch,
    "crack": _crack,
    "spot": _spot,
}


def _damage(rng: Rng, image: Array, region: Array, defect: str) -> tuple[Array, Array]:
    """Paint a defect inside the object; returns the image and the mask of what was painted."""
    size = image.shape[0]
    inner = cv2.erode(region, np.ones((9, 9), np.uint8)) > 0.5
    margin = size // 8
    inner[:margin], inner[-margin:], inner[:, :margin], inner[:, -margin:] = False, False, False, False
    rows, columns = np.nonzero(inner)
    mask = np.zeros((size, size), np.float32)
    while (mask > 0.3).sum() < 20:  # a defect may fall off a small object
        place = rng.integers(len(rows))
        mask = DEFECTS[defect](rng, size, np.array([columns[place], rows[place]], float)) * region
    dark = rng.random() < 0.6
    color = image * rng.uniform(0.2, 0.5) if dark else 1 - (1 - image) * rng.uniform(0.2, 0.5)
    return image * (1 - mask[..., None]) + color * mask[..., None], (mask > 0.3).astype(np.float32)


def _write(path: Path, image: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    cv2.imwrite(str(path), pixels[..., ::-1] if pixels.ndim == 3 else pixels)


def make_product(
    root: Path, product: str, *, train: int = 24, good: int = 12, defective: int = 6, size: int = 256, seed: int = 0
) -> Path:
    """Draw one product into ``root/product``.

    Args:
        root (Path): Folder of all products.
        product (str): One of :data:`PRODUCTS`.
        train (int): Good training images.
        good (int): Good test images.
        defective (int): Test images of each defect type.
        size (int): Side of the images in pixels.
        seed (int): Seed.

    Returns:
        Path: The folder of the product.
    """
    folder = root / product
    counts = {"train/good": train, "test/good": good} | {f"test/{defect}": defective for defect in DEFECTS}
    for split, count in counts.items():
        kind = split.rpartition("/")[2]
        for index in range(count):
            rng = np.random.default_rng([seed, *map(zlib.crc32, (product.encode(), split.encode())), index])
            image, region = PRODUCTS[product](rng, size)
            if kind in DEFECTS:
                image, mask = _damage(rng, image, region, kind)
                _write(folder / "ground_truth" / kind / f"{index:03d}_mask.png", mask)
            _write(folder / split / f"{index:03d}.png", image)
    return folder
