# SPDX-License-Identifier: Apache-2.0

"""Results of a folder of photos: a map over each, and a table whose rows are on the disk as soon as they are known."""

import csv
import errno
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from anomalib_resad.deploy.prediction import Prediction
from anomalib_resad.enrollment.files import HEADER, MAPS, TABLE, remove_stale, write_whole

MARK = "resad"  # the entry of a map that holds its mark
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would take a text for
# Of files whose names cannot be written; others than these end a run: a full disk, a folder that is read only.
UNUSABLE_NAMES = {errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}


def map_of(folder: Path, name: str) -> Path:
    """Where the map of a photo is written."""
    return folder / MAPS / f"{name}.png"


def finished(folder: Path, names: Iterable[str], mark_of: Callable[[str], str]) -> dict[str, list[str]]:
    """Rows of an earlier run that still hold: without an error, and with a map that has the mark.

    Args:
        folder (Path): Folder of the results.
        names (Iterable[str]): The photos.
        mark_of (Callable[[str], str]): A photo's mark now, which tells its content, its bank and its model.

    Returns:
        dict[str, list[str]]: The rows, by the names of the photos.
    """
    path = folder / TABLE
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = {row[0]: row for row in csv.reader(file) if len(row) == len(HEADER.split(",")) and not row[-1]}
    known = {name: rows[_shown(name)] for name in names if _shown(name) in rows}
    return {name: row for name, row in known.items() if _mark_in(map_of(folder, name)) == mark_of(name)}


class Results:
    """Writes the table row by row, and the maps whole.

    Args:
        folder (Path): Folder of the results; made if it is not there.
        kept (Mapping[str, Sequence[str]]): Rows of an earlier run that stay; see :func:`finished`.

    Attributes:
        count (int): Rows that were written.
        failed (int): Photos that were not inspected.
        problems (list[str]): What to tell of photos that were not inspected, or have no map.

    Raises:
        ValueError: If the folder cannot be written; the table of an earlier run stays then.
    """

    def __init__(self, folder: Path, kept: Mapping[str, Sequence[str]] | None = None) -> None:
        self.folder = folder
        self.kept = kept or {}
        self.count, self.failed = len(self.kept), 0
        self.problems: list[str] = []
        self._tidied: set[Path] = set()
        path = folder / TABLE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            remove_stale(folder)
            begin = f"{HEADER}\n".encode("utf-8-sig")  # the mark tells spreadsheets that it is UTF-8
            write_whole(path, begin + b"".join(map(_line, self.kept.values())))
            self._file = path.open("ab", buffering=0)
        except OSError as error:
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
        label = "" if found.label is None else ("anomalous" if found.label else "good")
        self._write(name, f"{found.score:.6f}", label, f"{found.raw_score:.6f}", problem)

    def fail(self, name: str, error: str) -> None:
        """Write the row of a photo that could not be inspected; a map of an earlier run goes."""
        try:
            map_of(self.folder, name).unlink(missing_ok=True)
        except OSError as problem:
            if problem.errno not in UNUSABLE_NAMES:
                raise
        self.failed += 1
        self.problems.append(f"not inspected: {error}")
        self._write(name, "", "", "", error)

    def _write(self, name: str, score: str, label: str, raw_score: str, error: str) -> None:
        """Write a row whole or not at all; every field is quoted, whatever the spreadsheet separates them by."""
        content = _line([_shown(name), score, label, raw_score, _shown(error)])
        start = os.fstat(self._file.fileno()).st_size
        try:
            while content:  # a disk that is nearly full takes a part of it first
                content = content[self._file.write(content) :]
        except OSError:
            self._file.truncate(start)
            raise
        self.count += 1


def _shown(text: str) -> str:
    """A text as it stands in the table: no formula, and with the bytes of names that are no text."""
    shown = text.encode(errors="backslashreplace").decode()
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
