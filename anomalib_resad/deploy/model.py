# SPDX-License-Identifier: Apache-2.0

"""A bundle that is open: its two models, and the banks of its products."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from anomalib_resad.deploy.bank import Bank, product_name
from anomalib_resad.deploy.bank_rows import is_whole
from anomalib_resad.deploy.bank_store import BankStore, Loaded
from anomalib_resad.deploy.bundle import DETECTOR, ENCODER, MANIFEST, banks_of, read_bundle
from anomalib_resad.deploy.history import Step
from anomalib_resad.deploy.runtime import Runtime, canvas_of
from anomalib_resad.deploy.watch import Watch
from anomalib_resad.enrollment.image_size import Size
from anomalib_resad.enrollment.region import cells_inside, filled
from anomalib_resad.enrollment.rotations import Rows
from anomalib_resad.enrollment.taught import Taught


class Model:
    """What a bundle knows.

    Arguments, attributes and errors are those of :class:`~anomalib_resad.deploy.inferencer.ResADInferencer`.
    """

    def __init__(
        self,
        bundle: Path | str,
        device: str = "CPU",
        banks: Path | str | None = None,
        threads: int | None = None,
        most_loaded: int = 32,
        streams: int = 1,
    ) -> None:
        self.bundle = Path(bundle)
        self.manifest, files = read_bundle(self.bundle)  # compiled from what was checked, not from the disk
        self.banks = banks_of(self.bundle, banks)
        self.device = device
        self.size = sum(map(len, files.values()))
        self._runtime = Runtime(files, device, threads, streams, self.manifest.precision == "bf16")
        # One more photo is decoded than is computed; a single stream takes photo after photo.
        self.in_flight = 1 if streams == 1 else int(streams) + 1
        self._store = BankStore(self.banks, self.manifest, Watch(self.bundle, files[MANIFEST]), most_loaded)

    def _run(self, file: str, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Run one of the two models."""
        return self._runtime.run(file, inputs)

    def encode(self, pixels: np.ndarray, size: Size | None = None) -> list[np.ndarray]:
        """Features of photos of one size: uint8 ``(B, H, W, 3)`` to float32 ``(B, C_l, H_l, W_l)`` per level.

        Args:
            pixels (np.ndarray): The photos.
            size (Size | None): Height and width that they are resized to, of a product that has a size of its own.
        """
        if self.manifest.area_side is None:
            return self._run(ENCODER, [pixels])
        return self._run(ENCODER, [pixels, canvas_of(size or self.manifest.image_size)])

    @property
    def products(self) -> list[str]:
        """Names of the enrolled products, sorted."""
        return self._store.products

    def _encode_rows(self, pixels: np.ndarray, region: np.ndarray | None, size: Size | None) -> Rows:
        """Rows of the patches that count, of a photo, or of the box of a region and of its rotated copies."""
        features = self.encode((pixels if region is None else filled(pixels, region))[None], size)
        rows = [level[0].transpose(1, 2, 0) for level in features]  # (H_l, W_l, C_l)
        if region is None:
            return [np.ascontiguousarray(level.reshape(-1, level.shape[2])) for level in rows]
        return [level[cells_inside(region, *level.shape[:2])] for level in rows]

    def loaded(self, name: str) -> Loaded:
        """A product as it is now.

        Raises:
            ValueError: If it is not enrolled.
            BankError: If its file cannot be used.
        """
        return self._store.load(name)

    def bank(self, name: str) -> Bank:
        """The bank of a product.

        Raises:
            ValueError: If it is not enrolled.
            BankError: If its file cannot be used.
        """
        return self.loaded(name).bank

    def searched(self, name: str) -> Rows:
        """The rows of a product that a search looks through, per level ``(N, C_l)``, as the detector takes them.

        Raises:
            ValueError: If it is not enrolled.
            BankError: If its file cannot be used.
        """
        return self._store.load(name).rows

    def has_position(self, name: str) -> bool:
        """Whether photos of a product with a region are told whose content has moved.

        Raises:
            ValueError: If it is not enrolled.
            BankError: If its file cannot be used.
        """
        return self._store.load(name).position is not None

    def fingerprint(self, name: str) -> str:
        """SHA-256 of all that makes the results of a photo of a product: the bundle and the bank."""
        return hashlib.sha256(f"{self.manifest} {self.bank(name).checksum}".encode()).hexdigest()

    def history(self, name: str) -> list[Step]:
        """The last changes of a product, the oldest first; also of one that was removed.

        Raises:
            ValueError: If there never was such a product.
        """
        return self._store.steps(product_name(name))

    def undo(self, name: str, step: int | None = None) -> Step:
        """Make a product what it was before a step, the last one by default. This is a step, too, and can be undone.

        Raises:
            ValueError: If there is no such step, or the product is already what it was then.
            BankError: If what was kept cannot be used, for example as it is of another model.
        """
        name = product_name(name)
        self._store.steps(name)  # a name that nobody knows leaves no lock
        with self._store.changing(name):
            return self._store.undo(name, step)

    def _whole_bank(self, name: str) -> Bank:
        bank = self.bank(name)
        if not is_whole(bank, self.manifest):
            if bank.tile_scale is not None:
                msg = (
                    f"{name!r} is looked at in tiles (tile_scale={bank.tile_scale:g}), of which its bank holds a "
                    "selection for all photos together. Enroll it again from all its photos."
                )
                raise ValueError(msg)
            msg = (
                f"{name!r} was thinned out by an earlier version (max_patches={bank.max_patches}): its rows do not "
                "tell which photo they are of. Enroll it again from all its photos."
            )
            raise ValueError(msg)
        return bank

    def _detect(self, features_and_rows: Sequence[np.ndarray]) -> tuple[float, np.ndarray]:
        """Raw score and map of one photo: its features, then the rows of a bank."""
        scores, maps = self._run(DETECTOR, list(features_and_rows))
        return float(scores[0]), maps[0, 0]

    def _scored(
        self, features: Sequence[np.ndarray], rows: Rows, taught: Taught | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Raw scores ``(B,)`` and maps ``(B, H, W)`` of photos or tiles, given features, rows, and what was taught."""
        scores, maps = self._run(DETECTOR, [*features, *rows])
        if taught is None:
            return scores, maps[:, 0]
        more, raised = taught.raises(features[-1])
        return scores + more, maps[:, 0] + raised
