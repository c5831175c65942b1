# SPDX-License-Identifier: Apache-2.0

"""Read the file of a bank, and see that it is whole, unaltered, and of the bundle."""

import json
import re
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from anomalib_resad.deploy.bank import (
    ENTRY,
    REACH,
    SEARCHED,
    SEARCHED_NEIGHBORHOODS,
    TAUGHT,
    USED,
    Bank,
    BankError,
    checksum_of,
    format_of,
)
from anomalib_resad.deploy.bank_rows import is_whole, patches_of
from anomalib_resad.deploy.bundle import Manifest
from anomalib_resad.deploy.json_reading import strict_json
from anomalib_resad.deploy.regions import check_min_area
from anomalib_resad.deploy.tiles import check_tile_scale
from anomalib_resad.enrollment.calibration import check_rate
from anomalib_resad.enrollment.checks import is_count
from anomalib_resad.enrollment.decoding import check_bit_depth
from anomalib_resad.enrollment.image_size import MOST_SIDE
from anomalib_resad.enrollment.neighborhoods import NEIGHBORHOODS
from anomalib_resad.enrollment.photos import Reference
from anomalib_resad.enrollment.region import LONGEST
from anomalib_resad.enrollment.rotations import check_rotations, kept_rows
from anomalib_resad.enrollment.thresholds import is_threshold


def read_bank(path: Path, manifest: Manifest) -> Bank:
    """Read the bank of a product and check all of it.

    Raises:
        BankError: If it is of another model or version, truncated, altered, not finite, or of a wrong size.
    """
    try:
        content = path.read_bytes()  # once, and no memory map: somebody may replace or cut the file
    except OSError as error:
        msg = f"{path} is truncated or no bank ({error}). Copy it again, or enroll the product again."
        raise BankError(msg) from error
    return parse_bank(content, manifest, str(path))


def parse_bank(content: bytes, manifest: Manifest, where: str) -> Bank:
    """Check the content of a bank's file; arguments and errors as of :func:`read_bank`."""
    try:
        bank = _parse(content, where)
    except BankError:
        raise
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        msg = f"{where} is truncated or no bank ({error}). Copy it again, or enroll the product again."
        raise BankError(msg) from error
    check_bank(bank, manifest, where)
    return bank


def _parse(content: bytes, where: str) -> Bank:
    arrays = load(content)
    header = strict_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = header.get("__metadata__", {})
    metadata = strict_json(metadata[ENTRY]) if ENTRY in metadata else metadata
    checksum = metadata.pop("checksum", None)
    expected = format_of(arrays, metadata)
    if metadata.get("format") != expected:
        msg = (
            f"{where} is no bank of this version ({metadata.get('format')} instead of {expected}). "
            "Enroll the product again from its good photos."
        )
        raise BankError(msg)
    if checksum_of(metadata, arrays) != checksum:
        msg = f"{where} was altered after it was written: its checksum differs. Copy it again, or enroll again."
        raise BankError(msg)
    scores, size = (json.loads(metadata.get(name, "null")) for name in ("leave_one_out", "image_size"))
    return Bank(
        product=metadata["product"],
        encoder=metadata["encoder"],
        references=_photos(metadata["references"]),
        arrays=arrays,
        threshold=json.loads(metadata["threshold"]),
        max_patches=json.loads(metadata["max_patches"]),
        rotations=json.loads(metadata["rotations"]),
        bit_depth=json.loads(metadata.get("bit_depth", "8")),
        false_alarm_rate=json.loads(metadata.get("false_alarm_rate", "null")),
        leave_one_out=None if scores is None else tuple(scores),
        min_area=json.loads(metadata.get("min_area", "0")),
        map_offset=json.loads(metadata.get("map_offset", "null")),
        tile_scale=json.loads(metadata.get("tile_scale", "null")),
        image_size=None if size is None else tuple(size),
        taught=_photos(metadata.get("taught", "[]")),
    )


def _photos(listed: str) -> tuple[Reference, ...]:
    return tuple(Reference(*each) for each in json.loads(listed))


def check_bank(bank: Bank, manifest: Manifest, where: str) -> None:
    """Check that a bank fits a bundle.

    Raises:
        BankError: If it does not.
    """
    _check_references(bank, where)
    _check_size(bank, manifest, where)
    if bank.encoder != manifest.encoder:
        msg = (
            f"{where} was enrolled with another model or precision ({_short(bank.encoder)}; this bundle is "
            f"{_short(manifest.encoder)}), so its features mean nothing here. Use that bundle, or enroll again."
        )
        raise BankError(msg)
    try:
        bank.with_threshold(bank.threshold)
        _check_scores(bank)
        check_rotations(bank.rotations)
        check_bit_depth(bank.bit_depth)
        check_min_area(bank.min_area)
        _check_view(bank.region, bank.tile_scale)
        _check_taught(bank, manifest)
    except ValueError as error:
        msg = f"{where}: {error} Enroll again."
        raise BankError(msg) from error
    if not all(is_count(each) for each in (bank.rotations, bank.bit_depth, bank.max_patches) if each is not None):
        msg = f"{where}: rotations={bank.rotations!r}, max_patches={bank.max_patches!r} are no numbers. Enroll again."
        raise BankError(msg)
    for number, level in enumerate(manifest.levels_at(bank.image_size)):
        rows = bank.arrays.get(f"rows_{number}")
        expected = len(bank.references) * kept_rows(patches_of(bank, level), bank.rotations)
        if bank.tile_scale is not None:
            by_itself = not manifest.keyed or (manifest.judges_neighborhoods and number == NEIGHBORHOODS)
            expected = len(bank.arrays.get(f"rows_{number if by_itself else len(manifest.levels) - 1}", ()))
        elif not is_whole(bank, manifest):
            expected = min(expected, bank.max_patches or expected)
        if rows is None or rows.dtype != np.float32 or rows.shape != (expected, level.channels) or expected == 0:
            has = None if rows is None else f"{rows.dtype} {rows.shape}"
            msg = f"{where}: level {number} has {has} instead of float32 {(expected, level.channels)}. Enroll again."
            raise BankError(msg)
        with np.errstate(over="ignore"):
            lengths = np.linalg.norm(rows, axis=1)  # which the matching divides by
        if not (np.isfinite(lengths).all() and lengths.all()):
            msg = (
                f"{where}: level {number} holds NaN, infinity, huge rows or rows of zeros. Check the photos and the "
                "bundle, and enroll again."
            )
            raise BankError(msg)
    _check_searched(bank, manifest, where)


def _check_view(region: np.ndarray | None, tile_scale: float | None) -> None:
    """Refuse what is no mask, and what is no scale of tiles.

    Raises:
        ValueError: If it is not.
    """
    if tile_scale is not None:
        check_tile_scale(tile_scale)
    if region is not None and not (
        region.dtype == np.uint8
        and region.ndim == 2
        and max(region.shape) <= LONGEST
        and region.any()
        and region.max() == 1
    ):
        msg = f"its region ({region.dtype}, {region.shape}) is no mask of 0 and 1."
        raise ValueError(msg)


def _check_size(bank: Bank, manifest: Manifest, where: str) -> None:
    """Refuse a size that the bundle does not give photos, and what is none.

    Raises:
        BankError: If it is so.
    """
    size, stride = bank.image_size, manifest.stride
    follows_shape = stride is not None and bank.tile_scale is None  # tiles have the size of the bundle
    if (size is not None) != follows_shape:
        had = "the bundle's size" if size is None else f"a size of its own, {' x '.join(map(str, size))} pixels"
        height, width = manifest.image_size
        gives = "gives each product its own" if stride is not None else f"resizes all photos to {height} x {width}"
        msg = (
            f"{where} was enrolled at {had} (height x width), and this bundle {gives}. Use the bundle that it was "
            "enrolled with, or enroll again."
        )
        raise BankError(msg)
    if size is not None and stride is not None:
        whole = [type(side) is int and 0 < side <= MOST_SIDE and side % stride == 0 for side in size]
        if len(whole) != 2 or not all(whole):
            msg = f"{where}: image_size={size!r} is no height and width in whole strides of {stride}. Enroll again."
            raise BankError(msg)


def _check_taught(bank: Bank, manifest: Manifest) -> None:
    """Refuse taught patches that cannot be, and a reach of rows, which tells what of them counts, that is none.

    Raises:
        ValueError: If there are some.
    """
    _check_reach(bank, manifest)
    rows, used = bank.arrays.get(TAUGHT), bank.arrays.get(USED)
    if rows is None and used is None and not bank.taught:
        return
    if not (
        manifest.keyed
        and bank.taught
        and rows is not None
        and (rows.dtype, rows.shape[1:]) == (np.float32, (manifest.levels[-1].channels,))
        and used is not None
        and (used.dtype, used.shape) == (np.uint8, (len(rows),))
        and np.isfinite(rows).all()
        and (is_whole(bank, manifest) or (bank.tile_scale is not None and (REACH in bank.arrays or not used.any())))
    ):
        msg = "what it was taught is no list of patches."
        raise ValueError(msg)


def _check_reach(bank: Bank, manifest: Manifest) -> None:
    """Refuse what is no reach of rows of tiles.

    Raises:
        ValueError: If it is none.
    """
    reach = bank.arrays.get(REACH)
    if reach is None:
        return
    rows = len(bank.arrays.get(f"rows_{len(manifest.levels) - 1}", ()))
    fits = manifest.keyed and bank.tile_scale is not None and (reach.dtype, reach.shape) == (np.float32, (rows,))
    if not fits or not (reach >= 0).all() or not np.isfinite(reach).all():
        msg = "the reach of its rows is no list of distances."
        raise ValueError(msg)


def _check_searched(bank: Bank, manifest: Manifest, where: str) -> None:
    """Refuse a choice of rows that is none.

    Raises:
        BankError: If it is none.
    """
    levels = {SEARCHED: len(manifest.levels) - 1}
    if manifest.judges_neighborhoods and bank.max_patches:
        levels[SEARCHED_NEIGHBORHOODS] = NEIGHBORHOODS
    for name in (SEARCHED, SEARCHED_NEIGHBORHOODS):
        chosen = bank.arrays.get(name)
        if chosen is None:
            continue
        rows = len(bank.arrays[f"rows_{levels[name]}"]) if name in levels else -1
        fits = manifest.keyed and is_whole(bank, manifest) and (chosen.dtype, chosen.shape) == (np.uint8, (rows,))
        groups = 1 if bank.max_patches else len(bank.references)
        counts = chosen.reshape(groups, -1).sum(axis=1) if fits else np.zeros(1)
        if not fits or chosen.max() > 1 or counts.min() == 0 or counts.min() != counts.max():
            msg = f"{where}: which of its rows are searched is no list of 0 and 1, as many of each photo. Enroll again."
            raise BankError(msg)


def _check_scores(bank: Bank) -> None:
    """Refuse leave-one-out scores and a false-alarm rate that cannot be.

    Raises:
        ValueError: If there are some.
    """
    if bank.false_alarm_rate is not None:
        check_rate(bank.false_alarm_rate)
    scores, photos = bank.leave_one_out, len(bank.references)
    if scores is not None and not (
        len(scores) == (photos if photos > 1 else 0) and all(is_threshold(each) for each in scores)
    ):
        msg = f"its photos' own scores are not {photos} finite numbers."
        raise ValueError(msg)
    if bank.map_offset is not None and not is_threshold(bank.map_offset):
        msg = f"map_offset={bank.map_offset!r} is no finite number."
        raise ValueError(msg)


def _check_references(bank: Bank, where: str) -> None:
    """Refuse names that are no text, and photos that are no SHA-256 in order.

    Raises:
        BankError: If there are some.
    """
    lists = [[each.sha256 for each in photos] for photos in (bank.references, bank.taught)]
    names = [each.name for each in (*bank.references, *bank.taught)]
    if not all(isinstance(each, str) for each in (bank.product, bank.encoder, *names, *lists[0], *lists[1])) or not all(
        photos == sorted(set(photos)) and all(re.fullmatch("[0-9a-f]{64}", each) for each in photos) for photos in lists
    ):
        msg = f"{where}: its list of photos is none. Enroll the product again."
        raise BankError(msg)


def _short(encoder: str) -> str:
    model, _, precision = encoder.partition("/")
    return f"{model[:12]}, {precision}"
