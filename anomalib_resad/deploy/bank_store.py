# SPDX-License-Identifier: Apache-2.0

"""The banks of all products: one file each in a folder, and the ones that were used last in memory."""

import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np

from anomalib_resad.deploy.bank import SUFFIX, Bank, BankError, bank_file, check_bank, padded, read_bank
from anomalib_resad.deploy.bundle import Manifest


class BankStore:
    """Reads, keeps and writes banks of one bundle.

    Args:
        folder (Path): Folder of the banks; made when the first one is written.
        manifest (Manifest): The bundle's manifest.
        most_loaded (int): Most banks kept in memory, the least recently used dropped first.
    """

    def __init__(self, folder: Path, manifest: Manifest, most_loaded: int) -> None:
        self.folder = folder
        self.manifest = manifest
        self.most_loaded = most_loaded
        self._loaded: OrderedDict[str, tuple[tuple[int, int], Bank, list[np.ndarray]]] = OrderedDict()
        self._lock = threading.RLock()

    @property
    def products(self) -> list[str]:
        """Names of the enrolled products, sorted."""
        return sorted(path.name.removesuffix(SUFFIX) for path in self.folder.glob(f"[!.]*{SUFFIX}"))

    def load(self, name: str) -> tuple[Bank, list[np.ndarray]]:
        """A bank, and its rows as the detector takes them.

        Raises:
            ValueError: If the product is not enrolled.
            BankError: If its file cannot be used.
        """
        with self._lock:
            stat = self._stat(name)
            if name not in self._loaded or self._loaded[name][0] != stat:
                bank = read_bank(bank_file(self.folder, name), self.manifest)
                multiple = self.manifest.row_multiple
                levels = range(len(self.manifest.levels))
                rows = [padded(bank.arrays[f"rows_{level}"], multiple) for level in levels]
                self._loaded[name] = (stat, bank, rows)
                while len(self._loaded) > self.most_loaded:
                    self._loaded.popitem(last=False)
            self._loaded.move_to_end(name)
            return self._loaded[name][1:]

    def write(self, bank: Bank) -> Bank:
        """Write a bank, whole or not at all.

        Raises:
            BankError: If it does not fit the bundle, or cannot be written.
        """
        check_bank(bank, self.manifest, bank.product)
        path = bank_file(self.folder, bank.product)
        with self._lock:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                bank.save(path)
            except OSError as error:
                msg = f"{path} cannot be written ({error}). Pass a folder for `banks` that can be."
                raise BankError(msg) from error
            self._loaded.pop(bank.product, None)
        return bank

    def remove(self, name: str) -> None:
        """Remove the bank of a product.

        Raises:
            ValueError: If it is not enrolled.
        """
        self._stat(name)
        bank_file(self.folder, name).unlink()
        self._loaded.pop(name, None)

    def _stat(self, name: str) -> tuple[int, int]:
        """Time and size of a bank's file, by which a change is noticed."""
        try:
            stat = bank_file(self.folder, name).stat()
        except FileNotFoundError as error:
            known = ", ".join(self.products) or "none"
            msg = f"{name!r} is not enrolled. Enrolled: {known}."
            raise ValueError(msg) from error
        return stat.st_mtime_ns, stat.st_size
