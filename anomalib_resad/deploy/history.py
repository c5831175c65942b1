# SPDX-License-Identifier: Apache-2.0

"""The last changes of each product, and its bank as it was before each of them, so that every change can be undone.

A step is one file: a line of JSON, then the bank's file as it was. It is written whole before the bank is changed. When
the device stops between the two, the step tells by itself that it was not taken: the bank is still the one before it.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from anomalib_resad.deploy.bank import Bank, BankError, product_name
from anomalib_resad.deploy.messages import printable
from anomalib_resad.enrollment.files import PART, write_whole

logger = logging.getLogger(__name__)
FOLDER = ".history"  # beside the banks; names of products begin with no dot
KEPT = 10  # steps of each product
SUFFIX = ".step"


@dataclass(frozen=True)
class Step:
    """A change of a product.

    Attributes:
        number (int): Counts the changes of the product, from 1.
        time (str): When it was, UTC.
        what (str): What was done.
        photos (int): How many photos the product had afterwards; 0 where it was removed.
        threshold (float | None): Its own threshold afterwards.
        before (str): SHA-256 of the bank's file before; empty where there was none.
        after (str): The same afterwards.
    """

    number: int
    time: str
    what: str
    photos: int
    threshold: float | None
    before: str
    after: str

    def row(self) -> list[str]:
        """As it is listed: number, time (UTC), what, photos, own threshold."""
        when = self.time.removesuffix("+00:00").replace("T", " ")
        own = "-" if self.threshold is None else f"{self.threshold:.4g}"
        return [str(self.number), when, printable(self.what), str(self.photos), own]


class History:
    """Keeps the last steps of each product.

    Whoever records a step must hold the lock of the product's bank.

    Args:
        banks (Path): Folder of the banks.
    """

    def __init__(self, banks: Path) -> None:
        self._folder = banks / FOLDER

    def steps(self, product: str, now: bytes | None) -> list[Step]:
        """The steps that can be undone, the oldest first.

        Args:
            product (str): The product.
            now (bytes | None): Its bank's file; ``None`` where there is none.
        """
        found = [step for path in self._files(product) if (step := _read(path)) is not None]
        if found and not _was_taken(found[-1], _digest(now)):
            found.pop()
        return found

    def before(self, product: str, number: int) -> bytes | None:
        """The bank's file as it was before a step; ``None`` where there was none.

        Raises:
            BankError: If it was altered or cannot be read.
        """
        path = self._path(product, number)
        step = _read(path)
        content = path.read_bytes().partition(b"\n")[2] if step is not None else b""
        kept = content if step is None or step.before else None
        if step is None or _digest(kept) != step.before:
            msg = f"{path} was altered: its checksum differs. Nothing was changed. Undo another step, or enroll again."
            raise BankError(msg)
        return kept

    @contextmanager
    def step(self, product: str, what: str, now: bytes | None, then: bytes | None, bank: Bank | None) -> Iterator[None]:
        """Keep what a product is, then change it; a change that changes nothing is no step, and one that fails neither.

        Args:
            product (str): The product.
            what (str): What will be done.
            now (bytes | None): Its bank's file.
            then (bytes | None): What will be written; ``None`` where it will be removed.
            bank (Bank | None): The same.

        Raises:
            OSError: If it cannot be written.
        """
        if now == then:
            yield
            return
        known = self.steps(product, now)
        step = Step(
            number=known[-1].number + 1 if known else 1,
            time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            what=what,
            photos=len(bank.references) if bank else 0,
            threshold=bank.threshold if bank else None,
            before=_digest(now),
            after=_digest(then),
        )
        path = self._path(product, step.number)
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".*{PART}"):
            left.unlink(missing_ok=True)  # of a writer that was killed, since the lock is held
        write_whole(path, json.dumps(asdict(step)).encode() + b"\n" + (now or b""))
        try:
            yield
        except OSError:  # the disk is full: the bank is as it was
            path.unlink(missing_ok=True)
            raise
        self._prune(product)

    def _prune(self, product: str) -> None:
        """Drop the oldest steps; the last ones stay."""
        for path in self._files(product)[:-KEPT]:
            path.unlink(missing_ok=True)

    def _path(self, product: str, number: int) -> Path:
        return self._folder / product_name(product) / f"{number:08}{SUFFIX}"

    def _files(self, product: str) -> list[Path]:
        return sorted((self._folder / product_name(product)).glob(f"[0-9]*{SUFFIX}"))


def _read(path: Path) -> Step | None:
    """What stands in a step; ``None`` if it cannot be read, or a change by somebody else has just dropped it."""
    try:
        with path.open("rb") as file:
            return Step(**json.loads(file.readline()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s is no step that could be undone (%s), and was left out.", path, error)
        return None


def _digest(content: bytes | None) -> str:
    return "" if content is None else hashlib.sha256(content).hexdigest()


def _was_taken(step: Step, now: str) -> bool:
    """Whether a change was made that was recorded before; a bank that somebody copied there is neither."""
    return step.after == now or step.before != now
