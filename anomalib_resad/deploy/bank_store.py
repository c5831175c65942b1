# SPDX-License-Identifier: Apache-2.0

"""The banks of all products: one file each in a folder, and the ones that were used last in memory."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from anomalib_resad.deploy.bank import SUFFIX, Bank, BankError, NotEnrolledError, UndoError, bank_file, product_name
from anomalib_resad.deploy.bank_reading import check_bank, parse_bank, read_bank
from anomalib_resad.deploy.bank_rows import padded, searched_of
from anomalib_resad.deploy.bundle import Manifest
from anomalib_resad.deploy.history import History, Step
from anomalib_resad.deploy.position import Position, position_of
from anomalib_resad.deploy.taught import taught_of
from anomalib_resad.deploy.watch import Watch, stamp
from anomalib_resad.enrollment.checks import is_count
from anomalib_resad.enrollment.files import PART, remove_stale, write_whole
from anomalib_resad.enrollment.taught import Taught

LOCK_SECONDS = 300  # a change encodes photos, which takes seconds; others wait this long for it


class Loaded(NamedTuple):
    """What an inspection needs of a product.

    Attributes:
        bank (Bank): Its bank.
        rows (list[np.ndarray]): The rows of the bank as the detector takes them.
        position (Position | None): How its photos lie in its region, if it has one.
        taught (Taught | None): The defects that it was taught, if any.
    """

    bank: Bank
    rows: list[np.ndarray]
    position: Position | None
    taught: Taught | None


class BankStore:
    """Reads, keeps and writes banks of one bundle.

    Args:
        folder (Path): Folder of the banks; made when the first one is written.
        manifest (Manifest): The bundle's manifest.
        watch (Watch): Looks after the bundle.
        most_loaded (int): Most banks kept in memory, the least recently used dropped first.
    """

    def __init__(self, folder: Path, manifest: Manifest, watch: Watch, most_loaded: int) -> None:
        self.folder = folder
        self.manifest = manifest
        self.watch = watch
        self.most_loaded = most_loaded
        self._history = History(folder)
        self._loaded: OrderedDict[str, tuple[tuple[int, ...], Loaded]] = OrderedDict()
        self._lock = threading.RLock()
        if not is_count(most_loaded):
            msg = f"most_loaded={most_loaded!r} must be a whole number of at least 1: one bank has to be in memory."
            raise ValueError(msg)

    @property
    def products(self) -> list[str]:
        """Names of the enrolled products, sorted."""
        return sorted(path.name.removesuffix(SUFFIX) for path in self.folder.glob(f"[!.]*{SUFFIX}"))

    def load(self, name: str) -> Loaded:
        """A bank, and what is computed from it once.

        Raises:
            ValueError: If the product is not enrolled.
            BankError: If its file cannot be used.
            BundleError: If the bundle was replaced.
        """
        with self._lock:
            self.watch.check()
            name = product_name(name)
            stat = self._stat(name)
            if name not in self._loaded or self._loaded[name][0] != stat:
                bank = read_bank(bank_file(self.folder, name), self.manifest)
                if bank.product != name:
                    msg = (
                        f"The bank of {name!r} is that of {bank.product!r}: its file was renamed. Give it its own name."
                    )
                    raise BankError(msg)
                rows = [padded(level, self.manifest.row_multiple) for level in searched_of(bank, self.manifest)]
                also = position_of(bank, self.manifest), taught_of(bank, rows, self.manifest)
                self._loaded[name] = (stat, Loaded(bank, rows, *also))
                while len(self._loaded) > self.most_loaded:
                    self._loaded.popitem(last=False)
            self._loaded.move_to_end(name)
            return self._loaded[name][1]

    @contextmanager
    def changing(self, name: str) -> Iterator[None]:
        """Hold a product's lock, from reading its bank to writing it, against threads, processes and containers.

        Raises:
            ValueError: If the name cannot be that of a product.
            BankError: If the folder cannot be written, or another writer does not end.
            BundleError: If the bundle was replaced.
        """
        self.watch.check()
        path = bank_file(self.folder, name)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_SECONDS):
                remove_stale(self.folder)
                for left in self.folder.glob(f".{path.name}.*{PART}"):
                    # Of a writer that was killed, since the lock is held; one more dot is that of another product.
                    if left.name.count(".") == path.name.count(".") + 3:
                        left.unlink(missing_ok=True)
                yield
        except Timeout as error:
            msg = f"{name!r} is being changed by another process for more than {LOCK_SECONDS} s. Try again later."
            raise BankError(msg) from error
        except OSError as error:
            msg = f"{path} cannot be written ({error}). Pass a folder for `banks` that can be."
            raise BankError(msg) from error

    def check_enrolled(self, name: str) -> None:
        """Refuse a product that is not enrolled.

        Raises:
            ValueError: If it is not.
        """
        self._stat(name)

    def write(self, bank: Bank, what: str) -> Bank:
        """Write a bank, whole or not at all; :meth:`changing` must be held.

        Args:
            bank (Bank): The bank.
            what (str): What the history of the product says was done.

        Raises:
            BankError: If it does not fit the bundle.
            OSError: If it cannot be written; :meth:`changing` makes a BankError of it.
        """
        check_bank(bank, self.manifest, bank.product)
        self._put(bank.product, bank.content, bank, what)
        return bank

    def remove(self, name: str) -> None:
        """Remove the bank of a product; :meth:`changing` must be held.

        Raises:
            ValueError: If it is not enrolled.
        """
        self._stat(name)
        self._put(name, None, None, "remove")

    def steps(self, name: str) -> list[Step]:
        """The last changes of a product, the oldest first; also of one that was removed.

        Raises:
            ValueError: If nothing is known of it.
        """
        self.watch.check()
        steps = self._history.steps(name, self._content(name))
        if not steps:
            self._stat(name)
        return steps

    def undo(self, name: str, number: int | None = None) -> Step:
        """Make a product what it was before a step, which is a step as well; :meth:`changing` must be held.

        Args:
            name (str): The product.
            number (int | None): Number of the step; ``None`` for the last one.

        Returns:
            Step: The one that was undone.

        Raises:
            UndoError: If there is no such step, or the product is already what it was then.
            BankError: If what was kept cannot be used with this bundle.
        """
        steps = self.steps(name)
        last = steps[-1].number if steps else 0
        chosen = {each.number: each for each in steps}.get(last if number is None else number)
        if chosen is None:
            kept = f"{steps[0].number} to {last}" if steps else "none"
            which = "step" if number is None else f"step {number}"
            msg = f"{name!r} has no {which} that could be undone; kept are {kept}. See `resad history`."
            raise UndoError(msg)
        content = self._history.before(name, chosen.number)
        if content == self._content(name):
            msg = f"{name!r} is what it was before step {chosen.number}. Nothing was changed."
            raise UndoError(msg)
        where = f"{name}, as it was before step {chosen.number},"
        bank = None if content is None else parse_bank(content, self.manifest, where)
        self._put(name, content, bank, f"undo {chosen.number}")
        return chosen

    def _content(self, name: str) -> bytes | None:
        try:
            return bank_file(self.folder, name).read_bytes()
        except FileNotFoundError:
            return None

    def _put(self, name: str, content: bytes | None, bank: Bank | None, what: str) -> None:
        """Write the file of a bank, or remove it, and keep what it was."""
        path = bank_file(self.folder, name)
        with self._lock, self._history.step(name, what, self._content(name), content, bank):
            if content is None:
                path.unlink()
            else:
                write_whole(path, content)
            self._loaded.pop(name, None)

    def _stat(self, name: str) -> tuple[int, ...]:
        """Dates and size of a bank's file, by which a change is noticed."""
        try:
            return stamp(bank_file(self.folder, name).stat())
        except FileNotFoundError as error:
            known = ", ".join(self.products) or "none"
            msg = f"{name!r} is not enrolled. Enrolled: {known}."
            raise NotEnrolledError(msg) from error
