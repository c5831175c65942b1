# SPDX-License-Identifier: Apache-2.0

"""The runtime of the edge: enroll products and inspect photos, with OpenVINO alone."""

import math
from collections.abc import Generator, Iterable

import numpy as np

from anomalib_resad.deploy.bank import Bank
from anomalib_resad.deploy.bank_rows import cells_of
from anomalib_resad.deploy.bank_store import Loaded
from anomalib_resad.deploy.bundle import BundleError
from anomalib_resad.deploy.in_flight import in_order
from anomalib_resad.deploy.placing import placed
from anomalib_resad.deploy.prediction import Prediction, scales_of
from anomalib_resad.deploy.teaching import Teaching
from anomalib_resad.deploy.tiles import inspected, resized_to, size_in_tiles
from anomalib_resad.enrollment.image_size import Size
from anomalib_resad.enrollment.photos import Photo, PhotoError, name_of, read_like
from anomalib_resad.enrollment.references import size_of
from anomalib_resad.enrollment.region import cut_out
from anomalib_resad.enrollment.thresholds import normalize


class ResADInferencer(Teaching):
    """One exported model for all products; the device itself learns a new one from a few good photos.

    Safe to use from several threads, of which ``streams`` compute at the same time. Everything is computed in float32,
    whatever precision the device would choose by itself.

    Args:
        bundle (Path | str): Folder made by ``resad export``, or file made by ``resad bundle pack``.
        device (str): OpenVINO device.
        banks (Path | str | None): Folder of the products' banks; ``banks`` in the bundle by default, and beside a
            packed one, ``<its name>.banks``.
        threads (int | None): Most CPU threads; ``None`` leaves it to OpenVINO.
        most_loaded (int): Most banks kept in memory, the least recently used dropped first.
        streams (int): Photos that are computed at the same time. With 1, each photo has all CPU threads, and its result
            is there soonest; several share them, for machines with many cores.

    Attributes:
        size (int): Bytes of the bundle.
        in_flight (int): Photos that are in work at the same time where several are inspected.

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
        return self._found(photo, pixels, known), pixels

    def predict_batch(self, photos: Iterable[Photo], product: str) -> Generator[Prediction, None, None]:
        """Inspect photos of one product, of any sizes; what is found comes photo by photo, in their order.

        Several photos are in work where there are several ``streams``, each by itself, so that the scores are those of
        :meth:`predict`; ``in_flight`` says how many. All are judged by the product as it is now.

        Args:
            photos (Iterable[Photo]): As of :meth:`predict`; read as results are taken.
            product (str): As of :meth:`predict`.

        Raises:
            ValueError: If the product is not enrolled.
            PhotoError: When the result of a photo is taken that cannot be used.
        """
        known = self.loaded(product)
        return in_order(lambda photo: self.inspect(photo, product, known)[0], photos, self.in_flight)

    def _found(self, photo: Photo, pixels: np.ndarray, known: Loaded) -> Prediction:
        bank, rows, position, taught = known
        if bank.tile_scale is not None:
            return self._told(*self._in_tiles(photo, pixels, known), False, bank)
        features, size = self._seen(photo, pixels, bank)
        moved = position is not None and position.has_moved(features[-1][0])
        if bank.region is not None:
            levels = self.manifest.levels_at(bank.image_size)
            for level, values, known_rows in zip(levels, features, rows, strict=True):
                values[:, :, ~cells_of(bank, level)] = known_rows[0][None, :, None]  # as in the leave-one-out scores
        scores, maps = self._scored(features, rows, taught)
        return self._told(scores[0], maps[0], size, moved, bank)

    def _in_tiles(self, photo: Photo, pixels: np.ndarray, known: Loaded) -> tuple[np.float32, np.ndarray, Size]:
        """Raw score and map of a photo that is looked at in tiles, and its size."""
        assert known.bank.tile_scale is not None
        tile = self.manifest.image_size
        size = size_in_tiles(name_of(photo), pixels.shape, known.bank.tile_scale, tile)

        def detect(tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return self._scored(self.encode(tiles), known.rows, known.taught)

        score, anomaly_map = inspected(resized_to(pixels, size), tile, detect)
        return np.float32(score), anomaly_map, size_of(photo)

    def _seen(self, photo: Photo, pixels: np.ndarray, bank: Bank) -> tuple[list[np.ndarray], Size]:
        """Features of what counts in a photo, and its size."""
        try:
            box = pixels if bank.region is None else cut_out(pixels, bank.region)
        except PhotoError as error:
            msg = f"{name_of(photo)}: {error}"
            raise PhotoError(msg) from error
        return self.encode(box[None], bank.image_size), size_of(photo)

    def _told(self, raw: np.float32, raw_map: np.ndarray, size: Size, moved: bool, bank: Bank) -> Prediction:
        """What is told of a photo, given its raw score and map."""
        score_scale, map_scale = scales_of(self.manifest, bank)
        above = self.manifest.label_above if not math.isnan(score_scale[0]) else None
        score, anomaly_map = normalize(raw, *score_scale), normalize(raw_map, *map_scale)
        if not (np.isfinite(score) and np.isfinite(anomaly_map).all()):
            msg = f"The model gave scores of NaN or infinity on {self.device}. Export it anew, or use another device."
            raise BundleError(msg)
        return Prediction(
            float(score),
            None if above is None or moved else bool(score > above),
            anomaly_map if bank.region is None else placed(anomaly_map, bank.region),
            float(raw),
            size,
            bank.min_area,
            moved,
        )
