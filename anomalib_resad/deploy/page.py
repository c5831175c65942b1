# SPDX-License-Identifier: Apache-2.0

"""What the page does: each action returns what its outputs show."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr

from anomalib_resad.deploy.bank import product_name
from anomalib_resad.deploy.guard import MOST_FILES
from anomalib_resad.deploy.inferencer import ResADInferencer
from anomalib_resad.deploy.messages import as_markdown, printable, without_folders
from anomalib_resad.deploy.pictures import shrunk
from anomalib_resad.deploy.prediction import Prediction, scales_of, threshold_of
from anomalib_resad.deploy.regions import find_regions
from anomalib_resad.deploy.uploads import Uploads
from anomalib_resad.enrollment.decoding import BitDepth
from anomalib_resad.enrollment.region import polygon
from anomalib_resad.enrollment.rotations import Rotations
from anomalib_resad.enrollment.thresholds import denormalize

EMPTY = "Drop a photo, choose what it shows, and press **Inspect**."
CHANGED = "This product has changed since. Press **Inspect** again."
MOVED = "what counts of the photo has moved, or shows something else. It is not judged."
REFUSED = "**Refused.**"
PLACES = 5  # regions that are told in words
LONGEST_SHOWN = 1600  # pixels of a side of the picture on the page


@dataclass(frozen=True)
class Inspection:
    """What was found, and what it belongs to.

    Attributes:
        product (str): The product.
        state (str): Checksum of the product's bank, which score and places depend on.
        score (float): 0 to 1, 0.5 at the product's threshold.
        photo (str): The file that was inspected.
        picture (str): The file of the map over it.
        places (str): The regions that were found, in words.
        moved (bool): Whether what counts has moved.
    """

    product: str
    state: str
    score: float
    photo: str
    picture: str
    places: str = ""
    moved: bool = False


def _places(found: Prediction) -> str:
    """Where the map lies above its threshold, the loudest places first; of a good photo too, as the slider may move."""
    regions = find_regions(found.map, found.size, found.min_area) if found.label is False else found.regions or ()
    lines = [
        f"\n- {each.width} x {each.height} pixels at {each.x}, {each.y}: area {each.area:,}, peak {each.peak:.2f}"
        for each in regions[:PLACES]
    ]
    more = f"\n- and {len(regions) - PLACES} more" if len(regions) > PLACES else ""
    return "\n" + "".join(lines) + more if lines else ""


def chosen(product: str | None) -> str:
    """The product.

    Raises:
        ValueError: If none is chosen.
    """
    if not product:
        msg = "Choose a product first."
        raise ValueError(msg)
    return product


class Page:
    """The page's actions.

    Args:
        inferencer (ResADInferencer): The model and its products.
        uploads (Uploads): Where photos come to lie, and pictures are put.
    """

    def __init__(self, inferencer: ResADInferencer, uploads: Uploads) -> None:
        self.inferencer = inferencer
        self.uploads = uploads

    # -- products -----------------------------------------------------------------------------------------------------

    def products(self) -> list[list[Any]]:
        """One row per product: name, photos, size, threshold."""
        rows: list[list[Any]] = []
        for name in self.inferencer.products:
            try:
                bank = self.inferencer.bank(name)
            except ValueError as error:
                rows.append([printable(name), 0, "-", self._public(error)])
                continue
            own = "the model's" if bank.threshold is None else f"{bank.threshold:.4g} (own)"
            rows.append([name, len(bank.references), f"{bank.size / 1e6:.1f}", own])
        return rows

    def choices(self, chosen: str | None = None) -> Any:  # noqa: ANN401  # Gradio's update
        """The products to choose from, also those that another session enrolled."""
        names = self.inferencer.products
        if chosen in names:  # said again, it would undo a choice that was made meanwhile
            return gr.Dropdown(choices=names)
        return gr.Dropdown(choices=names, value=names[0] if names else None)

    def enroll(
        self,
        name: str,
        files: Sequence[str] | None,
        rotations: Rotations | None = None,
        bit_depth: BitDepth = "auto",
        region: str | None = None,
    ) -> tuple[Any, ...]:
        """Enroll a product, or add photos to it, in as many orientations, and of the depth, as those that are there."""
        name = str(name or "").strip()
        with self.errors_shown():
            if not files:
                msg = "Drop some good photos first; 2 to 8 are usual."
                raise ValueError(msg)
            if len(files) > MOST_FILES:
                msg = f"{len(files)} photos are too many at once; add them {MOST_FILES} at a time."
                raise ValueError(msg)
            name = product_name(name)
            known = name in self.inferencer.products
            if known and polygon(region):
                msg = (
                    f"What counts of {name!r} is known; photos are added with it. Take the corners away, or remove it."
                )
                raise ValueError(msg)
            if known:
                bank = self.inferencer.add(name, list(files))
            else:
                bank = self.inferencer.enroll(
                    name, list(files), rotations=rotations, bit_depth=bit_depth, region=polygon(region)
                )
        self.uploads.forget(files)
        done = f"**{name}** has {len(bank.references)} photos now." if known else f"**{name}** is enrolled."
        if bank.rotations > 1:
            done += f" Each photo is known in {bank.rotations} orientations."
        chosen = gr.Dropdown(choices=self.inferencer.products, value=name)
        done += f" It takes {bank.size / 1e6:.1f} MB. It has {threshold_of(self.inferencer.manifest, bank)}."
        return done, self.products(), chosen, None, ""

    def remove(self, name: str) -> tuple[Any, ...]:
        """Remove a product."""
        with self.errors_shown():
            self.inferencer.remove(str(name or "").strip())
        return f"**{name}** was removed.", self.products(), self.choices()

    # -- inspection ---------------------------------------------------------------------------------------------------

    def inspect(
        self, photo: str | None, product: str | None, threshold: float, last: Inspection | None = None
    ) -> tuple[Any, ...]:
        """Inspect a photo; the files of the session's last inspection go."""
        with self.errors_shown():
            if not photo or not product:
                msg = "Drop a photo and choose a product first; enroll one if there is none."
                raise ValueError(msg)
            threshold = float(threshold)
            bank = self.inferencer.bank(product)
            found, pixels = self.inferencer.inspect(photo, product)
            stretch = found.label is None
            picture = self.uploads.keep(found.picture(shrunk(pixels, LONGEST_SHOWN), stretch))
        if last is not None:
            self.uploads.forget([last.picture, last.photo if last.photo != photo else None])
        now = Inspection(product, bank.checksum, found.score, photo, picture, _places(found), found.moved)
        return picture, now, self.verdict(now, product, threshold)

    def verdict(self, last: Inspection | None, product: str | None, threshold: float) -> str:
        """Score and label at a threshold, if they are still those of this product."""
        if last is None or last.product != product:
            return EMPTY
        try:
            if self.inferencer.bank(product).checksum != last.state:
                return CHANGED
        except ValueError:
            return CHANGED
        if last.moved:
            return f"## moved\n{product}: {MOVED}"
        anomalous = last.score > threshold
        word, places = ("anomalous", last.places) if anomalous else ("good", "")
        return f"## {word}\n{product}: score **{last.score:.3f}**, threshold {threshold:.3f}{places}"

    def clear(self, last: Inspection | None) -> tuple[Any, ...]:
        """Nothing is inspected: no map, no score, the threshold where it is, and no verdict."""
        if last is not None:
            self.uploads.forget([last.picture])
        return None, None, 0.5, EMPTY

    def changed(self, last: Inspection | None, product: str | None, photo: str | None) -> tuple[Any, ...]:
        """Clear what was found with another product or photo; this may be asked late, after a new inspection."""
        return (gr.skip(), gr.skip(), 0.5, EMPTY) if last is None else self.fitting(last, product, photo)

    def fitting(self, last: Inspection | None, product: str | None, photo: str | None) -> tuple[Any, ...]:
        """Clear what was found if product or photo were changed while it was computed."""
        if last is not None and (last.product, last.photo) != (product, photo):
            return self.clear(last)
        return gr.skip(), gr.skip(), gr.skip(), gr.skip()

    def keep_threshold(self, product: str | None, threshold: float, last: Inspection | None = None) -> tuple[Any, ...]:
        """Make the slider's value the product's own threshold, 0.5 from then on, and inspect the photo anew."""
        with self.errors_shown():
            name = chosen(product)
            scale, _ = scales_of(self.inferencer.manifest, self.inferencer.bank(name))
            self.inferencer.set_threshold(name, denormalize(float(threshold), *(float(each) for each in scale)))
            return self.judged_anew(name, f"The threshold of **{name}** was kept; it is at 0.5 from now on.", last)

    def calibrate(self, product: str | None, percent: float | None, last: Inspection | None = None) -> tuple[Any, ...]:
        """Give the product the threshold for a false-alarm rate, or without one the model's, and inspect anew."""
        with self.errors_shown():
            name = chosen(product)
            if percent is None:
                bank = self.inferencer.set_threshold(name, None)
            else:
                bank = self.inferencer.calibrate(name, float(percent) / 100)
            return self.judged_anew(name, f"**{name}** has {threshold_of(self.inferencer.manifest, bank)}.", last)

    def leave_out(self, product: str | None, min_area: float | None, last: Inspection | None = None) -> tuple[Any, ...]:
        """Leave out regions of fewer pixels of the photo, and inspect anew."""
        with self.errors_shown():
            name = chosen(product)
            bank = self.inferencer.set_min_area(name, int(min_area or 0))
            return self.judged_anew(name, f"Regions of **{name}** under {bank.min_area:,} pixels are left out.", last)

    def judged_anew(self, product: str, said: str, last: Inspection | None) -> tuple[Any, ...]:
        """What is shown once a product is judged in another way."""
        if last is None or last.product != product or not Path(last.photo).exists():
            picture, now, _, verdict = self.clear(last)
        else:
            picture, now, verdict = self.inspect(last.photo, product, 0.5, last)
        return 0.5, self.products(), f"{verdict}\n\n{said}", picture, now

    # -- errors -------------------------------------------------------------------------------------------------------

    def _public(self, error: Exception) -> str:
        folders = (self.uploads.folder, self.inferencer.banks, self.inferencer.bundle)
        return printable(without_folders(str(error), folders))

    def in_place(self, action: Callable[..., tuple[Any, ...]], shown: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
        """Take the paths of uploads, and show what is refused where the result would stand.

        Gradio's preprocessing, which this replaces, opens images; its own message would cover other things.

        Args:
            action (Callable[..., tuple[Any, ...]]): The action.
            shown (Sequence[Any]): What its outputs show then, with the text in the place of ``REFUSED``.
        """

        @wraps(action)
        def acting(*given: Any) -> tuple[Any, ...]:  # noqa: ANN401  # whatever Gradio gives
            try:
                return action(*(self._path(each) for each in given))
            except gr.Error as error:
                text = f"{REFUSED} {as_markdown(error.message)}"
                return tuple(text if each == REFUSED else each for each in shown)

        return acting

    def _path(self, given: Any) -> Any:  # noqa: ANN401  # whatever Gradio gives
        """Where an upload lies, or several; all else as it is."""
        if isinstance(given, list):
            return [self._path(each) for each in given]
        if not isinstance(given, dict):
            return given
        path = given.get("path")
        if not isinstance(path, str) or not self.uploads.holds(path):
            msg = "This file was not uploaded."
            raise gr.Error(msg, print_exception=False)
        if not Path(path).is_file():  # equal uploads are one file: another session may have been done with it
            msg = "This file is no longer here. Drop it again."
            raise gr.Error(msg, print_exception=False)
        return path

    @contextmanager
    def errors_shown(self) -> Iterator[None]:
        """Show an error's text on the page, without the server's folders."""
        try:
            yield
        except (ValueError, TypeError, OSError) as error:
            raise gr.Error(self._public(error), print_exception=False) from error
