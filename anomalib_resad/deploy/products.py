# SPDX-License-Identifier: Apache-2.0

"""The products of a bundle: enroll them, change them, and give them thresholds, with OpenVINO alone."""

import logging
from collections.abc import Iterable
from typing import Literal, TypeAlias

import numpy as np

from anomalib_resad.deploy.bank import Bank, BankError, EnrolledError, bank_file, product_name
from anomalib_resad.deploy.bank_rows import rows_of_photos
from anomalib_resad.deploy.enrolling import Enrolling, Photos, check_same, looked_at, read_photos
from anomalib_resad.deploy.regions import check_min_area
from anomalib_resad.deploy.taught import carried, check_same_view
from anomalib_resad.deploy.tiles import check_tile_scale
from anomalib_resad.enrollment.calibration import USUAL_RATE, check_rate
from anomalib_resad.enrollment.checks import is_count
from anomalib_resad.enrollment.decoding import BitDepth, check_bit_depth
from anomalib_resad.enrollment.image_size import Size
from anomalib_resad.enrollment.photos import Photo, PhotoError
from anomalib_resad.enrollment.references import size_of
from anomalib_resad.enrollment.region import RegionSource, read_region
from anomalib_resad.enrollment.rotations import Rotations

logger = logging.getLogger(__name__)
Rate: TypeAlias = float | Literal["auto"] | None


class Products(Enrolling):
    """A bundle whose products can be changed.

    Arguments, attributes and errors are those of :class:`~anomalib_resad.deploy.inferencer.ResADInferencer`, which also
    inspects.
    """

    def enroll(
        self,
        name: str,
        photos: Photos,
        threshold: float | None = None,
        max_patches: int | None = None,
        replace_existing: bool = False,
        rotations: Rotations | None = None,
        bit_depth: BitDepth = "auto",
        false_alarm_rate: Rate = "auto",
        min_area: int | None = None,
        region: RegionSource = None,
        tile_scale: float | None = None,
    ) -> Bank:
        """Learn a product from good photos.

        The result depends on the photos alone, not on their order or names; identical photos count once. It is written
        whole or not at all.

        Args:
            name (str): The product.
            photos (Photos): A folder, or photos.
            threshold (float | None): The product's own threshold of the raw score; ``None`` leaves it to
                ``false_alarm_rate``.
            max_patches (int | None): Most rows of a level that are searched, instead of the model's share of them.
            replace_existing (bool): Replace the product if it is enrolled already.
            rotations (Rotations | None): Orientations of each photo: 1 for photos as they are, 8 for every 45 degrees,
                ``"auto"`` for 8 where the photos are rotated to each other; ``None`` for the model's.
            bit_depth (BitDepth): Bits of a channel of this product's photos, kept with it; ``"auto"`` for what the
                files state.
            false_alarm_rate (Rate): Share of good photos that may lie above the product's own threshold, which is
                computed from its photos, and again when some are added or removed; of a single photo the model's stays.
                ``None`` for the model's. ``"auto"`` for what the product had that is replaced; of a new one,
                :data:`~anomalib_resad.enrollment.calibration.USUAL_RATE`, unless the bundle knows a threshold and no
                scatter of scores.
            min_area (int | None): Fewest pixels of a region that is found, of the photo, kept with the product;
                ``None`` for what the product had that is replaced, of a new one 0.
            region (RegionSource): What counts in the photos, as of
                :func:`~anomalib_resad.enrollment.region.read_region`, kept with the product; ``"none"`` for all of
                them, ``None`` for what the product had that is replaced, of a new one all.
            tile_scale (float | None): Photo pixels per pixel of the model, of large photos that are looked at in
                :mod:`~anomalib_resad.deploy.tiles`; 0 for whole photos, ``None`` for what the product had that is
                replaced, of a new one whole photos.

        Raises:
            ValueError: If the product exists, its name is no file name, or a number or the region is impossible.
            PhotoError: If a photo cannot be used; nothing was written then.
            BankError: If the product was given another region meanwhile.
        """
        name = product_name(name)
        self._check_new(name, replace_existing)
        if max_patches is not None and not is_count(max_patches):
            msg = f"max_patches={max_patches!r} must be a whole number of at least 1, or None."
            raise ValueError(msg)
        _check_one_threshold(threshold, false_alarm_rate)
        check_bit_depth(bit_depth)
        check_min_area(min_area or 0)
        rotations = self.manifest.rotations if rotations is None else rotations
        listed, read = read_photos(photos, bit_depth)
        if not read:
            msg = f"No photo was given for {name!r}. Enroll at least one good photo; 2 to 8 are usual."
            raise PhotoError(msg)
        mask, scale = self._view_of(name, region, tile_scale, listed)
        if scale is not None:
            bank = self._tiled_bank(name, read, rotations, max_patches, _without_region(scale, mask))
        else:
            bank = self._new_bank(name, read, rotations, max_patches, mask)
        with self._store.changing(name):
            self._check_new(name, replace_existing)  # again: somebody else may have enrolled it meanwhile
            before = self._earlier(name)
            if before is not None:
                check_same(name, before.region if region is None else mask, mask)
                check_same(name, before.tile_scale if tile_scale is None else scale, scale)
                bank = carried(bank, before, self.manifest)
            least = (0 if before is None else before.min_area) if min_area is None else min_area
            judged = self._judged(bank, before, threshold, false_alarm_rate).with_min_area(least)
            return self._store.write(judged, "enroll" if before is None else "replace")

    def _view_of(
        self, name: str, region: RegionSource, tile_scale: float | None, photos: Iterable[Photo]
    ) -> tuple[np.ndarray | None, float | None]:
        """Region and tile scale that a product is to have: what was asked for, else those that it has.

        Raises:
            ValueError: If it was taught with others.
        """
        try:
            now = self.bank(name) if bank_file(self.banks, name).exists() else None
        except BankError:  # which is told later
            now = None
        kept, kept_scale = (None, None) if now is None else (now.region, now.tile_scale)
        mask = kept if region is None else _region_of(region, photos)
        scale = (kept_scale if tile_scale is None else tile_scale) or None
        if now is not None:
            check_same_view(now, mask, scale)
        return mask, scale

    def _judged(self, bank: Bank, before: Bank | None, threshold: float | None, rate: Rate) -> Bank:
        """A new bank with the threshold that was asked for, else that of the bank that it replaces, else the usual."""
        if threshold is not None:
            return bank.with_threshold(threshold)
        if rate == "auto" and before is not None:
            return bank.judged_as(before, self.manifest)
        # A model of 0.1.0 has a threshold and knows no scatter: then its threshold is the better guess.
        of_model = self.manifest.spread is None and self.manifest.score.threshold is not None
        usual = None if of_model else USUAL_RATE
        return bank.with_rate(usual if rate == "auto" else rate, self.manifest)

    def _earlier(self, name: str) -> Bank | None:
        """The bank that is replaced; what was set in one that cannot be read is lost."""
        try:
            return self.bank(name) if bank_file(self.banks, name).exists() else None
        except BankError as error:
            logger.warning(
                "If %r had a threshold of its own, set it again, and so its region and its minimum area, and teach it "
                "again what it was taught: its bank was unusable. %s",
                name,
                error,
            )
            return None

    def _check_new(self, name: str, replace_existing: bool) -> None:
        if bank_file(self.banks, name).exists() and not replace_existing:
            msg = (
                f"{name!r} is enrolled already. Add photos to it (`--mode add`), or replace it (`--mode replace`; in "
                "Python `add`, `replace_existing=True`)."
            )
            raise EnrolledError(msg)

    def add(self, name: str, photos: Photos) -> Bank:
        """Add good photos to a product; the bank is then as if all had been enrolled at once.

        They are enrolled in as many orientations as those that are there, are resized to the size that was chosen from
        the shapes of these, and have to be of their bit depth. Nothing is lost where several threads or processes add
        to one product.

        Raises:
            ValueError: If the product is not enrolled, or version 0.1.0 thinned out its bank.
            PhotoError: If a photo cannot be used.
            BankError: If the product was enrolled in another way meanwhile.
        """
        before = self._whole_bank(name)
        name = before.product
        _, read = read_photos(photos, before.bit_depth)
        read = looked_at(read, before.region)
        added, _ = self._features_of(read, before.rotations, before.region, before.image_size)
        with self._store.changing(name):
            bank = self._whole_bank(name)
            if _way_of(bank) != _way_of(before):
                msg = (
                    f"{name!r} was enrolled anew meanwhile, in {bank.rotations} orientations, of {bank.bit_depth} bits "
                    "a channel, or of photos of another shape. Add the photos again."
                )
                raise BankError(msg)
            check_same(name, bank.region, before.region)
            return self._store.write(self._changed(bank, rows_of_photos(bank, self.manifest) | added), "add")

    def remove(self, name: str, photo: str | None = None) -> None:
        """Remove a product, or one of its photos by name, or by the beginning of its SHA-256.

        Raises:
            ValueError: If there is no such product or photo, it is the last photo, or several photos have that name.
        """
        self._store.check_enrolled(name)
        with self._store.changing(name):
            if photo is None:
                self._store.remove(name)
                return
            bank = self._whole_bank(name)
            chosen = [each for each in bank.references if each.name == photo or each.sha256.startswith(photo)]
            if len(chosen) != 1 or len(bank.references) == 1:
                names = ", ".join(f"{each.name} ({each.sha256[:8]})" for each in bank.references)
                problem = "names several photos" if len(chosen) > 1 else "is not one of several photos"
                msg = f"{photo!r} {problem} of {name!r}: {names}. Nothing was changed."
                raise ValueError(msg)
            kept = {
                reference: rows
                for reference, rows in rows_of_photos(bank, self.manifest).items()
                if reference != chosen[0]
            }
            self._store.write(self._changed(bank, kept), f"remove {chosen[0].name}")

    def set_threshold(self, name: str, threshold: float | None) -> Bank:
        """Give a product its own threshold of the raw score, or with ``None`` the model's again.

        Raises:
            ValueError: If the product is not enrolled, or the threshold is no finite number.
        """
        self._store.check_enrolled(name)
        with self._store.changing(name):
            return self._store.write(self.bank(name).with_threshold(threshold), "threshold")

    def set_min_area(self, name: str, min_area: int) -> Bank:
        """Change the fewest pixels of a region that is found in photos of a product; 0 for regions of any size.

        Raises:
            ValueError: If the product is not enrolled, or it is no number of pixels.
        """
        self._store.check_enrolled(name)
        with self._store.changing(name):
            return self._store.write(self.bank(name).with_min_area(min_area), "minimum area")

    def calibrate(self, name: str, rate: float) -> Bank:
        """Give a product the threshold that a share of good photos exceeds, from the scores of its own photos.

        Raises:
            ValueError: If the product is not enrolled, or of one photo, or thinned out by 0.1.0; or it is no rate.
        """
        check_rate(rate)
        self._store.check_enrolled(name)
        with self._store.changing(name):
            bank = self.bank(name)
            if bank.leave_one_out is None:
                bank = self._with_scores(self._whole_bank(name))
            if not bank.leave_one_out:
                msg = f"{name!r} has one photo, which nothing can be compared with. Add a good photo first."
                raise ValueError(msg)
            return self._store.write(bank.with_rate(rate, self.manifest), "threshold")


def _way_of(bank: Bank) -> tuple[int, int, Size | None]:
    """How photos become rows of a bank, which all of them have to share."""
    return bank.rotations, bank.bit_depth, bank.image_size


def _region_of(region: Photo, photos: Iterable[Photo]) -> np.ndarray | None:
    """The region that was given; ``None`` for all of the photos."""
    everything = isinstance(region, str) and region == "none"
    return None if everything else read_region(region, [size_of(each) for each in photos])


def _check_one_threshold(threshold: float | None, rate: Rate) -> None:
    """Refuse an impossible rate, and one beside a threshold.

    Raises:
        ValueError: If it is so.
    """
    if rate not in (None, "auto"):
        check_rate(rate)
        if threshold is not None:
            msg = f"threshold={threshold} and false_alarm_rate={rate} are two thresholds. Give one."
            raise ValueError(msg)


def _without_region(scale: float, region: np.ndarray | None) -> float:
    """A scale of tiles that can be used.

    Raises:
        ValueError: If it is none, or there is a region, too.
    """
    check_tile_scale(scale)
    if region is not None:
        msg = f"tile_scale={scale} cannot be combined with a region yet. Crop the photos, or give region='none'."
        raise ValueError(msg)
    return scale
