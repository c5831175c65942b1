# SPDX-License-Identifier: Apache-2.0

"""Drawn masks of any kind: each gives its defect, or is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from anomalib_resad.data.masks import read_mask
from anomalib_resad.enrollment.photos import PhotoError, read_header


def gray(shape: np.ndarray, value: int) -> Image.Image:
    return Image.fromarray(shape.astype(np.uint8) * np.uint8(value))


def wide(shape: np.ndarray, value: int) -> Image.Image:
    return Image.fromarray(shape.astype(np.uint16) * np.uint16(value * 255))


def colored(shape: np.ndarray, value: int) -> Image.Image:
    channels = np.zeros((*shape.shape, 3), np.uint8)
    channels[shape, value % 3] = value
    return Image.fromarray(channels)


def in_alpha(shape: np.ndarray, value: int) -> Image.Image:
    constant = np.full(shape.shape, value % 7 * 40, np.uint8)
    return Image.fromarray(np.dstack([constant] * 3 + [shape * np.uint8(value)]).astype(np.uint8))


def indexed(shape: np.ndarray, value: int) -> Image.Image:
    image = Image.fromarray((shape ^ bool(value % 2)).astype(np.uint8), "P")
    colors = [[0, 0, 0], [value, 9, 9]]
    image.putpalette([each for color in (colors[::-1] if value % 2 else colors) for each in color])
    return image


def compressed(shape: np.ndarray, value: int) -> Image.Image:
    return gray(shape, 255 - value % 100)  # drawn in blocks of 8, as JPEG stores them


DRAWN: dict[str, tuple[Callable[[np.ndarray, int], Image.Image], tuple[str, ...]]] = {
    "gray": (gray, ("png", "bmp", "tif", "pgm")),
    "deep": (wide, ("png", "tif")),
    "bits": (lambda shape, _: Image.fromarray(shape), ("png", "bmp", "tif", "pbm")),
    "colors": (colored, ("png", "bmp", "tif", "ppm")),
    "alpha": (in_alpha, ("png", "tif", "webp")),
    "index": (indexed, ("png", "bmp", "tif")),
    "blocks": (compressed, ("jpg",)),
}


@settings(max_examples=300, deadline=5000, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(sorted(DRAWN)),
    sides=st.tuples(st.integers(8, 13), st.integers(8, 13)),
    share=st.sampled_from([0.0, 0.02, 0.3, 0.6, 1.0]),
    value=st.integers(1, 255),
    fits=st.booleans() | st.just(value=True),
    draw=st.randoms(use_true_random=False),
)
def test_any_mask_gives_its_defect_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    sides: tuple[int, int],
    share: float,
    value: int,
    fits: bool,
    draw: Any,
) -> None:
    folder = tmp_path_factory.getbasetemp()
    shape = np.array([[draw.random() < share for _ in range(sides[1])] for _ in range(sides[0])])
    make, endings = DRAWN[kind]
    shape = np.kron(shape, np.ones((8, 8), bool)) if kind == "blocks" else shape
    assume(kind != "alpha" or not shape.all())  # then nothing is drawn in it
    path, photo = folder / f"mask.{draw.choice(endings)}", folder / "photo.png"
    make(shape, value).save(path, **({"quality": 90} if kind == "blocks" else {"lossless": True}))
    size = (shape.shape[1] + (0 if fits else 1), shape.shape[0])
    Image.new("RGB", size).save(photo)
    edge = np.concatenate([shape[0], shape[-1], shape[:, 0], shape[:, -1]])
    if not fits or (shape.mean() > 0.5 and edge.mean() > 0.5):
        with pytest.raises(PhotoError, match=r"while its photo has|of it is white"):
            read_mask(path, read_header(photo))
    else:
        assert np.array_equal(read_mask(path, read_header(photo)), shape)
