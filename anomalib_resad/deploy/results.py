# SPDX-License-Identifier: Apache-2.0

"""Results of a folder of photos: a map over each, and a table whose rows are on the disk as soon as they are known.

The same rows stand in a file of JSON lines, with the regions that were found.
"""

import csv
import errno
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from filelock import FileLock, Timeout
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from anomalib_resad.deploy.prediction import Prediction
from anomalib_resad.enrollment.files import HEADER, LINES, MAPS, TABLE, remove_stale, write_whole

Row: TypeAlias = tuple[Sequence[str], str]  # of one photo: in the table, and as JSON
LOCK = ".resad-predict.lock"
MARK = "resad"  # the entry of a map that holds its mark
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would take a text for
# Of files whose names cannot be written; others than these end a run: a full disk, a folder that is read only.
UNUSABLE_NAMES = {errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}


def map_of(folder: Path, name: str) -> Path:
    """Where the map of a photo is written."""
    return folder / MAPS / f"{name}.png"


def finished(folder: Path, names: Iterable[str], mark_of: Callable[[str], str]) -> dict[str, Row]:
    """Rows of an earlier run that still hold: without an error, and with a map that has the mark.

    Args:
        folder (Path): Folder of the results.
        names (Iterable[str]): The photos.
        mark_of (Callable[[str], str]): A photo's mark now, which tells its content, its bank and its model.

    Returns:
        dict[str, Row]: The rows, by the names of the photos.
    """
    path, objects = folder / TABLE, _objects(folder / LINES)
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = {row[0]: row for row in csv.reader(file) if len(row) == len(HEADER.split(",")) and not row[-1]}
    known = {
        name: (rows[_shown(name)], objects[_text(name)])
        for name in names
        if _shown(name) in rows and _text(name) in objects
    }
    return {name: row for name, row in known.items() if _mark_in(map_of(folder, name)) == mark_of(name)}


class Results:
    """Writes the table row by row, and the maps whole.

    Args:
        folder (Path): Folder of the results; made if it is not there.
        kept (Mapping[str, Row]): Rows of an earlier run that stay; see :func:`finished`.

    Attributes:
        count (int): Rows that were written.
        failed (int): Photos that were not inspected.
        problems (list[str]): What to tell of photos that were not inspected, or have no map.

    Raises:
        ValueError: If the folder cannot be written, or holds results of ``resad watch``; what is there stays then.
    """

    def __init__(self, folder: Path, kept: Mapping[str, Row] | None = None) -> None:
        self.folder = folder
        self.kept = kept or {}
        self.count, self.failed = len(self.kept), 0
        self.problems: list[str] = []
        self._tidied: set[Path] = set()
        path, lines = folder / TABLE, folder / LINES
        if lines.exists() and not path.exists():
            msg = f"{lines} is of `resad watch`, since there is no {TABLE}. Choose another folder for the results."
            raise ValueError(msg)
        self._lock = FileLock(folder / LOCK)  # the system frees it when the process ends, however it does
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            remove_stale(folder)
            begin = f"{HEADER}\n".encode("utf-8-sig")  # the mark tells spreadsheets that it is UTF-8
            write_whole(path, begin + b"".join(_line(row) for row, _ in self.kept.values()))
            write_whole(lines, "".join(f"{line}\n" for _, line in self.kept.values()).encode())
            self._file, self._lines = path.open("ab", buffering=0), lines.open("ab", buffering=0)
        except Timeout as error:
            msg = f"Another process writes to {path}. Wait for its end, or choose another folder for the results."
            raise ValueError(msg) from error
        except OSError as error:
            self._lock.release()
            msg = f"{path} cannot be written ({error}). Choose another folder for the results."
            raise ValueError(msg) from error

    def __enter__(self) -> "Results":  # noqa: PYI034  # Self needs Python 3.11
        """Nothing more to do."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the table; its rows are there already."""
        self._file.close()
        self._lines.close()
        self._lock.release()

    def add(self, name: str, found: Prediction, picture: Image.Image, mark: str = "") -> None:
        """Write the map of a photo, then its row; if only its name keeps the map from being written, the row says so.

        Args:
            name (str): The photo's path below its folder.
            found (Prediction): What was found.
            picture (Image.Image): The map over the photo.
            mark (str): What is kept in the map, for :func:`finished`.

        Raises:
            OSError: If one cannot be written; the rows before stay.
        """
        path, content, problem = map_of(self.folder, name), io.BytesIO(), ""
        text = PngInfo()
        text.add_text(MARK, mark)
        picture.save(content, "PNG", pnginfo=text)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.parent not in self._tidied:
                remove_stale(path.parent)
                self._tidied.add(path.parent)
            write_whole(path, content.getvalue())
        except OSError as error:
            if error.errno not in UNUSABLE_NAMES:
                raise
            problem = f"its map cannot be written ({error.strerror})"
            self.problems.append(f"{name}: {problem}")
        about = {
            "score": round(found.score, 6),
            "label": found.status,
            "raw_score": round(found.raw_score, 6),
            **found.where(),
        }
        self._write([name, f"{found.score:.6f}", found.status or "", f"{found.raw_score:.6f}", problem], about)

    def fail(self, name: str, error: str) -> None:
        """Write the row of a photo that could not be inspected; a map of an earlier run goes."""
        try:
            map_of(self.folder, name).unlink(missing_ok=True)
        except OSError as problem:
            if problem.errno not in UNUSABLE_NAMES:
                raise
        self.failed += 1
        self.problems.append(f"not inspected: {error}")
        self._write([name, "", "", "", error], {})

    def _write(self, row: Sequence[str], about: Mapping[str, Any]) -> None:
        """Write a row, first as JSON: what stands in the table stands there too."""
        name, *numbers, error = row
        content = {"photo": _text(name), **about} | ({"error": _text(error)} if error else {})
        _append(self._lines, (json.dumps(content) + "\n").encode())
        _append(self._file, _line([_shown(name), *numbers, _shown(error)]))
        self.count += 1


def _append(file: io.FileIO, content: bytes) -> None:
    """Append to a file whole or not at all."""
    start = os.fstat(file.fileno()).st_size
    try:
        while content:  # a disk that is nearly full takes a part of it first
            content = content[file.write(content) :]
    except OSError:
        file.truncate(start)
        raise


def _objects(path: Path) -> dict[str, str]:
    """Lines of JSON by their photos; what is no whole line, or none of this version, is left out."""
    found = {}
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError, TypeError, LookupError):
            found[str(json.loads(line)["photo"])] = line
    return found


def _text(text: str) -> str:
    """A text with the bytes of names that are no text."""
    return text.encode(errors="backslashreplace").decode()


def _shown(text: str) -> str:
    """A text as it stands in the table: no formula."""
    shown = _text(text)
    return f"'{shown}" if shown.startswith(FORMULA) else shown


def _line(row: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(row)
    return text.getvalue().encode()


def _mark_in(path: Path) -> str | None:
    """The mark in a map; ``None`` if there is none, or no whole map."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return picture.info.get(MARK)
    except (OSError, ValueError, SyntaxError):
        return None
