# SPDX-License-Identifier: Apache-2.0

"""A region of interest as it is drawn on the page: corners that are clicked on the first of the good photos."""

from collections.abc import Sequence
from typing import Any

import gradio as gr
from PIL import Image, ImageDraw

from anomalib_resad.deploy.page import Page
from anomalib_resad.deploy.pictures import BOX, shrunk
from anomalib_resad.enrollment.decoding import BitDepth
from anomalib_resad.enrollment.image_size import Size
from anomalib_resad.enrollment.photos import read_pixels
from anomalib_resad.enrollment.references import size_of
from anomalib_resad.enrollment.region import corners_of

LONGEST = 1000  # pixels of a side of the picture that is clicked on


def _scale_of(size: Size) -> float:
    """Photo pixels per pixel of the picture."""
    return max(1.0, max(size) / LONGEST)


def drawn(photo: str, bit_depth: BitDepth, text: str | None) -> Image.Image:
    """A photo, as small as it is shown, with the corners and the lines between them.

    Args:
        photo (str): Its file.
        bit_depth (BitDepth): Bits of a channel.
        text (str | None): The corners, in pixels of the photo.

    Raises:
        PhotoError: If it cannot be read.
    """
    picture = Image.fromarray(shrunk(read_pixels(photo, bit_depth), LONGEST))
    scale = _scale_of(size_of(photo))
    corners = [(x / scale, y / scale) for x, y in corners_of(text or "")]
    line = max(2, round(min(picture.size) / 150))
    draw = ImageDraw.Draw(picture)
    if len(corners) > 1:
        draw.line([*corners, corners[0]], fill=BOX, width=line, joint="curve")
    for x, y in corners:
        draw.ellipse([x - 2 * line, y - 2 * line, x + 2 * line, y + 2 * line], fill=BOX)
    return picture


def with_corner(photo: str, text: str | None, clicked: Sequence[float]) -> str:
    """The corners and one more.

    Args:
        photo (str): The photo's file.
        text (str | None): The corners so far.
        clicked (Sequence[float]): Where the picture of :func:`drawn` was clicked, x and y in its pixels.

    Raises:
        PhotoError: If it cannot be read.
    """
    height, width = size_of(photo)
    scale = _scale_of((height, width))
    x, y = (min(side, round(each * scale)) for each, side in zip(clicked, (width, height), strict=True))
    return " ".join(f"{a:g},{b:g}" for a, b in [*corners_of(text or ""), (x, y)])


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
            picture = self.page.uploads.keep(drawn(files[0], bit_depth, text)) if files else None
        self.page.uploads.forget([last])
        return picture, gr.skip()

    def click(
        self, files: Sequence[str] | None, bit_depth: BitDepth, text: str | None, last: str | None, at: Sequence[float]
    ) -> tuple[Any, ...]:
        """The corners with one more, and what :meth:`show` gives; arguments as there, and where was clicked."""
        with self.page.errors_shown():
            more = with_corner(files[0], text, at) if files else text
        return more, *self.show(files, bit_depth, more, last)

    def restart(self, files: Sequence[str] | None, bit_depth: BitDepth, last: str | None) -> tuple[Any, ...]:
        """No corners, and what :meth:`show` gives; arguments as there."""
        return "", *self.show(files, bit_depth, None, last)
