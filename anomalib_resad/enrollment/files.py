# SPDX-License-Identifier: Apache-2.0

"""Files and folders that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from uuid import uuid4

PART = ".part"  # ends the name of a file that is being written


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, also when the device loses its power."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}{PART}")  # a name that no two writers share
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its name at the end, unless something failed.

    Raises:
        FileExistsError: If ``path`` exists.
    """
    if path.exists():
        msg = f"{path} exists; nothing was changed. Choose another output folder, or remove this one."
        raise FileExistsError(msg)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(path)
    finally:
        rmtree(temporary, ignore_errors=True)
