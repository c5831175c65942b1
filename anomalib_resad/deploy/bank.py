# SPDX-License-Identifier: Apache-2.0

"""The bank of one product: features of its good photos, in one safetensors file."""

import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from anomalib_resad.deploy.bundle import Manifest, strict_json
from anomalib_resad.enrollment.decoding import check_bit_depth
from anomalib_resad.enrollment.files import write_whole
from anomalib_resad.enrollment.photos import Reference
from anomalib_resad.enrollment.rotations import check_rotations, kept_rows
from anomalib_resad.enrollment.thresholds import is_threshold

FORMAT = "resad-bank-2"
ENTRY = "resad"  # the one entry of a file's metadata; safetensors orders several at random, as in banks of 0.1.0
SUFFIX = ".safetensors"
LONGEST_NAME = 200  # bytes; file systems take 255, of which some are needed for the name of a temporary file
# What Windows takes for a device, whatever follows after a dot. `isdigit` of COM and LPT counts superscripts too.
DEVICES = ("CON", "PRN", "AUX", "NUL")


class BankError(ValueError):
    """A bank cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Bank:
    """Features of the good photos of one product.

    Attributes:
        product (str): The product's name.
        encoder (str): What made the features (:attr:`Manifest.encoder`).
        references (tuple[Reference, ...]): The photos, ordered by content.
        arrays (dict[str, np.ndarray]): ``rows_0``, ... of each level, float32, shape ``(N_l, C_l)``: the patches of the
            references one after the other, each with those of its rotated copies.
        threshold (float | None): The product's own threshold of the raw score; ``None`` for the model's.
        max_patches (int | None): Most rows of a level, if the bank was thinned out.
        rotations (int): Orientations of each photo; 1 for photos as they are.
        bit_depth (int): Bits of a channel of the photos; banks of 0.1.0 are of 8.
    """

    product: str
    encoder: str
    references: tuple[Reference, ...]
    arrays: dict[str, np.ndarray]
    threshold: float | None = None
    max_patches: int | None = None
    rotations: int = 1
    bit_depth: int = 8

    @property
    def size(self) -> int:
        """Bytes of the features."""
        return sum(array.nbytes for array in self.arrays.values())

    def with_threshold(self, threshold: float | None) -> "Bank":
        """The same bank with another threshold.

        Raises:
            ValueError: If it is not a finite number.
        """
        if threshold is not None and not is_threshold(threshold):
            msg = f"threshold={threshold!r} must be a finite number, on the scale of `raw_score`, or None."
            raise ValueError(msg)
        return replace(self, threshold=None if threshold is None else float(threshold))

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of all that the bank holds."""
        return _checksum(self._metadata(), self.arrays)

    def save(self, path: Path) -> None:
        """Write the bank, whole or not at all; equal banks are equal files."""
        metadata = json.dumps(self._metadata() | {"checksum": self.checksum}, sort_keys=True)
        write_whole(path, save(self.arrays, {ENTRY: metadata}))

    def _metadata(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "product": self.product,
            "encoder": self.encoder,
            "references": json.dumps([[each.name, each.sha256] for each in self.references]),
            "threshold": json.dumps(self.threshold),
            "max_patches": json.dumps(self.max_patches),
            "rotations": json.dumps(self.rotations),
            "bit_depth": json.dumps(self.bit_depth),
        }


def _checksum(metadata: dict[str, str], arrays: dict[str, np.ndarray]) -> str:
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


def read_bank(path: Path, manifest: Manifest) -> Bank:
    """Read the bank of a product and check all of it.

    Raises:
        BankError: If it is of another model or version, truncated, altered, not finite, or of a wrong size.
    """
    try:
        bank = _read(path)
    except BankError:
        raise
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        msg = f"{path} is truncated or no bank ({error}). Copy it again, or enroll the product again."
        raise BankError(msg) from error
    check_bank(bank, manifest, str(path))
    return bank


def _read(path: Path) -> Bank:
    content = path.read_bytes()  # once, and no memory map: somebody may replace or cut the file
    arrays = load(content)
    header = strict_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = header.get("__metadata__", {})
    metadata = strict_json(metadata[ENTRY]) if ENTRY in metadata else metadata
    checksum = metadata.pop("checksum", None)
    if metadata.get("format") != FORMAT:
        msg = (
            f"{path} is no bank of this version ({metadata.get('format')} instead of {FORMAT}). "
            "Enroll the product again from its good photos."
        )
        raise BankError(msg)
    if _checksum(metadata, arrays) != checksum:
        msg = f"{path} was altered after it was written: its checksum differs. Copy it again, or enroll again."
        raise BankError(msg)
    return Bank(
        product=metadata["product"],
        encoder=metadata["encoder"],
        references=tuple(Reference(*each) for each in json.loads(metadata["references"])),
        arrays=arrays,
        threshold=json.loads(metadata["threshold"]),
        max_patches=json.loads(metadata["max_patches"]),
        rotations=json.loads(metadata["rotations"]),
        bit_depth=json.loads(metadata.get("bit_depth", "8")),
    )


def check_bank(bank: Bank, manifest: Manifest, where: str) -> None:
    """Check that a bank fits a bundle.

    Raises:
        BankError: If it does not.
    """
    _check_references(bank, where)
    if bank.encoder != manifest.encoder:
        msg = (
            f"{where} was enrolled with another model or precision ({_short(bank.encoder)}; this bundle is "
            f"{_short(manifest.encoder)}), so its features mean nothing here. Use that bundle, or enroll again."
        )
        raise BankError(msg)
    try:
        bank.with_threshold(bank.threshold)
        check_rotations(bank.rotations)
        check_bit_depth(bank.bit_depth)
    except ValueError as error:
        msg = f"{where}: {error} Enroll again."
        raise BankError(msg) from error
    counts = [each for each in (bank.rotations, bank.bit_depth, bank.max_patches) if each is not None]
    if not all(type(each) is int and each > 0 for each in counts):
        msg = f"{where}: rotations={bank.rotations!r}, max_patches={bank.max_patches!r} are no numbers. Enroll again."
        raise BankError(msg)
    for number, level in enumerate(manifest.levels):
        rows = bank.arrays.get(f"rows_{number}")
        expected = len(bank.references) * kept_rows(level.patches, bank.rotations)
        expected = min(expected, bank.max_patches or expected)
        if rows is None or rows.dtype != np.float32 or rows.shape != (expected, level.channels) or expected == 0:
            found = None if rows is None else f"{rows.dtype} {rows.shape}"
            msg = f"{where}: level {number} has {found} instead of float32 {(expected, level.channels)}. Enroll again."
            raise BankError(msg)
        with np.errstate(over="ignore"):
            lengths = np.linalg.norm(rows, axis=1)  # which the matching divides by
        if not (np.isfinite(lengths).all() and lengths.all()):
            msg = (
                f"{where}: level {number} holds NaN, infinity, huge rows or rows of zeros. Check the photos and the "
                "bundle, and enroll again."
            )
            raise BankError(msg)


def _check_references(bank: Bank, where: str) -> None:
    """Refuse names that are no text, and photos that are no SHA-256 in order.

    Raises:
        BankError: If there are some.
    """
    photos = [each.sha256 for each in bank.references]
    texts = [bank.product, bank.encoder, *photos, *(each.name for each in bank.references)]
    if not all(isinstance(each, str) for each in texts) or not (
        photos == sorted(set(photos)) and all(re.fullmatch("[0-9a-f]{64}", each) for each in photos)
    ):
        msg = f"{where}: its list of photos is none. Enroll the product again."
        raise BankError(msg)


def _short(encoder: str) -> str:
    model, _, precision = encoder.partition("/")
    return f"{model[:12]}, {precision}"


def padded(rows: np.ndarray, multiple: int) -> np.ndarray:
    """Repeat the first row until their number is a multiple, which changes no nearest row."""
    missing = -len(rows) % multiple
    return np.concatenate([rows, np.repeat(rows[:1], missing, axis=0)]) if missing else rows
