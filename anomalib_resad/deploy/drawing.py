# SPDX-License-Identifier: Apache-2.0

"""A region of interest as it is drawn on the page: corners that are clicked on the first of the good photos."""

import re
from collections.abc import Sequence
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image, ImageDraw

from anomalib_resad.deploy.page import Page
from anomalib_resad.deploy.pictures import BOX, shrunk
from anomalib_resad.enrollment.decoding import BitDepth
from anomalib_resad.enrollment.photos import read_pixels
from anomalib_resad.enrollment.region import NUMBER

LONGEST = 1000  # pixels of a side of the picture that is clicked on
Corner = tuple[float, float]


def corners_of(text: str | None) -> list[Corner]:
    """The corners ``x,y`` in a text, however far it is written."""
    found = re.findall(rf"({NUMBER})\s*,\s*({NUMBER})", text or "")
    return [(float(x), float(y)) for x, y in found]


def _scale_of(pixels: np.ndarray) -> float:
    """Photo pixels per pixel of the picture."""
    return max(1.0, max(pixels.shape[:2]) / LONGEST)


def drawn(pixels: np.ndarray, text: str | None) -> Image.Image:
    """A photo, as small as it is shown, with the corners and the lines between them.

    Args:
        pixels (np.ndarray): The photo, uint8, shape ``(H, W, 3)``.
        text (str | None): The corners, in pixels of the photo.
    """
    picture = Image.fromarray(shrunk(pixels, LONGEST))
    scale = _scale_of(pixels)
    corners = [(x / scale, y / scale) for x, y in corners_of(text)]
    line = max(2, round(min(picture.size) / 150))
    draw = ImageDraw.Draw(picture)
    if len(corners) > 1:
        draw.line([*corners, corners[0]], fill=BOX, width=line, joint="curve")
    for x, y in corners:
        draw.ellipse([x - 2 * line, y - 2 * line, x + 2 * line, y + 2 * line], fill=BOX)
    return picture


def with_corner(pixels: np.ndarray, text: str | None, clicked: Sequence[float]) -> str:
    """The corners and one more.

    Args:
        pixels (np.ndarray): The photo, uint8, shape ``(H, W, 3)``.
        text (str | None): The corners so far.
        clicked (Sequence[float]): Where the picture of :func:`drawn` was clicked, x and y in its pixels.
    """
    height, width = pixels.shape[:2]
    x, y = (min(side, round(each * _scale_of(pixels))) for each, side in zip(clicked, (width, height), strict=True))
    return " ".join(f"{a:g},{b:g}" for a, b in [*corners_of(text), (x, y)])


class Drawing:
    """What the page does while a region is drawn.

    Args:
        page (Page): The page's other actions.
    """

    def __init__(self, page: Page) -> None:
        self.page = page

    def show(
        self, files: Sequence[str] | None, bit_depth: BitDepth, text: str | None, last: str | None
    ) -> tuple[Any, ...]:
        """The first of the good photos with the corners on it, and the message that stands there.

        Args:
            files (Sequence[str] | None): The good photos.
            bit_depth (BitDepth): Bits of a channel.
            text (str | None): The corners.
            last (str | None): The picture that was shown before, which goes.
        """
        with self.page.errors_shown():
            picture = self.page.uploads.keep(drawn(read_pixels(files[0], bit_depth), text)) if files else None
        self.page.uploads.forget([last])
        return picture, gr.skip()

    def click(
        self, files: Sequence[str] | None, bit_depth: BitDepth, text: str | None, last: str | None, at: Sequence[float]
    ) -> tuple[Any, ...]:
        """The corners with one more, and what :meth:`show` gives; arguments as there, and where was clicked."""
        with self.page.errors_shown():
            more = with_corner(read_pixels(files[0], bit_depth), text, at) if files else text
        return more, *self.show(files, bit_depth, more, last)

    def restart(self, files: Sequence[str] | None, bit_depth: BitDepth, last: str | None) -> tuple[Any, ...]:
        """No corners, and what :meth:`show` gives; arguments as there."""
        return "", *self.show(files, bit_depth, None, last)
