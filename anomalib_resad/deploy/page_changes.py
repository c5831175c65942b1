# SPDX-License-Identifier: Apache-2.0

"""What the page does about defects that were missed, and about changes that were made."""

from collections.abc import Sequence
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image, ImageDraw

from anomalib_resad.deploy.drawing import Drawing, with_corner
from anomalib_resad.deploy.messages import as_markdown, printable
from anomalib_resad.deploy.page import Inspection, Page, chosen
from anomalib_resad.deploy.teaching import in_words
from anomalib_resad.enrollment.decoding import BitDepth
from anomalib_resad.enrollment.image_size import Size
from anomalib_resad.enrollment.references import size_of
from anomalib_resad.enrollment.region import corners_of


def closed(text: str | None) -> str:
    """The corners of what was marked: of two, which are opposite ones of a box, all four."""
    corners = corners_of(text or "")
    if len(corners) == 2:
        (left, top), (right, bottom) = corners
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    return " ".join(f"{x:g},{y:g}" for x, y in corners)


def mask_of(text: str | None, size: Size) -> np.ndarray:
    """What was marked in a photo, bool, shape ``(H, W)``.

    Args:
        text (str | None): Its corners, in pixels of the photo.
        size (Size): Height and width of the photo.

    Raises:
        ValueError: If there are fewer than two.
    """
    corners = corners_of(closed(text))
    if len(corners) < 2:
        msg = (
            "Mark the defect first: click two opposite corners of a box around it, or three and more corners along "
            "its edge."
        )
        raise ValueError(msg)
    height, width = size
    mask = Image.new("1", (width, height))
    ImageDraw.Draw(mask).polygon(corners, fill=1)
    return np.asarray(mask)


class PageChanges:
    """The page's actions that teach, and that undo.

    Args:
        page (Page): The page's other actions.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self._drawing = Drawing(page)

    # -- teaching -----------------------------------------------------------------------------------------------------

    def restart(self, photo: str | None, product: str | None, last: str | None) -> tuple[Any, ...]:
        """No corners, and the photo without them.

        Args:
            photo (str | None): The photo.
            product (str | None): The product.
            last (str | None): The picture that was shown before, which goes.
        """
        return "", self._picture(photo, product, None, last)

    def show(self, photo: str | None, product: str | None, text: str | None, last: str | None) -> tuple[Any, ...]:
        """The photo with the corners ``text``; the other arguments are those of :meth:`restart`."""
        return gr.skip(), self._picture(photo, product, text, last)

    def click(
        self, photo: str | None, product: str | None, text: str | None, last: str | None, at: Sequence[float]
    ) -> tuple[Any, ...]:
        """The corners and one more, and the photo with them; arguments as of :meth:`show`, and where was clicked."""
        with self.page.errors_shown():
            more = with_corner(photo, text, at) if photo else text
        return more, self._picture(photo, product, more, last)

    def teach(
        self, photo: str | None, product: str | None, text: str | None, last: Inspection | None = None
    ) -> tuple[Any, ...]:
        """Teach a product what was marked in a photo, and judge the photo anew."""
        with self.page.errors_shown():
            name = chosen(product)
            if not photo:
                msg = "Drop the photo of the defect first."
                raise ValueError(msg)
            bank = self.page.inferencer.teach(name, photo, mask_of(text, size_of(photo)))
            was = f" The photo scored {last.score:.3f} before." if last is not None and last.product == name else ""
            said = f"{as_markdown(in_words(bank))}{was}"
            return *self.page.judged_anew(name, said, last), "", self.steps(name)

    def forget(self, product: str | None, last: Inspection | None = None) -> tuple[Any, ...]:
        """Forget all that a product was taught, and judge the photo anew."""
        with self.page.errors_shown():
            name = chosen(product)
            self.page.inferencer.forget(name)
            said = f"**{as_markdown(name)}** has forgotten all that it was taught."
            return *self.page.judged_anew(name, said, last), self.steps(name)

    # -- undoing ------------------------------------------------------------------------------------------------------

    def steps(self, product: str | None) -> list[list[str]]:
        """The last changes of a product, the last one first: number, what, and time (UTC)."""
        try:
            steps = [step.row() for step in reversed(self.page.inferencer.history(product or ""))]
        except (ValueError, OSError):  # nothing is known of it
            return []
        return [[number, what, when] for number, when, what, *_ in steps]

    def undo(self, product: str | None, last: Inspection | None = None) -> tuple[Any, ...]:
        """Undo the last change of a product, and judge the photo anew."""
        with self.page.errors_shown():
            name = chosen(product)
            said = self._undone(name)
            if name in self.page.inferencer.products:
                shown = self.page.judged_anew(name, said, last)
            else:
                picture, now, threshold, verdict = self.page.clear(last)
                shown = threshold, self.page.products(), f"{verdict}\n\n{said}", picture, now
            return *shown, self.page.choices(name), self.steps(name)

    def undo_named(self, product: str | None) -> tuple[Any, ...]:
        """The same beside the list of products: also of one that was removed."""
        with self.page.errors_shown():
            name = chosen(str(product or "").strip())
            return self._undone(name), self.page.products(), self.page.choices(name)

    def _undone(self, name: str) -> str:
        step = self.page.inferencer.undo(name)
        what = as_markdown(printable(step.what))
        said = f"**{name}** is what it was before step {step.number} ({what})."
        if name in self.page.inferencer.products:
            return f"{said} Undo again to have the change back."
        return f"{said} It is not enrolled now. On **Products**, write its name and undo again to have it back."

    # -- the picture --------------------------------------------------------------------------------------------------

    def _picture(self, photo: str | None, product: str | None, text: str | None, last: str | None) -> str | None:
        shown: str | None = self._drawing.show([photo] if photo else None, self._depth(product), closed(text), last)[0]
        return shown

    def _depth(self, product: str | None) -> BitDepth:
        """Bits of a channel of a product's photos."""
        with self.page.errors_shown():
            known = product in self.page.inferencer.products
            return self.page.inferencer.bank(product or "").bit_depth if known else "auto"
