# SPDX-License-Identifier: Apache-2.0

"""Banks of photos: what is kept of each, and how each scores against the others."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np

from anomalib_resad.deploy.bank import REACH, REGION, Bank, BankError
from anomalib_resad.deploy.bank_rows import chosen_rows, judged, leave_one_out, padded
from anomalib_resad.deploy.model import Model
from anomalib_resad.deploy.taught import carried
from anomalib_resad.deploy.tiles import MOST_ROWS, inspected, resized_to, rows_of, size_in_tiles
from anomalib_resad.enrollment.calibration import OwnScores, own_scores
from anomalib_resad.enrollment.decoding import BitDepth
from anomalib_resad.enrollment.image_size import Size
from anomalib_resad.enrollment.photos import Photo, PhotoError, Reference, by_content, list_photos
from anomalib_resad.enrollment.references import References, read_references
from anomalib_resad.enrollment.region import box_of, check_fits, cut_out, is_same
from anomalib_resad.enrollment.rotations import Rotations, Rows, enrolled_rows
from anomalib_resad.enrollment.taught import widen

Photos: TypeAlias = str | Path | Iterable[Photo]


class Enrolling(Model):
    """A bundle that makes banks of photos; arguments as of the classes above it."""

    def _features_of(
        self, read: References, rotations: Rotations, region: np.ndarray | None, size: Size | None
    ) -> tuple[dict[Reference, Rows], int]:
        """What a bank keeps of photos that :func:`looked_at` gave: ``(N_l, C_l)`` per level, and the orientations."""
        encode = partial(self._encode_rows, region=region, size=size)
        rows, orientations = enrolled_rows(read.values(), encode, self.manifest.keyed, rotations)
        return dict(zip(read, rows, strict=True)), orientations

    def _new_bank(
        self, name: str, read: References, rotations: Rotations, max_patches: int | None, region: np.ndarray | None
    ) -> Bank:
        """The bank of photos that are seen as a whole, or in a region, at the size that suits their shape."""
        seen = looked_at(read, region)
        size = self.manifest.size_for(seen.sizes)
        features, orientations = self._features_of(seen, rotations, region, size)
        return self._bank_of(name, features, orientations, read.bit_depth, max_patches, region, size)

    def _changed(self, bank: Bank, features: dict[Reference, Rows]) -> Bank:
        """The same product of other photos."""
        kept = bank.rotations, bank.bit_depth, bank.max_patches, bank.region, bank.image_size
        changed = carried(self._bank_of(bank.product, features, *kept), bank, self.manifest)
        return changed.judged_as(bank, self.manifest)

    def _bank_of(
        self,
        name: str,
        features: dict[Reference, Rows],
        rotations: int,
        bit_depth: int,
        max_patches: int | None,
        region: np.ndarray | None,
        size: Size | None,
    ) -> Bank:
        references = by_content(features)
        most = None if max_patches is None else int(max_patches)  # numbers of numpy's are no JSON
        rows = [np.concatenate(level) for level in zip(*(features[each] for each in references), strict=True)]
        arrays = {f"rows_{level}": values for level, values in enumerate(rows)}
        arrays |= chosen_rows(rows, len(references), self.manifest, most)
        arrays |= {} if region is None else {REGION: region}
        return self._with_scores(
            Bank(
                name,
                self.manifest.encoder,
                references,
                arrays,
                max_patches=most,
                rotations=int(rotations),
                bit_depth=int(bit_depth),
                image_size=size,
            )
        )

    def _with_scores(self, bank: Bank) -> Bank:
        own = leave_one_out(bank, self.manifest, self._detect)
        if own is None:
            return replace(bank, leave_one_out=None, map_offset=None)
        return replace(bank, leave_one_out=own.scores, map_offset=own.map_offset if own.scores else None)

    def _tiled_bank(
        self, name: str, read: References, rotations: Rotations, max_patches: int | None, scale: float
    ) -> Bank:
        """The bank of photos that are cut into tiles, each with its score against the others."""
        tile, keyed = self.manifest.image_size, self.manifest.keyed
        sizes = [size_in_tiles(each.name, size, scale, tile) for each, size in zip(read, read.sizes, strict=True)]
        if rotations == "auto":
            encode = partial(self._encode_rows, region=None, size=self.manifest.size_for(read.sizes))
            _, rotations = enrolled_rows(read.values(), encode, keyed)
        most = max(1, (MOST_ROWS if max_patches is None else int(max_patches)) // len(read))
        kept = [
            rows_of(pixels, size, tile, self.encode, keyed, rotations, most)
            for pixels, size in zip(read.values(), sizes, strict=True)
        ]
        own, arrays = self._own_of_tiles(read, sizes, kept, int(rotations))
        arrays |= {f"rows_{level}": np.concatenate(rows) for level, rows in enumerate(zip(*kept, strict=True))}
        return Bank(
            name,
            self.manifest.encoder,
            tuple(read),
            arrays,
            max_patches=None if max_patches is None else int(max_patches),
            rotations=int(rotations),
            bit_depth=int(read.bit_depth),
            leave_one_out=own.scores,
            map_offset=own.map_offset if own.scores else None,
            tile_scale=float(scale),
        )

    def _own_of_tiles(
        self, read: References, sizes: Sequence[Size], kept: Sequence[Rows], rotations: int
    ) -> tuple[OwnScores, dict[str, np.ndarray]]:
        """What photos in tiles score against the others, and how far the rows that are kept of them reach."""
        if len(read) < 2:
            return own_scores(()), {}
        keys = np.concatenate([rows[-1] for rows in kept])
        photo_of = np.repeat(np.arange(len(kept)), [len(rows[-1]) for rows in kept])
        reach = np.zeros(len(keys), dtype=np.float32)

        def found(index: int, pixels: np.ndarray) -> tuple[float, np.ndarray]:
            others = [np.concatenate(level) for level in zip(*(*kept[:index], *kept[index + 1 :]), strict=True)]
            searched = judged(others, len(read), rotations, self.manifest)
            rows = [padded(level, self.manifest.row_multiple) for level in searched]

            def detect(tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
                features = self.encode(tiles)
                if self.manifest.keyed:
                    widen(reach, features[-1], keys, photo_of != index)
                return self._scored(features, rows)

            return inspected(resized_to(pixels, sizes[index]), self.manifest.image_size, detect)

        own = own_scores(found(*each) for each in enumerate(read.values()))
        return own, {REACH: reach} if self.manifest.keyed else {}


def looked_at(read: References, region: np.ndarray | None) -> References:
    """What a model sees of photos: all of them, or the box of a region.

    Raises:
        PhotoError: If one has another shape than the region.
    """
    if region is None:
        return read
    for reference, size in zip(read, read.sizes, strict=True):
        try:
            check_fits(region, size)
        except ValueError as error:  # noqa: PERF203  # it does not know the name
            msg = f"{reference.name}: {error}"
            raise PhotoError(msg) from error
    boxes = [box_of(region, size) for size in read.sizes]
    sizes = [(bottom - top, right - left) for top, left, bottom, right in boxes]
    return read.seen(partial(cut_out, region=region), sizes)


def read_photos(photos: Photos, bit_depth: BitDepth) -> tuple[Sequence[Photo], References]:
    """Photos as they were given, one by one, and what was read of them."""
    listed: Sequence[Photo] = list_photos(photos) if isinstance(photos, str | Path) else list(photos)
    return listed, read_references(listed, bit_depth)


def check_same(name: str, now: np.ndarray | Size | float | None, used: np.ndarray | Size | float | None) -> None:
    """Refuse to write features of another region, size or tile scale than the product has by now.

    Raises:
        BankError: If it has another one.
    """
    if not is_same(now, used):
        msg = f"{name!r} was given another region, size or tile scale meanwhile. Enroll the photos again."
        raise BankError(msg)
