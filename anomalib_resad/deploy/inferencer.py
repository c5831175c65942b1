# SPDX-License-Identifier: Apache-2.0

"""The runtime of the edge: enroll products and inspect photos, with OpenVINO alone."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from anomalib_resad.deploy.bank import Bank
from anomalib_resad.deploy.bank_rows import cells_of
from anomalib_resad.deploy.bank_store import Loaded
from anomalib_resad.deploy.bundle import DETECTOR, BundleError
from anomalib_resad.deploy.placing import placed
from anomalib_resad.deploy.prediction import Prediction, scales_of
from anomalib_resad.deploy.undoing import Undoing
from anomalib_resad.enrollment.image_size import Size
from anomalib_resad.enrollment.photos import Photo, PhotoError, name_of, read_like
from anomalib_resad.enrollment.references import size_of
from anomalib_resad.enrollment.region import cut_out
from anomalib_resad.enrollment.thresholds import normalize


class ResADInferencer(Undoing):
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

    def inspect(self, photo: Photo, product: str, known: Loaded | None = None) -> tuple[Prediction, np.ndarray]:
        """What :meth:`predict` finds, and the pixels that it was found in, uint8, shape ``(H, W, 3)``.

        Args:
            photo (Photo): As of :meth:`predict`.
            product (str): As of :meth:`predict`.
            known (Loaded | None): The product as :meth:`loaded` gave it, if several photos are to be judged alike,
                whoever changes it meanwhile; ``None`` for the product as it is now.
        """
        known = self.loaded(product) if known is None else known
        pixels = read_like(photo, known.bank.bit_depth)
        return self._judge([self._seen(photo, pixels, known.bank)], known)[0], pixels

    def predict_batch(self, photos: Iterable[Photo], product: str) -> list[Prediction]:
        """Inspect photos of one product together, of any sizes."""
        known = self.loaded(product)
        encoded = [self._seen(photo, read_like(photo, known.bank.bit_depth), known.bank) for photo in photos]
        return self._judge(encoded, known) if encoded else []

    def _seen(self, photo: Photo, pixels: np.ndarray, bank: Bank) -> tuple[list[np.ndarray], Size]:
        """Features of what counts in a photo, and its size."""
        try:
            box = pixels if bank.region is None else cut_out(pixels, bank.region)
        except PhotoError as error:
            msg = f"{name_of(photo)}: {error}"
            raise PhotoError(msg) from error
        return self.encode(box[None]), size_of(photo)

    def _judge(self, encoded: Sequence[tuple[list[np.ndarray], Size]], known: Loaded) -> list[Prediction]:
        bank, rows, position = known
        features = [np.concatenate(level) for level in zip(*(each for each, _ in encoded), strict=True)]
        moved = [position is not None and position.has_moved(each) for each in features[-1]]
        if bank.region is not None:
            for level, values, known_rows in zip(self.manifest.levels, features, rows, strict=True):
                values[:, :, ~cells_of(bank, level)] = known_rows[0][None, :, None]  # as in the leave-one-out scores
        scores, maps = self._run(DETECTOR, [*features, *rows])
        score_scale, map_scale = scales_of(self.manifest, bank)
        above = self.manifest.label_above if not math.isnan(score_scale[0]) else None
        normalized, normalized_maps = normalize(scores, *score_scale), normalize(maps[:, 0], *map_scale)
        if not (np.isfinite(normalized).all() and np.isfinite(normalized_maps).all()):
            msg = f"The model gave scores of NaN or infinity on {self.device}. Export it anew, or use another device."
            raise BundleError(msg)
        return [
            Prediction(
                float(score),
                None if above is None or has_moved else bool(score > above),
                anomaly_map if bank.region is None else placed(anomaly_map, bank.region),
                float(raw),
                size,
                bank.min_area,
                has_moved,
            )
            for score, anomaly_map, raw, (_, size), has_moved in zip(
                normalized, normalized_maps, scores, encoded, moved, strict=True
            )
        ]
