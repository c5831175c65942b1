# SPDX-License-Identifier: Apache-2.0

"""The bank of one product: features of its good photos, in one safetensors file."""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from anomalib_resad.deploy.bundle import LARGEST, Manifest
from anomalib_resad.enrollment.decoding import check_bit_depth
from anomalib_resad.enrollment.files import write_whole
from anomalib_resad.enrollment.photos import Reference
from anomalib_resad.enrollment.rotations import check_rotations, kept_rows

FORMAT = "resad-bank-2"
SUFFIX = ".safetensors"


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
        if threshold is not None and not (isinstance(threshold, float | int) and abs(threshold) < LARGEST):
            msg = f"threshold={threshold!r} must be a finite number, on the scale of `raw_score`, or None."
            raise ValueError(msg)
        return replace(self, threshold=None if threshold is None else float(threshold))

    def save(self, path: Path) -> None:
        """Write the bank, whole or not at all."""
        metadata = self._metadata()
        write_whole(path, save(self.arrays, {**metadata, "checksum": _checksum(metadata, self.arrays)}))

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


def bank_file(folder: Path, product: str) -> Path:
    """Where the bank of a product is kept.

    Raises:
        ValueError: If the name could leave the folder, or is no file name everywhere.
    """
    if not re.fullmatch(r"\w[\w .()+-]{0,79}", product) or product[-1] in " .":
        msg = (
            f"{product!r} cannot be the name of a product. Use up to 80 letters, digits, spaces and _ . ( ) + -, "
            "beginning with a letter or a digit, and not ending with a dot or a space."
        )
        raise ValueError(msg)
    return folder / f"{product}{SUFFIX}"


def read_bank(path: Path, manifest: Manifest) -> Bank:
    """Read the bank of a product and check all of it.

    Raises:
        BankError: If it is of another model or version, truncated, altered, not finite, or of a wrong size.
    """
    again = "Enroll the product again from its good photos."
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
        checksum = metadata.pop("checksum", None)
        if metadata.get("format") != FORMAT:
            msg = f"{path} is no bank of this version ({metadata.get('format')} instead of {FORMAT}). {again}"
            raise BankError(msg)
        if _checksum(metadata, arrays) != checksum:
            msg = f"{path} was altered after it was written: its checksum differs. Copy it again, or enroll again."
            raise BankError(msg)
        bank = Bank(
            product=metadata["product"],
            encoder=metadata["encoder"],
            references=tuple(Reference(*each) for each in json.loads(metadata["references"])),
            arrays=arrays,
            threshold=json.loads(metadata["threshold"]),
            max_patches=json.loads(metadata["max_patches"]),
            rotations=json.loads(metadata["rotations"]),
            bit_depth=json.loads(metadata.get("bit_depth", "8")),
        )
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        msg = f"{path} is truncated or no bank ({error}). Copy it again, or enroll the product again."
        raise BankError(msg) from error
    check_bank(bank, manifest, str(path))
    return bank


def check_bank(bank: Bank, manifest: Manifest, where: str) -> None:
    """Check that a bank fits a bundle.

    Raises:
        BankError: If it does not.
    """
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
    if "auto" in (bank.rotations, bank.bit_depth) or (bank.max_patches is not None and not is_count(bank.max_patches)):
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
        if not np.isfinite(rows).all():
            msg = f"{where}: level {number} holds NaN or infinity. Check the photos and the bundle, and enroll again."
            raise BankError(msg)


def is_count(value: object) -> bool:
    """Whether a value is a positive integer."""
    return isinstance(value, int) and value > 0


def _short(encoder: str) -> str:
    model, _, precision = encoder.partition("/")
    return f"{model[:12]}, {precision}"


def padded(rows: np.ndarray, multiple: int) -> np.ndarray:
    """Repeat the first row until their number is a multiple, which changes no nearest row."""
    missing = -len(rows) % multiple
    return np.concatenate([rows, np.repeat(rows[:1], missing, axis=0)]) if missing else rows
