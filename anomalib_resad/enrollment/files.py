# SPDX-License-Identifier: Apache-2.0

"""Files and folders: written whole or not at all, named by their content, told from those of this package."""

import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from uuid import uuid4

PART = ".part"  # ends the name of a file or a folder that is being written
STALE_SECONDS = 24 * 3600  # what nobody wrote to for so long is of a writer that was killed


TABLE, LINES, MAPS = "results.csv", "results.jsonl", "maps"  # what `resad predict` writes into a folder
HEADER = "photo,score,label,raw_score,error"  # of the table


def content_hash(path: Path | str) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def files_below(folder: Path) -> list[Path]:
    """All files of a folder and of the folders in it, sorted; linked folders too, each folder once."""
    root, seen, found = Path(os.path.realpath(folder)), set[Path](), list[Path]()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = Path(os.path.realpath(parent))
        if real in seen or real in root.parents:  # a link that goes in circles
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        found += [Path(parent, name) for name in names]
    return sorted(found)


def earlier_maps(folder: Path) -> set[Path]:
    """Folders of maps that `resad predict` wrote in or around a folder: pictures, but none of the user's photos."""

    def is_ours(table: Path) -> bool:
        with suppress(OSError), table.open("rb") as file:
            return file.read(200).decode("utf-8-sig", "replace").startswith(HEADER)
        return False

    tables = [path for path in files_below(folder) if path.name == TABLE]
    tables += [parent / TABLE for parent in folder.parents]
    return {table.parent / MAPS for table in tables if is_ours(table)}


def temporary_name(path: Path) -> Path:
    """A hidden name beside ``path`` that no two writers share, and that is short enough for every file system."""
    unique = f".{uuid4().hex}{PART}"
    kept = path.name.encode(errors="ignore")[: 250 - len(unique)].decode(errors="ignore")
    return path.with_name(f".{kept}{unique}")


def remove_stale(folder: Path) -> None:
    """Remove what writers left in a folder that were killed, by its age: never what is being written."""
    for path in folder.glob(f".*{PART}"):
        with suppress(OSError):
            is_ours = re.search(rf"\.[0-9a-f]{{32}}{PART}$", path.name) is not None
            if is_ours and time.time() - path.stat().st_mtime > STALE_SECONDS:
                rmtree(path) if path.is_dir() else path.unlink()


def write_whole(path: Path, content: bytes, synced: bool = True) -> None:
    """Write a file whole or not at all; ``synced`` also when the device loses its power, which takes longer."""
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if synced:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its name at the end, unless something failed.

    Raises:
        OSError: If it cannot be written, or ``path`` exists.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path.parent)
    temporary = temporary_name(path)
    try:
        temporary.mkdir()
        yield temporary
        temporary.rename(path)
    finally:
        rmtree(temporary, ignore_errors=True)
