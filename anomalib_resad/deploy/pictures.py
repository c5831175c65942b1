# SPDX-License-Identifier: Apache-2.0

"""Anomaly maps over photos, with numpy and Pillow alone."""

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw

CLEAR, YELLOW = 0.4, 0.75  # of normalized maps
BOX = (0, 229, 255)  # of regions: it stands out from the map's red and yellow


def resized(anomaly_map: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """A map at another size, float32: bilinear, each side by its own scale, as photos are squeezed into the model.

    Args:
        anomaly_map (np.ndarray): Map of any size, shape ``(H, W)``.
        size (Sequence[int]): Height and width.
    """
    height, width = size
    picture = Image.fromarray(np.ascontiguousarray(anomaly_map, dtype=np.float32))
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def overlay(pixels: np.ndarray, anomaly_map: np.ndarray, stretch: bool = False) -> Image.Image:
    """Lay a map over its photo: clear up to :data:`CLEAR`, red at the threshold, 0.5, yellow at :data:`YELLOW`.

    So what lies well below the threshold leaves the photo as it is, and all photos are on one scale.

    Args:
        pixels (np.ndarray): The photo, uint8, shape ``(H, W, 3)``.
        anomaly_map (np.ndarray): Map of any size, 0 to 1.
        stretch (bool): Use the map's own range: for models that learned no threshold, whose 0.5 means nothing.
    """
    if stretch:
        low, high = float(anomaly_map.min()), float(anomaly_map.max())
        anomaly_map = (anomaly_map - low) / max(high - low, 1e-6)
    value = np.clip(resized(anomaly_map, pixels.shape[:2]), 0, 1)[:, :, None]
    strength = 0.7 * np.clip((value - CLEAR) / (0.5 - CLEAR), 0, 1)
    picture = pixels * (1 - strength)
    green = np.clip((value - 0.5) / (YELLOW - 0.5), 0, 1)  # with red it is yellow
    picture += 255 * strength * np.concatenate([np.ones_like(green), green, np.zeros_like(green)], axis=2)
    return Image.fromarray(picture.astype(np.uint8))


def boxed(picture: Image.Image, boxes: Iterable[tuple[float, float, float, float]]) -> Image.Image:
    """Draw boxes into a picture, around what they hold where there is room.

    Args:
        picture (Image.Image): The picture, which is changed.
        boxes (Iterable[tuple[float, float, float, float]]): Left, top, right and bottom edge of each, in its pixels.
    """
    line = max(1, round(min(picture.size) / 250))
    draw = ImageDraw.Draw(picture)
    for left, top, right, bottom in boxes:
        start = max(0, round(left) - line), max(0, round(top) - line)
        end = min(picture.width, round(right) + line) - 1, min(picture.height, round(bottom) + line) - 1
        draw.rectangle([start, end], outline=BOX, width=line)
    return picture


def shrunk(pixels: np.ndarray, longest: int) -> np.ndarray:
    """Make a photo as small as it is shown; smaller ones stay.

    Args:
        pixels (np.ndarray): The photo, uint8, shape ``(H, W, 3)``.
        longest (int): Most pixels of a side.
    """
    if max(pixels.shape[:2]) <= longest:
        return pixels
    image = Image.fromarray(pixels)
    image.thumbnail((longest, longest))
    return np.asarray(image)
