# SPDX-License-Identifier: Apache-2.0

"""Drawn products in number: a seed chooses a design, each photo varies it as a camera in a factory would."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from anomalib_resad.enrollment.files import write_whole
from benchmarks.sources.damage import DEFECTS, damaged
from benchmarks.sources.objects import cables, part, relief, round_thing
from benchmarks.sources.surfaces import Array, Product, Rng, array, grain, noise, printed, stones, traces, weave

FAMILIES: dict[str, Callable[[Rng], Product]] = {
    function.__name__: function
    for function in (grain, weave, stones, array, printed, traces, part, round_thing, relief, cables)
}
KINDS = (3, 5)  # kinds of defects that a product has, from and to


@dataclass(frozen=True)
class Camera:
    """How the photos of a product vary; see :func:`photographed`.

    Args:
        light (float): Deviation of the brightness, in shares.
        shade (float): Deviation of the brightness across the photo.
        shift (float): Deviation of the position, in shares of the side.
        tilt (float): Deviation of the rotation in degrees.
        zoom (float): Deviation of the scale, in shares.
        blur (float): Most blur in pixels.
        grain (float): Noise of the sensor, 0..1.
        quality (int): Quality of the JPEG that the photo once was.
    """

    light: float
    shade: float
    shift: float
    tilt: float
    zoom: float
    blur: float
    grain: float
    quality: int


def _camera(design: Rng) -> Camera:
    limits = {"light": 0.08, "shade": 0.08, "shift": 0.01, "tilt": 1.5, "zoom": 0.015, "blur": 0.9, "grain": 0.02}
    return Camera(
        **{name: float(design.uniform(0, most)) for name, most in limits.items()}, quality=int(design.integers(70, 98))
    )


def _moved(rng: Rng, image: Array, region: Array, camera: Camera) -> tuple[Array, Array]:
    """Position, rotation and scale of one photo, which the defects follow."""
    size = len(image)
    tilt, zoom = rng.normal(0, camera.tilt), 1 + rng.normal(0, camera.zoom)
    matrix: Array = cv2.getRotationMatrix2D((size / 2, size / 2), tilt, zoom)
    matrix[:, 2] += rng.normal(0, camera.shift, 2) * size
    moved = [
        cv2.warpAffine(each, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        for each in (image, region)
    ]
    return moved[0], moved[1]


def photographed(rng: Rng, image: Array, camera: Camera) -> np.ndarray:
    """Light, blur, noise and compression of one photo.

    Args:
        rng (Rng): Random numbers.
        image (Array): Picture in 0..1, shape ``(size, size, 3)``.
        camera (Camera): How photos of the product vary.

    Returns:
        np.ndarray: uint8, shape ``(size, size, 3)``.
    """
    size = len(image)
    light = 1 + rng.normal(0, camera.light) + rng.normal(0, camera.shade) * np.linspace(-1, 1, size)[None, :, None]
    image = image * light + camera.grain * noise(rng, size, 0.4)[..., None]
    blur = rng.uniform(0, camera.blur)
    image = cv2.GaussianBlur(image, (0, 0), blur) if blur > 0.2 else image
    pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, camera.quality])[1]
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR))


def _write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, cv2.imencode(".png", pixels)[1].tobytes())


def make_product(
    root: Path | os.PathLike[str],
    name: str,
    design_of: Callable[[Rng], Product],
    seed: int,
    *,
    train: int = 24,
    good: int = 8,
    defective: int = 24,
    size: int = 256,
) -> Path:
    """Draw a product into ``root``, in the layout of MVTec AD. The same arguments give the same pictures.

    Args:
        root (Path | os.PathLike[str]): Folder of all products.
        name (str): What the product shows; its folder is ``<name>_<seed>``.
        design_of (Callable[[Rng], Product]): Chooses the design, as those of :data:`FAMILIES` do.
        seed (int): Seed of the design, its photos and its defects.
        train (int): Good training photos.
        good (int): Good test photos.
        defective (int): Defective test photos, spread over :data:`KINDS` kinds of defects.
        size (int): Side of the photos in pixels.

    Returns:
        Path: The folder of the product.
    """
    folder = Path(root) / f"{name}_{seed:04d}"
    design = np.random.default_rng([seed, 0])
    product, camera = design_of(design), _camera(design)
    kinds = design.choice(list(DEFECTS), int(design.integers(KINDS[0], KINDS[1] + 1)), replace=False)
    numbers = {("train", "good"): train, ("test", "good"): good}
    numbers |= {("test", str(kind)): len(range(index, defective, len(kinds))) for index, kind in enumerate(kinds)}
    for split, ((part_of, kind), count) in enumerate(numbers.items()):
        for index in range(count):
            rng = np.random.default_rng([seed, 1 + split, index])
            image, region = _moved(rng, *product(rng, size), camera)
            if kind != "good":
                image, mask = damaged(rng, np.clip(image, 0, 1).astype(np.float32), region, kind)
                _write(folder / "ground_truth" / kind / f"{index:03d}_mask.png", (mask * 255).astype(np.uint8))
            _write(folder / part_of / kind / f"{index:03d}.png", photographed(rng, image, camera))
    return folder
