# SPDX-License-Identifier: Apache-2.0

"""Photos that were uploaded and pictures that were made of them: on the disk for a while, and never more than fits."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from tempfile import NamedTemporaryFile
from uuid import uuid4

from filelock import FileLock, Timeout
from PIL import Image

KEPT_SECONDS = 1800  # a photo that was dropped is inspected, or enrolled, within this time
MOST_KEPT = 40  # files: two enrollments of many photos, or the photos and maps of twenty visitors


@contextmanager
def own_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder of this process; those of processes that were killed are removed first.

    A lock beside a folder tells whether its process lives. It is there before the folder, and longer.
    """
    for left in parent.glob(f"resad-{'[0-9a-f]' * 32}"):
        if _lock_of(left).exists():
            with suppress(OSError, Timeout), FileLock(_lock_of(left), timeout=0):  # also those of other users stay
                _remove(left)
    folder = parent / f"resad-{uuid4().hex}"
    with FileLock(_lock_of(folder)):
        try:
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            _remove(folder)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _remove(folder: Path) -> None:
    """Remove a folder, then its lock, which is held."""
    rmtree(folder, ignore_errors=True)
    if not folder.exists():
        _lock_of(folder).unlink(missing_ok=True)


class Uploads:
    """A folder of temporary files.

    Args:
        folder (Path): The folder.
        most_bytes (int): Most bytes in it; the oldest files go first.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder = folder.resolve()
        self.most_bytes = most_bytes

    def holds(self, path: str | Path) -> bool:
        """Whether a file lies in the folder."""
        return self.folder in Path(path).resolve().parents

    def keep(self, picture: Image.Image) -> str:
        """Write a picture for the page, as PNG, and say where."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=self.folder, prefix="map-", suffix=".png", delete=False) as file:
            picture.save(file, "PNG")
        return file.name

    def forget(self, paths: Iterable[str | None]) -> None:
        """Remove files that are no longer needed; those of others, outside of the folder, stay."""
        for path in paths:
            if path is not None and self.holds(path):
                Path(path).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove what is old, or too much, and empty folders."""
        found = []
        for path in self.folder.rglob("*"):
            with suppress(FileNotFoundError):  # another thread removed it
                found.append((path.stat(), path))
        count, total, oldest = 0, 0, time.time() - KEPT_SECONDS
        for stat, path in sorted(found, key=lambda each: -each[0].st_mtime):
            with suppress(OSError):
                if path.is_dir():
                    if stat.st_mtime < oldest:  # a younger one may be about to get its file
                        path.rmdir()  # unless it is not empty
                    continue
                count, total = count + 1, total + stat.st_size
                if stat.st_mtime < oldest or count > MOST_KEPT or total > self.most_bytes:
                    path.unlink()
