# SPDX-License-Identifier: Apache-2.0

"""Rows of JSON, one a line, each of them on the disk before the next photo is looked at, and none of them twice."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from anomalib_resad.enrollment.files import LINES, TABLE

_LOCK = ".resad-watch.lock"


class Journal:
    """Appends rows to a file. What a killed writer left of a row is cut off.

    Args:
        folder (Path): Folder of the results; made if it is not there.

    Attributes:
        path (Path): The file.
        recorded (set[tuple[str, str]]): Name and SHA-256 of each photo in it.

    Raises:
        ValueError: If the folder cannot be written, another process writes there, or it holds something else.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LINES
        if (folder / TABLE).exists():
            msg = f"{folder / TABLE} is of `resad predict`. Choose another folder for the results of `resad watch`."
            raise ValueError(msg)
        self._lock = FileLock(folder / _LOCK)  # the system frees it when the process ends, however it does
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            whole, self.recorded = _checked(self.path)
            self._file = self.path.open("ab", buffering=0)
            self._file.truncate(whole)
        except Timeout as error:
            msg = f"Another process writes to {self.path}. End it first, or choose another folder for the results."
            raise ValueError(msg) from error
        except OSError as error:
            msg = f"{self.path} cannot be written ({error}). Choose another folder for the results."
            raise ValueError(msg) from error

    def __enter__(self) -> "Journal":  # noqa: PYI034  # Self needs Python 3.11
        """Nothing more to do."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; its rows are there already."""
        self._file.close()
        self._lock.release()

    def add(self, row: dict[str, Any]) -> None:
        """Write a row, whole or not at all, also when the device loses its power afterwards.

        Args:
            row (dict[str, Any]): The row, with at least ``photo`` and ``sha256``.

        Raises:
            OSError: If it cannot be written; the rows before stay.
        """
        content = json.dumps(row, allow_nan=False).encode() + b"\n"
        start = os.fstat(self._file.fileno()).st_size
        try:
            while content:  # a disk that is nearly full takes a part of it first
                content = content[self._file.write(content) :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(start)
            raise
        self.recorded.add((row["photo"], row["sha256"]))


def rows_from(path: Path, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Whole rows behind an offset in bytes, and where the next one begins; while the file is being written, too."""
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield json.loads(line), offset


def _checked(path: Path) -> tuple[int, set[tuple[str, str]]]:
    """Bytes of the whole rows of a file, and which photos they are of.

    Raises:
        ValueError: If a whole line is no row.
    """
    size, recorded = 0, set()
    if path.exists():
        try:
            for row, after in rows_from(path, 0):
                recorded.add((row["photo"], row["sha256"]))
                size = after
        except (ValueError, TypeError, KeyError) as error:
            msg = (
                f"{path}: what follows after {size} bytes is no row of `resad watch` ({error!r}). Nothing was changed. "
                "Repair the file, or choose another folder for the results."
            )
            raise ValueError(msg) from error
    return size, recorded
