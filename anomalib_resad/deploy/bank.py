# SPDX-License-Identifier: Apache-2.0

"""The bank of one product: features of its good photos, in one safetensors file."""

import hashlib
import json
import math
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from anomalib_resad.deploy.bundle import Manifest
from anomalib_resad.deploy.regions import check_min_area
from anomalib_resad.enrollment.calibration import check_rate, product_threshold
from anomalib_resad.enrollment.files import write_whole
from anomalib_resad.enrollment.image_size import Size
from anomalib_resad.enrollment.neighborhoods import judges_neighborhoods
from anomalib_resad.enrollment.photos import Reference
from anomalib_resad.enrollment.thresholds import is_threshold

FORMAT = "resad-bank-2"
FORMAT_OF_VIEW = "resad-bank-3"  # of a bank with a region, of tiles, or of a size: versions that know none refuse it
FORMAT_OF_TAUGHT = "resad-bank-4"  # of a bank that was taught defects
REGION = "region"  # its array
SEARCHED = "searched"  # which rows a search looks through; without it they are chosen anew, which takes longer
SEARCHED_NEIGHBORHOODS = "searched_neighborhoods"  # the same of neighborhoods, if not all are
TAUGHT, USED = "taught", "taught_used"  # keys of taught patches, and which of them count
REACH = "reach"  # of rows of tiles: how near to them patches of the good photos lie that are not kept
ENTRY = "resad"  # the one entry of a file's metadata; safetensors orders several at random, as in banks of 0.1.0
SUFFIX = ".safetensors"
LONGEST_NAME = 200  # bytes; file systems take 255, of which some are needed for the name of a temporary file
# What Windows takes for a device, whatever follows after a dot. `isdigit` of COM and LPT counts superscripts too.
DEVICES = ("CON", "PRN", "AUX", "NUL")


class BankError(ValueError):
    """A bank cannot be used; the message says why and what to do."""


class NotEnrolledError(ValueError):
    """There is no such product."""


class EnrolledError(ValueError):
    """There is such a product already."""


class NotTaughtError(ValueError):
    """The product was taught nothing."""


class UndoError(ValueError):
    """There is nothing to undo."""


@dataclass(frozen=True)
class Bank:
    """Features of the good photos of one product.

    Attributes:
        product (str): The product's name.
        encoder (str): What made the features (:attr:`Manifest.encoder`).
        references (tuple[Reference, ...]): The photos, ordered by content.
        arrays (dict[str, np.ndarray]): ``rows_0``, ... of each level, float32, shape ``(N_l, C_l)``: the patches of the
            references one after the other, each with those of its rotated copies. Where levels are searched by keys,
            ``searched``, uint8, shape ``(N,)``, tells which rows are, if not all, and ``searched_neighborhoods`` which
            neighborhoods. And of a product that has one,
            ``region``, see :mod:`anomalib_resad.enrollment.region`: then there are no rows of patches outside of it.
            Of a product that was taught defects also ``taught``, keys of their patches, shape ``(M, K)``, and
            ``taught_used``, uint8, shape ``(M,)``, see :mod:`anomalib_resad.deploy.taught`. Of two or more photos that
            are looked at in tiles and searched by keys, ``reach``, float32, shape ``(N,)``, see
            :func:`~anomalib_resad.enrollment.taught.widen`; banks that were enrolled earlier have none.
        threshold (float | None): The product's own threshold of the raw score; ``None`` for the model's.
        max_patches (int | None): Most rows of a level that are searched; banks of 0.1.0 hold no others then.
        rotations (int): Orientations of each photo; 1 for photos as they are.
        bit_depth (int): Bits of a channel of the photos; banks of 0.1.0 are of 8.
        false_alarm_rate (float | None): Target that the threshold was computed for, and is again when photos are added
            or removed; ``None`` for one that somebody set, and for the model's.
        leave_one_out (tuple[float, ...] | None): Raw score of each photo against the others, none of a single one;
            ``None`` in banks of 0.1.0.
        min_area (int): Fewest pixels of a region that is found, of the photo.
        map_offset (float | None): How much higher these scores are than the top of the photos' maps, on the mean;
            ``None`` of a single photo, and if unknown.
        tile_scale (float | None): Photo pixels per pixel of the model, of photos that are looked at in tiles; then the
            rows are a selection; ``None`` for whole photos.
        image_size (Size | None): Height and width that the product's photos are resized to, chosen from their shapes
            when it was enrolled; ``None`` for the size of the bundle.
        taught (tuple[Reference, ...]): Photos whose defects were taught, ordered by content.
    """

    product: str
    encoder: str
    references: tuple[Reference, ...]
    arrays: dict[str, np.ndarray]
    threshold: float | None = None
    max_patches: int | None = None
    rotations: int = 1
    bit_depth: int = 8
    false_alarm_rate: float | None = None
    leave_one_out: tuple[float, ...] | None = None
    min_area: int = 0
    map_offset: float | None = None
    tile_scale: float | None = None
    image_size: Size | None = None
    taught: tuple[Reference, ...] = ()

    @property
    def region(self) -> np.ndarray | None:
        """The mask of what counts in the product's photos, uint8; ``None`` where all counts."""
        return self.arrays.get(REGION)

    @property
    def size(self) -> int:
        """Bytes of the features."""
        return sum(array.nbytes for array in self.arrays.values())

    def spread(self, manifest: Manifest) -> float:
        """How far scores of the source's good photos scatter, with neighborhoods where this product's are judged.

        Args:
            manifest (Manifest): The bundle's.

        Returns:
            float: Their standard deviation within the source categories; NaN if unknown.
        """
        neighborhoods = judges_neighborhoods(len(self.references), self.rotations)
        known = manifest.spread if neighborhoods or manifest.patch_spread is None else manifest.patch_spread
        return math.nan if known is None else known

    def with_threshold(self, threshold: float | None) -> "Bank":
        """The same bank with another threshold.

        Raises:
            ValueError: If it is not a finite number.
        """
        if threshold is not None and not is_threshold(threshold):
            msg = f"threshold={threshold!r} must be a finite number, on the scale of `raw_score`, or None."
            raise ValueError(msg)
        return replace(self, threshold=None if threshold is None else float(threshold), false_alarm_rate=None)

    def with_rate(self, rate: float | None, manifest: Manifest) -> "Bank":
        """The same bank with the threshold for a false-alarm rate; the model's with a single photo, or without a rate.

        Args:
            rate (float | None): Target false-alarm rate.
            manifest (Manifest): The bundle's.

        Raises:
            ValueError: If it is no rate, or its threshold no finite number.
        """
        if rate is None:
            return self.with_threshold(None)
        check_rate(rate)
        own = self.leave_one_out
        threshold = product_threshold(own, self.spread(manifest), rate) if own else None
        return replace(self.with_threshold(threshold), false_alarm_rate=float(rate))

    def with_min_area(self, min_area: int) -> "Bank":
        """The same bank with another minimum area of regions.

        Raises:
            ValueError: If it is no number of pixels.
        """
        check_min_area(min_area)
        return replace(self, min_area=min_area)

    def judged_as(self, other: "Bank", manifest: Manifest) -> "Bank":
        """The same bank with the threshold of another one, or that for its rate, and with its minimum area."""
        bank = self.with_min_area(other.min_area)
        if other.false_alarm_rate is None:
            return bank.with_threshold(other.threshold)
        return bank.with_rate(other.false_alarm_rate, manifest)

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of all that the bank holds."""
        return checksum_of(self._metadata(), self.arrays)

    @property
    def content(self) -> bytes:
        """The bank's file; equal banks are equal files."""
        metadata = json.dumps(self._metadata() | {"checksum": self.checksum}, sort_keys=True)
        return save(self.arrays, {ENTRY: metadata})

    def save(self, path: Path) -> None:
        """Write the bank, whole or not at all."""
        write_whole(path, self.content)

    def _metadata(self) -> dict[str, str]:
        # What is as it always was is left out, so that equal banks of earlier versions are equal files.
        added = {"min_area": json.dumps(self.min_area)} if self.min_area else {}
        added |= {} if self.tile_scale is None else {"tile_scale": json.dumps(self.tile_scale)}
        added |= {} if self.map_offset is None else {"map_offset": json.dumps(self.map_offset)}
        added |= {} if self.image_size is None else {"image_size": json.dumps(self.image_size)}
        added |= {"taught": _listed(self.taught)} if self.taught else {}
        return added | {
            "format": format_of(self.arrays, added),
            "product": self.product,
            "encoder": self.encoder,
            "references": _listed(self.references),
            "threshold": json.dumps(self.threshold),
            "max_patches": json.dumps(self.max_patches),
            "rotations": json.dumps(self.rotations),
            "bit_depth": json.dumps(self.bit_depth),
            "false_alarm_rate": json.dumps(self.false_alarm_rate),
            "leave_one_out": json.dumps(self.leave_one_out),
        }


def format_of(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Format of a bank's file: a newer one only where an earlier version would leave something out."""
    if TAUGHT in arrays:
        return FORMAT_OF_TAUGHT
    of_view = REGION in arrays or "tile_scale" in metadata or "image_size" in metadata
    return FORMAT_OF_VIEW if of_view else FORMAT


def _listed(photos: Iterable[Reference]) -> str:
    return json.dumps([[each.name, each.sha256] for each in photos])


def checksum_of(metadata: dict[str, str], arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of what a bank's file holds."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def product_name(given: str) -> str:
    """The one form of a product's name, in composed Unicode: macOS takes letters with accents apart.

    Raises:
        ValueError: If it could leave the folder of the banks, or is no file name everywhere.
    """
    name = unicodedata.normalize("NFC", given)
    kinds = [unicodedata.category(each)[0] for each in name]  # L for letters, M for their marks, N for digits
    fits = all(kind in "LMN" or each in "_ .()+-" for kind, each in zip(kinds, name, strict=True))
    if not fits or not name or not (kinds[0] in "LN" or name[0] == "_") or name[-1] in " .":
        msg = (
            f"{given[:80]!r} cannot be the name of a product. Use letters of any script, digits, spaces and _ . ( ) + "
            "-, beginning with a letter or a digit, and not ending with a dot or a space."
        )
        raise ValueError(msg)
    if len(name.encode()) > LONGEST_NAME:
        msg = f"{given[:20]!r}... takes {len(name.encode())} bytes in UTF-8; names of products take {LONGEST_NAME}."
        raise ValueError(msg)
    device = name.partition(".")[0].rstrip().upper()
    if device in DEVICES or (device[:3] in ("COM", "LPT") and len(device) == 4 and device[3].isdigit()):
        msg = f"{given!r} cannot be the name of a product: Windows takes {device} for a device. Use another name."
        raise ValueError(msg)
    return name


def bank_file(folder: Path, product: str) -> Path:
    """Where the bank of a product is kept.

    Raises:
        ValueError: As of :func:`product_name`.
    """
    return folder / f"{product_name(product)}{SUFFIX}"
