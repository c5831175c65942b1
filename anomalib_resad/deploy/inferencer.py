# SPDX-License-Identifier: Apache-2.0

"""The runtime of the edge: enroll products and inspect photos, with OpenVINO alone."""

import hashlib
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from anomalib_resad.deploy.bank import Bank, BankError, bank_file, product_name
from anomalib_resad.deploy.bank_store import BankStore
from anomalib_resad.deploy.bundle import DETECTOR, ENCODER, MANIFEST, BundleError, banks_of, read_bundle
from anomalib_resad.deploy.prediction import Prediction, scales_of
from anomalib_resad.deploy.runtime import Runtime
from anomalib_resad.deploy.watch import Watch
from anomalib_resad.enrollment.coreset import thin_out
from anomalib_resad.enrollment.decoding import BitDepth, check_bit_depth
from anomalib_resad.enrollment.image_size import Size
from anomalib_resad.enrollment.photos import Photo, PhotoError, Reference, by_content, list_photos, read_like
from anomalib_resad.enrollment.references import read_references, size_of
from anomalib_resad.enrollment.rotations import Rotations, enrolled_rows
from anomalib_resad.enrollment.thresholds import normalize

logger = logging.getLogger(__name__)
Photos: TypeAlias = str | Path | Iterable[Photo]


class ResADInferencer:
    """One exported model for all products; the device itself learns a new one from a few good photos.

    Safe to use from several threads, which wait for each other. Everything is computed in float32, whatever precision
    the device would choose by itself.

    Args:
        bundle (Path | str): Folder made by ``resad export``, or file made by ``resad bundle pack``.
        device (str): OpenVINO device.
        banks (Path | str | None): Folder of the products' banks; ``banks`` in the bundle by default, and beside a
            packed one, ``<its name>.banks``.
        threads (int | None): Most CPU threads; ``None`` leaves it to OpenVINO.
        most_loaded (int): Most banks kept in memory, the least recently used dropped first.

    Attributes:
        size (int): Bytes of the bundle.

    Raises:
        BundleError: If the bundle cannot be used.
        ValueError: If there is no such device, or a number is impossible.
    """

    def __init__(
        self,
        bundle: Path | str,
        device: str = "CPU",
        banks: Path | str | None = None,
        threads: int | None = None,
        most_loaded: int = 32,
    ) -> None:
        self.bundle = Path(bundle)
        self.manifest, files = read_bundle(self.bundle)  # compiled from what was checked, not from the disk
        self.banks = banks_of(self.bundle, banks)
        self.device = device
        self.size = sum(map(len, files.values()))
        self._runtime = Runtime(files, device, threads)
        self._store = BankStore(self.banks, self.manifest, Watch(self.bundle, files[MANIFEST]), most_loaded)

    # -- products -----------------------------------------------------------------------------------------------------

    @property
    def products(self) -> list[str]:
        """Names of the enrolled products, sorted."""
        return self._store.products

    def enroll(
        self,
        name: str,
        photos: Photos,
        threshold: float | None = None,
        max_patches: int | None = None,
        replace_existing: bool = False,
        rotations: Rotations | None = None,
        bit_depth: BitDepth = "auto",
    ) -> Bank:
        """Learn a product from good photos.

        The result depends on the photos alone, not on their order or names; identical photos count once. It is written
        whole or not at all.

        Args:
            name (str): The product.
            photos (Photos): A folder, or photos.
            threshold (float | None): The product's own threshold of the raw score; ``None`` for the model's, or for the
                one of the product that is replaced.
            max_patches (int | None): Most rows of a level; ``None`` keeps them all.
            replace_existing (bool): Replace the product if it is enrolled already.
            rotations (Rotations | None): Orientations of each photo: 1 for photos as they are, 8 for every 45 degrees,
                ``"auto"`` for 8 where the photos are rotated to each other; ``None`` for the model's.
            bit_depth (BitDepth): Bits of a channel of this product's photos, kept with it; ``"auto"`` for what the
                files state.

        Raises:
            ValueError: If the product exists, its name is no file name, or a number is impossible.
            PhotoError: If a photo cannot be used; nothing was written then.
        """
        name = product_name(name)
        self._check_new(name, replace_existing)
        if max_patches is not None and max_patches < 1:
            msg = f"max_patches={max_patches} must be at least 1, or None."
            raise ValueError(msg)
        check_bit_depth(bit_depth)
        rotations = self.manifest.rotations if rotations is None else rotations
        features, orientations, depth = self._features_of(photos, rotations, bit_depth)
        if not features:
            msg = f"No photo was given for {name!r}. Enroll at least one good photo; 2 to 8 are usual."
            raise PhotoError(msg)
        bank = self._bank_of(name, features, orientations, depth, threshold, max_patches)
        with self._store.changing(name):
            self._check_new(name, replace_existing)  # again: somebody else may have enrolled it meanwhile
            return self._store.write(bank if threshold is not None else bank.with_threshold(self._own_threshold(name)))

    def _own_threshold(self, name: str) -> float | None:
        """The threshold that a product has of its own; one that cannot be read, or is of another model, is lost."""
        try:
            return self.bank(name).threshold if bank_file(self.banks, name).exists() else None
        except BankError as error:
            logger.warning("If %r had a threshold of its own, set it again: its bank was unusable. %s", name, error)
            return None

    def _check_new(self, name: str, replace_existing: bool) -> None:
        if bank_file(self.banks, name).exists() and not replace_existing:
            msg = f"{name!r} is enrolled already. Use `add` for more photos, or replace it (replace_existing=True)."
            raise ValueError(msg)

    def add(self, name: str, photos: Photos) -> Bank:
        """Add good photos to a product; the bank is then as if all had been enrolled at once.

        They are enrolled in as many orientations as those that are there, and have to be of their bit depth. Nothing is
        lost where several threads or processes add to one product.

        Raises:
            ValueError: If the product is not enrolled, or its bank was thinned out.
            PhotoError: If a photo cannot be used.
            BankError: If the product was enrolled in another way meanwhile.
        """
        before = self._whole_bank(name)
        name = before.product
        added, *_ = self._features_of(photos, before.rotations, before.bit_depth)
        with self._store.changing(name):
            bank = self._whole_bank(name)
            if (bank.rotations, bank.bit_depth) != (before.rotations, before.bit_depth):
                msg = (
                    f"{name!r} was enrolled anew meanwhile, in {bank.rotations} orientations, of {bank.bit_depth} bits "
                    "a channel. Add the photos again."
                )
                raise BankError(msg)
            rows = self._rows_of(bank) | added
            return self._store.write(self._bank_of(name, rows, bank.rotations, bank.bit_depth, bank.threshold))

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
            kept = {reference: rows for reference, rows in self._rows_of(bank).items() if reference != chosen[0]}
            self._store.write(self._bank_of(name, kept, bank.rotations, bank.bit_depth, bank.threshold))

    def set_threshold(self, name: str, threshold: float | None) -> Bank:
        """Give a product its own threshold of the raw score, or with ``None`` the model's again.

        Raises:
            ValueError: If the product is not enrolled, or the threshold is no finite number.
        """
        self._store.check_enrolled(name)
        with self._store.changing(name):
            return self._store.write(self.bank(name).with_threshold(threshold))

    def bank(self, name: str) -> Bank:
        """The bank of a product.

        Raises:
            ValueError: If it is not enrolled.
            BankError: If its file cannot be used.
        """
        return self._store.load(name)[0]

    def fingerprint(self, name: str) -> str:
        """SHA-256 of all that makes the results of a photo of a product: the bundle and the bank."""
        return hashlib.sha256(f"{self.manifest} {self.bank(name).checksum}".encode()).hexdigest()

    def _whole_bank(self, name: str) -> Bank:
        bank = self.bank(name)
        if bank.max_patches is not None:
            msg = f"{name!r} was thinned out (max_patches={bank.max_patches}). Enroll it again from all its photos."
            raise ValueError(msg)
        return bank

    def _features_of(
        self, photos: Photos, rotations: Rotations, bit_depth: BitDepth
    ) -> tuple[dict[Reference, list[np.ndarray]], int, int]:
        """What a bank keeps of each photo, ``(N_l, C_l)`` per level; in how many orientations; and their bit depth."""
        listed: Sequence[Photo] = list_photos(photos) if isinstance(photos, str | Path) else list(photos)
        read = read_references(listed, bit_depth)
        rows, orientations = enrolled_rows(read.values(), self._encode_rows, self.manifest.keyed, rotations)
        return dict(zip(read, rows, strict=True)), orientations, read.bit_depth

    def _encode_rows(self, pixels: np.ndarray) -> list[np.ndarray]:
        features = self.encode(pixels[None])
        return [np.ascontiguousarray(level[0].transpose(1, 2, 0).reshape(-1, level.shape[1])) for level in features]

    def _rows_of(self, bank: Bank) -> dict[Reference, list[np.ndarray]]:
        count = len(bank.references)
        levels = [np.split(bank.arrays[f"rows_{level}"], count) for level in range(len(self.manifest.levels))]
        return {reference: [level[index] for level in levels] for index, reference in enumerate(bank.references)}

    def _bank_of(
        self,
        name: str,
        features: dict[Reference, list[np.ndarray]],
        rotations: int,
        bit_depth: int,
        threshold: float | None,
        max_patches: int | None = None,
    ) -> Bank:
        references = by_content(features)
        levels = range(len(self.manifest.levels))
        rows = [np.concatenate([features[reference][level] for reference in references]) for level in levels]
        if max_patches is not None:
            # Keys and what they stand for are thinned out together, levels that are matched apart each by itself.
            kept = [thin_out(level, max_patches) for level in (rows[-1:] * len(rows) if self.manifest.keyed else rows)]
            rows = [level[chosen] for level, chosen in zip(rows, kept, strict=True)]
        arrays = {f"rows_{level}": values for level, values in enumerate(rows)}
        bank = Bank(name, self.manifest.encoder, references, arrays, None, max_patches, rotations, bit_depth)
        return bank.with_threshold(threshold)

    # -- inspection ---------------------------------------------------------------------------------------------------

    def _run(self, file: str, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Run one of the two models."""
        return self._runtime.run(file, inputs)

    def encode(self, pixels: np.ndarray) -> list[np.ndarray]:
        """Features of photos of one size: uint8 ``(B, H, W, 3)`` to float32 ``(B, C_l, H_l, W_l)`` per level."""
        return self._run(ENCODER, [pixels])

    def predict(self, photo: Photo, product: str) -> Prediction:
        """Inspect a photo.

        Args:
            photo (Photo): A file, a Pillow image, or an array of uint8, shape ``(H, W, 3)``.
            product (str): What it shows.

        Raises:
            ValueError: If the product is not enrolled.
            PhotoError: If the photo cannot be used, or is of another bit depth than the product's.
        """
        return self.inspect(photo, product)[0]

    def inspect(self, photo: Photo, product: str) -> tuple[Prediction, np.ndarray]:
        """What :meth:`predict` finds, and the pixels that it was found in, uint8, shape ``(H, W, 3)``."""
        bank, rows = self._store.load(product)
        pixels = read_like(photo, bank.bit_depth)
        return self._judge([(self.encode(pixels[None]), size_of(photo))], bank, rows)[0], pixels

    def predict_batch(self, photos: Iterable[Photo], product: str) -> list[Prediction]:
        """Inspect photos of one product together, of any sizes."""
        bank, rows = self._store.load(product)
        encoded = [(self.encode(read_like(photo, bank.bit_depth)[None]), size_of(photo)) for photo in photos]
        return self._judge(encoded, bank, rows) if encoded else []

    def _judge(
        self, encoded: Sequence[tuple[list[np.ndarray], Size]], bank: Bank, rows: list[np.ndarray]
    ) -> list[Prediction]:
        features = [np.concatenate(level) for level in zip(*(each for each, _ in encoded), strict=True)]
        scores, maps = self._run(DETECTOR, [*features, *rows])
        score_scale, map_scale = scales_of(self.manifest, bank)
        above = self.manifest.label_above if not math.isnan(score_scale[0]) else None
        normalized, normalized_maps = normalize(scores, *score_scale), normalize(maps[:, 0], *map_scale)
        if not (np.isfinite(normalized).all() and np.isfinite(normalized_maps).all()):
            msg = f"The model gave scores of NaN or infinity on {self.device}. Export it anew, or use another device."
            raise BundleError(msg)
        return [
            Prediction(float(score), None if above is None else bool(score > above), anomaly_map, float(raw), size)
            for score, anomaly_map, raw, (_, size) in zip(normalized, normalized_maps, scores, encoded, strict=True)
        ]
