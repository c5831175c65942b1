# SPDX-License-Identifier: Apache-2.0

"""Teach a product defects that were missed, with OpenVINO alone."""

import re
from typing import TypeAlias

import numpy as np

from anomalib_resad.deploy.bank import REACH, TAUGHT, USED, Bank, NotTaughtError
from anomalib_resad.deploy.bank_rows import cells_of
from anomalib_resad.deploy.bundle import Level
from anomalib_resad.deploy.enrolling import check_same, looked_at, read_photos
from anomalib_resad.deploy.products import Products
from anomalib_resad.deploy.taught import check_not_good, spread_of, which_count, with_taught
from anomalib_resad.deploy.tiles import batches, part_of, resized_to, size_in_tiles
from anomalib_resad.enrollment.checks import is_number
from anomalib_resad.enrollment.coreset import thin_out
from anomalib_resad.enrollment.image_size import Size
from anomalib_resad.enrollment.photos import Photo, PhotoError, read_pixels
from anomalib_resad.enrollment.references import References, size_of
from anomalib_resad.enrollment.region import INSIDE, box_of, core, stretched
from anomalib_resad.enrollment.taught import MOST_PATCHES, covered, defect_cells, defective, most_of, nearest

MOST_TAUGHT = 100 * MOST_PATCHES  # patches of a product
Mask: TypeAlias = "Photo | None"
Box: TypeAlias = tuple[int, int, int, int]  # x, y, width and height


class Teaching(Products):
    """A bundle whose products learn from defects that were missed.

    Arguments, attributes and errors are those of :class:`~anomalib_resad.deploy.inferencer.ResADInferencer`.
    """

    def teach(self, name: str, photo: Photo, mask: Mask = None, box: Box | None = None) -> Bank:
        """Teach a product a defect that was missed: what looks like it scores higher from now on.

        Its patches are kept with the product, in tiles those of all tiles that show it. Those that resemble the good
        photos more than these resemble each other do not count, so no good photo of the bank scores higher, and the
        threshold stays (:mod:`anomalib_resad.deploy.taught`). Teaching the same again changes nothing.

        Args:
            name (str): The product.
            photo (Photo): A photo with the defect.
            mask (Mask): Where the defect is: a mask of the photo's size, white there.
            box (Box | None): The same as x, y, width and height in pixels of the photo. Without either, the patches
                that differ most from the good photos are taken for the defect.

        Raises:
            ValueError: If the product is not enrolled, or cannot be taught; or mask or box are impossible.
            PhotoError: If the photo cannot be used, is one of the good photos, or nothing in it differs from them.
            BankError: If the product was given another region or tile scale meanwhile.
        """
        before = self._teachable(name)
        name = before.product
        _, read = read_photos([photo], before.bit_depth)
        (reference,) = read
        check_not_good(before, reference)
        rows, chosen = self._keys_of(before, read, _marked(size_of(photo), mask, box))
        with self._store.changing(name):
            bank = self._teachable(name)
            check_same(name, bank.region, before.region)
            check_same(name, bank.image_size, before.image_size)
            check_same(name, bank.tile_scale, before.tile_scale)
            check_not_good(bank, reference)
            kept = self._patches(bank, rows, chosen)
            if not which_count(bank, kept, self.manifest).any():
                where = "the photo" if chosen is None else "what was marked"
                msg = (
                    f"{reference.name}: nothing in {where} differs from the good photos of {name!r} by more than these "
                    "differ from each other, so there is nothing to teach. Mark the defect closely (mask or box), or "
                    "add good photos."
                )
                raise PhotoError(msg)
            kept = np.unique(np.concatenate([bank.arrays.get(TAUGHT, kept[:0]), kept]), axis=0)
            if len(kept) > MOST_TAUGHT:
                msg = f"{name!r} was taught {len(kept)} patches by now, more than {MOST_TAUGHT}. Forget them first."
                raise ValueError(msg)
            photos = {reference.sha256: reference} | {each.sha256: each for each in bank.taught}
            taught = with_taught(bank, photos.values(), kept, self.manifest)
            return self._store.write(taught, f"teach {reference.name}")

    def forget(self, name: str) -> Bank:
        """Forget all defects that a product was taught.

        Raises:
            NotEnrolledError: If the product is not enrolled.
            NotTaughtError: If it was taught nothing; no step is written then.
        """
        self._store.check_enrolled(name)
        with self._store.changing(name):
            bank = self.bank(name)
            if not bank.taught:
                msg = (
                    f"{bank.product!r} was taught nothing, so there is nothing to forget. `resad history` lists its "
                    "changes, and `resad undo` takes them back."
                )
                raise NotTaughtError(msg)
            return self._store.write(with_taught(bank, [], np.empty((0, 0)), self.manifest), "forget")

    def _teachable(self, name: str) -> Bank:
        """The bank of a product that can be taught.

        Raises:
            ValueError: If it cannot.
        """
        bank = self.bank(name)
        if not self.manifest.keyed:
            msg = (
                "This bundle is of a published method, which compares its levels apart, and cannot be taught. Export "
                "the default method, or a backbone with its ready head (`resad export --backbone`)."
            )
            raise ValueError(msg)
        if bank.tile_scale is not None and REACH not in bank.arrays:
            msg = (
                f"{name!r} is looked at in tiles (tile_scale={bank.tile_scale:g}), and its bank does not say how far "
                "its good photos differ: it is of one photo, or of an earlier version. Enroll the product again from "
                "two or more good photos (--mode replace), and teach it then."
            )
            raise ValueError(msg)
        if spread_of(bank, self.manifest) is None:
            msg = (
                f"{name!r} has one photo, and this bundle does not know how far good photos scatter, so how much a "
                "defect should weigh is unknown. Add a good photo first."
            )
            raise ValueError(msg)
        return bank if bank.tile_scale is not None else self._whole_bank(name)

    def _keys_of(self, bank: Bank, read: References, marked: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Keys of a photo's patches that count, shape ``(N, K)``, and which of them were marked, ``None`` for unknown.

        Args:
            bank (Bank): The product.
            read (References): The photo.
            marked (np.ndarray | None): Where the defect is, bool, of the photo's own size.

        Raises:
            ValueError: If what was marked lies outside of the product's region.
            PhotoError: If the photo does not fit the product's region or its tiles.
        """
        (reference,) = read
        level = self.manifest.levels_at(bank.image_size)[-1]
        if bank.tile_scale is None:
            chosen = _chosen(bank, marked, level)
            seen = looked_at(read, bank.region)
            return self._features_of(seen, 1, bank.region, bank.image_size)[0][reference][-1], chosen
        tile, keys, shares = self.manifest.image_size, [], []
        size = size_in_tiles(reference.name, read.sizes[0], bank.tile_scale, tile)
        for corners, tiles in batches(resized_to(read[reference], size), tile):
            keys.append(self.encode(tiles)[-1].transpose(0, 2, 3, 1).reshape(-1, level.channels))
            if marked is not None:
                parts = [part_of(marked, corner, tile, size) for corner in corners]
                shares += [covered(part, level.height, level.width) for part in parts]
        return np.concatenate(keys), None if marked is None else defective(np.stack(shares)).ravel()

    def _patches(self, bank: Bank, rows: np.ndarray, chosen: np.ndarray | None) -> np.ndarray:
        """What is kept of a photo: keys of the patches that were marked, or of those that differ most from good ones.

        Args:
            bank (Bank): The product.
            rows (np.ndarray): Keys of the photo's patches that count, shape ``(N, K)``.
            chosen (np.ndarray | None): Which of them were marked, bool, shape ``(N,)``.
        """
        if chosen is None:
            distances = nearest(rows, self.searched(bank.product)[-1])
            patches = self.manifest.levels_at(bank.image_size)[-1].patches
            defect = rows[np.argsort(-distances, kind="stable")[: most_of(patches)]]
        else:
            defect = rows[chosen]
        return defect[thin_out(defect, MOST_PATCHES)]


def in_words(bank: Bank) -> str:
    """What a product was taught by now."""
    used, photos = bank.arrays[USED], "a photo" if len(bank.taught) == 1 else f"{len(bank.taught)} photos"
    return (
        f"{bank.product} was taught defects of {photos} by now: {used.sum()} patches count, "
        f"{len(used) - used.sum()} do not, since they resemble good photos."
    )


def read_box(text: str | None) -> Box | None:
    """A box that was written as ``x,y,width,height``; ``None`` where nothing was.

    Raises:
        ValueError: If it is something else.
    """
    if text is None:
        return None
    if not re.fullmatch(r"\s*-?\d+(\s*,\s*-?\d+){3}\s*", text):
        msg = f"box={text[:80]!r} is no box. Give x,y,width,height in pixels of the photo: 120,80,40,25."
        raise ValueError(msg)
    x, y, width, height = map(int, text.split(","))
    return x, y, width, height


def _marked(size: Size, mask: Mask, box: Box | None) -> np.ndarray | None:
    """Where a defect is in a photo, bool, shape ``(H, W)``; ``None`` if nothing was said.

    Raises:
        ValueError: If it is nowhere, outside of the photo, or said twice.
        PhotoError: If the mask cannot be read.
    """
    height, width = size
    if mask is not None and box is not None:
        msg = f"mask={mask!s:.80} and box={box} both say where the defect is. Give one of them."
        raise ValueError(msg)
    if box is not None:
        x, y, wide, high = box if len(box) == 4 and all(map(is_number, box)) else (0, 0, 0, 0)
        if not (x >= 0 and y >= 0 and wide >= 1 and high >= 1 and x + wide <= width and y + high <= height):
            msg = (
                f"box={box} does not lie in the photo, which has {width} x {height} pixels. Give x, y, width and "
                "height in pixels, counted from its top left corner."
            )
            raise ValueError(msg)
        marked = np.zeros(size, dtype=bool)
        marked[int(y) : int(y + high), int(x) : int(x + wide)] = True
        return marked
    if mask is None:
        return None
    if size_of(mask) != size:
        msg = (
            "The mask has {1} x {0} pixels, the photo {3} x {2}. Give a mask of the photo's size, white where the "
            "defect is.".format(*size_of(mask), *size)
        )
        raise ValueError(msg)
    marked = mask if isinstance(mask, np.ndarray) and mask.dtype == bool else read_pixels(mask).max(axis=2) > INSIDE
    if not marked.any():
        msg = f"The mask is empty: no pixel is brighter than {INSIDE}. Paint the defect white."
        raise ValueError(msg)
    return marked


def _chosen(bank: Bank, marked: np.ndarray | None, level: Level) -> np.ndarray | None:
    """Which of a photo's patches that count were marked, bool, shape ``(N,)``; ``None`` if nothing was.

    Raises:
        ValueError: If what was marked lies outside of the product's region.
    """
    if marked is None:
        return None
    counting = cells_of(bank, level)
    if bank.region is not None:
        top, left, bottom, right = box_of(bank.region, marked.shape)
        marked = marked[top:bottom, left:right] & (stretched(core(bank.region), (bottom - top, right - left)) > 0)
        if not marked.any():
            msg = (
                f"What was marked lies outside of the region of {bank.product!r}, where nothing counts. Mark the "
                "defect inside of it, or enroll the product with another region."
            )
            raise ValueError(msg)
    return (defect_cells(marked, level.height, level.width) & counting)[counting]
