# SPDX-License-Identifier: Apache-2.0

"""The taught patches of a bank: which of them count, and how they follow when the good photos change.

A taught patch counts unless a good photo of the bank has a patch that is nearer to it than to all other good photos. So
what is taught raises no good photo of the bank, compared with the others, and its threshold stays what it is.

The bank of a product in tiles keeps some patches of its photos only, so it cannot tell that of those that it does not
keep. Instead, it says of each row how near to it they lie at most (its reach). What lies in the reach of a row is like
a good photo: it is never raised, and such a taught patch does not count. Each patch of a good photo of the bank lies in
one, also where the photo is compared with the others alone. So the same holds for it.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NoReturn

import numpy as np

from anomalib_resad.deploy.bank import REACH, TAUGHT, USED, Bank
from anomalib_resad.deploy.bank_rows import left_out, levels_of, patches_of
from anomalib_resad.deploy.bundle import Manifest
from anomalib_resad.enrollment.photos import PhotoError, Reference, by_content
from anomalib_resad.enrollment.region import is_same
from anomalib_resad.enrollment.rotations import Rows
from anomalib_resad.enrollment.taught import BLOCK, RAISE, Taught, in_reach, nearest


def taught_of(bank: Bank, rows: Rows, manifest: Manifest) -> Taught | None:
    """What an inspection needs of taught defects; ``None`` where none count.

    Args:
        bank (Bank): The bank.
        rows (Rows): The rows that are searched.
        manifest (Manifest): The bundle's.
    """
    spread = spread_of(bank, manifest)
    if not bank.taught or spread is None or not bank.arrays[USED].any():
        return None
    chosen = bank.arrays[TAUGHT][bank.arrays[USED] > 0]
    reach = bank.arrays.get(REACH)
    good = rows[-1] if reach is None else rows[-1][: len(reach)]  # without what they are padded with
    return Taught(good, chosen, RAISE * spread, bank.image_size or manifest.image_size, reach)


def spread_of(bank: Bank, manifest: Manifest) -> float | None:
    """Standard deviation of good photos' scores: the source's, else that of the product's own; ``None`` if unknown."""
    spread = bank.spread(manifest)
    if not math.isnan(spread):
        return spread
    return float(np.std(bank.leave_one_out, ddof=1)) if bank.leave_one_out else None


def with_taught(bank: Bank, photos: Iterable[Reference], rows: np.ndarray, manifest: Manifest) -> Bank:
    """A bank that was taught these patches and no others.

    Args:
        bank (Bank): A whole bank.
        photos (Iterable[Reference]): The photos that they are from.
        rows (np.ndarray): Keys of the patches, shape ``(M, K)``; equal ones count once, in any order.
        manifest (Manifest): The bundle's.
    """
    arrays = {name: values for name, values in bank.arrays.items() if name not in (TAUGHT, USED)}
    if len(rows):
        unique = np.unique(rows, axis=0)
        arrays |= {TAUGHT: unique, USED: which_count(bank, unique, manifest).astype(np.uint8)}
    return replace(bank, arrays=arrays, taught=by_content(photos))


def carried(bank: Bank, before: Bank, manifest: Manifest) -> Bank:
    """A bank of other good photos that was taught what the one before was."""
    if not before.taught:
        return bank
    check_same_view(before, bank.region, bank.tile_scale)
    if bank.image_size != before.image_size:
        _refuse_view(before)
    _refuse_taught(bank.product, before.taught, bank.references)
    return with_taught(bank, before.taught, before.arrays[TAUGHT], manifest)


def which_count(bank: Bank, rows: np.ndarray, manifest: Manifest) -> np.ndarray:
    """Which taught patches raise no good photo of a bank, bool, shape ``(M,)``.

    All of them for a single photo; none of them in tiles that have no reach, where they wait for another enrollment.
    """
    if bank.tile_scale is not None:
        reach = bank.arrays.get(REACH)
        return np.zeros(len(rows), bool) if reach is None else ~in_reach(rows, levels_of(bank, manifest)[-1], reach)
    counting = np.ones(len(rows), dtype=bool)
    if len(bank.references) < 2:
        return counting
    for own, others in left_out(bank, manifest):
        patches = own[-1][: patches_of(bank, manifest.levels_at(bank.image_size)[-1])]
        limits = nearest(patches, others[-1])
        for start in range(0, len(rows), BLOCK):
            part = slice(start, start + BLOCK)
            counting[part] &= (2 - 2 * (patches @ rows[part].T) >= limits[:, None]).all(axis=0)
    return counting


def check_same_view(bank: Bank, region: np.ndarray | None, scale: float | None) -> None:
    """Refuse another region or tile scale for a product that was taught.

    Args:
        bank (Bank): The product as it is.
        region (np.ndarray | None): The region that it is to have.
        scale (float | None): The tile scale that it is to have.

    Raises:
        ValueError: If it is another one.
    """
    if not bank.taught:
        return
    if not (is_same(bank.region, region) and is_same(bank.tile_scale, scale)):
        _refuse_view(bank)


def _refuse_view(bank: Bank) -> NoReturn:
    msg = (
        f"{bank.product!r} was taught defects ({len(bank.taught)} of its photos), which mean nothing with another "
        "region or tile scale, or with photos of another shape. Forget them first (`resad teach --forget`), and teach "
        "them again."
    )
    raise ValueError(msg)


def check_not_good(bank: Bank, photo: Reference) -> None:
    """Refuse to teach a good photo of the product.

    Raises:
        PhotoError: If it is one.
    """
    same = [each.name for each in bank.references if each.sha256 == photo.sha256]
    if same:
        msg = (
            f"{photo.name} is one of the good photos of {bank.product!r} ({same[0]}), so it cannot be taught as a "
            f"defect. If it is defective, enroll the product without it, or `remove({bank.product!r}, {same[0]!r})` "
            "in Python."
        )
        raise PhotoError(msg)


def _refuse_taught(product: str, taught: Iterable[Reference], photos: Iterable[Reference]) -> None:
    """Refuse good photos that were taught as defects.

    Raises:
        PhotoError: If there are some.
    """
    both = {each.sha256: each.name for each in taught}
    names = [each.name for each in photos if each.sha256 in both]
    if names:
        msg = (
            f"{', '.join(names)} was taught to {product!r} as a defect, so it cannot be a good photo. Undo that "
            "first (`resad history`, `resad undo`), or forget all (`resad teach --forget`)."
        )
        raise PhotoError(msg)
