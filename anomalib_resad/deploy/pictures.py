# SPDX-License-Identifier: Apache-2.0

"""Anomaly maps over photos, with numpy and Pillow alone."""

import numpy as np
from PIL import Image


def overlay(pixels: np.ndarray, anomaly_map: np.ndarray, stretch: bool = False) -> Image.Image:
    """Lay a map over its photo: clear where it is 0, red at 0.5 and above, yellow at 1.

    Args:
        pixels (np.ndarray): The photo, uint8, shape ``(H, W, 3)``.
        anomaly_map (np.ndarray): Map of any size, 0 to 1.
        stretch (bool): Use the map's own range: for models that learned no threshold, whose 0.5 means nothing.
    """
    if stretch:
        low, high = float(anomaly_map.min()), float(anomaly_map.max())
        anomaly_map = (anomaly_map - low) / max(high - low, 1e-6)
    height, width = pixels.shape[:2]
    resized = Image.fromarray(anomaly_map.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    value = np.clip(np.asarray(resized), 0, 1)[:, :, None]
    strength = 0.8 * np.clip(2 * value - 0.4, 0, 1)
    picture = pixels * (1 - strength)
    for channel, color in enumerate((1.0, np.clip(2 * value[..., 0] - 1, 0, 1))):  # red, and with green yellow
        picture[..., channel] += color * 255 * strength[..., 0]
    return Image.fromarray(picture.astype(np.uint8))


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
